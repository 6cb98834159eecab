"""How curves look in the charts and the page of a report: the same colour, shape and dash everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lic_dist.drawing import COLOURS, INK, SHAPES
from lic_dist.evaluation.jobs import BASE
from lic_dist.reporting.curves import Curve

Dash = tuple[int, ...]
SOLID: Dash = (1, 0)
BROKEN: tuple[Dash, ...] = ((6, 3), (7, 2, 2, 2), (2, 2))


@dataclass(frozen=True)
class Style:
    """How a curve looks in every chart: a colour, a shape of SHAPES, lengths of strokes and gaps."""

    colour: str
    shape: str
    dash: Dash


Styles = Mapping[str, Style]  # by curve, the first anchor first


def styles(curves: Sequence[Curve], anchor: str) -> dict[str, Style]:
    """The anchor in ink, the others in the palette's order; of more than it has, a colour for each quantizer.

    Shapes and dashes then say the arm, unbroken for the first, which is the base where there is one.
    """
    others = [curve for curve in curves if curve.name != anchor]
    many = len(others) > len(COLOURS)
    forms = _forms(curves) if many else {curve.name: (n, n + 1) for n, curve in enumerate(others)}
    chosen = {anchor: Style(INK, SHAPES[0], SOLID)}
    for curve in others:
        colour, form = forms[curve.name]
        dash = BROKEN[(form - 1) % len(BROKEN)] if many and form else SOLID
        chosen[curve.name] = Style(COLOURS[colour], SHAPES[form % len(SHAPES)], dash)
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
