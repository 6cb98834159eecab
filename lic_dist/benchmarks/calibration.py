"""`lic-dist bench calibration`: the search of building/surface.py beside the pattern search that it took the place of.

Both calibrate the same quantizers of a model on the same crops, half of the pictures' for the pilot, with the same
parts; the pattern search measures every trial on all crops. L is that of what each chose on crops that neither saw.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lic_dist import config
from lic_dist.benchmarks.data import BASE, pictures
from lic_dist.benchmarks.refinement import crops
from lic_dist.benchmarks.tables import machine, table
from lic_dist.building import surface
from lic_dist.building.calibrate import calibrate, measure
from lic_dist.building.latents import encode, inputs_of
from lic_dist.building.surface import Fixed, Measured, Point, SearchSpace
from lic_dist.building.threads import one_thread
from lic_dist.models import checkpoint as checkpoints

QUANTIZERS = {
    "sq-adapted": {"name": "sq"},
    "rdoq": {"name": "rdoq"},
    "tcq8": {"name": "tcq"},
    "tcq8, levels fitted": {"name": "tcq", "spread": "fitted", "weights": "rounding"},
}
GAINING = 1e-4  # of L; what the pattern search takes for an improvement


def bench(name: str | None, folder: Path | None, asked: Sequence[str], quick: bool) -> dict[str, Any]:
    """Calibrate each quantizer by both searches; print and return CPU seconds, trials and L of each.

    Without a model it is the shipped one, without a folder scikit-image's pictures. `quick` takes RDOQ alone, and six
    pictures. Raises UsageError for an unknown model; LicError where no picture is large enough.
    """
    loaded = checkpoints.load(name or BASE)
    taken = crops(pictures(folder))[: 6 if quick else None]
    chosen = {key: QUANTIZERS[key] for key in (asked or (["rdoq"] if quick else QUANTIZERS))}
    with one_thread():
        parts = [encode(loaded.model, taken[first::3], 8)[0] for first in range(3)]
    pilot, held_out, judged = parts
    figures: dict[str, Any] = {"machine": machine(), "model": loaded.source, "crops": len(taken), "quantizers": {}}
    small = config.Quantizer.model_validate({"name": "tcq", "step": 0.7, "lambda_scale": 0.2, "shift": 0, "spread": 0})
    calibrate(loaded, small, pilot.part(slice(2)), held_out.part(slice(2)))  # compiles
    with one_thread():
        inputs = inputs_of(loaded.model, judged.y, judged.z, 8)
        for key, section in chosen.items():
            found = figures["quantizers"][key] = {}
            for search in (pattern_search, surface.search):
                started = time.process_time()
                record = calibrate(loaded, config.Quantizer.model_validate(section), pilot, held_out, search=search)
                found[search.__name__] = {
                    "seconds": time.process_time() - started,
                    "trials": len(record.notes["calibration"]),
                    "L": record.notes["L"],
                    "judged": measure(loaded, record, judged, inputs).L,
                }
    rows = []
    for key, found in figures["quantizers"].items():
        before, after = found["pattern_search"], found["search"]
        changes = (f"{100 * (after[one] / before[one] - 1):+.3f} %" for one in ("L", "judged"))
        times = (f"{before['seconds']:.1f}", f"{after['seconds']:.1f}", f"{after['seconds'] / before['seconds']:.2f}")
        rows.append((key, f"{before['trials']}", f"{after['trials']}", *times, *changes))
    names = ("", "trials, pattern", "trials", "CPU s, pattern", "CPU s", "ratio", "L", "L of other crops")
    Console().print(table(f"{figures['model']}: calibration on {len(held_out)} crops", names, rows))
    return figures


def pattern_search(
    trial: Callable[[Point, bool], Measured],
    start: Point,
    space: SearchSpace,
    fixed: Fixed,
    price: float,
    first: float,
    in_parts: bool,
) -> Point:
    """Move to the first better neighbour until none is better, with moves of one and then of one half; arguments as of
    `surface.search`.
    """
    best, lowest = start, trial(start, True).L
    for size in (first, 0.5 * first):
        moved = True
        while moved:
            moved = False
            for one in _neighbours(best, size, space, fixed):
                if (value := trial(one, True).L) < lowest * (1 - GAINING):
                    best, lowest, moved = one, value, True
                    break
    return best


def _neighbours(best: Point, size: float, space: SearchSpace, fixed: Fixed) -> Iterator[Point]:
    low, high = space.bounds()
    for axis in surface.ORDER:
        for by in (size, -size) if fixed[axis] is None else ():
            place = space.moves(best) + by * np.eye(4)[axis]
            if low[axis] <= place[axis] <= high[axis]:
                strength, step, shift, spread = (None if axis == other else one for other, one in enumerate(best))
                yield space.point(place, (strength, step, shift, spread))
