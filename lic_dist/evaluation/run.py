"""Rate-distortion runs: each image coded to real bytes, decoded again, compared bit for bit, and measured.

Every image of every point is a unit of one run of the engine, job after job, so that workers start once and keep a
codec until the next job comes. A row is journalled as it comes; a point whose rows are all there goes into the result
file. Both say what they were measured of, and what still stands is not measured again.
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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lic_dist.building.base_summary import base_summary_of_pictures
from lic_dist.building.shards import restore_torch_settings
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.rans import BitstreamError
from lic_dist.config import Experiment, need
from lic_dist.data import images
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.jobs import BASE, Job, Task, file_safe
from lic_dist.evaluation.journal import Journal, Key, beside
from lic_dist.evaluation.metrics import ms_ssim8, psnr8
from lic_dist.evaluation.results import (
    LARGEST_COUNTED,
    ImageResult,
    Point,
    image_row,
    plain_row,
    read_originals,
    read_points,
    write_points,
    write_whole,
)
from lic_dist.evaluation.summary import write_csv
from lic_dist.models.names import label
from lic_dist.progress import Progress

Row = Mapping[str, Any]  # as the journal has it: figures, or a "fault"
_FIGURES = tuple(field.name for field in fields(ImageResult))
_STATISTICS = ("channel_bits", "k_counts", "z_bpp")


@dataclass(frozen=True)
class Unit:
    """An image to code for a job; `picture` is where the decoded one is kept, "" nowhere."""

    job: Job
    image: str
    picture: str = ""

    def __str__(self) -> str:
        return f"{self.image} with {self.job}"


@dataclass(frozen=True)
class Measured:
    """An image that was coded: figures, the decoded picture uint8 [H, W, 3], k [lanes, steps] and the lanes' bits."""

    result: ImageResult
    picture: NDArray[np.uint8]
    k: NDArray[np.int16]
    bits: NDArray[np.float64]


def evaluate(experiment: Experiment) -> Path:
    """Run every checkpoint with every quantizer over the images; returns the result file, a CSV of rows beside it.

    Both are written after each point; points that the file already holds, of the same tensors, record and images, are
    not measured again, and those of other checkpoints and quantizers stay. An image that cannot be coded is set aside
    with its reason.

    Raises:
        LicError: no images, one that cannot be read, a decoder that does not give the encoder's picture, a job that
            can code no image, another run at work on the file.
        UsageError: an unknown checkpoint, quantizer or image, or a quantizer made for another model.
    """
    task = Task.of(experiment)
    section = need(experiment.evaluate, "evaluate")
    _require_known(section.show, task.names)
    if section.show:
        task.require_outside(section.out)
    with Journal.of(section.out) as journal:
        before = read_points(section.out)
        originals = read_originals(section.out) | _keep_originals(section.out, section.show, task)
        known = {Key.of(point): point for point in before}
        others = task.others(before)
        found: dict[Job, Point | None] = {
            job: replace(point, checkpoint=job.checkpoint, arm=job.arm, seed=job.seed)
            if (point := known.get(task.key(job)))
            else None
            for job in task.jobs
        }
        kept = {job: _kept(section.out, job, task, section.show) for job in task.jobs}
        units = [unit for job in task.jobs for unit in _missing(job, task, found[job], journal, kept[job])]

        def finish(jobs: Sequence[Job]) -> None:
            for job in jobs:
                rows = [row for name in task.names if (row := journal.rows.get((task.key(job), name))) is not None]
                point = found[job] or _point(job, task, rows)
                shown = {name: _relative(path, section.out) for name, path in kept[job].items()}
                found[job] = point and replace(point, shown=_there({**point.shown, **shown}, section.out))
            points = [*(one for one in found.values() if one), *others]
            used = {name for one in points for name in one.shown}
            kept_originals = {name: path for name, path in originals.items() if name in used}
            write_points(section.out, experiment.name, points, originals=kept_originals)
            write_csv(beside(section.out, ".csv"), points)

        _tell_bases(task, units)
        code(task, units, journal, _measured_row, finish)
        for job, point in found.items():
            if point is None:
                first = journal.rows[task.key(job), task.names[0]]
                raise LicError(f"no image can be coded with {job}: {first['image']}: {first['fault']}")
        journal.settle(task.named)
    return section.out


def _tell_bases(task: Task, units: Sequence[Unit]) -> None:
    """One line on each base model that is about to code, as it is."""
    bases = {unit.job.checkpoint: unit.job for unit in units if unit.job.arm == BASE}
    for job in bases.values():
        if line := base_summary_of_pictures(job.load(), task.folder, task.names):
            print(line, flush=True)


def code(
    task: Task,
    units: Sequence[Unit],
    journal: Journal,
    work: Callable[[ImageCodec, NDArray[np.uint8], str], tuple[Row, NDArray[np.uint8]]],
    finish: Callable[[Sequence[Job]], None],
) -> None:
    """Do `work` on every unit and journal the rows; `finish` jobs whose units are done, first those that have none.

    `work` takes a codec, an image and its name, and returns a row and a picture; it must pickle.
    """
    left = Counter(unit.job for unit in units)
    if whole := [job for job in task.jobs if not left[job]]:
        finish(whole)
    if not units:
        return
    engine = task.engine
    stage = Stage("code", partial(_make_coder, str(task.folder.resolve()), work), engine.searchers)
    results = run([stage], units, engine=engine.name, address=engine.address, num_cpus=engine.num_cpus)
    total = len(task.jobs) * len(task.names)
    with restore_torch_settings(), closing(results), Progress("coding", total, "image", done=total - len(units)) as bar:
        for unit, row in results:
            job = unit.job
            journal.add(task.key(job), job.checkpoint, row)
            bar.advance(1, **{name: row[name] for name in ("bpp", "psnr") if isinstance(row.get(name), float)})
            left[job] -= 1
            if not left[job]:
                finish([job])


def _make_coder(
    folder: str, work: Callable[[ImageCodec, NDArray[np.uint8], str], tuple[Row, NDArray[np.uint8]]]
) -> Callable[[Unit], Row]:
    torch.set_num_threads(1)
    held: tuple[Job, ImageCodec] | None = None

    def code(unit: Unit) -> Row:
        nonlocal held
        if held is None or held[0] != unit.job:
            held = None  # two models at once are too many
            held = unit.job, unit.job.codec()
            _warm_up(held[1])
        image = images.read(Path(folder) / unit.image)
        try:
            row, picture = work(held[1], image, unit.image)
        except BitstreamError as error:
            raise LicError(f"{unit}: {error.message}", hint=error.hint) from None
        except LicError as error:
            return {"image": unit.image, "fault": error.message}
        if unit.picture:
            _write_png(picture, Path(unit.picture))
        return row

    return code


def _warm_up(codec: ImageCodec) -> None:
    """Load the compiled kernels: that is no time of an image."""
    with suppress(LicError):  # of a model that can code nothing: its images will say so
        codec.decode(codec.encode(np.zeros((1, 1, 3), np.uint8)).data)


def _measured_row(codec: ImageCodec, image: NDArray[np.uint8], name: str) -> tuple[Row, NDArray[np.uint8]]:
    measured = measure_image(codec, image, name)
    return {**plain_row(measured.result), **statistics(codec, measured)}, measured.picture


def measure_image(codec: ImageCodec, image: NDArray[np.uint8], name: str) -> Measured:
    """Encode, decode and measure one image, uint8 [H, W, 3].

    Latents are compared, bit for bit: the picture is a function of y_hat alone.

    Raises:
        LicError: latents that cannot be coded.
        BitstreamError: the decoded indices or y_hat differ from the encoder's.
    """
    height, width = image.shape[:2]
    started = time.perf_counter()
    encoded = codec.encode(image)
    middle = time.perf_counter()
    latents = codec.decode_latents(encoded.data)
    decoded = codec.picture(latents)
    ended = time.perf_counter()
    if not (np.array_equal(latents.k, encoded.k) and torch.equal(latents.y_hat, encoded.y_hat)):
        raise BitstreamError(f"{name}: the decoder's picture differs from the encoder's")
    pixels, bits = height * width, codec.lane_bits(encoded)
    result = ImageResult(
        image=name,
        height=height,
        width=width,
        bpp=encoded.coded_bits / pixels,
        psnr=psnr8(image, decoded),
        ms_ssim=ms_ssim8(image, decoded),
        estimated_bpp=(codec.z_bits(encoded) + float(bits.sum())) / pixels,
        likelihood_bpp=codec.likelihood_bits(encoded) / pixels,
        container_bpp=encoded.container_bits / pixels,
        encode_seconds=middle - started,
        decode_seconds=ended - middle,
    )
    return Measured(result, decoded, encoded.k, bits)


def statistics(codec: ImageCodec, measured: Measured) -> dict[str, Any]:
    """Where the bits of an image are: `channel_bits`, `k_counts` and `z_bpp` as `Point` has them."""
    pixels = measured.result.height * measured.result.width
    by_channel = (measured.bits / pixels).reshape(-1, len(codec.record.weights)).sum(axis=0)
    counted = np.clip(measured.k, -LARGEST_COUNTED, LARGEST_COUNTED).ravel() + LARGEST_COUNTED
    return {
        "channel_bits": by_channel.tolist(),
        "k_counts": np.bincount(counted, minlength=2 * LARGEST_COUNTED + 1).tolist(),
        "z_bpp": measured.result.estimated_bpp - float(by_channel.sum()),
    }


def _point(job: Job, task: Task, rows: Sequence[Row]) -> Point | None:
    """A job's point, of the rows of all its images; None where not one could be coded."""
    coded = [row for row in rows if "fault" not in row]
    if not coded:
        return None
    return Point(
        checkpoint=job.checkpoint,
        quantizer=job.quantizer,
        lmbda=job.lmbda,
        images=tuple(image_row({name: row[name] for name in _FIGURES}) for row in coded),
        record=job.record,
        model=job.model,
        arm=job.arm,
        seed=job.seed,
        pictures=task.pictures,
        channel_bits=tuple(fmean(column) for column in zip(*(row["channel_bits"] for row in coded), strict=True)),
        k_counts=tuple(sum(column) for column in zip(*(row["k_counts"] for row in coded), strict=True)),
        z_bpp=fmean(row["z_bpp"] for row in coded),
        set_aside={row["image"]: row["fault"] for row in rows if "fault" in row},
    )


def _missing(job: Job, task: Task, point: Point | None, journal: Journal, kept: Mapping[str, Path]) -> list[Unit]:
    """The units of a job that are left: images without a row, and shown ones without their picture."""
    units = []
    for name in task.names:
        row = journal.rows.get((task.key(job), name), {})
        wanted = str(kept[name].resolve()) if name in kept else ""
        faulty = "fault" in row or (point is not None and name in point.set_aside)
        measured = point is not None or faulty or {*_FIGURES, *_STATISTICS} <= row.keys()
        if not measured or (wanted and not faulty and not kept[name].exists()):
            units.append(Unit(job, name, wanted))
    return units


def _require_known(show: Sequence[str], names: Sequence[str]) -> None:
    for name in show:
        if name not in names:
            alike = [one for one in names if Path(one).name == Path(name).name]
            near = alike or difflib.get_close_matches(name, names, 1) or names
            raise UsageError(f"evaluate.show names no image: '{name}'", hint=f"there is '{near[0]}'")


def _keep_originals(out: Path, show: Sequence[str], task: Task) -> dict[str, str]:
    """Write the originals of the shown images; their paths by name."""
    folder = beside(out, ".pictures") / f"original-{task.pictures[:8]}"
    paths = {name: _png(folder, name) for name in show}
    for name, path in paths.items():
        if not path.exists():
            _write_png(images.read(task.folder / name), path)
    return {name: _relative(path, out) for name, path in paths.items()}


def _kept(out: Path, job: Job, task: Task, show: Sequence[str]) -> dict[str, Path]:
    """Where the decoded pictures of a job are kept, by image."""
    digest = hashlib.sha256(f"{job.model} {job.record} {task.pictures}".encode()).hexdigest()
    folder = file_safe(f"{label(job.checkpoint)}-{job.quantizer}-{digest[:8]}")
    return {name: _png(beside(out, ".pictures") / folder, name) for name in show}


def _png(folder: Path, name: str) -> Path:
    """The PNG of an image: its name, .png behind it even where that is its ending, so that no two are one."""
    return folder / f"{name}.png"


def _relative(path: Path, out: Path) -> str:
    return path.relative_to(out.parent).as_posix()


def _there(paths: Mapping[str, str], out: Path) -> dict[str, str]:
    return {name: path for name, path in paths.items() if (out.parent / path).exists()}


def _write_png(picture: NDArray[np.uint8], path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    write_whole(path, data.getvalue())
