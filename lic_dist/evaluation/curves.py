"""The curves of a report: of one file or several, with names as short as is clear."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        """The curve of this full or short name.

        Raises:
            UsageError: there is none.
        """
        for curve in self.curves:
            if name in (curve.name, self.full[curve.name]):
                return curve
        known = ", ".join(curve.name for curve in self.curves)
        raise UsageError(f"no curve is named {name!r}", hint=f"there are {known}")


@dataclass(frozen=True)
class _Part:
    """The points of one arm and quantizer in one file."""

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
            _Part(file, plain(found.name), label, tuple(points), found.description)
            for (label, _), points in labels.items()
        ]
    own = [curve for family in _families(parts) for curve in _merged(family)]
    several = {name for name in (name for name, *_ in own) if [one[0] for one in own].count(name) > 1}
    measured = [
        (stem, curve_of(f"{name} {label}".strip() if name in several else name, points, description))
        for name, label, stem, points, description in own
    ]
    named = _told_apart([*measured, *published])
    short = _shortened([curve.name for curve in named[: len(measured)]], [c.name for c in named[len(measured) :]])
    curves = tuple(replace(curve, name=short.get(curve.name, curve.name)) for curve in named)
    full = {one.name: whole.name for one, whole in zip(curves, named, strict=True)}
    return Collection(curves, full, folders, originals)


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


_Merged = tuple[str, str, str, tuple[Point, ...], str]  # file's name, label, file's stem, points, description


def _merged(family: Sequence[_Part]) -> list[_Merged]:
    """One curve of all parts where no lambda repeats; else one of each file's name; else one of each file."""
    names = dict.fromkeys(part.name for part in family)
    by_name = [[part for part in family if part.name == name] for name in names]
    groups = [list(family)] if _distinct(family) else by_name
    groups = [one for group in groups for one in ([group] if _distinct(group) else [[part] for part in group])]
    return [
        (
            _common_name([part.name for part in group]),
            group[0].label,
            group[0].file.stem,
            tuple(point for part in group for point in part.points),
            group[0].description,
        )
        for group in groups
    ]


def _distinct(parts: Sequence[_Part]) -> bool:
    lambdas = [point.lmbda for part in parts for point in part.points]
    return len(set(lambdas)) == len(lambdas)


def _common_name(names: Sequence[str]) -> str:
    """What the names begin with ("kodak-0.0067", "kodak-0.013": "kodak"), else all of them."""
    unique = list(dict.fromkeys(names))
    if len(unique) == 1:
        return unique[0]
    return os.path.commonprefix(unique).rstrip(" -_.=0123456789") or plain(" + ".join(unique))


def _told_apart(found: Sequence[tuple[str, Curve]]) -> list[Curve]:
    """Curves of one name get their file's stem behind it, and a number where that is not enough."""
    names = [curve.name for _, curve in found]
    first = [f"{c.name} ({plain(stem)})" if names.count(c.name) > 1 else c.name for stem, c in found]
    taken: set[str] = set()
    apart = []
    for name, (_, curve) in zip(first, found, strict=True):
        unique, number = name, 1
        while unique in taken:
            number += 1
            unique = f"{name} {number}"
        taken.add(unique)
        apart.append(replace(curve, name=unique))
    return apart


def _shortened(own: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Names without the words that all of them begin with; as they are where a published curve has such a name."""
    words = [name.split(" ") for name in own]
    shared = 0
    if len(own) > 1:
        while all(len(one) > shared + 1 for one in words) and len({one[shared] for one in words}) == 1:
            shared += 1
    short = [" ".join(one[shared:]) for one in words]
    return {} if set(short) & set(others) else dict(zip(own, short, strict=True))
