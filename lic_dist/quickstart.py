"""The quick start: the whole main job on a handful of photos, offline, in a few minutes on two cores.

    photos -> crops -> frozen encoder -> calibrated TCQ -> cache (Ray) -> retrained decoder -> real bits on test photos

The test photos are seen by nothing before the closing table: (g, D) are calibrated, and the best weights chosen, on
held-out photos of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lic_dist import config, images
from lic_dist.building.build import build
from lic_dist.building.calibrate import calibrate
from lic_dist.building.job import open_cache
from lic_dist.building.pilot import calibration_samples
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.records import compressai_record
from lic_dist.errors import LicError
from lic_dist.evaluation.metrics import psnr8
from lic_dist.evaluation.plots import Picture, comparison_sheet, training_plot
from lic_dist.manifest import scan
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.finetune import finetune
from lic_dist.training.log import read_log

BASE = "base-small"
EMBEDDED = {  # the photographs that scikit-image ships; the two of the stereo pair stay on one side
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
    ),
    "held_out": ("coffee.png", "rocket.jpg"),
    "test": ("chelsea.png",),
}
MOST_TESTED = 8  # of a user's photos
CROP, VARIATIONS, STEPS = 256, 16, 200  # pixels of a crop, crops of a photo, steps of the decoder's retraining


@dataclass(frozen=True)
class Row:
    """One line of the closing table: means over the test photos, real bits, 8-bit PSNR."""

    name: str
    bpp: float
    psnr: float
    L: float


def quickstart(out: Path, photos: Path | None, engine: str) -> dict[str, Any]:
    """Run the main job into `out`; returns the closing figures.

    Raises:
        LicError: fewer than four usable photos, or `out` is of a quick start with others.
    """
    console = Console()
    console.print(f"[bold]1/4[/] photos: {photos or 'embedded'}")
    _lay_out(_split(photos), out)
    experiment = _experiment(out, engine)
    (out / "experiment.yaml").write_text(
        yaml.safe_dump(experiment.model_dump(mode="json", exclude_none=True), sort_keys=False)
    )
    console.print("[bold]2/4[/] calibrate TCQ-8 and build the latent cache")
    report = build(experiment)
    report.require_tolerated()
    console.print(f"      {report.samples} crops, {report.shards_built} of {report.shards} shards built now")
    console.print("[bold]3/4[/] retrain the decoder on the quantized latents")
    path = finetune(experiment)
    console.print("[bold]4/4[/] real bitstreams of the test photos")
    figures = _close(experiment, path, out, console)
    console.print(f"cache, checkpoint, experiment.yaml, plot and pictures: {out.resolve()}")
    return figures


def _experiment(out: Path, engine: str) -> config.Experiment:
    return config.Experiment(
        name="quickstart",
        model=config.Model(checkpoint=BASE),
        images=config.Images(path=out / "photos", crop=CROP, variations=VARIATIONS, held_out="held_out", tolerate=0.5),
        quantizer=config.Quantizer(name="tcq", states=8, group="tcq8", pilot=96, calibration=32),
        cache=config.Cache(path=str(out / "tcq8.zarr"), shard=32),
        engine=config.Engine(name=engine, encoders=1, searchers=1, readers=1, num_cpus=3),
        finetune=config.Finetune(
            recipe="decoder", steps=STEPS, batch=4, lr=1e-5, evaluate_every=25, out=out / "finetuned"
        ),
        evaluate=config.Evaluate(
            images=out / "test",
            checkpoints=(str(out / "finetuned"),),
            quantizers=("tcq8",),
            out=out / "evaluation.json",
        ),
    )


def _split(source: Path | None) -> dict[str, dict[str, Path]]:
    """The photos of each part, by the name they are to have: the embedded ones, or a user's, by digest."""
    if source is None:
        import skimage

        shipped = Path(skimage.__file__).parent / "data"
        return {part: {file: shipped / file for file in files} for part, files in EMBEDDED.items()}
    usable = [photo for photo in scan(source) if not photo.fault and min(photo.width, photo.height) >= CROP]
    unique = sorted({photo.digest: photo for photo in usable}.items())
    if len(unique) < 4:
        raise LicError(
            f"{source} has {len(unique)} usable photos", hint=f"give four or more of {CROP} pixels or larger"
        )
    few = min(MOST_TESTED, math.ceil(len(unique) / 10))
    parts = {"test": unique[:few], "held_out": unique[few : 2 * few], "train": unique[2 * few :]}
    named = {}
    for part, photos in parts.items():
        files = {digest: (source / photo.path).resolve() for digest, photo in photos}
        named[part] = {f"{digest[:12]}{file.suffix}": file for digest, file in files.items()}
    return named


def _lay_out(parts: dict[str, dict[str, Path]], out: Path) -> None:
    """Link the photos into out/photos/train, out/photos/held_out and out/test.

    Raises:
        LicError: other photos lie there already; nothing is ever removed.
    """
    for part, files in parts.items():
        folder = out / "test" if part == "test" else out / "photos" / part
        folder.mkdir(parents=True, exist_ok=True)
        strange = {path.name for path in folder.iterdir()} - set(files)
        if strange:
            raise LicError(f"{folder} holds other photos, such as {min(strange)}", hint="give another --out")
        for name, file in files.items():
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(file)


def _close(experiment: config.Experiment, finetuned: Path, out: Path, console: Console) -> dict[str, Any]:
    base = checkpoints.load(BASE)
    retrained = checkpoints.load(str(finetuned))
    cache = open_cache(experiment)
    tcq = QuantizerRecord.from_json(cache.record_json("tcq8"))
    section = config.Quantizer(name="sq", group="sq-adapted", pilot=96, calibration=32)
    adapted = calibrate(base, section, *calibration_samples(cache, section))
    arms: list[tuple[str, Checkpoint, QuantizerRecord]] = [
        ("SQ", base, adapted),
        ("TCQ", base, tcq),
        ("TCQ retrained", retrained, QuantizerRecord.from_json(retrained.quantizers["tcq8"])),
        ("SQ, CompressAI's tables", base, compressai_record(base)),
    ]
    names = images.find(out / "test")
    originals = [images.read(out / "test" / name) for name in names]
    rows, shown = [], [Picture("original", "", originals[0])]
    for name, model, record in arms:
        codec = ImageCodec(model.model, record)
        results = []
        for image in originals:
            encoded = codec.encode(image)
            decoded = codec.decode(encoded.data)
            if (decoded != codec.picture(encoded)).any():
                raise LicError(f"{name}: the decoder's picture differs from the encoder's")
            results.append((encoded.coded_bits / image[..., 0].size, psnr8(image, decoded), decoded, image))
        rows.append(_row(name, model.spec.lmbda, results))
        if name != arms[-1][0]:
            shown.append(Picture(name, f"{results[0][0]:.3f} bpp  {results[0][1]:.2f} dB", results[0][2]))
    table = Table(title=f"{len(names)} test photo{'s' * (len(names) > 1)}, real bits, lambda {base.spec.lmbda}")
    for column in ("", "bpp", "PSNR dB", "L", "L against SQ"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows[:3]:
        change = f"{100 * (row.L / rows[0].L - 1):+.2f} %"
        table.add_row(row.name, f"{row.bpp:.4f}", f"{row.psnr:.3f}", f"{row.L:.4f}", change)
    console.print(table)
    plain = rows[3]
    console.print(
        f"SQ has tables adapted to the photos, as TCQ has; with {plain.name[4:]}: {plain.bpp:.4f} bpp, "
        f"{plain.psnr:.3f} dB, L {plain.L:.4f}."
    )
    comparison_sheet(shown, out / "pictures.png")
    training_plot(read_log(config.need(experiment.finetune, "finetune").out / "log.jsonl"), out / "training.png")
    return {"rows": [row.__dict__ for row in rows], "images": names, "out": str(out)}


def _row(name: str, lmbda: float, results: list[Any]) -> Row:
    losses = [lmbda * 255**2 * 10 ** (-psnr / 10) + bpp for bpp, psnr, _, _ in results]
    return Row(name, fmean(one[0] for one in results), fmean(one[1] for one in results), fmean(losses))
