"""How many workers each stage gets of the room that there is: more where a unit takes longer."""

from __future__ import annotations

from collections.abc import Sequence

Bounds = tuple[int, int]  # of a pool's workers: at least, at most


def allot(bounds: Sequence[Bounds], seconds: Sequence[float] | None, room: int) -> list[int]:
    """Return the numbers of workers by which the slowest stage is fastest, with `room` workers in all.

    `seconds` are what a unit takes in each stage. A stage has one worker however little room there is. The stages are
    filled up to their least numbers first, and then grow as long as the slowest of them may. None, while the seconds
    are not known: no stage grows beyond its least.
    """
    counts = [1] * len(bounds)

    def lag(stage: int) -> float:
        return counts[stage] / (seconds[stage] if seconds else 1.0)

    while sum(counts) < room and (few := [stage for stage, (least, _) in enumerate(bounds) if counts[stage] < least]):
        counts[min(few, key=lag)] += 1
    while seconds and sum(counts) < room:
        slowest = min(range(len(bounds)), key=lag)
        if counts[slowest] >= bounds[slowest][1]:
            break
        counts[slowest] += 1
    return counts


def rate(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the units a second of the slowest stage."""
    return min(count / one for count, one in zip(counts, seconds, strict=True))
