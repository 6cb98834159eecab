"""Templates: `{section.key}` in a name, path or reference stands for the value of that key in the same experiment.

Defaults count, and what `auto` stands for. `{name}` is the experiment's, `{model.name}` the checkpoint's: its file
without the ending, or the folder that holds `checkpoint.pth.tar`. A value may have placeholders itself. `${HOME}` is a
variable, and braces around anything but words with dots between them stay as they are.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from lic_dist.config.faults import keys, nearest
from lic_dist.config.yaml_file import PLACEHOLDER
from lic_dist.errors import UsageError
from lic_dist.models.names import label

MODEL_NAME = "model.name"
CURVES = ("report", "label")


def fill(document: dict[str, Any], experiment: BaseModel) -> dict[str, Any]:
    """The document with its placeholders replaced; `experiment` is the document as it is read, templates and all.

    `sweep` and `fast` stay, whose values are of other keys, and the template of a report's curves.

    Raises:
        UsageError: an unknown key, a section that is absent, a value that is no text, a circle.
    """
    filled = dict(document)
    for section, part in document.items():
        if isinstance(part, dict) and section not in ("sweep", "fast"):
            filled[section] = {
                key: value if (section, key) == CURVES else _filled(value, experiment, f"{section}.{key}")
                for key, value in part.items()
            }
        elif isinstance(part, str):
            filled[section] = _filled(part, experiment, section)
    return filled


def text_of(value: Any) -> str | None:
    """A value as a placeholder writes it: `{:g}` where that is the same number; None for null and mappings."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    if isinstance(value, tuple):
        texts = [text_of(one) for one in value]
        return None if None in texts else "+".join(map(str, texts))
    return None if value is None or isinstance(value, dict | BaseModel) else str(value)


def _filled(value: Any, experiment: BaseModel, key: str) -> Any:
    """A value of the document that stands at `key`, its texts filled."""
    if isinstance(value, str):
        return _text(value, experiment, (key,))
    if isinstance(value, list):
        return [_filled(one, experiment, key) for one in value]
    if isinstance(value, dict):
        whole = {_filled(name, experiment, key): _filled(one, experiment, key) for name, one in value.items()}
        if len(whole) < len(value):
            raise UsageError(f"{key}: two names are the same with their placeholders filled: {', '.join(whole)}")
        return whole
    return value


def _text(template: str, experiment: BaseModel, around: tuple[str, ...]) -> str:
    """A text with its placeholders replaced; `around` are the keys that wait for it, where it stands first."""
    return PLACEHOLDER.sub(lambda found: _value(found[1], experiment, around), template)


def _value(key: str, experiment: BaseModel, around: tuple[str, ...]) -> str:
    """The text that a key stands for."""
    where, whole = f"{around[0]}: {{{key}}}", type(experiment)
    if key not in {"name", MODEL_NAME, *(one for one, _, _ in keys(whole) if "." in one)}:
        near = " or ".join(f"{{{one}}}" for one in nearest(whole, key, [MODEL_NAME]) if one != key)
        raise UsageError(
            f"{around[0]}: unknown placeholder {{{key}}}",
            hint=f"did you mean {near}?" if near else "`lic-dist config explain` lists all keys",
        )
    section, _, name = key.partition(".")
    part = getattr(experiment, section)
    if part is None:
        raise UsageError(f"{where}: the experiment has no section '{section}'", hint=f"add '{section}:' to it")
    if key in around:
        circle = " -> ".join(f"{{{one}}}" for one in (*around[around.index(key) :], key))
        raise UsageError(f"{around[0]}: {circle} is a circle")
    if key == MODEL_NAME:
        return label(_value("model.checkpoint", experiment, (*around, key)))
    value = getattr(part, name) if name else part
    if not (text := text_of(value)):
        what = "no text, number or list of these" if value else "null" if value is None else "empty"
        raise UsageError(f"{where}: {key} is {what}", hint="name another key")
    return _text(text, experiment, (*around, key))
