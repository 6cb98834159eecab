"""What is wrong with an experiment file, in plain words: which key, what it takes, what was given.

pydantic tells a fault of every branch of a union; what the key takes is said here from its JSON schema instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lic_dist.config.yaml_file import NUMBER

Key = tuple[str | int, ...]
LIMITS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "up to",
    "exclusiveMaximum": "below",
    "multipleOf": "in multiples of",
}


def fault_of(error: ValidationError, experiment: type[BaseModel], document: Any) -> tuple[str, str]:
    """One fault in one line, unknown keys first, and a hint that may be empty."""
    faults = error.errors()
    first = min(faults, key=lambda one: one["type"] != "extra_forbidden")
    section, key, inner = place(experiment, first["loc"])
    name, last = ".".join(map(str, key)), str(key[-1])
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return f"unknown key '{name}'", _meant(experiment, section, key)
    if first["type"] == "missing":
        return f"{name} is missing", section.model_fields[last].description or ""
    given = _given(document, key)
    for one in faults:
        if one["type"] == "value_error" and place(experiment, one["loc"])[1] == key:
            return f"{name}: {one['ctx']['error']}", f"got {given!r}"[:200]  # of a validator of ours
    if first["type"] == "model_type" and inner is not None:
        return f"{name} must be a section with keys of its own, not {_shown(given)}", _as_section(inner, name, given)
    what = takes(section, last)
    return f"{name} must be {what}, not {_shown(given)}", _mend(what, given)


def place(experiment: type[BaseModel], location: Key) -> tuple[type[BaseModel], Key, type[BaseModel] | None]:
    """The section that pydantic's location stands in, the key without the names of branches, the section it holds."""
    section, key = experiment, []
    inside: type[BaseModel] | None = experiment
    for part in location:
        if inside is None:
            break
        key.append(part)
        if isinstance(part, str):
            section = inside
            field = section.model_fields.get(part)
            inside = section_of(field.annotation) if field else None
    return section, tuple(key), inside


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's annotation; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := section_of(one)) is not None), None)


def takes(section: type[BaseModel], name: str) -> str:
    """What a key takes, in words: 'a whole number, 1 or more, or auto'."""
    return _words(section.model_json_schema()["properties"][name])


def keys(section: type[BaseModel], around: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """All keys of the file: the whole key, its section, its name there. Those of a list's elements are not."""
    for name, field in section.model_fields.items():
        yield f"{around}{name}", section, name
        if not around and (inner := section_of(field.annotation)):
            yield from keys(inner, f"{name}.")


def nearest(experiment: type[BaseModel], key: str, besides: Sequence[str] = ()) -> list[str]:
    """The keys that a wrong one may mean: in its own section, elsewhere under that name, else the most alike."""
    known = [*(name for name, _, _ in keys(experiment)), *besides]
    around, _, last = key.rpartition(".")
    own = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == around}
    if same := [one for one in known if one.lower() == key.lower()]:
        return same
    near = difflib.get_close_matches(last, own, n=1, cutoff=0.7)
    elsewhere = [one for one in known if one.rpartition(".")[2] == last]
    return [own[one] for one in near] or elsewhere or [own[one] for one in difflib.get_close_matches(last, own, n=1)]


def _meant(experiment: type[BaseModel], section: type[BaseModel], key: Key) -> str:
    name = ".".join(map(str, key))
    if "." in str(key[-1]):
        return "in a file, sections hold their keys: images: {path: photos/}"
    near = nearest(experiment, name)
    if any(isinstance(part, int) for part in key):  # of a list's element
        near = difflib.get_close_matches(str(key[-1]), section.model_fields, n=1, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(one) for one in near)}?"
    return f"{'.'.join(map(str, key[:-1])) or 'the file'} has the keys {', '.join(section.model_fields)}"


def _given(document: Any, key: Key) -> Any:
    for part in key:
        document = document[part]
    return document


def _shown(value: Any) -> str:
    text = "nothing" if value is None else f"'{value}'" if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _mend(what: str, value: Any) -> str:
    """What to do about a value that is only written in the wrong form."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and what.startswith(("a text", "a path", "a name")):
        return f'a text that looks like a number stands in quotes: "{value}"'
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, dict) and list(one.values()) == [None]:
            return f'a text that begins with a placeholder stands in quotes: "{{{next(iter(one))}}}"'
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return "a number stands without quotes"
    if isinstance(value, str) and "a list" in what:
        return f"a list stands in brackets: [{value}]"
    return ""


def _as_section(section: type[BaseModel], name: str, given: Any) -> str:
    first = next((key for key, field in section.model_fields.items() if field.is_required()), None)
    if first is not None and isinstance(given, str):
        return f"{name}: {{{first}: {given}}}"
    return f"its keys: {', '.join(section.model_fields)}"


def _words(schema: dict[str, Any]) -> str:
    return _either(_options(schema))


def _either(options: list[str]) -> str:
    *most, last = dict.fromkeys(options)
    return f"{', '.join(most)} or {last}" if most else last


def _options(schema: dict[str, Any]) -> list[str]:
    """What a key takes, one or the other, in words."""
    if "anyOf" in schema:
        return [option for one in schema["anyOf"] for option in _options(one)]
    if "enum" in schema or "const" in schema:
        return [str(one) for one in schema.get("enum", [schema.get("const")])]
    kind = schema.get("type")
    if kind in ("integer", "number"):
        limits = " and ".join(f"{word} {schema[key]:.10g}" for key, word in LIMITS.items() if key in schema)
        return [f"a {'whole ' * (kind == 'integer')}number {limits}".rstrip()]
    if kind == "array":
        return [f"a list of {_several(schema.get('items'))}{' (one at least)' * ('minItems' in schema)}"]
    if kind == "object":
        names = _options(schema["propertyNames"]) if "enum" in schema.get("propertyNames", {}) else ["names"]
        return [f"a mapping from {_either(names)} to {_several(schema.get('additionalProperties'))}"]
    if kind == "string" and "pattern" in schema:
        return ["a name of letters, digits and . _ -"]
    if kind == "string":
        return ["a path" if schema.get("format") == "path" else "a text"]
    return [{"boolean": "true or false", "null": "null"}.get(str(kind), "a section")]


def _several(schema: Any) -> str:
    if not isinstance(schema, dict) or not schema:
        return "values"
    words = _words(schema)
    for one in ("whole number", "number", "text", "path", "list", "section"):
        if words.startswith(f"a {one}"):
            return f"{one}s{words[len(one) + 2 :]}"
    return words
