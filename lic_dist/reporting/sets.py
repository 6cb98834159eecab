"""Sets of pictures apart: what holds for each kind of picture, and the mean of the sets.

A picture's set is the folder in its name, told apart as training tells sources apart: `kodak/kodim01.png` is of `kodak`
where others are of other folders. The mean of sets is the mean of the sets' means, so that a set of many pictures does
not outweigh the others; its interval draws pictures anew within each set.

Besides what a report compares anyway, each retrained arm is compared with its controls of the same quantizer: what it
gains over them is what real quantization brought. A control is an arm of the same recipe on other latents (`noise`,
`straight-through`), or one named `control`, which is of the arm that the rest of its name says, else of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lic_dist.data.folders import folder_names, with_others
from lic_dist.evaluation.jobs import BASE, CONTROL, CONTROLS, is_control
from lic_dist.evaluation.metrics import METRICS
from lic_dist.intervals import Interval, changes_interval, mean_interval
from lic_dist.reporting.comparison import Compare, Rates
from lic_dist.reporting.curves import Curve, plain
from lic_dist.reporting.gains import PointPair, image_losses, shared_by_seeds
from lic_dist.reporting.grid import Grids, Place
from lic_dist.reporting.seeds import Pairs, by_seeds, compare_seeds, name_of, paired

MOST_SETS = 12  # of a table; the smallest of more are one set, `others`

Cells = tuple[Interval | None, ...]  # of each set, then their mean


@dataclass(frozen=True)
class Sets:
    """The names of each set's pictures, by the name of the set."""

    pictures: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> Sets:
        """The sets of all pictures that were measured."""
        images = sorted({row.image for curve in curves for point in curve.points for row in point.images})
        named, names = with_others(folder_names(images), MOST_SETS)
        own = zip(images, named, strict=True)
        found: dict[str, list[str]] = {name: [] for name in names}
        for image, name in own:
            found[name].append(image)
        return cls({name: tuple(found[name]) for name in names})

    @property
    def heads(self) -> tuple[str, ...]:
        """A heading for each of the cells."""
        return (*(f"{plain(name)} ({len(found)})" for name, found in self.pictures.items()), "mean of sets")

    def rates(self, found: Rates) -> Cells:
        """The means of the images' BD-rates; None for a set of which an image has none."""
        seeds = found.seeds or (found.rates,)
        return self._cells(lambda sets: mean_interval(*(_picked(seeds, own) for own in sets)), found.rates)

    def change(self, pairs: Sequence[PointPair], of: Mapping[str, float] | None = None) -> Cells:
        """The changes of L of points against their bases, a pair a seed; None for a set that was not measured.

        In percent of the base's L, or of `of` by image.
        """
        bases, losses = ([image_losses(pair[number]) for pair in pairs] for number in (0, 1))
        whole = bases if of is None else [of] * len(pairs)

        def changed(sets: Sequence[tuple[str, ...]]) -> Interval:
            return changes_interval([(_picked(losses, own), _picked(bases, own), _picked(whole, own)) for own in sets])

        return self._cells(changed, losses[0])

    def _cells(self, interval: Callable[[Sequence[tuple[str, ...]]], Interval], known: Iterable[str]) -> Cells:
        names = set(known)
        cells = [interval([own]) if names.issuperset(own) else None for own in self.pictures.values()]
        return (*cells, interval(list(self.pictures.values())) if all(cells) else None)


def _picked(seeds: Sequence[Mapping[str, float]], images: Sequence[str]) -> list[list[float]]:
    """The figures of some images, [seeds, images]."""
    return [[one[image] for image in images] for one in seeds]


@dataclass(frozen=True)
class SetRow:
    """A curve against what the table is of; `trusted` as in its comparison, `learned` as the curve."""

    names: tuple[str, ...]
    cells: Cells
    trusted: bool = True
    learned: bool = True


@dataclass(frozen=True)
class SetTable:
    """All rows `against` one thing: BD-rates by quality, and the change of L, whose last name is the lambda.

    `heads` says what the names of a row are. Rows without a figure are left out.
    """

    against: str
    heads: tuple[str, ...]
    rates: Mapping[str, tuple[SetRow, ...]]
    changes: tuple[SetRow, ...]

    @property
    def best(self) -> SetRow | None:
        """The row of the least mean of sets by PSNR, of the figures to trust of learned codecs, without controls; None
        where none is.
        """
        rows = [
            row for row in self.rates["psnr"] if row.trusted and row.learned and not any(map(is_control, row.names[:2]))
        ]
        found = [(row.cells[-1].mean, row) for row in rows if row.cells[-1]]
        return min(found, key=lambda one: one[0], default=(0.0, None))[1]


@dataclass(frozen=True)
class SetsApart:
    """The sets, and a table for each anchor, for each curve's own base, and for controls."""

    sets: Sets
    tables: tuple[SetTable, ...]


_Match = tuple[tuple[str, ...], Pairs]  # the names of a row, and what it compares


def sets_apart(curves: Sequence[Curve], anchors: Sequence[Curve], grids: Grids, of: Compare) -> SetsApart | None:
    """What the pictures of each set say; None where there are fewer than two sets. `of` compares, as for `grids`."""
    sets = Sets.of(curves)
    if len(sets.pictures) < 2:
        return None
    measured = [curve for curve in curves if curve.points]
    tables = [
        _table(anchor.name, ("curve",), _anchored(anchor, measured), sets, of) for anchor in anchors if anchor.points
    ]
    own = [((quantizer, arm), pairs) for (arm, quantizer), pairs in grids.own.items()]
    tables.append(_table("its own base", ("quantizer", "arm"), own, sets, of))
    tables.append(_table("its control", ("quantizer", "arm", "control"), _controlled(grids.placed), sets, of))
    return SetsApart(sets, tuple(table for table in tables if table.rates["psnr"] or table.changes))


def _anchored(anchor: Curve, curves: Sequence[Curve]) -> list[_Match]:
    groups = by_seeds([curve for curve in curves if curve not in anchor.parts])
    return [((name_of(group),), pairs) for group in groups if (pairs := paired(anchor.parts, group))]


def _table(against: str, heads: tuple[str, ...], matches: Sequence[_Match], sets: Sets, of: Compare) -> SetTable:
    rates: dict[str, list[SetRow]] = {quality: [] for quality in METRICS}
    changes = []
    for names, pairs in matches:
        found = compare_seeds(pairs, of)
        for quality, rows in rates.items():
            learned = all(curve.learned for _, curve in pairs)
            rows.append(SetRow(names, sets.rates(found.by[quality]), found.trusted, learned))
        shared = shared_by_seeds(pairs)
        changes += [SetRow((*names, f"{lmbda:g}"), sets.change(own)) for lmbda, own in shared.items()]
    return SetTable(against, heads, {quality: _filled(rows) for quality, rows in rates.items()}, _filled(changes))


def _filled(rows: Sequence[SetRow]) -> tuple[SetRow, ...]:
    return tuple(row for row in rows if any(row.cells))


def _controlled(placed: Mapping[Place, tuple[Curve, ...]]) -> list[_Match]:
    """Each retrained arm with each of its controls, of several seeds each with its own."""
    arms = {arm for arm, _ in placed if arm != BASE and not is_control(arm)}
    return [
        ((quantizer, arm, control), pairs)
        for (arm, quantizer), curves in placed.items()
        if arm in arms
        for (control, same), anchors in placed.items()
        if same == quantizer and is_control(control) and _controls(control, arm, arms)
        if (pairs := paired(anchors, curves))
    ]


def _controls(control: str, arm: str, arms: set[str]) -> bool:
    rest = " ".join(word for word in control.split() if word not in CONTROLS)
    return rest == arm or (CONTROL in control.split() and rest not in arms)
