"""The reference of experiment files, made from their descriptions: terminal text, Markdown page and JSON schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lic_dist.config.experiment import Experiment, require_key
from lic_dist.config.faults import keys, section_of, takes

PAGE = """# Configuration

One YAML file holds one experiment, or several with `---` between them. `lic-dist init DIR` writes one to begin with,
`lic-dist config show FILE` prints what a file comes to, `--all` with every key there is, and `lic-dist config explain
KEY` what stands below of one key. `--set a.b=c` overrides a key for one command. A section is needed only by the
commands that use it. Relative paths begin in the folder that the command is typed in; `~` and variables such as
`$SCRATCH` are expanded. An unknown key, and a key that stands twice, is an error. `null` is what YAML calls nothing.

In names, paths and what refers to them, `{section.key}` stands for the value of that key, its default too:

```yaml
model: {checkpoint: base-small}
finetune: {recipe: decoder, lr: 3.0e-5, out: "runs/{model.name}-{finetune.lr}"}  # runs/base-small-3e-05
evaluate: {images: kodak/, checkpoints: ["{model.checkpoint}", "{finetune.out}"]}
```

`{name}` is the experiment's name, `{model.name}` the checkpoint's file without its ending, or the folder that holds
`checkpoint.pth.tar`; lists are joined by `+`. In YAML such a text stands in quotes where it begins with a brace or lies
within braces or brackets. A placeholder that is no key is an error. So is a `sweep` of which two experiments would
write different content into one place; the error names the placeholder that is missing.

Editors with a YAML language server complete and check files whose first line names the schema
(`lic-dist config schema > schema.json`):

```yaml
# yaml-language-server: $schema=schema.json
```

This page is written by `lic-dist config explain --markdown` from the descriptions in `lic_dist/config/`.
"""


def default_of(field: FieldInfo) -> str:
    """Return a field's default as YAML writes it, or 'required'."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "{}"
    return yaml_text(value)


def yaml_text(value: Any) -> str:
    """Return a value as one line of YAML."""
    plain = json.loads(json.dumps(value, default=str))
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def explain(key: str = "") -> Iterator[str]:
    """Yield lines that explain one key, a section's keys, all keys of a name (`lr`), or, by default, the sections.

    Raises:
        UsageError: there is no such key; the nearest is named.
    """
    known = {name: (section, last) for name, section, last in keys(Experiment)}
    named = [key] if key in known else [one for one in known if key and one.rpartition(".")[2] == key]
    if not key:
        yield from (_key_line(name, known) for name in known if "." not in name)
        yield "{section.key} in a name or path stands for that key's value, {model.name} for the checkpoint's name"
        yield "`lic-dist config explain KEY` says more: of a section, or of a key such as images.held_out"
        return
    if not named:
        require_key(key, "config explain")
    for name in named or [".".join(key.split(".")[:2])]:
        section, last = known[name]
        field = section.model_fields[last]
        inner = section_of(field.annotation)
        yield name
        yield f"  {field.description}"
        if inner is not None and "." not in name:
            yield f"  {_first_line(inner)}"
            yield from (f"  {_key_line(one, known)}" for one in known if one.startswith(f"{name}."))
        else:
            yield f"  takes: {takes(section, last)}"
            yield f"  default: {default_of(field)}"
            if inner is not None:
                for part, one in inner.model_fields.items():
                    yield f"  - {part}: {one.description} Takes {takes(inner, part)}; {default_of(one)}."


def _key_line(name: str, known: dict[str, tuple[type[BaseModel], str]]) -> str:
    section, last = known[name]
    field = section.model_fields[last]
    holds = section_of(field.annotation) is not None and "." not in name
    return f"{name}: {field.description}" if holds else f"{name} [{default_of(field)}]: {field.description}"


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().split("\n")[0]


def markdown() -> str:
    """Return the page docs/configuration.md."""
    parts = [PAGE]
    top = {name: field for name, field in Experiment.model_fields.items() if section_of(field.annotation) is None}
    parts.append(_table("The file", "What stands outside of the sections.", Experiment, top))
    for name, field in Experiment.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            parts.append(_table(f"`{name}`", _first_line(section), section, section.model_fields))
            for key, one in section.model_fields.items():
                if (inner := section_of(one.annotation)) is not None:
                    parts.append(_table(f"`{name}.{key}`: its elements", _first_line(inner), inner, inner.model_fields))
    return "\n".join(parts)


def _table(title: str, text: str, section: type[BaseModel], fields: dict[str, FieldInfo]) -> str:
    rows = [
        f"| `{name}` | {takes(section, name)} | `{default_of(field)}` | {field.description} |"
        for name, field in fields.items()
    ]
    return "\n".join(
        [f"## {title}\n", f"{text}\n", "| key | takes | default | |", "| --- | --- | --- | --- |", *rows, ""]
    )


def schema() -> dict[str, Any]:
    """Return the JSON schema of one document of a file, with which editors complete and check it."""
    found = Experiment.model_json_schema()
    names = {"propertyNames": {"enum": [name for name, _, _ in keys(Experiment)]}}
    for name in ("sweep", "fast"):
        found["properties"][name] |= names
    found["properties"]["sweep"]["additionalProperties"]["minItems"] = 1
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "lic-dist experiment"}


def commented(experiment: Experiment) -> str:
    """Return the file with every key, its value and description; absent sections stand in it as comments."""
    lines: list[str] = []
    for name, field in Experiment.model_fields.items():
        value, section = getattr(experiment, name), section_of(field.annotation)
        lines += ["", f"# {field.description}"]
        if section is None:
            lines.append(f"{name}: {yaml_text(value)}")
            continue
        mark = "# " if value is None else ""
        lines.append(f"{mark}{name}:")
        for key, one in section.model_fields.items():
            plain = default_of(one) if value is None else yaml_text(value.model_dump(mode="json")[key])
            lines.append(f"{mark}  {key}: {plain}  # {one.description}")
    return "\n".join(lines[1:])
