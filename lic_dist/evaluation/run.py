"""Rate-distortion runs: code each image to real bytes, decode it, compare it bit for bit, and measure.

Every image of every job is one unit of a single run of the engine, job after job, so that workers start once and keep a
codec until the next job begins; anchors are coded in a second run, at qualities that cover what the first measured. A
row is put into the journal at once, and a point into the result file as soon as all its rows exist. Both have the key
of what was measured, and what is still valid is not measured again.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lic_dist.building.base_summary import base_summary_of_pictures
from lic_dist.building.shards import restore_torch_settings
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.rans import BitstreamError
from lic_dist.config import Evaluate, Experiment, bounds, need
from lic_dist.data import images
from lic_dist.data.source import PhotoSource
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.anchors import anchor_jobs, asked, measured_anchor_row
from lic_dist.evaluation.bitstreams import Bitstream, Bitstreams
from lic_dist.evaluation.classic import ClassicCodec
from lic_dist.evaluation.in_blocks import MeasuredBlocks, SidedCodec, measure_blocks
from lic_dist.evaluation.jobs import BASE, AnyJob, J, Job, Task, file_safe
from lic_dist.evaluation.journal import Journal, Key, beside
from lic_dist.evaluation.memory import Peak
from lic_dist.evaluation.metrics import METRICS, distortion, require
from lic_dist.evaluation.results import (
    ImageResult,
    Point,
    counts_of,
    image_row,
    plain_row,
    read_originals,
    read_points,
    write_points,
    write_whole,
)
from lic_dist.evaluation.summary import write_csv
from lic_dist.models.complexity import NetCost, complexity
from lic_dist.models.names import label
from lic_dist.progress import Progress

Row = Mapping[str, Any]  # of the journal: figures, or a "fault"
Coded = tuple[Row, NDArray[np.uint8], bytes]  # an image's row, the decoded picture, the file
Work = Callable[[Any, NDArray[np.uint8], str], Coded]  # on a codec, an image and its name
Networks = dict[str, Mapping[str, NetCost]]  # what the networks of a model cost, by its digest
_FIGURES = tuple(field.name for field in fields(ImageResult))
STANDARD: tuple[str, ...] = Evaluate.model_fields["metrics"].default
_OPTIONAL = {"metrics", "encode_bytes", "decode_bytes"}
_STATISTICS = ("channel_bits", "k_counts", "z_bpp")


@dataclass(frozen=True)
class Unit(Generic[J]):
    """An image to code for a job.

    `picture` is the path at which the decoded picture is kept, or empty; `keep` asks for the bitstream.
    """

    job: J
    image: str
    picture: str = ""
    keep: bool = False

    def __str__(self) -> str:
        return f"{self.image} with {self.job}"


@dataclass(frozen=True)
class Measured:
    """A coded image: figures, the decoded picture uint8 [H, W, 3], the file, k int16 [M, h*w], bits by channel [M]."""

    result: ImageResult
    picture: NDArray[np.uint8]
    data: bytes
    k: NDArray[np.int16]
    bits: NDArray[np.float64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often k has each value: see `counts_of`."""
        return counts_of(self.k)


def evaluate(experiment: Experiment) -> Path:
    """Code the images with every checkpoint and its quantizers; return the result file, with a CSV of rows beside it.

    Both files are written after each point. Points that the file already holds for the same tensors, record and images
    are not measured again; points of other checkpoints and quantizers are kept. An image that cannot be coded is set
    aside with its reason.

    Raises:
        LicError: no images, one that cannot be read, a decoder that does not give the encoder's picture, a job that
            can code no image, or another run that writes the file.
        UsageError: an unknown checkpoint, quantizer, image or anchor, a quantizer made for another model, or an anchor
            that is not installed.
    """
    section = need(experiment.evaluate, "evaluate")
    require(section.metrics)
    wanted = asked(section.anchors)
    task = Task.of(experiment)
    _require_known(section.show, task.names)
    if section.show:
        task.require_outside(section.out)
    with Journal.of(section.out) as journal:
        kept = Bitstreams(section.out, section.bitstreams == "with checkpoints") if section.bitstreams else None
        if task.jobs:
            _measure(experiment, task, journal, partial(_measured_row, section.metrics), kept)
        if wanted:
            jobs = anchor_jobs(wanted, task.source, task.names, task.pictures, read_points(section.out))
            anchors = Task(task.engine, jobs, task.source, task.names, task.pictures)
            _measure(experiment, anchors, journal, partial(measured_anchor_row, section.metrics), kept)
        if kept is not None:
            kept.pack(experiment.name, read_points(section.out), journal.keys)
    return section.out


def _measure(experiment: Experiment, task: Task[J], journal: Journal, work: Work, kept: Bitstreams | None) -> None:
    """Do `work` on all pictures of the task's jobs, and write the points into the result file: see `evaluate`."""
    section = need(experiment.evaluate, "evaluate")
    stored = read_points(section.out)
    originals = read_originals(section.out) | _keep_originals(section.out, section.show, task)
    whole = [point for point in stored if kept is None or kept.has_all(point)]
    known = {Key.of(point): point for point in whole if _has_all(point, section.metrics)}
    others = task.others(stored)
    networks = {point.model: point.complexity for point in stored if point.complexity}
    found: dict[J, Point | None] = {
        job: replace(point, checkpoint=job.checkpoint, **_said(job, networks))
        if (point := known.get(task.key(job)))
        else None
        for job in task.jobs
    }
    pictures = {job: _picture_paths(section.out, job, task, section.show) for job in task.jobs}
    units = [
        unit
        for job in task.jobs
        for unit in _units_left(job, task, found[job], journal, pictures[job], section.metrics, kept)
    ]

    def finish(jobs: Sequence[J]) -> None:
        for job in jobs:
            rows = [row for name in task.names if (row := journal.rows.get((task.key(job), name))) is not None]
            point = found[job] or _point(job, task, rows, networks)
            shown = {name: _relative(path, section.out) for name, path in pictures[job].items()}
            found[job] = point and replace(point, shown=_existing({**point.shown, **shown}, section.out))
        left = {(task.key(job), job.arm) for job, point in found.items() if not point}
        unfinished = [point for point in stored if (Key.of(point), point.arm) in left]  # of fewer metrics
        points = [*(point for point in found.values() if point), *unfinished, *others]
        points.sort(key=lambda point: point.lmbda is None)  # anchors last
        used = {name for point in points for name in point.shown}
        kept_originals = {name: path for name, path in originals.items() if name in used}
        write_points(section.out, experiment.name, points, originals=kept_originals)
        write_csv(beside(section.out, ".csv"), points)

    if kept is not None:
        for job in task.jobs:
            kept.begin(task.key(job), job)
    _print_base_lines(task, units)
    code(task, units, journal, work, finish, kept)
    for job, point in found.items():
        if point is None:
            first = journal.rows[task.key(job), task.names[0]]
            raise LicError(f"no image can be coded with {job}: {first['image']}: {first['fault']}")
    journal.settle(task.named)


def _print_base_lines(task: Task[Any], units: Sequence[Unit[Any]]) -> None:
    """Print a line on each base model that is about to code: see `base_summary_of_pictures`."""
    bases: dict[str, Job] = {unit.job.checkpoint: unit.job for unit in units if unit.job.arm == BASE}
    for job in bases.values():
        if line := base_summary_of_pictures(job.load(), task.source, task.names):
            print(line, flush=True)


def code(
    task: Task[J],
    units: Sequence[Unit[J]],
    journal: Journal,
    work: Work,
    finish: Callable[[Sequence[J]], None],
    kept: Bitstreams | None = None,
) -> None:
    """Do `work` on every unit, put the rows into the journal, and call `finish` with jobs whose units are all done.

    `finish` is called first with the jobs that have no units. `work` takes a job's codec, an image and its name, and
    returns a row, a picture and a file; it must be picklable. `kept` takes the bitstreams of units that keep them.
    """
    left = Counter(unit.job for unit in units)
    if without_units := [job for job in task.jobs if not left[job]]:
        finish(without_units)
    if not units:
        return
    engine = task.engine
    stage = Stage("code", partial(_make_coder, task.source, work), *bounds(engine.searchers))
    results = run([stage], units, engine=engine.name, address=engine.address, num_cpus=engine.num_cpus)
    total = len(task.jobs) * len(task.names)
    with restore_torch_settings(), closing(results), Progress("coding", total, "image", done=total - len(units)) as bar:
        for unit, (row, bitstream) in results:
            job = unit.job
            if kept is not None and bitstream is not None:
                kept.add(task.key(job), unit.image, bitstream)
            journal.add(task.key(job), job.checkpoint, row)
            bar.advance(1, **{name: row[name] for name in ("bpp", "psnr") if isinstance(row.get(name), float)})
            left[job] -= 1
            if not left[job]:
                finish([job])


def _make_coder(source: PhotoSource, work: Work) -> Callable[[Unit[Any]], tuple[Row, Bitstream | None]]:
    """Set up a worker process; return the function that codes a unit and keeps the codec for the next one."""
    torch.set_num_threads(1)
    loaded: tuple[AnyJob, ImageCodec | SidedCodec | ClassicCodec] | None = None

    def code(unit: Unit[Any]) -> tuple[Row, Bitstream | None]:
        nonlocal loaded
        if loaded is None or loaded[0] != unit.job:
            loaded = None  # free it first: two models may not fit into memory
            loaded = unit.job, unit.job.codec()
            if not isinstance(loaded[1], ClassicCodec):
                _warm_up(loaded[1])
        image = images.picture(source, unit.image)
        try:
            row, picture, data = work(loaded[1], image, unit.image)
        except BitstreamError as error:
            raise LicError(f"{unit}: {error.message}", hint=error.hint) from None
        except LicError as error:
            return {"image": unit.image, "fault": error.message}, None
        if unit.picture:
            write_png(picture, Path(unit.picture))
        return row, Bitstream.of(data, image, picture) if unit.keep else None

    return code


def _warm_up(codec: ImageCodec | SidedCodec) -> None:
    """Load the compiled kernels, so that no image's time includes it."""
    alone = codec.codec.alone if isinstance(codec, SidedCodec) else codec
    with suppress(LicError):  # a model that can code nothing: the rows of its images will say so
        alone.decode(alone.encode(np.zeros((1, 1, 3), np.uint8)).data)


def _measured_row(metrics: Sequence[str], codec: ImageCodec | SidedCodec, image: NDArray[np.uint8], name: str) -> Coded:
    measured: Measured | MeasuredBlocks
    if isinstance(codec, SidedCodec):
        measured = measure_blocks(codec, image, name, metrics)
    else:
        measured = measure_image(codec, image, name, metrics)
    return {**plain_row(measured.result), **statistics(measured)}, measured.picture, measured.data


def measure_image(
    codec: ImageCodec, image: NDArray[np.uint8], name: str, metrics: Sequence[str] = STANDARD
) -> Measured:
    """Encode, decode and measure one image, uint8 [H, W, 3]; PSNR always, and these metrics.

    The latents are compared bit for bit, because the picture is a function of y_hat alone.

    Raises:
        LicError: latents that cannot be coded.
        BitstreamError: the decoded indices or y_hat differ from the encoder's.
    """
    height, width = image.shape[:2]
    memory, started = Peak(), time.perf_counter()
    encoded = codec.encode(image)
    middle, encode_bytes = time.perf_counter(), memory.bytes
    memory, resumed = Peak(), time.perf_counter()
    latents = codec.decode_latents(encoded.data)
    decoded = codec.picture(latents)
    ended, decode_bytes = time.perf_counter(), memory.bytes
    if not (np.array_equal(latents.k, encoded.k) and torch.equal(latents.y_hat, encoded.y_hat)):
        raise BitstreamError(f"{name}: the decoder's picture differs from the encoder's")
    pixels, bits = height * width, codec.channel_bits(encoded)
    result = ImageResult(
        image=name,
        height=height,
        width=width,
        bpp=encoded.coded_bits / pixels,
        **distortion(metrics, image, decoded),
        estimated_bpp=(codec.side_bits(encoded) + float(bits.sum())) / pixels,
        likelihood_bpp=codec.likelihood_bits(encoded) / pixels,
        container_bpp=encoded.container_bits / pixels,
        encode_seconds=middle - started,
        decode_seconds=ended - resumed,
        encode_bytes=encode_bytes,
        decode_bytes=decode_bytes,
    )
    return Measured(result, decoded, encoded.data, encoded.k, bits)


def statistics(measured: Measured | MeasuredBlocks) -> dict[str, Any]:
    """Return how the bits of an image are distributed: `channel_bits`, `k_counts` and `z_bpp` as in `Point`."""
    pixels = measured.result.height * measured.result.width
    by_channel = measured.bits / pixels
    return {
        "channel_bits": by_channel.tolist(),
        "k_counts": measured.counts.tolist(),
        "z_bpp": measured.result.estimated_bpp - float(by_channel.sum()),
    }


def _said(job: AnyJob, networks: Networks) -> dict[str, Any]:
    """Return what a point says of how its model was made and what it costs, or of which library coded.

    `networks` has the costs that are known by the model's digest, and gets those that are counted here.
    """
    if not isinstance(job, Job):
        return {name: getattr(job, name) for name in ("settings", "versions")}
    if job.model not in networks:
        networks[job.model] = complexity(job.load().model)
    said = {name: getattr(job, name) for name in ("arm", "seed", "snapshot", "cache")}
    return {**said, "complexity": networks[job.model]}


def _point(job: J, task: Task[J], rows: Sequence[Row], networks: Networks) -> Point | None:
    """Return a job's point from the rows of all its images; None where no image could be coded."""
    coded = [row for row in rows if "fault" not in row]
    if not coded:
        return None
    return Point(
        checkpoint=job.checkpoint,
        quantizer=job.quantizer,
        lmbda=job.lmbda,
        images=tuple(map(_result, coded)),
        record=job.record,
        model=job.model,
        **_said(job, networks),
        pictures=task.pictures,
        set_aside={row["image"]: row["fault"] for row in rows if "fault" in row},
        **(_means_of_statistics(coded) if isinstance(job, Job) else {}),
    )


def _result(row: Row) -> ImageResult:
    return image_row({name: row[name] for name in _FIGURES if name in row})


def _means_of_statistics(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the `statistics` of a point from those of its images."""
    return {
        "channel_bits": tuple(fmean(column) for column in zip(*(row["channel_bits"] for row in rows), strict=True)),
        "k_counts": tuple(sum(column) for column in zip(*(row["k_counts"] for row in rows), strict=True)),
        "z_bpp": fmean(row["z_bpp"] for row in rows),
    }


def _has_all(point: Point, metrics: Sequence[str]) -> bool:
    """Return whether every image of a point has these metrics, or is too small for them."""
    return all(_has(plain_row(row), metrics) for row in point.images)


def _has(row: Row, metrics: Sequence[str]) -> bool:
    """Return whether a row with figures has these metrics; MS-SSIM is None of a picture too small, or not asked for."""
    known = {"psnr", *row.get("metrics", ())}
    if row["ms_ssim"] is not None or min(row["height"], row["width"]) < METRICS["ms-ssim"].least:
        known.add("ms-ssim")
    return known.issuperset(metrics)


def _units_left(
    job: J,
    task: Task[J],
    point: Point | None,
    journal: Journal,
    paths: Mapping[str, Path],
    metrics: Sequence[str],
    kept: Bitstreams | None,
) -> list[Unit[J]]:
    """Return the units that a job still needs: images without a row, or without a bitstream that shall be kept, and
    shown images without their picture.
    """
    units = []
    needed = {*_FIGURES, *(_STATISTICS if isinstance(job, Job) else ())} - _OPTIONAL
    for name in task.names:
        row = journal.rows.get((task.key(job), name), {})
        picture = str(paths[name].resolve()) if name in paths else ""
        faulty = "fault" in row or (point is not None and name in point.set_aside)
        in_journal = needed <= row.keys() and _has(row, metrics)
        if in_journal and kept is not None:
            in_journal = kept.has(task.key(job), _result(row))
        measured = point is not None or faulty or in_journal
        if not measured or (picture and not faulty and not paths[name].exists()):
            units.append(Unit(job, name, picture, kept is not None))
    return units


def _require_known(show: Sequence[str], names: Sequence[str]) -> None:
    for name in show:
        if name not in names:
            alike = [known for known in names if Path(known).name == Path(name).name]
            near = alike or difflib.get_close_matches(name, names, 1) or names
            raise UsageError(f"evaluate.show names no image: '{name}'", hint=f"there is '{near[0]}'")


def _keep_originals(out: Path, show: Sequence[str], task: Task[Any]) -> dict[str, str]:
    """Write the originals of the shown images as PNG; return their relative paths by name."""
    folder = beside(out, ".pictures") / f"original-{task.pictures[:8]}"
    paths = {name: _png_path(folder, name) for name in show}
    for name, path in paths.items():
        if not path.exists():
            write_png(images.picture(task.source, name), path)
    return {name: _relative(path, out) for name, path in paths.items()}


def _picture_paths(out: Path, job: AnyJob, task: Task[Any], show: Sequence[str]) -> dict[str, Path]:
    """Return the paths at which the decoded pictures of a job are kept, by image."""
    digest = hashlib.sha256(f"{job.model} {job.record} {task.pictures}".encode()).hexdigest()
    folder = file_safe(f"{label(job.checkpoint)}-{job.quantizer}-{digest[:8]}")
    return {name: _png_path(beside(out, ".pictures") / folder, name) for name in show}


def _png_path(folder: Path, name: str) -> Path:
    """Return the path of an image's PNG; .png is appended even to `a.jpg.png`, so that `a.jpg` has another path."""
    return folder / f"{name}.png"


def _relative(path: Path, out: Path) -> str:
    return path.relative_to(out.parent).as_posix()


def _existing(paths: Mapping[str, str], out: Path) -> dict[str, str]:
    return {name: path for name, path in paths.items() if (out.parent / path).exists()}


def write_png(picture: NDArray[np.uint8], path: Path) -> None:
    """Write a picture, uint8 [H, W, 3], whole or not at all; make its folder."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    write_whole(path, data.getvalue())
