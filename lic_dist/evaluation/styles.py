"""How curves look in the plots and the page of a report: the same colour, marker and line everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lic_dist.evaluation.gains import BASE
from lic_dist.evaluation.plots import ANCHOR_COLOUR, COLOURS, MARKERS
from lic_dist.evaluation.results import Curve

Line = Literal["-", "--", "-.", ":"]

BROKEN: tuple[Line, ...] = ("--", "-.", ":")


@dataclass(frozen=True)
class Style:
    """How a curve looks in every plot: `series` is its number, the first anchor's 0."""

    series: int
    colour: str
    marker: str
    line: Line


Styles = Mapping[str, Style]


def styles(curves: Sequence[Curve], anchor: str) -> dict[str, Style]:
    """The anchor in black, the others in the palette's order; of more than it has, a colour for each quantizer.

    Markers and lines then say the arm, unbroken for the first, which is the base where there is one.
    """
    others = [curve for curve in curves if curve.name != anchor]
    many = len(others) > len(COLOURS)
    forms = _forms(curves) if many else {curve.name: (n, n + 1) for n, curve in enumerate(others)}
    chosen = {anchor: Style(0, ANCHOR_COLOUR, MARKERS[0], "-")}
    for number, curve in enumerate(others, 1):
        colour, form = forms[curve.name]
        line = BROKEN[(form - 1) % len(BROKEN)] if many and form else "-"
        chosen[curve.name] = Style(number, COLOURS[colour], MARKERS[form % len(MARKERS)], line)
    return chosen


def _forms(curves: Sequence[Curve]) -> dict[str, tuple[int, int]]:
    """By curve, the numbers of its quantizer's colour and its arm's form; each published curve has its own colour."""
    places = {
        curve.name: (curve.points[0].arm, (curve.points[0].quantizer, "")) if curve.points else ("", ("", curve.name))
        for curve in sorted(curves, key=lambda curve: not curve.points)
    }
    arms = sorted(dict.fromkeys(arm for arm, _ in places.values()), key=lambda arm: arm != BASE)
    quantizers = list(dict.fromkeys(quantizer for _, quantizer in places.values()))
    forms: dict[str, tuple[int, int]] = {}
    for curve, (arm, quantizer) in places.items():
        colour, form = quantizers.index(quantizer) % len(COLOURS), arms.index(arm)
        while (colour, form) in forms.values():
            form += 1
        forms[curve] = colour, form
    return forms
