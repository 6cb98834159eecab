"""What the device takes of a job: the search, a batch from pixels to rows, a sum of gradients, and steps of training.

Every function has a budget of seconds and runs on any device; on a CPU with a few small samples, so that its code runs
without a GPU. A call is timed with the device's queue empty before and after it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lic_dist.benchmarks import data
from lic_dist.benchmarks.speed import SEARCHES, record
from lic_dist.benchmarks.training import training_step
from lic_dist.codec import walk
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import QUANTILES, freeze_all_but
from lic_dist.models.stages import only_side, only_stage, rounded_z, to_input
from lic_dist.quantization import tensors
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.quantize import search as on_cpu
from lic_dist.quantization.rates import search_rates
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.reference import inverse
from lic_dist.quantization.trellis import Trellis
from lic_dist.training.base import RelaxedModel
from lic_dist.training.capture import Replay
from lic_dist.training.loop import take_step
from lic_dist.training.samples import Batch

MOST = 200  # calls of which a median is taken
STEP, PRICE = 0.49, 0.6  # of the Gaussian that is searched: two bits a latent


@dataclass(frozen=True)
class Extent:
    """How much is measured at once: lanes and steps of the search, crops of a batch and their side in pixels."""

    lanes: int
    steps: int
    crops: int
    side: int


ON_GPU, ON_CPU = Extent(192 * 64, 256, 64, 256), Extent(2, 3, 2, 64)


def seconds(call: Callable[[], Any], device: torch.device, budget: float) -> float:
    """Return the median seconds of a call, after one to warm up, repeated within the budget but twice at least."""
    call()
    taken: list[float] = []
    ends = time.monotonic() + budget
    while len(taken) < 2 or (time.monotonic() < ends and len(taken) < MOST):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return median(taken)


def synchronize(device: torch.device) -> None:
    """Wait for what a device has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def why_no_triton(device: torch.device) -> str:
    """Return why Triton's kernels do not run on a device; empty where they do, by its interpreter too."""
    if not find_spec("triton"):
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a GPU, or TRITON_INTERPRET=1"
    return ""


def search(device: torch.device, extent: Extent, budget: float) -> dict[str, Any]:
    """Return by trellis and arm (the CPU's search, the torch one, Triton's) latents a second, and whether k and costs
    are equal to the CPU's. A GPU that has no time left has no row of the next trellis.
    """
    samples, ends, found = data.gaussian(extent.lanes, extent.steps), time.monotonic() + budget, {}
    for number, trellis in enumerate(SEARCHES):
        left = max(0.0, ends - time.monotonic())
        if number and not left and device.type == "cuda":
            break
        one = record("tcq", trellis, STEP, PRICE, data.gaussian(48, 64))
        arms = _searches(one, trellis, samples, device)
        expected = arms["cpu"]()
        share = left / (len(SEARCHES) - number) / (2 * len(arms))  # the other half is for compiling
        row: dict[str, Any] = {}
        for arm, call in arms.items():
            k, cost = (values.cpu() for values in call())
            equal = torch.equal(k, expected[0]) and torch.equal(cost, expected[1])
            spent = seconds(call, torch.device("cpu") if arm == "cpu" else device, share)
            row[arm] = {"equal": equal, "latents_per_second": extent.lanes * extent.steps / spent}
        found[trellis.name] = row
    return found


def _searches(
    one: QuantizerRecord, trellis: Trellis, samples: data.LatentSamples, device: torch.device
) -> dict[str, Callable[[], Any]]:
    r, level = torch.from_numpy(samples.r), torch.from_numpy(samples.level)
    weight, rates = torch.from_numpy(one.lane_weights(len(r))), search_rates(one.y_tables)
    held = tensors.DeviceRates.of(rates, device, trellis=True)
    arguments: Any = (*(values.to(device) for values in (r, level, weight)), float(inverse(one.step)), held, trellis)
    arms: dict[str, Callable[[], Any]] = {
        "cpu": lambda: on_cpu(r, level, weight, one.step, rates, trellis),
        "torch": lambda: tensors.search(*arguments),
    }
    if not why_no_triton(device):
        from lic_dist.quantization import triton_search

        arms["triton"] = lambda: triton_search.search(*arguments)
    return arms


def batch(
    loaded: Checkpoint, one: QuantizerRecord, device: torch.device, extent: Extent, budget: float
) -> dict[str, Any]:
    """Return crops a second from uint8 pixels in the CPU's memory to k there, with nothing else leaving the device, and
    the seconds of each part.
    """
    codec, quantizer = loaded.codec, Quantizer(one)
    pixels = _pixels(extent)
    pixels = pixels.pin_memory() if device.type == "cuda" else pixels

    @torch.no_grad()
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        y = codec.analyse(x).half()
        return y.float(), only_side(codec).dequantize(rounded_z(codec, y.float()))

    @torch.no_grad()
    def scales(y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        stage = only_stage(codec, (z_hat,))
        return stage.elements.lanes(y - stage.means), walk.levels(stage, "nearest")

    x = to_input(pixels, device)
    y, z_hat = encode(x)
    r, level = scales(y, z_hat)
    k = quantizer.quantize(r, level)

    def whole() -> Any:
        r, level = scales(*encode(to_input(pixels, device)))
        k = quantizer.quantize(r, level)
        quantizer.rows(k, level)
        return k.cpu()

    calls: dict[str, Callable[[], Any]] = {
        "all": whole,
        "pixels to the device": lambda: to_input(pixels, device),
        "encode: g_a, h_a": lambda: encode(x),
        "scale levels: h_s": lambda: scales(y, z_hat),
        "search": lambda: quantizer.quantize(r, level),
        "rows": lambda: quantizer.rows(k, level),
        "k from the device": lambda: k.cpu(),
    }
    spent = {name: seconds(call, device, budget / len(calls)) for name, call in calls.items()}
    return {"crops_per_second": extent.crops / spent["all"], "crops": extent.crops, "seconds": spent}


def all_reduce(numbers: int, device: torch.device, budget: float) -> dict[str, Any]:
    """Return the seconds of an all_reduce of float32 numbers by one rank, NCCL on a GPU, else gloo."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        values = torch.ones(numbers, device=device)
        spent = seconds(lambda: dist.all_reduce(values), device, budget)
        equal = bool((values == 1).all())
    finally:
        dist.destroy_process_group()
    return {"backend": backend, "numbers": numbers, "seconds": spent, "unchanged": equal}


def training(
    loaded: Checkpoint, one: QuantizerRecord, device: torch.device, extent: Extent, budget: float
) -> dict[str, float]:
    """Return steps a second: of retraining the decoder in float32 and bf16, and of base training, the same as graphs.

    Finetuning has no graphs. The samples are on the device already. Graphs need a GPU.
    """
    samples = _samples(loaded, one, device, extent)
    x = to_input(samples.pixels, device)
    graphs = (False, True) if device.type == "cuda" else (False,)
    share = budget / 2 / (1 + len(graphs)) / 2  # of two precisions; the other half is for what comes before
    found = {}
    for bf16 in (False, True):
        precision = "bf16" if bf16 else "float32"
        step = training_step(loaded, one, "decoder", device, bf16)
        found[f"decoder, {precision}"] = 1 / seconds(partial(step, samples), device, share)
        for graph in graphs:
            name = f"base training, {precision}{', one graph a step' * graph}"
            found[name] = 1 / seconds(_base_step(loaded, x, bf16, graph), device, share)
    return found


def _base_step(loaded: Checkpoint, x: Tensor, bf16: bool, graph: bool) -> Callable[[], Any]:
    relaxed = RelaxedModel(loaded.model, "noise", bf16).train()
    names = tuple(name for name, _ in loaded.model.named_parameters() if not name.endswith(QUANTILES))
    trained = freeze_all_but(loaded.model, names)
    optimizer = torch.optim.Adam(trained, lr=1e-6)

    def add(part: Tensor) -> Tensor:
        x_hat, bits = relaxed(part)
        loss = loaded.spec.lmbda * 255**2 * (x_hat - part).square().mean() + bits / part[:, 0].numel()
        loss.backward()
        return loss.detach()

    replay = Replay(add, x.device) if graph else None

    def step() -> None:
        optimizer.zero_grad(set_to_none=not graph)
        loss = replay(x, lambda: optimizer.zero_grad(set_to_none=False)) if replay else add(x)
        take_step(float(loss), trained, optimizer, clip=1.0)

    return step


@torch.no_grad()
def _samples(loaded: Checkpoint, one: QuantizerRecord, device: torch.device, extent: Extent) -> Batch:
    """Return a batch of the decoder's training, eight crops at most, on the device."""
    codec, quantizer, pixels = loaded.codec, Quantizer(one), _pixels(extent)[:8]
    x = to_input(pixels, device)
    y = codec.analyse(x)
    z = rounded_z(codec, y)
    stage = only_stage(codec, (only_side(codec).dequantize(z),))
    r = stage.elements.lanes(y - stage.means)
    k = quantizer.quantize(r, walk.levels(stage, "nearest"))
    none = torch.empty(0, device=device)
    level, active = (lanes.reshape(y.shape) for lanes in (quantizer.unspread(k), quantizer.active(k)))
    number = torch.arange(len(x), device=device)
    return Batch(number, pixels.to(device), none, none, z.short(), k.reshape(y.shape), level, active)


def _pixels(extent: Extent) -> Tensor:
    """Return crops of a smooth picture with noise, uint8 [crops, 3, side, side]."""
    generator = np.random.default_rng(0)
    place = np.mgrid[: extent.side, : extent.side].sum(0) / 40
    waves = np.sin(place * generator.uniform(0.5, 3, (extent.crops, 3, 1, 1)))
    noise = generator.normal(0, 6, (extent.crops, 3, extent.side, extent.side))
    return torch.from_numpy(np.clip(128 + 80 * waves + noise, 0, 255).astype(np.uint8))
