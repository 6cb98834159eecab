"""What a curve's codec costs: multiply-accumulates and parameters, and on the machine that measured time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from lic_dist.models.complexity import NetCost
from lic_dist.reporting.curves import Curve

ENCODER, DECODER = ("g_a", "h_a"), ("g_s",)  # networks that only the one runs; both run all others


@dataclass(frozen=True)
class Costs:
    """Of a curve: kMAC a pixel and parameters, means over its points, None where they were not counted.

    Seconds an image are medians over all images and points, and bytes, of which an image took the most, None where they
    were not measured; `megapixels` of an image are the mean.
    """

    name: str
    encode_kmac: float | None
    decode_kmac: float | None
    parameters: float | None
    encode_seconds: float
    decode_seconds: float
    encode_bytes: float | None
    decode_bytes: float | None
    megapixels: float


def costs(curves: Sequence[Curve]) -> tuple[Costs, ...]:
    """Of each measured curve."""
    found = []
    for curve in curves:
        rows = [row for point in curve.points for row in point.images]
        if rows:
            nets = [point.complexity for point in curve.points]
            found.append(
                Costs(
                    curve.name,
                    _kmac(nets, DECODER),
                    _kmac(nets, ENCODER),
                    fmean(sum(cost.parameters for cost in one.values()) for one in nets) if all(nets) else None,
                    median(row.encode_seconds for row in rows),
                    median(row.decode_seconds for row in rows),
                    max((row.encode_bytes for row in rows if row.encode_bytes is not None), default=None),
                    max((row.decode_bytes for row in rows if row.decode_bytes is not None), default=None),
                    fmean(row.height * row.width for row in rows) / 1e6,
                )
            )
    return tuple(found)


def decode_kmac(curve: Curve) -> float | None:
    """The kMAC a pixel of decoding, the mean over the curve's points; None where they were not counted."""
    return _kmac([point.complexity for point in curve.points], ENCODER)


def networks(curves: Sequence[Curve]) -> list[tuple[list[str], Mapping[str, NetCost]]]:
    """What each network costs, with the checkpoints of which that is so."""
    found: list[tuple[list[str], Mapping[str, NetCost]]] = []
    for point in (point for curve in curves for point in curve.points if point.complexity):
        names = next((names for names, cost in found if cost == point.complexity), None)
        if names is None:
            found.append(([point.checkpoint], point.complexity))
        elif point.checkpoint not in names:
            names.append(point.checkpoint)
    return found


def _kmac(nets: Sequence[Mapping[str, NetCost]], without: Sequence[str]) -> float | None:
    if not nets or not all(nets):
        return None
    return fmean(sum(cost.kmac for name, cost in one.items() if name not in without) for one in nets)
