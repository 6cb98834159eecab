"""The table of a study: BD-rates of quantizers (rows) and arms (columns), against what each has to beat.

That is its own base, the same quantizer without retraining, and on the base models CompressAI's quantizer (`sq`) and SQ
with adapted tables (`sq-adapted`), a grid for each. A curve's own base is found as in `gains`: by the quantizer's name,
else by its records, so that `tcq8-cached` has the base's `tcq8`. Of two base models at one lambda neither is taken.
Curves of one place that differ in their seed alone are one cell, the mean over seeds; a place that several others claim
stays empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lic_dist.evaluation.jobs import BASE
from lic_dist.reporting.comparison import Compare, Comparison, compare, distinct_notes
from lic_dist.reporting.curves import Curve
from lic_dist.reporting.gains import SQ_ADAPTED, measured
from lic_dist.reporting.seeds import Pairs, by_seeds, compare_seeds, paired

SQ = "sq"  # CompressAI's own quantizer

Place = tuple[str, str]  # arm and quantizer


@dataclass(frozen=True)
class Grid:
    """BD-rates by arm and quantizer, in percent, against `anchor` on the base models; None: against each own base.

    `arms` and `quantizers` are in their order of appearance, the base first. A place without a comparison is not in
    `cells`.
    """

    anchor: str | None
    arms: tuple[str, ...]
    quantizers: tuple[str, ...]
    cells: Mapping[Place, Comparison]

    @property
    def notes(self) -> list[str]:
        """Every note of a cell once, row by row."""
        places = ((arm, quantizer) for quantizer in self.quantizers for arm in self.arms)
        return distinct_notes([self.cells[place] for place in places if place in self.cells])


@dataclass(frozen=True)
class Grids:
    """The grids that these curves give, and what stands in none of them and why.

    `placed` has the curves of each place, one a seed, `own` those of each retrained one with its base.
    """

    grids: tuple[Grid, ...] = ()
    notes: tuple[str, ...] = ()
    placed: Mapping[Place, tuple[Curve, ...]] = field(default_factory=dict)
    own: Mapping[Place, Pairs] = field(default_factory=dict)


def grids_of(curves: Sequence[Curve], of: Compare = compare) -> Grids:
    """The grids of measured curves with a known arm; empty where no arm was retrained.

    A grid is there where its anchor is. `of` compares a curve (its second argument) with an anchor.
    """
    claims = _claims(curves)
    if all(arm == BASE for arm, _ in claims):
        return Grids()
    groups = {place: by_seeds(found) for place, found in claims.items()}
    placed = {place: found[0] for place, found in groups.items() if len(found) == 1}
    notes = [
        f"{len(found)} curves are {' '.join(place)}, none is in a grid: {', '.join(curve.name for curve in found)}"
        for place, found in claims.items()
        if place not in placed
    ]
    bases = {quantizer: found[0] for (arm, quantizer), found in placed.items() if arm == BASE}
    if _several_models([curve for (arm, _), found in claims.items() if arm == BASE for curve in found]):
        bases = {}
        notes.append("two base models share a lambda, no point says which is its own: there is no grid")
    retrained = {place: found for place, found in placed.items() if place[0] != BASE}
    pairs = {place: own for place, found in retrained.items() if (own := _own(found, place[1], bases))}
    found = [_grid(None, retrained, pairs, of)] if pairs else []
    for name in (SQ, SQ_ADAPTED):
        if name in bases and retrained:
            anchor = bases[name]
            others = {place: paired([anchor], found) for place, found in placed.items() if anchor not in found}
            found.append(_grid(name, placed, others, of))
    return Grids(tuple(found), tuple(notes), placed, pairs)


def _claims(curves: Sequence[Curve]) -> dict[Place, list[Curve]]:
    """The curves of each place, those of one seed that measured the same once."""
    claims: dict[Place, list[Curve]] = {}
    for curve in curves:
        places = {(point.arm, point.quantizer) for point in curve.points}
        if len(places) == 1 and all(arm for arm, _ in places):
            found = claims.setdefault(places.pop(), [])
            if all(_figures(curve) != _figures(other) for other in found):
                found.append(curve)
    return claims


def _figures(curve: Curve) -> list[object]:
    return [(point.seed, point.lmbda, point.pictures, measured(point)) for point in curve.points]


def _several_models(bases: Sequence[Curve]) -> bool:
    models: dict[tuple[float | str, str], set[str]] = {}
    for point in (point for curve in bases for point in curve.points):
        models.setdefault((point.place, point.pictures), set()).add(point.model)
    return any(len(found) > 1 for found in models.values())


def _own(curves: Sequence[Curve], quantizer: str, bases: Mapping[str, Curve]) -> Pairs:
    """The curves with their base; none where it is not there, or not the same."""
    base, *others = {_base_of(curve, quantizer, bases) for curve in curves}
    return () if others or base is None else paired([base], curves)


def _base_of(curve: Curve, quantizer: str, bases: Mapping[str, Curve]) -> Curve | None:
    if quantizer in bases:
        return bases[quantizer]
    records = _records(curve)
    fitting = [base for base in bases.values() if all(record for _, record in records) and records <= _records(base)]
    return fitting[0] if len(fitting) == 1 else None


def _records(curve: Curve) -> set[tuple[float | str, str]]:
    return {(point.place, point.record) for point in curve.points}


def _grid(anchor: str | None, placed: Mapping[Place, object], pairs: Mapping[Place, Pairs], of: Compare) -> Grid:
    arms = sorted(dict.fromkeys(arm for arm, _ in placed), key=lambda arm: arm != BASE)
    quantizers = tuple(dict.fromkeys(quantizer for _, quantizer in placed))
    return Grid(anchor, tuple(arms), quantizers, {place: compare_seeds(own, of) for place, own in pairs.items()})
