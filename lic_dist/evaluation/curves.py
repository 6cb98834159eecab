"""The curves of a report: of one file or several, with names as short as is clear."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import filter as filter_names
from pathlib import Path

from lic_dist.errors import UsageError
from lic_dist.evaluation.results import Curve, Point, curve_of, read_file

LONGEST_NAME = 80


@dataclass(frozen=True)
class Collection:
    """The curves of a report under their short names.

    `full` has the full name of each curve by its short one, `folders` the folder of the result file of each point (by
    the point's id: points are compared by what they are), `originals` the path of each original by folder and image.
    """

    curves: tuple[Curve, ...]
    full: Mapping[str, str]
    folders: Mapping[int, Path]
    originals: Mapping[tuple[Path, str], str]

    def named(self, name: str) -> Curve:
        """The curve of this full or short name, or the only one of this arm and quantizer ("base sq").

        Raises:
            UsageError: there is none.
        """
        for names in ({curve.name: curve for curve in self.curves}, {self.full[one.name]: one for one in self.curves}):
            if name in names:
                return names[name]
        labelled = [curve for curve in self.curves if curve.points and _label(curve.points[0]) == name]
        if len(labelled) == 1:
            return labelled[0]
        known = ", ".join(curve.name for curve in labelled or self.curves)
        if labelled:
            raise UsageError(f"{len(labelled)} curves are {name!r}", hint=f"give one as the anchor: {known}")
        raise UsageError(f"no curve is named {name!r}", hint=f"there are {known}")

    def only(self, patterns: Sequence[str], anchors: Sequence[str]) -> Collection:
        """The curves whose short names match one of the patterns, and those of these names.

        Raises:
            UsageError: a pattern matches none.
        """
        names = [curve.name for curve in self.curves]
        for pattern in patterns:
            if not filter_names(names, pattern):
                raise UsageError(f"no curve matches {pattern!r}", hint=f"there are {', '.join(names)}")
        kept = {*anchors, *(name for pattern in patterns for name in filter_names(names, pattern))}
        return replace(self, curves=tuple(curve for curve in self.curves if curve.name in kept))


@dataclass(frozen=True)
class _Part:
    """The points of one arm and quantizer in one file."""

    number: int
    file: Path
    name: str
    label: str
    points: tuple[Point, ...]
    description: str


def collect(files: Sequence[Path]) -> Collection:
    """Read result files. Points of one arm and quantizer at different lambdas, on the same pictures, are one curve.

    They may lie in several files (one a checkpoint). Where a lambda repeats, the files of one name still make one
    curve, and where it repeats in these, each file makes its own. A published file is a curve of its own.

    Raises:
        LicError: a file that is no result file.
    """
    published: list[tuple[str, Curve]] = []  # with the file's stem
    parts: list[_Part] = []
    folders: dict[int, Path] = {}
    originals: dict[tuple[Path, str], str] = {}
    for file in files:
        found = read_file(file)
        if found.figures:
            published.append((file.stem, Curve(plain(found.name), found.figures, (), found.description)))
        originals |= {(file.parent, image): path for image, path in found.originals.items()}
        labels: dict[tuple[str, str], list[Point]] = {}
        for read in found.points:
            point = _plain_point(read)
            folders[id(point)] = file.parent
            labels.setdefault((_label(point), point.pictures), []).append(point)
        parts += [
            _Part(number, file, plain(found.name), label, tuple(points), found.description)
            for number, ((label, _), points) in enumerate(labels.items(), len(parts))
        ]
    groups = sorted((group for family in _families(parts) for group in _groups(family)), key=lambda one: one[0].number)
    runs = [_common_name([part.name for part in group]) for group in groups]
    labels_of: dict[str, set[str]] = {}
    for run, group in zip(runs, groups, strict=True):
        labels_of.setdefault(run, set()).add(group[0].label)
    own = []
    for run, group in zip(runs, groups, strict=True):
        name = f"{run} {group[0].label}".strip() if len(labels_of[run]) > 1 else run
        points = [point for part in group for point in part.points]
        own.append((group[0].file.stem, curve_of(name, points, group[0].description)))
    stems, whole = zip(*((stem, curve.name) for stem, curve in (*own, *published)), strict=True)
    short = _shortened(whole[: len(own)], whole[len(own) :])
    names = list(zip(_distinct_names(short, stems), _distinct_names(whole, stems), strict=True))
    curves = tuple(replace(curve, name=name) for (name, _), (_, curve) in zip(names, (*own, *published), strict=True))
    return Collection(curves, dict(names), folders, originals)


def read_curves(files: Sequence[Path]) -> tuple[Curve, ...]:
    """The curves of result files, ours or CompressAI's, under the names that a report gives them: see `collect`."""
    return collect(files).curves


def plain(text: str) -> str:
    """A name from a file as one line of printable characters, of bounded length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * LONGEST_NAME]).split())
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


def _plain_point(point: Point) -> Point:
    return replace(
        point, arm=plain(point.arm), quantizer=plain(point.quantizer), checkpoint=plain(point.checkpoint or "?")
    )


def _label(point: Point) -> str:
    return f"{point.arm} {point.quantizer}".strip()


def _families(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Parts of one arm and quantizer and the same pictures, in the order of the files."""
    families: dict[tuple[str, str], list[_Part]] = {}
    for part in parts:
        families.setdefault((part.label, part.points[0].pictures), []).append(part)
    return list(families.values())


def _groups(family: Sequence[_Part]) -> list[list[_Part]]:
    """All parts where no lambda repeats; else those of each file's name; else each."""
    if _distinct(family):
        return [list(family)]
    by_name = [[part for part in family if part.name == name] for name in dict.fromkeys(part.name for part in family)]
    return [one for group in by_name for one in ([group] if _distinct(group) else [[part] for part in group])]


def _distinct(parts: Sequence[_Part]) -> bool:
    lambdas = [point.lmbda for part in parts for point in part.points]
    return len(set(lambdas)) == len(lambdas)


def _common_name(names: Sequence[str]) -> str:
    """What the names begin with ("kodak-0.0067", "kodak-0.013": "kodak"), else all of them."""
    unique = list(dict.fromkeys(names))
    if len(unique) == 1:
        return unique[0]
    return os.path.commonprefix(unique).rstrip(" -_.=0123456789") or plain(" + ".join(unique))


def _distinct_names(names: Sequence[str], stems: Sequence[str]) -> list[str]:
    """Equal names get their file's stem behind them, and a number where that is not enough."""
    taken: dict[str, None] = {}
    for name, stem in zip(names, stems, strict=True):
        first = unique = f"{name} ({plain(stem)})" if names.count(name) > 1 else name
        number = 1
        while unique in taken:
            number += 1
            unique = f"{first} {number}"
        taken[unique] = None
    return list(taken)


def _shortened(own: Sequence[str], others: Sequence[str]) -> list[str]:
    """Our names without the words that all begin with, as they are where a published curve has such a name; theirs."""
    words = [name.split(" ") for name in own]
    shared = 0
    if len(set(own)) > 1:
        while all(len(one) > shared + 1 for one in words) and len({one[shared] for one in words}) == 1:
            shared += 1
    short = [" ".join(one[shared:]) for one in words]
    return [*(own if set(short) & set(others) else short), *others]
