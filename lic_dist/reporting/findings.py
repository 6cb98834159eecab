"""All that a report says of its curves, as plain values: what the terminal, the Markdown and the page show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from lic_dist.reporting import comparison
from lic_dist.reporting.comparison import AnchorTable, against, best
from lic_dist.reporting.curves import Curve
from lic_dist.reporting.gains import Gains, gains, lambdas
from lic_dist.reporting.grid import Grids, grids_of
from lic_dist.reporting.lead import Lead, lead
from lic_dist.reporting.seeds import comparing, joined
from lic_dist.reporting.sets import SetsApart, sets_apart


@dataclass(frozen=True)
class Findings:
    """Of several lambdas: BD-rates (`tables`), the grids of quantizers and arms, gains at each lambda. Of one: L leads.

    `leads` and `tables` are against one anchor each, in the order that they were asked for. `curves` has those that
    differ in the seed of their retraining alone as one, and `parts` each of them.
    """

    curves: tuple[Curve, ...]
    parts: tuple[Curve, ...]
    anchors: tuple[Curve, ...]
    leads: tuple[Lead, ...]
    tables: tuple[AnchorTable, ...]
    grids: Grids
    gains: tuple[Gains, ...]
    sets: SetsApart | None  # where the pictures are of several

    @classmethod
    def of(cls, curves: Sequence[Curve], anchors: Sequence[Curve]) -> Findings:
        """Compare all curves with each anchor, which is one of them or of `joined` ones."""
        compare = cache(comparison.compare)
        whole = _with_anchors(curves, anchors)
        tables = tuple(against(anchor, whole, comparing(compare)) for anchor in anchors)
        leads = _leads(curves, anchors)
        grids = grids_of(curves, compare)
        if not any(table.rated for table in tables):  # no grids of empty cells
            filled = (grid for grid in grids.grids if any(cell.pchip is not None for cell in grid.cells.values()))
            grids = replace(grids, grids=tuple(filled))
        if leads and not grids.grids:
            grids = replace(grids, notes=())
        found = gains([point for curve in curves for point in curve.points])
        rated = tuple(table for table in tables if table.rated or not leads)
        return cls(
            tuple(whole),
            tuple(curves),
            tuple(anchors),
            leads,
            rated,
            grids,
            found,
            sets_apart(curves, anchors, grids, compare),
        )

    @property
    def best(self) -> list[str]:
        """Names of the best curves: of each comparison's, and where L leads those of the least."""
        measured = [curve.name for curve in self.curves if curve.learned]
        names = [one.name for one in (best(table, measured) for table in self.tables) if one]
        least = [one.best.gain.point for one in self.leads if one.best]
        parts = [(curve.name, point) for curve in self.curves for part in curve.parts for point in part.points]
        return names + [name for name, point in parts if any(point is one for one in least)]


def _with_anchors(curves: Sequence[Curve], anchors: Sequence[Curve]) -> list[Curve]:
    """The curves joined by seeds; an anchor of those given is it, and one that is a single seed stays alone besides."""
    given = {anchor.seeds: anchor for anchor in anchors if anchor.seeds}
    whole = [given.get(curve.seeds, curve) for curve in joined(curves)]
    return [*(anchor for anchor in anchors if anchor not in whole), *whole]


def _leads(curves: Sequence[Curve], anchors: Sequence[Curve]) -> tuple[Lead, ...]:
    """Of each anchor, where all measured points are of one lambda; none where they are of several."""
    points = [point for curve in curves for point in curve.points if point.lmbda is not None]
    if len(lambdas(points)) != 1:
        return ()
    return tuple(lead(points, anchor.parts[0].points[0]) for anchor in anchors if anchor.learned)
