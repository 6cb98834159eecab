"""Successive coding: code each image, then its decoded picture, and so on, to measure how a codec drifts.

    {"name": .., "points": [{"checkpoint": .., "quantizer": .., "bpp": [..], "psnr": [..], "psnr_previous": [..],
                             "images": [{"image": .., "bpp": [..], "psnr": [..], "psnr_previous": [..]}, ..]}, ..]}

Each list has one number for each generation: bpp, PSNR in dB against the original (`psnr`) and against the picture that
was coded (`psnr_previous`). Those of a point are means over its images. A PSNR that is not finite, because nothing
changed any more, is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lic_dist.codec.codec import ImageCodec
from lic_dist.config import Experiment, need
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.jobs import Job, Task
from lic_dist.evaluation.journal import Journal, Key, beside
from lic_dist.evaluation.metrics import psnr8
from lic_dist.evaluation.results import write_whole
from lic_dist.evaluation.run import Coded, Row, Unit, code, measure_image, write_png
from lic_dist.models.names import label

FIGURES = ("bpp", "psnr", "psnr_previous")


@dataclass(frozen=True)
class Generations:
    """One checkpoint with one quantizer over a set of images, coded successively; rows as in the module's docstring."""

    checkpoint: str
    quantizer: str
    arm: str
    lmbda: float
    record: str
    model: str
    pictures: str
    images: tuple[Row, ...]
    set_aside: dict[str, str] = field(default_factory=dict)

    def means(self) -> dict[str, list[float | None]]:
        """Return the means over the images, one number for each generation; None where one is not finite."""
        columns = {name: zip(*(row[name] for row in self.images), strict=True) for name in FIGURES}
        return {name: [None if None in row else fmean(row) for row in rows] for name, rows in columns.items()}


def evaluate_generations(experiment: Experiment, count: int, keep: Path | None = None) -> Path:
    """Code every image `count` times with each checkpoint and quantizer; return the result file, with a plot beside it.

    A run is resumed as by `evaluate` and raises the same errors. Stored rows of more than `count` generations are cut.
    `keep` is a folder for what was coded, the pictures of generation 0, which are the originals, to `count` - 1, as
    PNG: of `train/a.jpg` they are `train/g0/a.jpg.png`, `train/g1/a.jpg.png`, .. A cache that is built of it has the
    latents of generations 1 to `count`.

    Raises:
        UsageError: files in blocks; `keep` with several checkpoints or quantizers, whose pictures would differ.
    """
    if need(experiment.evaluate, "evaluate").blocks:
        raise UsageError("generations are of whole pictures, not of files in blocks", hint="leave out evaluate.blocks")
    task = Task.of(experiment)
    if not task.jobs:
        raise UsageError("nothing to code again: anchors are not", hint="name evaluate.checkpoints, or a model")
    if keep is not None:
        if len(task.jobs) > 1:
            said = "; ".join(map(str, task.jobs))
            raise UsageError(f"pictures of one checkpoint and quantizer are kept, not of {said}", hint="name one")
        task.require_outside(keep)
    out = beside(need(experiment.evaluate, "evaluate").out, ".generations.json")
    task.require_outside(out)
    with Journal.of(out) as journal:
        stored = read_generations(out)
        known = {(Key.of(point), row["image"]): row for point in stored for row in point.images}
        known |= {(Key.of(point), name): _fault(name, why) for point in stored for name, why in point.set_aside.items()}
        known |= journal.rows
        others = task.others(stored)
        points: dict[Job, Generations | None] = dict.fromkeys(task.jobs)
        units = [
            Unit(job, name)
            for job in task.jobs
            for name in task.names
            if not _is_complete(known.get((task.key(job), name)), count)
            or (keep is not None and not all(path.exists() for path in _kept(keep, name, count)))
        ]

        def finish(jobs: Sequence[Job]) -> None:
            rows = known | journal.rows
            for job in jobs:
                points[job] = _point(job, task, [_truncated(rows[task.key(job), name], count) for name in task.names])
            left = {task.key(job) for job, done in points.items() if not done}
            unfinished = [point for point in stored if Key.of(point) in left]
            _write(out, experiment.name, [*(point for point in points.values() if point), *unfinished, *others])

        code(task, units, journal, partial(_code_again, count, keep and keep.resolve()), finish)
        for job, point in points.items():
            if point is not None and not point.images:
                image, reason = next(iter(point.set_aside.items()))
                raise LicError(f"no image can be coded with {job}: {image}: {reason}")
        journal.settle(task.named)
    return out


def read_generations(path: Path) -> tuple[Generations, ...]:
    """Return the points of a file; none where there is no file yet.

    Raises:
        LicError: it cannot be read, or is no file of generations.
    """
    if not path.exists():
        return ()
    try:
        points = json.loads(path.read_text())["points"]
        return tuple(
            Generations(**{k: v for k, v in point.items() if k not in FIGURES} | {"images": tuple(point["images"])})
            for point in points
        )
    except OSError as error:
        raise LicError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LicError(f"{path} has no generations", hint="remove it, or give evaluate another 'out'") from None


def summary(path: Path) -> dict[str, Any]:
    """Print the first and the last generation of each point; return the means of all."""
    points = [point for point in read_generations(path) if point.images]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("quantizer", "arm", "lmbda", "generation", "bpp", "PSNR dB", "to the one before"):
        table.add_column(head, justify="left" if head in ("quantizer", "arm") else "right")
    for point in points:
        means = point.means()
        for number in sorted({0, len(means["bpp"]) - 1}):
            bpp, psnr, previous = (means[name][number] for name in FIGURES)
            shown = (f"{bpp:.4f}", *("" if value is None else f"{value:.3f}" for value in (psnr, previous)))
            table.add_row(point.quantizer, point.arm, f"{point.lmbda:g}", str(number + 1), *shown)
    Console().print(table)
    print(path)
    figures = [{k: v for k, v in asdict(point).items() if k != "images"} | point.means() for point in points]
    return {"out": str(path), "points": figures}


def _kept(keep: Path, name: str, count: int) -> list[Path]:
    """Return the files of an image's generations."""
    path = keep / name
    return [path.parent / f"g{generation}" / f"{path.name}.png" for generation in range(count)]


def _code_again(count: int, keep: Path | None, codec: ImageCodec, image: NDArray[np.uint8], name: str) -> Coded:
    """Code an image `count` times in succession; return its row, the last decoded picture and its file."""
    row: dict[str, Any] = {"image": name, "height": len(image), "width": image.shape[1]}
    row |= {figure: [] for figure in FIGURES}
    picture, data = image, b""
    for path in _kept(keep, name, count) if keep else [None] * count:
        if path:
            write_png(picture, path)
        measured = measure_image(codec, picture, name)
        previous, picture, data = picture, measured.picture, measured.data
        for figure, value in zip(
            FIGURES, (measured.result.bpp, psnr8(image, picture), psnr8(previous, picture)), strict=True
        ):
            row[figure].append(value if math.isfinite(value) else None)
    return row, picture, data


def _point(job: Job, task: Task[Job], rows: Sequence[Row]) -> Generations:
    return Generations(
        checkpoint=job.checkpoint,
        quantizer=job.quantizer,
        arm=job.arm,
        lmbda=job.lmbda,
        record=job.record,
        model=job.model,
        pictures=task.pictures,
        images=tuple(row for row in rows if "fault" not in row),
        set_aside={row["image"]: row["fault"] for row in rows if "fault" in row},
    )


def _write(out: Path, name: str, points: Sequence[Generations]) -> None:
    content = {"name": name, "points": [asdict(point) | point.means() for point in points]}
    write_whole(out, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    if drawn := [point for point in points if point.images]:
        from lic_dist.evaluation.picture import drift_plot  # imported here, because workers do not draw

        several = len({point.lmbda for point in points}) > 1
        labels = [
            f"{point.arm} {point.quantizer}" + (f", {label(point.checkpoint)}" if several else "") for point in drawn
        ]
        drift_plot(zip(labels, (point.means() for point in drawn), strict=True), out.with_suffix(".png"))


def _is_complete(row: Row | None, count: int) -> bool:
    """Return whether a row has figures of `count` generations, or a fault."""
    return row is not None and ("fault" in row or all(len(row.get(name, ())) >= count for name in FIGURES))


def _truncated(row: Row, count: int) -> Row:
    return row if "fault" in row else {**row, **{name: row[name][:count] for name in FIGURES}}


def _fault(name: str, reason: str) -> Row:
    """Return the row of an image that could not be coded."""
    return {"image": name, "fault": reason}
