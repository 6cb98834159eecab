"""What a report of one lambda begins with: L of every point against one anchor, and what the change is worth as rate.

L = lmbda 255^2 MSE + bpp is what the models were trained for. At an optimum of L a gain in distortion is worth as many
bits, so that to first order the change of L over the anchor's bpp is the change of rate at equal quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lic_dist.evaluation.jobs import BASE, is_control
from lic_dist.evaluation.results import Point
from lic_dist.intervals import Interval
from lic_dist.reporting.gains import Gain, change, change_p, gains, measured, seed_pairs
from lic_dist.reporting.signed_rank import SAYS
from lic_dist.text import counted

LEAD_SAYS = (
    "L = lambda 255^2 MSE + bpp, the mean over the pictures (8-bit, real bits); less is better. Intervals: paired "
    "bootstrap over the pictures. `as rate`: the change of L over the anchor's bpp, which is to first order the rate "
    "that the same quality costs more or less, since at an optimum of L a gain in distortion is worth as many bits. "
    "`against own base`: the change of L against the same quantizer on the base model, which is what retraining "
    "brought. A control shows what else would have gained as much. `p` of the first change: " + SAYS
)
FEW = 8  # pictures, below which intervals prove little


@dataclass(frozen=True)
class LeadRow:
    """One quantizer and arm: changes in percent against the anchor, `own` against the same quantizer on the base."""

    name: str
    gain: Gain
    control: bool
    change: Interval | None
    rate: Interval | None
    own: Interval | None
    p: float | None = None  # of the change


@dataclass(frozen=True)
class Lead:
    """All points of one lambda on the anchor's pictures: the base's first, controls last."""

    lmbda: float
    pictures: tuple[str, ...]
    anchor: LeadRow
    rows: tuple[LeadRow, ...]

    @property
    def best(self) -> LeadRow | None:
        """The least L of all but the anchor and controls."""
        found = [row for row in self.rows if not row.control and row is not self.anchor and row.change]
        return min(found, key=lambda row: row.gain.loss, default=None)


def lead(points: Sequence[Point], anchor: Point) -> Lead:
    """The points at the anchor's lambda and on its pictures, each against the anchor; those of several seeds as one."""

    def anchored(row: Gain) -> bool:
        return any(_same(point, anchor) for point in row.points)

    # equal points count once: the row may be of another that measures the same
    table = next(one for one in gains(points) if any(map(anchored, one.rows)))
    base = next(row for row in table.rows if anchored(row))
    made = [_row(row, base) for row in table.rows]
    rows = tuple(sorted(made, key=lambda row: (row.gain.arm != BASE, row.control)))
    own = next(row for row in rows if row.gain is base)
    return Lead(table.lmbda, tuple(row.image for row in anchor.images), own, rows)


def lead_title(found: Lead) -> str:
    many = len(found.pictures)
    return f"L at lambda {found.lmbda:g}, {counted(many, 'picture')}, against {found.anchor.name}"


def _same(one: Point, other: Point) -> bool:
    places = ((point.quantizer, point.arm, point.lmbda, point.pictures) for point in (one, other))
    return len(set(places)) == 1 and measured(one) == measured(other)


def _row(gain: Gain, anchor: Gain) -> LeadRow:
    control = is_control(gain.point.arm)
    name = " ".join(part for part in (gain.arm, gain.point.quantizer) if part) + (" (control)" if control else "")
    own = None if gain.arm == BASE else gain.own
    pairs = seed_pairs(anchor.points, gain.points)
    if not pairs:  # the anchor, or of other seeds
        return LeadRow(name, gain, control, None, None, own)
    rate = change(pairs, of=[row.bpp for row in anchor.point.images])
    return LeadRow(name, gain, control, change(pairs), rate, own, change_p(pairs))
