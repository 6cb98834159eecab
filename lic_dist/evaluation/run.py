"""Rate-distortion runs: each image coded to real bytes, decoded again, compared bit for bit, and measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lic_dist import images
from lic_dist.building.records import named_record
from lic_dist.codec.codec import ImageCodec
from lic_dist.config import Engine, Experiment, need
from lic_dist.engine.stages import Stage, run
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.metrics import ms_ssim8, psnr8
from lic_dist.evaluation.results import ImageResult, Point, read_points, write_points
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.progress import Progress

CARRIED = "carried"  # a quantizer's name that stands for all that a checkpoint carries


@dataclass(frozen=True)
class Job:
    """One point to measure: a checkpoint with a quantizer, and the digests that say whether it is known already."""

    checkpoint: str
    quantizer: str
    architecture: str | None
    lmbda: float | None
    record: str
    model: str
    arm: str

    @classmethod
    def of(cls, checkpoint: str, quantizer: str, experiment: Experiment) -> Job:
        """Load both once, so that every mistake shows before the first image is coded.

        A checkpoint's own record of a name comes first; else a bare name is a group of the experiment's cache.
        """
        section = experiment.model
        architecture, lmbda = (section.architecture, section.lmbda) if section else (None, None)
        loaded = checkpoints.load(checkpoint, architecture, lmbda)
        elsewhere = quantizer in ("sq", *loaded.quantizers) or "/" in quantizer or Path(quantizer).exists()
        if experiment.cache is not None and not elsewhere:
            quantizer = f"{experiment.cache.path}/quantized/{quantizer}"
        record = named_record(loaded, quantizer)
        ImageCodec(loaded.model, record)
        model = checkpoints.digest(loaded.model.state_dict())
        return cls(checkpoint, quantizer, architecture, loaded.spec.lmbda, record.digest, model, arm_of(loaded))


def evaluate(experiment: Experiment) -> Path:
    """Run every checkpoint with every quantizer over the images; returns the result file.

    The file is written after each point; points that it already holds, of the same tensors, record and images, are
    not measured again, and those of other checkpoints and quantizers stay.

    Raises:
        LicError: no images, or a decoder that does not give the encoder's picture.
        UsageError: an unknown checkpoint or quantizer, or one made for another model.
    """
    section = need(experiment.evaluate, "evaluate")
    if not section.checkpoints and experiment.model is None:
        raise UsageError("nothing to evaluate", hint="name evaluate.checkpoints, or a model")
    chosen = section.checkpoints or (need(experiment.model, "model").checkpoint,)
    names = images.find(section.images)
    pictures = images.files_digest(section.images, names)
    jobs = [
        Job.of(one, quantizer, experiment)
        for one in chosen
        for wanted in section.quantizers
        for quantizer in (carried(one) if wanted == CARRIED else (wanted,))
    ]
    before = {(point.quantizer, point.record, point.model, point.pictures): point for point in read_points(section.out)}
    known = {job: before.get((short_name(job.quantizer), job.record, job.model, pictures)) for job in jobs}
    named = {(job.checkpoint, short_name(job.quantizer)) for job in jobs}
    others = [point for point in before.values() if (point.checkpoint, point.quantizer) not in named]
    for job in jobs:
        known[job] = known[job] or _run_point(job, section.images, names, pictures, experiment.engine)
        write_points(section.out, experiment.name, [*(point for point in known.values() if point), *others])
    return section.out


def carried(checkpoint: str) -> tuple[str, ...]:
    """The quantizers that a checkpoint carries for its own weights: not those of the caches it was trained from."""
    names = checkpoints.read(checkpoints.locate(checkpoint)).get("quantizers", ())
    return tuple(name for name in names if not name.endswith("-cached"))


def measure_image(codec: ImageCodec, path: Path, name: str) -> ImageResult:
    """Encode, decode and measure one image.

    Raises:
        LicError: the decoded indices or pixels differ from the encoder's.
    """
    image = images.read(path)
    height, width = image.shape[:2]
    started = time.perf_counter()
    encoded = codec.encode(image)
    middle = time.perf_counter()
    decoded, k = codec.decode_with_indices(encoded.data)
    ended = time.perf_counter()
    if not (np.array_equal(k, encoded.k) and np.array_equal(decoded, codec.reconstruction(encoded))):
        raise LicError(f"{name}: the decoder's picture differs from the encoder's")
    pixels = height * width
    return ImageResult(
        image=name,
        height=height,
        width=width,
        bpp=encoded.coded_bits / pixels,
        psnr=psnr8(image, decoded),
        ms_ssim=ms_ssim8(image, decoded),
        estimated_bpp=codec.estimated_bits(encoded) / pixels,
        likelihood_bpp=codec.likelihood_bits(encoded) / pixels,
        container_bpp=encoded.container_bits / pixels,
        encode_seconds=middle - started,
        decode_seconds=ended - middle,
    )


def _make_measurer(job: Job, folder: str) -> Callable[[str], ImageResult]:
    torch.set_num_threads(1)
    loaded = checkpoints.load(job.checkpoint, job.architecture, job.lmbda)
    codec = ImageCodec(loaded.model, named_record(loaded, job.quantizer))
    return lambda name: measure_image(codec, Path(folder) / name, name)


def _run_point(job: Job, folder: Path, names: list[str], pictures: str, engine: Engine) -> Point:
    """One checkpoint and quantizer over a folder of images, in parallel over images."""
    there = replace(job, checkpoint=checkpoints.absolute(job.checkpoint), quantizer=checkpoints.absolute(job.quantizer))
    measurer = Stage("measure", partial(_make_measurer, there, str(folder.resolve())), engine.searchers)
    rows: dict[str, ImageResult] = {}
    title = f"coding with {Path(job.checkpoint).name}, {short_name(job.quantizer)}"
    with Progress(title, len(names), "image") as bar:
        for _, row in run([measurer], names, engine=engine.name, address=engine.address, num_cpus=engine.num_cpus):
            rows[row.image] = row
            done = list(rows.values())
            bar.advance(1, bpp=sum(r.bpp for r in done) / len(done), psnr=sum(r.psnr for r in done) / len(done))
    assert job.lmbda is not None
    return Point(
        checkpoint=job.checkpoint,
        quantizer=short_name(job.quantizer),
        lmbda=job.lmbda,
        images=tuple(rows[name] for name in names),
        record=job.record,
        model=job.model,
        arm=job.arm,
        pictures=pictures,
    )


def arm_of(loaded: Checkpoint) -> str:
    """How a checkpoint was made, by its own account: "base", "decoder", "decoder noise", "decoder+hyper round 2" ..."""
    rounds = [entry for entry in loaded.history if "recipe" in entry]
    if not rounds:
        return "base"
    last = rounds[-1]
    phases = [phase["recipe"] for phase in last.get("phases", ())] or [last["recipe"]]
    recipes = [one if isinstance(one, str) else "+".join(one) for one in phases]
    latents = "" if last["latents"] == "quantized" else f" {last['latents']}"
    return ", ".join(recipes) + latents + (f" round {len(rounds)}" if len(rounds) > 1 else "")


def short_name(quantizer: str) -> str:
    """The name of a quantizer: of a record's path, the group or file that holds it."""
    return Path(quantizer.removesuffix("record.json")).name.removesuffix(".json") or quantizer
