"""How a base model codes as it is: one line before anything is built on it, so that a wrong checkpoint shows."""

from __future__ import annotations

import math

import numpy as np

from lic_dist import images
from lic_dist.building.calibrate import measure, one_thread
from lic_dist.building.job import Job
from lic_dist.building.latents import encode, view
from lic_dist.building.records import analytic_record

LOOKED_AT = 8  # crops
LEAST_PSNR = 15.0  # dB; what is trained for photos lies above it at every lambda of CompressAI's


@one_thread()
def base_line(job: Job) -> str:
    """Bits a pixel and PSNR in dB of SQ on the first crops, held-out ones if there are any; a warning if they are bad.

    Crops that cannot be read are left out: a build counts them. Empty where none can.
    """
    plan, parent = job.plan, job.parent
    training = plan.num_samples - plan.num_held_out
    first = training if plan.num_held_out else 0  # the plan's order: training samples first
    crops = [plan.crops[number] for number in range(first, min(plan.num_samples, first + LOOKED_AT))]
    pixels, status = images.read_crops(job.images.path, crops, job.images.crop)
    if not (status == 0).any():
        return ""
    samples, overflow = encode(parent.model, pixels[status == 0], plan.batch)
    kind = "held-out " if plan.num_held_out else ""
    of = f"base {parent.source}, SQ, {len(samples)} {kind}crops"
    if overflow.any():
        return f"{of}: latents that are not finite or overflow\nwarning: is this the checkpoint of a trained model?"
    record = analytic_record(parent, "sq", 1, 1.0, 1.0, np.ones(parent.spec.M, np.float32))
    found = measure(parent, record, samples, view(parent.model, samples.y, samples.z, plan.batch))
    psnr = -10 * math.log10(found.mse)
    line = f"{of}: {found.bpp:.3f} bpp, {psnr:.2f} dB"
    if psnr < LEAST_PSNR:
        line += f"\nwarning: below {LEAST_PSNR:.0f} dB: is it trained, and for pictures in [0, 1]?"
    return line
