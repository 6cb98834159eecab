"""Experiment files as plain data: YAML 1.2's scalars, no key twice, several documents, and `a.b=c` overrides.

PyYAML reads YAML 1.1, in which `5e-2` is a text, `no` is false, `010` is eight and 2024-01-01 a date: here `5e-2` is a
number everywhere, in lists, in `sweep` and after --set too.
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
SCALARS = (  # YAML 1.2's core schema, and 1_000; the first that fits counts
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?(0|[1-9][\d_]*)|0x[\da-fA-F]+"), list("-+0123456789")),
    ("float", NUMBER, list("-+.0123456789")),
    ("merge", re.compile("<<"), ["<"]),
)


class Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice in one mapping, with SCALARS."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As PyYAML's, with a look at the keys as they are written, before `<<` brings any that are overridden."""
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
    """The file's documents, empty ones passed over.

    Raises:
        UsageError: no such file, not YAML, no mapping, a key that stands twice.
    """
    try:
        read = _load(path.read_bytes())  # bytes: PyYAML then finds UTF-16 by its mark
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="give the experiment's YAML file") from None
    except DuplicateKey as error:
        raise UsageError(f"{path}: {error}", hint="leave one of them") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {_fault(error)}", hint=_quotes(error)) from None
    documents = [document for document in read if document is not None]
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise UsageError(f"{path} holds no mapping", hint="an experiment file has sections such as 'model:'")
    return documents


def _load(text: str | bytes) -> list[Any]:
    try:
        return list(yaml.load_all(text, Loader))
    except (ValueError, RecursionError) as error:  # of scalars that only look like numbers, and of deep nesting
        raise yaml.YAMLError(str(error)) from None


def _fault(error: yaml.YAMLError) -> str:
    """What PyYAML says, in one line: what is wrong, and where."""
    if isinstance(error, yaml.reader.ReaderError):
        return "it is not text in UTF-8"
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        what = " ".join(filter(None, (error.problem, error.context)))
        tab = ": indent with spaces" if "'\\t'" in what else ""
        return f"{where}{what}{tab}"
    return " ".join(str(error).split())


def _quotes(error: yaml.YAMLError) -> str:
    """What to do where a placeholder is taken for a mapping."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    braced = mark is not None and PLACEHOLDER.search(mark.get_snippet(max_length=200) or "")
    return f'a text with {braced[0]} in it stands in quotes: "runs/{braced[0]}"' if braced else ""


def apply(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The document, changed in place by `a.b=c` overrides. Raises UsageError: not of that form, or not YAML."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {override}: not of the form a.b=c")
        set_key(document, key.strip(), _scalar(value))
    return document


def _scalar(text: str) -> Any:
    try:
        read = _load(text)
    except DuplicateKey as error:
        raise UsageError(f"--set: {text!r}: {error}", hint="leave one of them") from None
    except yaml.YAMLError:
        raise UsageError(f"--set: {text!r} is not YAML", hint="quote it for the shell: --set 'a.b=[1, 2]'") from None
    return read[0] if read else None


def set_key(document: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b` in place, making the sections above it. Raises UsageError: `a` is no section."""
    *parents, last = key.split(".")
    for part in parents:
        if document.get(part) is None:
            document[part] = {}
        document = document[part]
        if not isinstance(document, dict):
            raise UsageError(f"{key}: '{part}' is not a section")
    document[last] = value
