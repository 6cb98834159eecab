"""Anchors: classic codecs over the pictures of an evaluation, at qualities that cover its points.

An anchor's points are of one codec, a quality each; they have no lambda. Where the experiment names no qualities they
are chosen from the codec's ladder (`classic.CODECS`) by PSNR, since a BD-rate is taken at equal quality: from the last
that is no better than the worst of the measured points to the first that is better than the best of them, and one more
at each end, for single pictures and other metrics; four at least; all, where nothing was measured. The PSNR of a
quality is that of a few pictures, spread over the set, against the points' PSNR on the same pictures.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lic_dist.data import images
from lic_dist.data.source import PhotoSource
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.classic import CODECS, ClassicCodec
from lic_dist.evaluation.memory import Peak
from lic_dist.evaluation.metrics import distortion, psnr8
from lic_dist.evaluation.results import ImageResult, Point, plain_row

SAMPLE = 4  # pictures that qualities are chosen on
FEWEST = 4  # points of a BD-rate


@dataclass(frozen=True)
class AnchorJob:
    """One point to measure: a classic codec at a quality, by the library of these versions.

    It is named and keyed as a `Job` is: `quantizer` is the codec, `checkpoint` says the quality; `record` is the digest
    of all settings, `model` that of what the points of a curve have in common.
    """

    quantizer: str
    quality: float
    versions: str
    arm: str = ""
    lmbda: None = None

    def __str__(self) -> str:
        return f"{self.quantizer}, {self.checkpoint}"

    @property
    def checkpoint(self) -> str:
        """The quality, in the codec's own word."""
        return f"{CODECS[self.quantizer].knob} {self.quality:g}"

    @property
    def settings(self) -> str:
        """What Pillow or a program is given."""
        codec = CODECS[self.quantizer]
        given = (f"{name}={value}" for name, value in codec.settings(self.quality).items())
        return f"{codec.format.name}: {', '.join(given)}"

    @property
    def record(self) -> str:
        """The digest of the settings, the quality among them."""
        return hashlib.sha256(self.settings.encode()).hexdigest()

    @property
    def model(self) -> str:
        """The digest of the versions and of the settings but the quality."""
        options = CODECS[self.quantizer].options
        return hashlib.sha256(f"{self.versions}; {options}".encode()).hexdigest()

    def codec(self) -> ClassicCodec:
        """Load the codec. Raises UsageError where it is absent or has other versions than where the run began."""
        codec = ClassicCodec(self.quantizer, self.quality)
        if codec.classic.versions != self.versions:
            here = codec.classic.versions
            raise UsageError(f"{self.quantizer}: {here} here, {self.versions} where the run began")
        return codec


Wanted = Mapping[str, tuple[float, ...]]  # the qualities of each codec; none: they are chosen


def asked(anchors: Sequence[str] | Wanted) -> Wanted:
    """Return the codecs of `evaluate.anchors` with their qualities.

    Raises:
        UsageError: a codec that there is not, that this Pillow lacks or that does not know its settings, or a quality
            that a codec does not have.
    """
    wanted = anchors if isinstance(anchors, Mapping) else dict.fromkeys(anchors, ())
    for name, qualities in wanted.items():
        if name not in CODECS:
            near = difflib.get_close_matches(name.lower(), CODECS, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(CODECS)}"
            raise UsageError(f"evaluate.anchors: no codec '{name}'", hint=hint)
        ClassicCodec(name, CODECS[name].ladder[-1]).require_settings()
        for quality in qualities:
            try:
                CODECS[name].require_quality(quality)
            except ValueError as error:
                raise UsageError(f"evaluate.anchors: {name} has no quality {quality:g}", hint=str(error)) from None
    return wanted


def anchor_jobs(
    wanted: Wanted, source: PhotoSource, names: Sequence[str], pictures: str, points: Sequence[Point]
) -> tuple[AnchorJob, ...]:
    """Return the jobs of all codecs; qualities that are not given are chosen to cover `points`, and are printed.

    `names` are the pictures' and `pictures` is their digest: only points of these pictures count.
    """
    sample = _Sample.of(source, names, [point for point in points if point.pictures == pictures])
    jobs = []
    for name, given in wanted.items():
        versions = CODECS[name].versions
        qualities = tuple(dict.fromkeys(given)) or sample.qualities(name, versions)
        jobs += [AnchorJob(name, quality, versions) for quality in qualities]
    return tuple(jobs)


@dataclass(frozen=True)
class _Sample:
    """Some of the pictures; the measured points with the mean PSNR of each on them."""

    source: PhotoSource
    names: tuple[str, ...]
    measured: tuple[tuple[Point, float], ...]

    @classmethod
    def of(cls, source: PhotoSource, names: Sequence[str], points: Sequence[Point]) -> _Sample:
        step = max(1, len(names) // SAMPLE)
        chosen = tuple(names[step // 2 :: step][:SAMPLE])
        measured = []
        for point in points:
            rows = [row.psnr for row in point.images if row.image in chosen]
            if len(rows) == len(chosen) and math.isfinite(psnr := fmean(rows)):
                measured.append((point, psnr))
        return cls(source, chosen, tuple(measured))

    def qualities(self, name: str, versions: str) -> tuple[float, ...]:
        """Return the part of a codec's ladder that covers the learned points, and print it."""
        ladder = CODECS[name].ladder
        learned = [psnr for point, psnr in self.measured if point.lmbda is not None]
        if not learned:
            return ladder
        keys = [(job.quantizer, job.record, job.model) for job in (AnchorJob(name, one, versions) for one in ladder)]
        stored = {(point.quantizer, point.record, point.model): psnr for point, psnr in self.measured}
        known = {number: stored[key] for number, key in enumerate(keys) if key in stored}
        try:
            first = max(0, self._last_up_to(min(learned), name, known) - 1)
            last = min(len(ladder) - 1, self._last_up_to(max(learned), name, known) + 2)
        except LicError:  # a picture that the codec does not take
            return ladder
        while last - first + 1 < FEWEST:
            first, last = max(0, first - 1), min(len(ladder) - 1, last + 1)
        chosen = ladder[first : last + 1]
        reach = f"{min(learned):.1f} to {max(learned):.1f} dB"
        print(f"{name}: {CODECS[name].knob} {', '.join(f'{one:g}' for one in chosen)} for {reach}", flush=True)
        return chosen

    def _last_up_to(self, psnr: float, name: str, known: dict[int, float]) -> int:
        """Return the last place on a ladder that is no better than a PSNR in dB, -1 where all are better.

        `known` has the PSNR of places that are measured, and gets those that are measured here.
        """
        low = max((place for place, value in known.items() if value <= psnr), default=-1)
        high = min((place for place, value in known.items() if value > psnr), default=len(CODECS[name].ladder))
        while high - low > 1:
            middle = (low + high) // 2
            known[middle] = self._psnr(name, CODECS[name].ladder[middle])
            low, high = (middle, high) if known[middle] <= psnr else (low, middle)
        return low

    def _psnr(self, name: str, quality: float) -> float:
        codec = ClassicCodec(name, quality)
        originals = (images.picture(self.source, one) for one in self.names)
        return fmean(psnr8(one, codec.decode(codec.encode(one))) for one in originals)


def measured_anchor_row(
    metrics: Sequence[str], codec: ClassicCodec, image: NDArray[np.uint8], name: str
) -> tuple[dict[str, Any], NDArray[np.uint8], bytes]:
    """Code, decode and measure one image, uint8 [H, W, 3], by these metrics.

    Returns its row, the decoded picture and the file.

    Raises:
        LicError: the codec does not take the image, or returns another size.
    """
    height, width = image.shape[:2]
    memory, started = Peak(), time.perf_counter()
    data = codec.encode(image)
    middle, encode_bytes = time.perf_counter(), memory.bytes
    memory, resumed = Peak(), time.perf_counter()
    decoded = codec.decode(data)
    ended = time.perf_counter()
    if decoded.shape != image.shape:
        raise LicError(f"{codec.name} returns {decoded.shape[1]}x{decoded.shape[0]} pixels of {width}x{height}")
    result = ImageResult(
        image=name,
        height=height,
        width=width,
        bpp=8 * len(data) / (height * width),
        **distortion(metrics, image, decoded),
        estimated_bpp=math.nan,
        likelihood_bpp=math.nan,
        container_bpp=0.0,
        encode_seconds=middle - started,
        decode_seconds=ended - resumed,
        encode_bytes=None if codec.classic.format.program else encode_bytes,  # a program has its own
        decode_bytes=None if codec.classic.format.program else memory.bytes,
    )
    return plain_row(result), decoded, data
