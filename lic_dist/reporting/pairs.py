"""A blind comparison of kept pictures in pairs: the page that a viewer answers on, and the key that names its pictures.

A trial is one image by two curves at about one rate, beside the original. The page has no names: a trial is called by
its pictures' digests, whose order decides which of the two is its first, and the key alone says of what they are. The
page chooses anew, for each session, which trials are shown and on which side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from string import Template
from typing import Any

from lic_dist.data import images
from lic_dist.errors import UsageError
from lic_dist.evaluation.results import write_whole
from lic_dist.reporting.assets import as_json, asset, script_source
from lic_dist.reporting.curves import Collection, Curve
from lic_dist.reporting.sheets import busiest_window
from lic_dist.reporting.shown import Decoded, Pixels, data_uri, decoded_by_image, original_of, read_kept

PAGE, KEY = "study.html", "study-key.json"
RATIO = 1.15  # of the rates of two pictures that are compared, at most
SIDE = 640  # of what is shown of a picture: two of them lie side by side on most screens
TRIALS = 60  # of a session, at most: some ten minutes


@dataclass(frozen=True)
class Trial:
    """Two pictures of one image, and the original where it was kept: digests and pixels, uint8 [H, W, 3], of a window.

    `first` and `second` say whose the two are.
    """

    id: str
    shown: tuple[tuple[str, Pixels], ...]
    first: Decoded
    second: Decoded


def write_study(collection: Collection, curves: Sequence[Curve], out: Path) -> int:
    """Write study.html and study-key.json into `out`; return the number of trials.

    Raises:
        UsageError: there is no image of which two of the curves kept a picture at about one rate.
        LicError: the folder cannot be written.
    """
    trials = find_trials(collection, curves)
    if not trials:
        raise UsageError(
            "no two curves kept a picture of one image at about one rate",
            hint="`evaluate.show` names the images whose decoded pictures are kept",
        )
    key = {
        "study": study_of([one.id for one in trials]),
        "curves": [curve.name for curve in curves],
        "trials": {one.id: {"first": _told(one.first), "second": _told(one.second)} for one in trials},
    }
    write_whole(out / KEY, (json.dumps(key, indent=1) + "\n").encode())
    write_whole(out / PAGE, study_page(trials).encode())
    return len(trials)


def find_trials(collection: Collection, curves: Sequence[Curve]) -> list[Trial]:
    """All pairs of pictures to compare, by their ids: of two curves those that are each other's nearest in rate.

    Classic codecs are not compared with each other, unless all curves are theirs. Every picture is read once.
    """
    found: dict[str, Trial] = {}
    for (image, _), kept in decoded_by_image(curves).items():
        original = original_of(image, kept, collection)
        pairs = sorted(_pairs(kept, curves), key=lambda pair: pair[0].row.bpp)  # those of a picture near each other
        left = Counter(one.path for pair in pairs for one in pair)
        held: dict[Path, Pixels | None] = {}
        for one, other in pairs:
            for path in (one.path, other.path):
                held[path] = held[path] if path in held else read_kept(path)
                left[path] -= 1
            if (trial := _trial(one, other, held[one.path], held[other.path], original)) is not None:
                found[trial.id] = trial
            held = {path: pixels for path, pixels in held.items() if left[path]}
    return [found[name] for name in sorted(found)]


def _pairs(kept: Sequence[Decoded], curves: Sequence[Curve]) -> Iterator[tuple[Decoded, Decoded]]:
    """The pictures of one image that are compared."""
    classic = {curve.name for curve in curves if curve.classic}
    alone = len(classic) == len(curves)
    by_curve = {curve.name: [one for one in kept if one.curve == curve.name] for curve in curves}
    for first, second in combinations(by_curve, 2):
        if {first, second} <= classic and not alone:
            continue
        for one in by_curve[first]:
            other = _nearest(one, by_curve[second])
            if other is None or _nearest(other, by_curve[first]) is not one:
                continue
            if abs(math.log(one.row.bpp / other.row.bpp)) <= math.log(RATIO):
                yield one, other


def study_of(trials: Sequence[str]) -> str:
    """The name of a study: a digest of its trials'."""
    return hashlib.sha256(" ".join(sorted(trials)).encode()).hexdigest()[:12]


def study_page(trials: Sequence[Trial]) -> str:
    """The text of study.html: every picture once, in the order of digests, without a word of whose it is."""
    pool = {digest: pixels for one in trials for digest, pixels in one.shown}
    order = {digest: number for number, digest in enumerate(sorted(pool))}
    data: dict[str, Any] = {
        "study": study_of([one.id for one in trials]),
        "session": TRIALS,
        "pictures": [data_uri(pool[digest]) for digest in order],
        "trials": [{"id": one.id, "shown": [order[digest] for digest, _ in one.shown]} for one in trials],
    }
    script = asset("study.js")
    return Template(asset("study.html.in")).substitute(
        script_source=script_source(script), style=asset("style.css"), data=as_json(data), script=script
    )


def _trial(
    one: Decoded, other: Decoded, first: Pixels | None, second: Pixels | None, original: Pixels | None
) -> Trial | None:
    """None where a picture is absent or of another size, or where both are the same."""
    if first is None or second is None or first.shape != second.shape:
        return None
    height, width = min(first.shape[0], SIDE), min(first.shape[1], SIDE)
    top, left = busiest_window([first, second], height, width)
    window = (slice(top, top + height), slice(left, left + width))
    cut = [pixels[window].copy() for pixels in (first, second)]  # the whole ones are not kept
    (a, whose_a), (b, whose_b) = sorted(zip(map(_named, cut), (one, other), strict=True), key=lambda pair: pair[0][0])
    if a[0] == b[0]:
        return None
    shown = [a, b]
    if original is not None and original.shape == first.shape:
        shown.append(_named(original[window]))
    return Trial(hashlib.sha256(f"{a[0]} {b[0]}".encode()).hexdigest()[:16], tuple(shown), whose_a, whose_b)


def _named(pixels: Pixels) -> tuple[str, Pixels]:
    return images.pixel_digest(pixels), pixels


def _nearest(one: Decoded, others: Sequence[Decoded]) -> Decoded | None:
    return min(others, key=lambda other: abs(math.log(other.row.bpp / one.row.bpp)), default=None)


def _told(one: Decoded) -> dict[str, Any]:
    return {"curve": one.curve, "image": one.row.image, "lmbda": one.point.lmbda, "bpp": one.row.bpp}
