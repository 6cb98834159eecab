"""Read experiment files as plain data: several documents, scalars of YAML 1.2, no key twice, `a.b=c` overrides.

PyYAML reads YAML 1.1, in which `5e-2` is a text, `no` is false, `010` is eight and 2024-01-01 is a date. Here `5e-2` is
a number, also in lists, in `sweep` and after --set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lic_dist.errors import UsageError

NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+(?:\.\w+)*)\}")  # see templates.py; ${HOME} is a variable
SCALARS = (  # YAML 1.2's core schema, and 1_000; the first pattern that fits counts
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?(0|[1-9][\d_]*)|0x[\da-fA-F]+"), list("-+0123456789")),
    ("float", NUMBER, list("-+.0123456789")),
    ("merge", re.compile("<<"), ["<"]),
)


class Loader(yaml.SafeLoader):
    """PyYAML's SafeLoader with the scalars of SCALARS; refuses a key that stands twice in one mapping."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping as PyYAML does, and check its written keys before `<<` merges in others."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, (key.tag, str(key.value))
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                lines = f"line {line}" if seen[name] == line else f"lines {seen[name]} and {line}"
                raise DuplicateKey(f"key '{key.value}' stands twice, in {lines}")
            seen[name] = line
        return node


class DuplicateKey(yaml.YAMLError):
    """A key that stands twice in one mapping."""


for _tag, _pattern, _first in SCALARS:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern.pattern})$"), _first)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the file's documents, without empty ones.

    Raises:
        UsageError: no such file, not YAML, a document that is no mapping, or a key that stands twice.
    """
    try:
        loaded = _load(path.read_bytes())  # bytes, in which PyYAML recognises UTF-16 by its mark
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="give the experiment's YAML file") from None
    except DuplicateKey as error:
        raise UsageError(f"{path}: {error}", hint="leave one of them") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {_problem(error)}", hint=_quotes_hint(error)) from None
    documents = [document for document in loaded if document is not None]
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise UsageError(f"{path} holds no mapping", hint="an experiment file has sections such as 'model:'")
    return documents


def _load(text: str | bytes) -> list[Any]:
    try:
        return list(yaml.load_all(text, Loader))
    except (ValueError, RecursionError) as error:  # from scalars that only look like numbers, or deep nesting
        raise yaml.YAMLError(str(error)) from None


def _problem(error: yaml.YAMLError) -> str:
    """Return PyYAML's message in one line: what is wrong, and where."""
    if isinstance(error, yaml.reader.ReaderError):
        return "it is not text in UTF-8"
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        what = " ".join(filter(None, (error.problem, error.context)))
        tab = ": indent with spaces" if "'\\t'" in what else ""
        return f"{where}{what}{tab}"
    return " ".join(str(error).split())


def _quotes_hint(error: yaml.YAMLError) -> str:
    """Return what to do where a placeholder was read as a mapping; empty where none was."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    placeholder = mark is not None and PLACEHOLDER.search(mark.get_snippet(max_length=200) or "")
    return f'a text with {placeholder[0]} in it stands in quotes: "runs/{placeholder[0]}"' if placeholder else ""


def apply(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=c` overrides to a document in place; return it. Raises UsageError for another form, or not YAML."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {override}: not of the form a.b=c")
        set_key(document, key.strip(), _scalar(value))
    return document


def _scalar(text: str) -> Any:
    try:
        loaded = _load(text)
    except DuplicateKey as error:
        raise UsageError(f"--set: {text!r}: {error}", hint="leave one of them") from None
    except yaml.YAMLError:
        raise UsageError(f"--set: {text!r} is not YAML", hint="quote it for the shell: --set 'a.b=[1, 2]'") from None
    return loaded[0] if loaded else None


def set_key(document: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b` in place; make `a` where it is missing. Raises UsageError where `a` is no section."""
    *parents, last = key.split(".")
    for part in parents:
        if document.get(part) is None:
            document[part] = {}
        document = document[part]
        if not isinstance(document, dict):
            raise UsageError(f"{key}: '{part}' is not a section")
    document[last] = value
