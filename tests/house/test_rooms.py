"""The rooms of the package: which may import which, and that no modules import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lic_dist

PACKAGE = Path(lic_dist.__file__).parent
# modules that any room may import
GROUND = ("errors", "text", "progress", "temporary", "drawing", "intervals", "remote", "version")
FACE = ""  # the package itself: offers names of all rooms, and no room imports it
ROOMS = ("data", "models", "quantization", "cache", "codec", "engine", "config", "building")
MAY = {
    "data": (),
    "models": (),
    "quantization": (),
    "engine": (),
    "cache": ("data",),
    "codec": ("models", "quantization"),
    "config": ("models",),
    "building": ("data", "models", "quantization", "cache", "codec", "engine", "config"),
    "training": ROOMS,
    "evaluation": ROOMS,
    "reporting": (*ROOMS, "evaluation"),
    "cluster": (*ROOMS, "training"),
    "benchmarks": (*ROOMS, "training", "evaluation", "reporting"),
    "app": (*ROOMS, "training", "evaluation", "reporting", "cluster", "benchmarks"),
    "__main__": ("app",),
}


def modules() -> dict[str, Path]:
    """{"cache.reader": path}; a room's `__init__` is the room."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").rstrip(".")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it: in functions and for types alone too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lic_dist":
            name = node.module.partition(".")[2]  # type: ignore[union-attr]
            inner = [f"{name}.{alias.name}".lstrip(".") for alias in node.names]
            yield from {one if one in known else name for one in inner}


def test_a_room_imports_what_it_may() -> None:
    known = modules()
    for name, path in known.items():
        if (room := name.split(".")[0]) == FACE:
            continue
        for other in imports(path, known):
            there = other.split(".")[0]
            assert room in GROUND or there in (*GROUND, room, *MAY[room]), f"{name} imports {other}"
            assert room not in GROUND or there in GROUND, f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    left = {name: set(imports(path, known)) - {name} for name, path in known.items()}
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, f"in circles or behind them: {sorted(left)}"
