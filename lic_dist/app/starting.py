"""`lic-dist init`: write a first experiment file for given photos and a checkpoint, with comments."""

from __future__ import annotations

import math
import os
from pathlib import Path

from lic_dist.building.latents import in_one_stage
from lic_dist.config.reference import yaml_text
from lic_dist.data import images, photo_files
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.text import counted

HELD_OUT_NAMES = ("valid", "val", "validation", "held_out", "heldout")
SAMPLES, HELD_OUT = 320, 48  # crops that suffice for calibration: in all, and held-out ones among them
MEASURED = 200  # about how many photos are measured

TEMPLATE = """\
# An experiment over {photos}: {count} photos, {sizes}. `lic-dist config explain KEY` says more of each key,
# `lic-dist config show --all {file}` lists all there are. Relative paths begin in the folder you type in.
#   lic-dist cache plan {file}     # what it will take: samples, bytes, time; builds nothing
#   lic-dist run {file}            # everything, in order; stopped, it goes on
name: {name}

# {model}.
model: {{checkpoint: {checkpoint}{given}}}

images:
  path: {path}
  crop: {crop}          # pixels: side of a crop, a multiple of 64; smaller photos are set aside
  variations: {variations}      # crops taken of each photo; {count} photos make {crops} crops
  held_out: {held_out}    # {held_out_why}

# Trellis-coded quantization; its group is named tcq8 by itself. sq, deadzone and rdoq are the others. The last two keys
# serve decoders that flatten small latents (docs/measurements.md, Search and decoder).
quantizer: {{name: tcq, states: 8, weights: rounding, spread: {spread}}}

cache: {{path: {cache}}}

# Processes on this machine; `name: ray` is for a cluster.
engine: {{name: local, encoders: 1, searchers: {searchers}, readers: 1}}

finetune:
  recipe: decoder   # trains g_s; decoder+hyper trains h_s too
  steps: 900
  batch: 8          # crops of a step
  lr: 3.0e-5
  out: {finetuned}

{evaluate}"""

EVALUATE = """\
evaluate:
  images: {test}
  checkpoints: {{{checkpoint}: [sq, {record}], {finetuned}: [carried]}}  # before and after
  out: {out}

report: {{anchors: [base sq], out: {report}}}
"""


def write(
    folder: Path,
    photos: Path,
    checkpoint: str,
    test: Path | None = None,
    architecture: str | None = None,
    lmbda: float | None = None,
) -> str:
    """Write folder/experiment.yaml; return a text that says what it was made from and what to do next.

    The photos are counted, about 200 of them are measured, and the checkpoint is loaded. Paths are written as given.

    Raises:
        UsageError: the file exists already, or the checkpoint needs its architecture or lmbda given.
        LicError: there are no photos, none has 64x64 pixels, or there is no checkpoint.
    """
    file = folder / "experiment.yaml"
    if file.exists():
        raise UsageError(f"{file} is there already", hint="give another DIR, or remove it; nothing is overwritten")
    found = photo_files.search(photos)
    found.tell()
    names = found.names
    if test is not None:
        photo_files.search(test)
    base = checkpoints.load(checkpoint, architecture, lmbda)
    checkpoints.check_agrees(base.spec, architecture=architecture, lmbda=lmbda)
    spec = base.spec
    crop, sizes = _crop(photos, names)
    held_out, why, training, judged = _held_out(names)
    variations = max(1, math.ceil((SAMPLES - HELD_OUT) / max(1, training)), math.ceil(HELD_OUT / max(1, judged)))
    given = "".join(
        f", {key}: {yaml_text(value)}" for key, value in (("architecture", architecture), ("lmbda", lmbda)) if value
    )
    carried = f", carries {', '.join(base.quantizers)}" if base.quantizers else ""
    finetuned, group = folder / "finetuned", folder / "cache.zarr" / "quantized" / "tcq8"
    evaluate = EVALUATE.format(
        test="kodak/" if test is None else yaml_text(str(test)),
        checkpoint=yaml_text(checkpoint),
        record=yaml_text(str(group)),
        finetuned=yaml_text(str(finetuned)),
        out=yaml_text(str(folder / "evaluation.json")),
        report=yaml_text(str(folder / "report")),
    )
    if test is None:
        commented = "".join(f"# {line}\n" if line else "#\n" for line in evaluate.splitlines())
        evaluate = (
            f"# Test pictures, which are none of the photos above: name their folder and take the # away.\n{commented}"
        )
    text = TEMPLATE.format(
        photos=photos,
        count=len(names),
        sizes=sizes,
        file=file,
        name=yaml_text(folder.resolve().name),
        model=f"{spec.architecture}, N {spec.N}, M {spec.M}, lambda {spec.lmbda}{carried}",
        checkpoint=yaml_text(checkpoint),
        given=given,
        path=yaml_text(str(photos)),
        crop=crop,
        variations=variations,
        spread=_spread(base, crop),
        crops=variations * len(names),
        held_out=held_out,
        held_out_why=why,
        cache=yaml_text(str(folder / "cache.zarr")),
        searchers=max(1, (os.cpu_count() or 1) // 2),
        finetuned=yaml_text(str(finetuned)),
        evaluate=evaluate,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with file.open("x", encoding="utf-8") as stream:
        stream.write(text)
    missing = "" if test is not None else "\nit measures nothing yet: name test pictures under 'evaluate' in it"
    return (
        f"{file}: {counted(len(names), 'photo')}, {spec.architecture}, lambda {spec.lmbda}{missing}\n"
        f"next: lic-dist cache plan {file}, then lic-dist run {file}"
    )


def _spread(base: Checkpoint, crop: int) -> str:
    """Return the best `quantizer.spread` that a model takes."""
    codec = base.codec
    positions, of_z = ((crop // stride,) * 2 for stride in (codec.strides.y, codec.strides.side))
    return "fitted" if codec.prior is None and in_one_stage(codec, positions, of_z) else "auto"


def _crop(photos: Path, names: list[str]) -> tuple[int, str]:
    """Return the largest crop of 256, 128 and 64 pixels that fits nine of ten photos, and their sizes in words."""
    sizes = []
    for name in names[:: max(1, len(names) // MEASURED)]:
        try:
            sizes.append(images.measure(images.contents(photos / name, name), name))
        except images.PhotoError:
            continue  # `cache scan` will name it
    shorter = sorted(min(size) for size in sizes)
    if not shorter or shorter[-1] < 64:
        raise LicError(f"{photos} has no photo that can be read and has 64x64 pixels", hint="see `lic-dist cache scan`")
    tenth_percentile = shorter[len(shorter) // 10]
    least, most = min(sizes), max(sizes)
    words = f"{least[0]}x{least[1]} to {most[0]}x{most[1]} pixels" if least != most else f"{least[0]}x{least[1]} pixels"
    return next((side for side in (256, 128) if side <= tenth_percentile), 64), words


def _held_out(names: list[str]) -> tuple[str, str, int, int]:
    """Return the value of images.held_out, its comment, and the numbers of training and held-out photos."""
    for folder in HELD_OUT_NAMES:
        if judged := sum(name.startswith(f"{folder}/") for name in names):
            return folder, "photos of this subfolder are judged on, never trained on", len(names) - judged, judged
    part = min(0.5, max(0.05, math.ceil(400 / len(names)) / 100))
    judged = round(part * len(names))
    return f"{part:g}", "part of the photos that is judged on, never trained on", len(names) - judged, judged
