"""Templates: `{section.key}` in a name, path or reference stands for the value of that key in the same experiment.

The value may be a default, or what `auto` stands for, and may have placeholders itself. `{name}` is the experiment's
name. `{model.name}` is the checkpoint's: its file without the ending, or the folder that holds `checkpoint.pth.tar`.
`${HOME}` is a variable. Braces around anything but words with dots between them stay as they are.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from lic_dist.config.faults import keys, nearest
from lic_dist.config.yaml_file import PLACEHOLDER
from lic_dist.errors import UsageError
from lic_dist.models.names import label

MODEL_NAME = "model.name"
CURVE_LABEL = ("report", "label")  # its placeholders are fields of points: see reporting/curves.py


def fill(document: dict[str, Any], experiment: BaseModel) -> dict[str, Any]:
    """Return the document with its placeholders replaced; `experiment` is the same document, validated.

    `sweep` and `fast`, whose values belong to other keys, and `report.label` stay as they are.

    Raises:
        UsageError: an unknown key, a section that is absent, a value that has no text, or a circular reference.
    """
    filled = dict(document)
    for section, part in document.items():
        if isinstance(part, dict) and section not in ("sweep", "fast"):
            filled[section] = {
                key: value if (section, key) == CURVE_LABEL else _filled(value, experiment, f"{section}.{key}")
                for key, value in part.items()
            }
        elif isinstance(part, str):
            filled[section] = _filled(part, experiment, section)
    return filled


def text_of(value: Any) -> str | None:
    """Return the text of a value: a float as `{:g}` where that is the same number; None for null and mappings."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    if isinstance(value, tuple):
        texts = [text_of(item) for item in value]
        return None if None in texts else "+".join(map(str, texts))
    return None if value is None or isinstance(value, dict | BaseModel) else str(value)


def _filled(value: Any, experiment: BaseModel, key: str) -> Any:
    """Return the document's value at `key` with the placeholders in all its texts replaced."""
    if isinstance(value, str):
        return _filled_text(value, experiment, (key,))
    if isinstance(value, list):
        return [_filled(item, experiment, key) for item in value]
    if isinstance(value, dict):
        filled = {_filled(name, experiment, key): _filled(item, experiment, key) for name, item in value.items()}
        if len(filled) < len(value):
            raise UsageError(f"{key}: two names are the same with their placeholders filled: {', '.join(filled)}")
        return filled
    return value


def _filled_text(template: str, experiment: BaseModel, pending: tuple[str, ...]) -> str:
    """Return a text with its placeholders replaced; `pending` are the keys being filled, the outermost first."""
    return PLACEHOLDER.sub(lambda found: _text_of_key(found[1], experiment, pending), template)


def _text_of_key(key: str, experiment: BaseModel, pending: tuple[str, ...]) -> str:
    """Return the text that a key stands for. Raises UsageError as `fill` does."""
    where, root = f"{pending[0]}: {{{key}}}", type(experiment)
    if key not in {"name", MODEL_NAME, *(known for known, _, _ in keys(root) if "." in known)}:
        near = " or ".join(f"{{{close}}}" for close in nearest(root, key, [MODEL_NAME]) if close != key)
        raise UsageError(
            f"{pending[0]}: unknown placeholder {{{key}}}",
            hint=f"did you mean {near}?" if near else "`lic-dist config explain` lists all keys",
        )
    section, _, name = key.partition(".")
    part = getattr(experiment, section)
    if part is None:
        raise UsageError(f"{where}: the experiment has no section '{section}'", hint=f"add '{section}:' to it")
    if key in pending:
        circle = " -> ".join(f"{{{link}}}" for link in (*pending[pending.index(key) :], key))
        raise UsageError(f"{pending[0]}: {circle} is a circle")
    if key == MODEL_NAME:
        return label(_text_of_key("model.checkpoint", experiment, (*pending, key)))
    value = getattr(part, name) if name else part
    if not (text := text_of(value)):
        problem = "no text, number or list of these" if value else "null" if value is None else "empty"
        raise UsageError(f"{where}: {key} is {problem}", hint="name another key")
    return _filled_text(text, experiment, (*pending, key))
