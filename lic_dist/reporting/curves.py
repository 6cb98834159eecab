"""Rate-distortion curves: the points of result files, grouped by what a label says of them.

A label is a template of the fields of a point (FIELDS), such as "{arm} {quantizer}": points with one label and one set
of pictures are one curve, in whichever files they lie. Where a lambda repeats in a curve it is split by the first of
SPLITS that differs, whose value then stands behind its name, as do run or file behind names that are equal. A published
file is a curve of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import filter as filter_names
from pathlib import Path
from typing import TypeVar

from lic_dist.config import Report
from lic_dist.errors import UsageError
from lic_dist.evaluation.results import Figures, Point, read_file

LABEL: str = Report.model_fields["label"].default
LONGEST_NAME = 80
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Curve:
    """A named rate-distortion curve, figures by rising bpp; `points` in the same order, empty if published.

    `label` is its name without what it was split by; `run` and `file` name where its first point was read, `folders`
    has the folder of each point's result file. Where it is the mean of retrainings that differ in their seed alone,
    `seeds` has the curve of each, and its points are means: see `seeds`.
    """

    name: str
    figures: tuple[Figures, ...]
    points: tuple[Point, ...] = ()
    description: str = ""
    label: str = ""
    run: str = ""
    file: str = ""
    folders: tuple[Path, ...] = ()
    seeds: tuple[Curve, ...] = ()

    @property
    def parts(self) -> tuple[Curve, ...]:
        """The curves of its seeds, or itself: what was measured."""
        return self.seeds or (self,)

    @property
    def learned(self) -> bool:
        """Whether it was measured of a learned codec: neither a classic codec's nor a published curve."""
        return bool(self.points) and not self.classic

    @property
    def classic(self) -> bool:
        """Whether it was measured of a classic codec."""
        return any(point.lmbda is None for point in self.points)


@dataclass(frozen=True)
class _Read:
    """A point with where it was read: the name that its file has inside (`run`), and the file."""

    point: Point
    run: str
    file: Path
    description: str


FIELDS: dict[str, Callable[[_Read], str]] = {
    "run": lambda one: one.run,
    "arm": lambda one: one.point.arm,
    "quantizer": lambda one: one.point.quantizer,
    "seed": lambda one: "" if one.point.seed is None else f"seed {one.point.seed}",
    "checkpoint": lambda one: one.point.checkpoint,
    "file": lambda one: one.file.stem,
}
SPLITS = ("arm", "seed", "run", "file")


@dataclass(frozen=True)
class Collection:
    """The curves of a report, their names distinct; the path of each original by folder and image; our runs' names."""

    curves: tuple[Curve, ...]
    originals: Mapping[tuple[Path, str], str]
    runs: tuple[str, ...]

    def named(self, name: str) -> Curve:
        """The curve of this name, or the only one of this label.

        Raises:
            UsageError: there is none.
        """
        found = [one for one in self.curves if one.name == name] or [one for one in self.curves if one.label == name]
        if len(found) == 1:
            return found[0]
        known = ", ".join(curve.name for curve in found or self.curves)
        if found:
            raise UsageError(f"{len(found)} curves are {name!r}", hint=f"give one as the anchor: {known}")
        raise UsageError(f"no curve is named {name!r}", hint=f"there are {known}")

    def only(self, patterns: Sequence[str], anchors: Sequence[str]) -> Collection:
        """The curves whose names or labels match one of the patterns, and those of these names or labels.

        Raises:
            UsageError: a pattern matches none.
        """
        names = [curve.name for curve in self.curves]
        known = [*names, *(curve.label for curve in self.curves)]
        for pattern in patterns:
            if not filter_names(known, pattern):
                raise UsageError(f"no curve matches {pattern!r}", hint=f"there are {', '.join(names)}")
        kept = {*anchors, *(name for pattern in patterns for name in filter_names(known, pattern))}
        return replace(self, curves=tuple(one for one in self.curves if not kept.isdisjoint((one.name, one.label))))


def collect(files: Sequence[Path], label: str = LABEL) -> Collection:
    """Read result files, ours or published, and group their points into curves by a label template.

    Raises:
        LicError: a file that is no result file.
        UsageError: a label with an unknown field.
    """
    read: list[_Read] = []
    published: list[Curve] = []
    originals: dict[tuple[Path, str], str] = {}
    for file in files:
        found = read_file(file)
        name = plain(found.name)
        if found.figures:
            published.append(Curve(name, found.figures, (), found.description, name, name, file.stem))
        originals |= {(file.parent, image): path for image, path in found.originals.items()}
        read += [_Read(_plain_point(point), name, file, found.description) for point in found.points]
    own = [
        _curve(label_, split, piece)
        for (label_, _), group in _grouped(read, lambda one: (_labelled(one, label), one.point.pictures)).items()
        for split, piece in _pieces(group, SPLITS)
    ]
    curves = [*own, *published]
    named = zip(curves, _distinct(curves), strict=True)
    runs = tuple(dict.fromkeys(one.run for one in read))
    return Collection(tuple(replace(curve, name=name) for curve, name in named), originals, runs)


def read_curves(files: Sequence[Path], label: str = LABEL) -> tuple[Curve, ...]:
    """The curves of result files, ours or CompressAI's, under the names that a report gives them: see `collect`."""
    return collect(files, label).curves


def curve_of(name: str, points: Sequence[Point], description: str = "") -> Curve:
    """The curve through measured points."""
    ordered = tuple(sorted(points, key=lambda point: point.figures.bpp))
    return Curve(name, tuple(point.figures for point in ordered), ordered, description, name)


def place_of(point: Point) -> str:
    """What a point is on its curve, as text: its lambda, or a classic codec's quality."""
    return point.checkpoint if point.lmbda is None else f"{point.lmbda:g}"


def _labelled(one: _Read, label: str) -> str:
    """The label of a point; raises UsageError where the template names no field."""
    try:
        return " ".join(label.format(**{name: value(one) for name, value in FIELDS.items()}).split())
    except (KeyError, IndexError, ValueError, AttributeError):
        raise UsageError(
            f"no label: {label!r}", hint=f"of the fields {', '.join(f'{{{n}}}' for n in FIELDS)}"
        ) from None


def plain(text: str) -> str:
    """A name from a file as one line of printable characters, of bounded length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * LONGEST_NAME]).split())
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


def _plain_point(point: Point) -> Point:
    return replace(
        point,
        arm=plain(point.arm),
        quantizer=plain(point.quantizer),
        checkpoint=plain(point.checkpoint or "?"),
        settings=plain(point.settings),
        versions=plain(point.versions),
    )


def _grouped(items: Iterable[_Read], key: Callable[[_Read], T]) -> dict[T, list[_Read]]:
    groups: dict[T, list[_Read]] = {}
    for one in items:
        groups.setdefault(key(one), []).append(one)
    return groups


def _pieces(group: list[_Read], fields: Sequence[str]) -> list[tuple[list[str], list[_Read]]]:
    """The group, or where a lambda repeats its parts by the first fields that differ, with their values."""
    places = {one.point.place for one in group}
    if len(places) == len(group) or not fields:
        return [([], group)]
    parts = _grouped(group, FIELDS[fields[0]])
    values = [[value] if value and len(parts) > 1 else [] for value in parts]
    return [
        ([*value, *more], piece)
        for value, part in zip(values, parts.values(), strict=True)
        for more, piece in _pieces(part, fields[1:])
    ]


def _curve(label: str, split: Sequence[str], read: Sequence[_Read]) -> Curve:
    ordered = sorted(read, key=lambda one: one.point.figures.bpp)
    first = ordered[0]
    name = (f"{label} ({', '.join(map(plain, split))})" if split else label).strip() or "?"
    return replace(
        curve_of(name, [one.point for one in ordered], first.description),
        label=label,
        run=first.run,
        file=first.file.stem,
        folders=tuple(one.file.parent for one in ordered),
    )


def _distinct(curves: Sequence[Curve]) -> list[str]:
    """The names; behind equal ones what tells them apart: run, file, or a number."""
    names = [curve.name for curve in curves]
    for field_ in ("run", "file"):
        for name, count in Counter(names).items():
            alike = [number for number, one in enumerate(names) if one == name]
            values = [plain(getattr(curves[number], field_)) for number in alike]
            if count > 1 and len(set(values)) == count:
                for number, value in zip(alike, values, strict=True):
                    names[number] = f"{name} ({value})"
    taken: dict[str, None] = {}
    for name in names:
        number, unique = 1, name
        while unique in taken or (number > 1 and unique in names):
            number += 1
            unique = f"{name} {number}"
        taken[unique] = None
    return list(taken)
