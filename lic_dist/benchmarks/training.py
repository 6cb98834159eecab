"""`lic-dist bench training`: what a cache costs a training step, and what it saves, in tables and JSON.

Every figure is of one process and one thread of torch. The arms of a comparison run sections of steps in turn, each
from a new reader, so that none reads ahead while another is timed. Since machines drift, times are medians over the
rounds, and ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from lic_dist.benchmarks import building
from lic_dist.benchmarks.data import BASE
from lic_dist.benchmarks.reading import build_cache
from lic_dist.benchmarks.tables import machine, table
from lic_dist.building.latents import encode, quantizer_input
from lic_dist.building.threads import one_thread
from lic_dist.cache.order import Order
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import RECIPES, freeze_all_but, trainable
from lic_dist.models.stages import to_input
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.decoding import Decoding
from lic_dist.training.distortion import Distortion
from lic_dist.training.distributed import Ranks
from lic_dist.training.loop import take_step
from lic_dist.training.samples import Batch, Samples, ShuffledData, StreamedData

PARTS = ("feeding", "in-loop")
BATCH = 8
CPU = torch.device("cpu")
KEPT = 8  # batches of the arm that has its tensors in memory
MEMORY, RAM, STREAM = "tensors in memory", "samples in RAM", "stream of shards"

Step = Callable[[Batch], None]
Feed = Callable[[int], Generator[Batch, None, None]]  # the batches from a step on


@dataclass(frozen=True)
class Extent:
    """Crops of the cache, and steps of a section: untimed (until reading is as far ahead as it gets), and timed.

    Training uses no more samples than the timed steps take, so that these include the reading of every shard.
    """

    crops: int
    warm: int
    timed: int

    def part(self, cache: LatentCache) -> NDArray[np.int64]:
        """Return the numbers of the samples that are trained on."""
        return cache.indices(held_out=False)[: self.timed * BATCH]


FEEDING, IN_LOOP, QUICK = Extent(160, 4, 16), Extent(80, 2, 8), Extent(40, 1, 4)


def bench(parts: Sequence[str], images: Path | None, rounds: int, quick: bool) -> dict[str, Any]:
    """Run the parts (all of PARTS where none is named), print their tables, return their figures.

    `quick` takes fewer crops and steps. Raises UsageError for an unknown part.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"no part '{unknown[0]}' of this benchmark", hint=f"there are {', '.join(PARTS)}")
    console = Console()
    figures: dict[str, Any] = {"machine": machine(), "quick": quick}
    runs: dict[str, Callable[[], Any]] = {
        "feeding": lambda: feeding(images, QUICK if quick else FEEDING, rounds),
        "in-loop": lambda: in_loop(images, QUICK if quick else IN_LOOP, rounds),
    }
    for part in parts or PARTS:
        figures[part] = runs[part]()
        console.print(_TABLES[part](figures[part]))
    console.print(f"machine: {figures['machine']}")
    return figures


@one_thread()
def feeding(folder: Path | None, extent: Extent, rounds: int) -> dict[str, Any]:
    """Measure steps a second of the shipped model from samples decoded to RAM and from the shard stream, by recipe.

    `ratio` is relative to the steps a second from tensors already in memory.
    """
    figures: dict[str, Any] = {"batch": BATCH, "recipes": {}}
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name:
        cache = LatentCache.open(build_cache(folder, Path(name), extent.crops))
        figures["samples"] = len(extent.part(cache))
        record = QuantizerRecord.from_json(cache.record_json("tcq8"))
        feeds = _feeds(cache, Quantizer(record), extent.part(cache))
        for recipe in RECIPES:
            step = training_step(checkpoints.load(BASE), record, recipe)
            arms = {arm: (feed, step) for arm, feed in feeds.items()}
            seconds = _seconds(arms, extent, rounds, f"training steps, {recipe}")
            figures["recipes"][recipe] = {
                arm: {
                    "steps_per_second": 1 / float(np.median(one)),
                    "ratio": float(np.median(seconds[MEMORY] / one)),
                }
                for arm, one in seconds.items()
            }
    return figures


@one_thread()
def in_loop(folder: Path | None, extent: Extent, rounds: int) -> dict[str, Any]:
    """Compare a step from the shard stream with one that encodes and searches its crops first, by model.

    The step is that of recipe `decoder`. Quantizing in the loop overlaps nothing; its crops are in RAM, so their
    decoding and cropping are left out. Seconds a step: `in_loop`, its parts `encode` (g_a, h_a and h_s, which training
    runs again for its means), `search` and `step` (training alone), and `cache`. `speedup` is in_loop / cache, `bound`
    is (encode + search + step) / step, which a cache that costs nothing would reach, and `of_bound` is their quotient.
    """
    figures: dict[str, Any] = {"batch": BATCH, "recipe": "decoder", "models": {}}
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name:
        untrained = building.untrained(Path(name), building.N, building.M)
        for title, model in (("the shipped model", BASE), ("untrained mbt2018-mean", str(untrained))):
            parent = checkpoints.load(model)
            work = Path(name) / str(parent.spec.M)
            work.mkdir()
            cache = LatentCache.open(build_cache(folder, work, extent.crops, model))
            record = QuantizerRecord.from_json(cache.record_json("tcq8"))
            quantizer = Quantizer(record)
            feeds = _feeds(cache, quantizer, extent.part(cache))
            step = training_step(parent, record, figures["recipe"])
            quantizing = _QuantizeInLoop(parent.model, quantizer, step)
            arms: dict[str, tuple[Feed, Step]] = {
                "in_loop": (feeds[MEMORY], quantizing),
                "cache": (feeds[STREAM], step),
            }
            seconds = _seconds(arms, extent, rounds, f"training steps, {title}")
            encoding, searching, training = quantizing.seconds(extent, rounds)
            speedup, bound = seconds["in_loop"] / seconds["cache"], (encoding + searching + training) / training
            found = {
                **seconds,
                "encode": encoding,
                "search": searching,
                "step": training,
                "speedup": speedup,
                "bound": bound,
                "of_bound": speedup / bound,
            }
            figures["models"][f"{title}, N = {parent.spec.N}, M = {parent.spec.M}"] = {
                name: float(np.median(one)) for name, one in found.items()
            }
    return figures


def _feeds(cache: LatentCache, quantizer: Quantizer, part: NDArray[np.int64]) -> dict[str, Feed]:
    """Return the ways to read batches of some samples of a cache."""
    alone = Ranks(0, 1, torch.device("cpu"))
    in_ram = ShuffledData(Samples(cache, {"tcq8": quantizer}, part, with_y=False), seed=0, batch=BATCH)
    order = Order(part, cache.header.shard, BATCH, seed=0)
    streamed = StreamedData(cache, {"tcq8": quantizer}, False, order, workers=0)
    with closing(in_ram.batches(0, alone)) as batches:
        kept = list(itertools.islice(batches, KEPT))
    return {
        MEMORY: lambda first: (kept[number % KEPT] for number in itertools.count(first)),
        RAM: lambda first: in_ram.batches(first, alone),
        STREAM: lambda first: streamed.batches(first, alone),
    }


def training_step(
    parent: Checkpoint, record: QuantizerRecord, recipe: str, device: torch.device = CPU, bf16: bool = False
) -> Step:
    """Return the step of `lic-dist finetune` on a model, whose device and memory layout are changed in place."""
    model: Any = parent.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    decoding = Decoding(model, record, bf16=bf16).to(device)
    trained = freeze_all_but(model, trainable(model, recipe))
    distortion = Distortion("mse", 0, device)
    optimizer = torch.optim.Adam(trained, lr=1e-5)

    def step(batch: Batch) -> None:
        x = to_input(batch.pixels, device)
        x_hat, bits = decoding(batch)
        loss = parent.spec.lmbda * distortion(x_hat, x) + bits / x[:, 0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        take_step(float(loss.detach()), trained, optimizer, clip=1.0)

    return step


class _QuantizeInLoop:
    """A training step that encodes and searches the crops of its batch first; of the batch it uses the pixels alone."""

    def __init__(self, model: nn.Module, quantizer: Quantizer, step: Step) -> None:
        self.model, self.quantizer, self.step = model, quantizer, step
        self.laps: list[tuple[float, float, float]] = []

    def __call__(self, batch: Batch) -> None:
        started = time.perf_counter()
        latents, _ = encode(self.model, batch.pixels.numpy(), BATCH)
        inputs = quantizer_input(self.model, latents.y, latents.z, BATCH)
        encoded = time.perf_counter()
        k = self.quantizer.quantize(inputs.residual, inputs.level)
        found = {"k": k, "level": self.quantizer.unspread(k), "quantizer": self.quantizer.active(k)}
        tensors = {name: torch.from_numpy(values.reshape(latents.y.shape)) for name, values in found.items()}
        batch = replace(batch, z=torch.from_numpy(latents.z), **tensors)
        searched = time.perf_counter()
        self.step(batch)
        self.laps.append((encoded - started, searched - encoded, time.perf_counter() - searched))

    def seconds(self, extent: Extent, rounds: int) -> NDArray[np.float64]:
        """Return the mean seconds of a timed step's encoding, search and training in each round, [3, rounds]."""
        laps = np.array(self.laps).reshape(rounds, extent.warm + extent.timed, 3)
        means: NDArray[np.float64] = laps[:, extent.warm :].mean(axis=1).T
        return means


def _seconds(
    arms: dict[str, tuple[Feed, Step]], extent: Extent, rounds: int, title: str
) -> dict[str, NDArray[np.float64]]:
    """Return the mean seconds of a timed step by arm in each round, [rounds]."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    with Progress(title, rounds * len(arms), "section") as bar:
        for number in range(rounds):
            for arm, (feed, step) in arms.items():
                with closing(feed(number * extent.timed)) as batches:
                    for _ in range(extent.warm):
                        step(next(batches))
                    started = time.perf_counter()
                    for _ in range(extent.timed):
                        step(next(batches))
                    seconds[arm].append((time.perf_counter() - started) / extent.timed)
                bar.advance()
    return {arm: np.array(one) for arm, one in seconds.items()}


def _feeding_table(figures: dict[str, Any]) -> Table:
    title = f"Training steps of the shipped model, batch {figures['batch']}, {figures['samples']} samples"
    rows = [
        (f"{recipe}: {arm}", f"{one['steps_per_second']:.3f}", f"{100 * one['ratio']:.1f} %")
        for recipe, arms in figures["recipes"].items()
        for arm, one in arms.items()
    ]
    return table(title, ("", "steps/s", "of tensors in memory"), rows)


def _in_loop_table(figures: dict[str, Any]) -> Table:
    title = f"Quantizing in the loop against a cache: recipe {figures['recipe']}, batch {figures['batch']}"
    models = figures["models"]
    times = {
        "ms a step: encode": "encode",
        "search": "search",
        "train": "step",
        "all in the loop": "in_loop",
        "from the cache": "cache",
    }
    rows = [(label, *(f"{1000 * one[name]:.0f}" for one in models.values())) for label, name in times.items()]
    rows += [(name, *(f"{one[name]:.3f}" for one in models.values())) for name in ("speedup", "bound")]
    rows.append(("speedup, of the bound", *(f"{100 * one['of_bound']:.1f} %" for one in models.values())))
    return table(title, ("", *models), rows)


_TABLES: dict[str, Callable[[Any], Table]] = {"feeding": _feeding_table, "in-loop": _in_loop_table}
