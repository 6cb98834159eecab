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
from lic_dist.reporting.sets import SetsApart, sets_apart


@dataclass(frozen=True)
class Findings:
    """Of several lambdas: BD-rates (`tables`), the grids of quantizers and arms, gains at each lambda. Of one: L leads.

    `leads` and `tables` are against one anchor each, in the order that they were asked for.
    """

    curves: tuple[Curve, ...]
    anchors: tuple[Curve, ...]
    leads: tuple[Lead, ...]
    tables: tuple[AnchorTable, ...]
    grids: Grids
    gains: tuple[Gains, ...]
    sets: SetsApart | None  # where the pictures are of several

    @classmethod
    def of(cls, curves: Sequence[Curve], anchors: Sequence[Curve]) -> Findings:
        """Compare all curves with each anchor."""
        compare = cache(comparison.compare)
        tables = tuple(against(anchor, curves, compare) for anchor in anchors)
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
            tuple(curves), tuple(anchors), leads, rated, grids, found, sets_apart(curves, anchors, grids, compare)
        )

    @property
    def best(self) -> list[str]:
        """Names of the best curves: of each comparison's, and where L leads those of the least."""
        measured = [curve.name for curve in self.curves if curve.learned]
        names = [one.name for one in (best(table, measured) for table in self.tables) if one]
        least = [one.best.gain.point for one in self.leads if one.best]
        return names + [curve.name for curve in self.curves for point in least if point in curve.points]


def _leads(curves: Sequence[Curve], anchors: Sequence[Curve]) -> tuple[Lead, ...]:
    """Of each anchor, where all measured points are of one lambda; none where they are of several."""
    points = [point for curve in curves for point in curve.points if point.lmbda is not None]
    if len(lambdas(points)) != 1:
        return ()
    return tuple(lead(points, anchor.points[0]) for anchor in anchors if anchor.learned)
