"""Describe in words what is wrong with an experiment file: which key, what it takes, what was given.

pydantic reports a fault for every branch of a union. What a key takes is therefore worded here from its JSON schema.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lic_dist.config.yaml_file import NUMBER

Key = tuple[str | int, ...]  # names, and indices in lists
LIMITS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "up to",
    "exclusiveMaximum": "below",
    "multipleOf": "in multiples of",
}


def fault_of(error: ValidationError, experiment: type[BaseModel], document: Any) -> tuple[str, str]:
    """Return one fault in one line, unknown keys first, and a hint, which may be empty."""
    faults = error.errors()
    first = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")
    section, key, inner = locate(experiment, first["loc"])
    name, last = ".".join(map(str, key)), str(key[-1])
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return f"unknown key '{name}'", _unknown_key_hint(experiment, section, key)
    if first["type"] == "missing":
        return f"{name} is missing", section.model_fields[last].description or ""
    given = _value_at(document, key)
    for fault in faults:
        if fault["type"] == "value_error" and locate(experiment, fault["loc"])[1] == key:
            return f"{name}: {fault['ctx']['error']}", f"got {given!r}"[:200]  # raised by a validator of a section
    if first["type"] == "model_type" and inner is not None:
        return f"{name} must be a section with keys of its own, not {_quoted(given)}", _section_hint(inner, name, given)
    expected = takes(section, last)
    return f"{name} must be {expected}, not {_quoted(given)}", _form_hint(expected, given)


def locate(experiment: type[BaseModel], location: Key) -> tuple[type[BaseModel], Key, type[BaseModel] | None]:
    """Return the section of pydantic's location, the key without names of union branches, and the section it holds."""
    section, key = experiment, []
    inner: type[BaseModel] | None = experiment
    for part in location:
        if inner is None:
            break
        key.append(part)
        if isinstance(part, str):
            section = inner
            field = section.model_fields.get(part)
            inner = section_of(field.annotation) if field else None
    return section, tuple(key), inner


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in a field's annotation; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := section_of(one)) is not None), None)


def takes(section: type[BaseModel], name: str) -> str:
    """Return what a key takes, in words: 'a whole number of at least 1 or auto'."""
    return _accepted(section.model_json_schema()["properties"][name])


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """Yield each full key, its section and its name there, without the keys of a list's elements."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", section, name
        if not prefix and (inner := section_of(field.annotation)):
            yield from keys(inner, f"{name}.")


def nearest(experiment: type[BaseModel], key: str, extra: Sequence[str] = ()) -> list[str]:
    """Return the keys that a wrong one may mean: in its own section, elsewhere under that name, or the most alike."""
    known = [*(name for name, _, _ in keys(experiment)), *extra]
    section, _, last = key.rpartition(".")
    own = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == section}
    if same := [one for one in known if one.lower() == key.lower()]:
        return same
    near = difflib.get_close_matches(last, own, n=1, cutoff=0.7)
    elsewhere = [one for one in known if one.rpartition(".")[2] == last]
    return [own[one] for one in near] or elsewhere or [own[one] for one in difflib.get_close_matches(last, own, n=1)]


def _unknown_key_hint(experiment: type[BaseModel], section: type[BaseModel], key: Key) -> str:
    name = ".".join(map(str, key))
    if "." in str(key[-1]):
        return "in a file, sections hold their keys: images: {path: photos/}"
    near = nearest(experiment, name)
    if any(isinstance(part, int) for part in key):  # the key of a list's element
        near = difflib.get_close_matches(str(key[-1]), section.model_fields, n=1, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(one) for one in near)}?"
    return f"{'.'.join(map(str, key[:-1])) or 'the file'} has the keys {', '.join(section.model_fields)}"


def _value_at(document: Any, key: Key) -> Any:
    for part in key:
        document = document[part]
    return document


def _quoted(value: Any) -> str:
    """Return a value as messages show it, in 80 characters at most."""
    text = "nothing" if value is None else f"'{value}'" if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _form_hint(expected: str, value: Any) -> str:
    """Return what to do about a value that is only written in the wrong form; empty where it is not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and expected.startswith(("a text", "a path", "a name")):
        return f'a text that looks like a number stands in quotes: "{value}"'
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict) and list(item.values()) == [None]:
            return f'a text that begins with a placeholder stands in quotes: "{{{next(iter(item))}}}"'
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return "a number stands without quotes"
    if isinstance(value, str) and "a list" in expected:
        return f"a list stands in brackets: [{value}]"
    return ""


def _section_hint(section: type[BaseModel], name: str, given: Any) -> str:
    """Return how to write a section for which a plain value was given."""
    first = next((key for key, field in section.model_fields.items() if field.is_required()), None)
    if first is not None and isinstance(given, str):
        return f"{name}: {{{first}: {given}}}"
    return f"its keys: {', '.join(section.model_fields)}"


def _accepted(schema: dict[str, Any]) -> str:
    """Return what a JSON schema accepts, in words."""
    return _joined(_options(schema))


def _joined(options: list[str]) -> str:
    """Join alternatives as in 'a, b or c'."""
    *most, last = dict.fromkeys(options)
    return f"{', '.join(most)} or {last}" if most else last


def _options(schema: dict[str, Any]) -> list[str]:
    """Return the alternatives that a schema accepts, in words."""
    if "anyOf" in schema:
        return [option for one in schema["anyOf"] for option in _options(one)]
    if "enum" in schema or "const" in schema:
        return [str(one) for one in schema.get("enum", [schema.get("const")])]
    kind = schema.get("type")
    if kind in ("integer", "number"):
        limits = " and ".join(f"{word} {schema[key]:.10g}" for key, word in LIMITS.items() if key in schema)
        return [f"a {'whole ' * (kind == 'integer')}number {limits}".rstrip()]
    if kind == "array":
        return [f"a list of {_plural(schema.get('items'))}{' (one at least)' * ('minItems' in schema)}"]
    if kind == "object":
        names = _options(schema["propertyNames"]) if "enum" in schema.get("propertyNames", {}) else ["names"]
        return [f"a mapping from {_joined(names)} to {_plural(schema.get('additionalProperties'))}"]
    if kind == "string" and "examples" in schema:
        return schema["examples"]
    if kind == "string" and "pattern" in schema:
        return ["a name of letters, digits and . _ @ -"]
    if kind == "string":
        return ["a path" if schema.get("format") == "path" else "a text"]
    return [{"boolean": "true or false", "null": "null"}.get(str(kind), "a section")]


def _plural(schema: Any) -> str:
    """Return what a schema accepts in the plural, as in 'paths' or 'whole numbers of at least 1'."""
    if not isinstance(schema, dict) or not schema:
        return "values"
    words = _accepted(schema)
    for noun in ("whole number", "number", "text", "path", "list", "section"):
        if words.startswith(f"a {noun}"):
            return f"{noun}s{words[len(noun) + 2 :]}"
    return words
