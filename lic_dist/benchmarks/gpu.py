"""`lic-dist bench gpu`: what a machine with a GPU does a second, part by part, and what a million photos cost on it.

One call of at most three minutes: each part has a share of the seconds, and one for which none are left is left out.
Without a GPU the same code runs on the CPU with a few small samples, whose figures say nothing, and Triton by its
interpreter where TRITON_INTERPRET=1, else not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lic_dist.benchmarks import on_device, photo_reading
from lic_dist.benchmarks.codec import tcq8_record
from lic_dist.benchmarks.data import BASE
from lic_dist.benchmarks.tables import machine, table
from lic_dist.building.threads import one_thread
from lic_dist.errors import UsageError
from lic_dist.models import checkpoint as checkpoints

SECONDS = {"search": 45.0, "batch": 25.0, "all-reduce": 5.0, "training": 40.0, "reading": 25.0}  # of each part
SECONDS_TINY = {"search": 2.0, "batch": 0.5, "all-reduce": 0.1, "training": 1.0, "reading": 0.5}  # without a GPU
MILLION = 1_000_000


def bench(parts: Sequence[str], model: str | None, megapixels: float, crops: int, price: float) -> dict[str, Any]:
    """Run the parts (all of SECONDS where none is named), print their tables, return their figures.

    A million photos are of so many megapixels with so many crops of 256x256 each; `price` is in dollars an hour. Raises
    UsageError for an unknown part or model.
    """
    if unknown := [part for part in parts if part not in SECONDS]:
        raise UsageError(f"no part '{unknown[0]}' of this benchmark", hint=f"there are {', '.join(SECONDS)}")
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = device.type == "cpu"
    extent, console = on_device.ON_CPU if tiny else on_device.ON_GPU, Console()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    figures: dict[str, Any] = {"machine": {**machine(), "gpu": name}, "tiny": tiny}
    if tiny:
        console.print("no GPU here: the same code on the CPU with a few small samples, whose figures say nothing")
    if why := on_device.why_no_triton(device):
        console.print(f"without Triton's rows: {why}")
    loaded = checkpoints.load(model or BASE)
    loaded.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    record, numbers = tcq8_record(loaded), sum(one.numel() for one in loaded.codec.nets["g_s"].parameters())
    runs: dict[str, Callable[[float], Any]] = {
        "search": lambda budget: on_device.search(device, extent, budget),
        "batch": lambda budget: on_device.batch(loaded, record, device, extent, budget),
        "all-reduce": lambda budget: on_device.all_reduce(numbers, device, budget),
        "training": lambda budget: on_device.training(loaded, record, device, extent, budget),
        "reading": lambda budget: photo_reading.rates(megapixels, budget, (1,) if tiny else ()),
    }
    with one_thread():
        for part in parts or SECONDS:
            began = time.monotonic()
            figures[part] = runs[part]((SECONDS_TINY if tiny else SECONDS)[part])
            console.print(_TABLES[part](figures[part]))
            figures.setdefault("seconds", {})[part] = time.monotonic() - began
    if set(SECONDS) <= figures.keys():
        figures["dollars"] = dollars(figures, crops, price)
        console.print(_dollars_table(figures["dollars"], megapixels, crops, price))
    figures["seconds"]["all"] = time.monotonic() - started
    console.print(f"machine: {figures['machine']}; {figures['seconds']['all']:.0f} s in all")
    return figures


def dollars(figures: Mapping[str, Any], crops: int, price: float) -> dict[str, Any]:
    """Return what a million photos cost: a build, which waits for the slower of its readers and the device, and an
    epoch of retraining the decoder at its faster precision.
    """
    stages = {
        "reading": max(figures["reading"].values()),
        "the device": figures["batch"]["crops_per_second"] / crops,
    }
    bottleneck = min(stages, key=lambda name: stages[name])
    parts = {name: spent for name, spent in figures["batch"]["seconds"].items() if name != "all"}
    decoder = {name: rate for name, rate in figures["training"].items() if name.startswith("decoder")}
    best = max(decoder, key=lambda name: decoder[name])
    trained = decoder[best] * min(8, figures["batch"]["crops"]) / crops
    hours = {"build": MILLION / stages[bottleneck] / 3600, f"an epoch of {best}": MILLION / trained / 3600}
    return {
        "photos_per_second": stages,
        "bottleneck": bottleneck,
        "slowest_on_the_device": max(parts, key=lambda name: parts[name]),
        "hours": hours,
        "dollars": {name: price * one for name, one in hours.items()},
    }


def _search_table(figures: Mapping[str, Any]) -> Table:
    arms = list(next(iter(figures.values())))
    rows = [
        (
            trellis,
            *(f"{row[arm]['latents_per_second'] / 1e6:.3g}" for arm in arms),
            "yes" if all(row[arm]["equal"] for arm in arms) else "NO",
        )
        for trellis, row in figures.items()
    ]
    return table("Search: M latents/s", ("", *arms, "k and costs equal"), rows)


def _batch_table(figures: Mapping[str, Any]) -> Table:
    title = f"A batch of {figures['crops']} crops, pixels to k: {figures['crops_per_second']:.1f} crops/s"
    rows = [(name, f"{1000 * one:.2f}") for name, one in figures["seconds"].items()]
    return table(title, ("", "ms"), rows)


def _all_reduce_table(figures: Mapping[str, Any]) -> Table:
    row = (figures["backend"], f"{figures['numbers']:,}", f"{1e6 * figures['seconds']:.0f}")
    return table("all_reduce of g_s's gradients, one rank", ("", "float32", "us"), [row])


def _training_table(figures: Mapping[str, float]) -> Table:
    return table("Training", ("", "steps/s"), [(name, f"{rate:.2f}") for name, rate in figures.items()])


def _reading_table(figures: Mapping[str, float]) -> Table:
    return table("Reading", ("processes", "photos/s"), [(count, f"{rate:.1f}") for count, rate in figures.items()])


def _dollars_table(found: Mapping[str, Any], megapixels: float, crops: int, price: float) -> Table:
    title = (
        f"A million photos of {megapixels:g} megapixels, {crops} crops each, at {price:g} dollars an hour; "
        f"a build waits for {found['bottleneck']}, the device for {found['slowest_on_the_device']}"
    )
    rows = [(what, f"{hours:.2f}", f"{found['dollars'][what]:.2f}") for what, hours in found["hours"].items()]
    return table(title, ("", "hours", "dollars"), rows)


_TABLES: dict[str, Callable[[Any], Table]] = {
    "search": _search_table,
    "batch": _batch_table,
    "all-reduce": _all_reduce_table,
    "training": _training_table,
    "reading": _reading_table,
}
