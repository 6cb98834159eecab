"""One line on how a base model codes as it is, printed before anything is built on it, so that a wrong checkpoint
shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from lic_dist.building.calibrate import measure
from lic_dist.building.job import Job
from lic_dist.building.latents import encode, inputs_of
from lic_dist.building.records import analytic_record
from lic_dist.building.threads import one_thread
from lic_dist.data import images
from lic_dist.data.photo import PhotoError
from lic_dist.data.source import PhotoSource
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.text import counted

CROPS, MIDDLE = 8, 256  # crops; pixels a side of the middle of a picture
LEAST_PSNR = 15.0  # dB; models trained for photos exceed it at every lambda of CompressAI's


def base_summary(job: Job) -> str:
    """Return bits a pixel and PSNR in dB of SQ on the first crops (held-out ones if there are any), with a warning if
    bad.

    Crops that cannot be read are left out; a build counts them. The line is empty where no crop can be read.
    """
    plan = job.plan
    training = plan.num_samples - plan.num_held_out
    first = training if plan.num_held_out else 0  # a plan has its training samples first
    crops = [plan.crops[number] for number in range(first, min(plan.num_samples, first + CROPS))]
    pixels, status = images.read_crops(job.source, crops, job.images.crop)
    readable = pixels[status == 0]
    what = counted(len(readable), "held-out crop" if plan.num_held_out else "crop")
    return _summary(job.parent, readable, what, plan.batch)


def base_summary_of_pictures(parent: Checkpoint, source: PhotoSource, names: Sequence[str]) -> str:
    """Return the same for the middles of the first pictures of a source, which an evaluation is going to code."""
    pictures = []
    for name in names[:CROPS]:
        with suppress(PhotoError):  # the evaluation sets it aside, with its reason
            pictures.append(images.picture(source, name))
    multiple = parent.codec.strides.multiple
    side = min(MIDDLE, *(min(picture.shape[:2]) for picture in pictures)) // multiple * multiple if pictures else 0
    if not side:
        return ""
    pixels = [images.middle(picture, side, side).transpose(2, 0, 1) for picture in pictures]
    return _summary(parent, np.stack(pixels), f"the middle {side}x{side} of {counted(len(pixels), 'picture')}", 1)


@one_thread()
def _summary(parent: Checkpoint, pixels: NDArray[np.uint8], what: str, batch: int) -> str:
    """Return the line for pixels uint8 [n, 3, size, size]."""
    if not len(pixels):
        return ""
    samples, overflow = encode(parent.model, pixels, batch)
    of = f"base {parent.source}, SQ, {what}"
    if overflow.any():
        return f"{of}: latents that are not finite or overflow\nwarning: is this the checkpoint of a trained model?"
    record = analytic_record(parent, "sq", 1, 1.0, 1.0, np.ones(parent.codec.channels, np.float32))
    found = measure(parent, record, samples, inputs_of(parent.model, samples.y, samples.z, batch))
    psnr = -10 * math.log10(found.mse)
    line = f"{of}: {found.bpp:.3f} bpp, {psnr:.2f} dB"
    if psnr < LEAST_PSNR:
        line += f"\nwarning: below {LEAST_PSNR:.0f} dB: is it trained, and for pictures in [0, 1]?"
    return line
