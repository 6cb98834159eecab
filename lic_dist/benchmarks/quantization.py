"""`lic-dist bench quantization`: speed, gain and limits of the quantizers, in tables and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lic_dist.benchmarks import data, search_parts, speed, theory
from lic_dist.benchmarks.tables import machine, table
from lic_dist.errors import UsageError
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.trellis import ECM8
from lic_dist.quantization.viterbi import block_width, decision_memory

PARTS = ("speed", "parts", "gap", "mixture", "lanes", "candidates")
REAL_STEP, REAL_PRICE = 0.7, 0.05  # D, and c of the real latents: about what calibration finds for the shipped model
GAUSSIAN_STEP, GAUSSIAN_PRICE = 0.49, 0.6  # two bits a sample


def bench(parts: Sequence[str], images: Path | None, rounds: int, quick: bool) -> dict[str, Any]:
    """Run the parts (all of PARTS where none is named), print their tables, return their figures.

    `quick` takes fewer samples: figures of quality are then a few hundredths off. Raises UsageError for an unknown
    part.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"no part '{unknown[0]}' of this benchmark", hint=f"there are {', '.join(PARTS)}")
    console = Console()
    figures: dict[str, Any] = {"machine": machine(), "quick": quick}
    runs: dict[str, Callable[[], Any]] = {
        "speed": lambda: _speed(images, rounds, quick),
        "parts": lambda: _parts(images, rounds, quick),
        "gap": lambda: theory.gap((32, 2048) if quick else (64, 8192)),
        "mixture": lambda: theory.mixture_rates((64, 1024) if quick else (256, 2048)),
        "lanes": lambda: theory.lanes(data.real_latents(images)),
        "candidates": lambda: theory.candidates((16, 128) if quick else (64, 256)),
    }
    for part in parts or PARTS:
        figures[part] = runs[part]()
        for one in _TABLES[part](figures[part]):
            console.print(one)
    if "speed" in figures and find_spec("nncodec") is None:
        console.print("NNCodec is not installed: `pip install nncodec` adds it to the table of speeds")
    console.print(f"machine: {figures['machine']}")
    return figures


def _speed(images: Path | None, rounds: int, quick: bool) -> dict[str, Any]:
    real = data.real_latents(images).repeated(1 if quick else 3)
    two_bits = data.gaussian(256 if quick else 1728, 768)
    width = block_width(len(real.r))
    memory = {
        str(one.states): 8 * sum(array.nbytes for array in decision_memory(width, 768, one.states)) / (768 * width)
        for one in speed.SEARCHES
    }
    figures: dict[str, Any] = {"memory_bits": memory, "lanes_in_flight": width}
    for name, samples, step, price in (
        ("real", real, REAL_STEP, REAL_PRICE),
        ("two_bits", two_bits, GAUSSIAN_STEP, GAUSSIAN_PRICE),
    ):
        tcq8 = Quantizer(speed.record("tcq", ECM8, step, price, samples))
        bits = float(tcq8.bits(tcq8.quantize(samples.r, samples.level), samples.level).sum()) / samples.r.size
        figures[name] = {
            "bits_a_latent": bits,
            "latents": samples.r.size,
            "arms": speed.timed(speed.arms(samples, step, price), rounds, f"speed, {bits:.2f} bit a latent"),
            "threads": speed.threads(samples, step, price, rounds),
        }
    return figures


def _parts(images: Path | None, rounds: int, quick: bool) -> dict[str, dict[str, float]]:
    real = data.real_latents(images).repeated(1 if quick else 2)
    return search_parts.timed(speed.record("tcq", ECM8, REAL_STEP, REAL_PRICE, real), real, rounds)


def _speed_tables(figures: dict[str, Any]) -> list[Table]:
    titles = {"real": "latents of the shipped model", "two_bits": "Gaussian"}
    tables = []
    for name, title in titles.items():
        one = figures[name]
        rows = [
            (arm, f"{row['ns']:.2f}", f"{row['millions_per_second']:.2f}", f"{row['times_tcq8']:.2f}")
            for arm, row in one["arms"].items()
        ]
        rows += [
            (f"tcq8, {cores} threads", "", "", f"{1 / ratio:.2f} (speed-up {ratio:.2f})")
            for cores, ratio in one["threads"].items()
        ]
        title = f"Speed on one core: {title}, {one['bits_a_latent']:.2f} bit a latent with tcq8"
        tables.append(table(title, ("", "ns a latent", "M latents/s", "time against tcq8"), rows))
    title = f"Memory of the search, bits a latent of the {figures['lanes_in_flight']} lanes in flight"
    memory = figures["memory_bits"]
    bits = tuple(f"{one:.1f}" for one in memory.values())
    return [*tables, table(title, tuple(f"{states} states" for states in memory), [bits])]


def _gap_tables(figures: dict[str, list[float]]) -> list[Table]:
    title = "Unit Gaussian: dB above Shannon's R(D), ideal entropy coding"
    rows = [(name, *(f"{gap:.3f}" for gap in gaps)) for name, gaps in figures.items()]
    return [table(title, ("", *(f"{rate} bit" for rate in theory.RATES)), rows)]


def _mixture_tables(figures: dict[str, Any]) -> list[Table]:
    title = "Mixture of Gaussians: rate at the mean squared error of SQ, step 1"
    rows = [
        (name, f"{row['bits']:.4f}", f"{100 * row['against_sq']:+.2f} %" if "against_sq" in row else "")
        for name, row in figures.items()
    ]
    return [table(title, ("", "bit a sample", "against SQ with CompressAI's rates"), rows)]


def _lane_tables(figures: dict[str, Any]) -> list[Table]:
    title = "TCQ-8 on latents of the shipped model: lanes against one long trellis"
    rows = [(steps, f"{100 * row['cost']:+.3f} %", f"{100 * row['bits']:+.3f} %") for steps, row in figures.items()]
    return [table(title, ("steps of a lane", "cost D + lambda R", "bits alone"), rows)]


def _candidate_tables(figures: dict[str, Any]) -> list[Table]:
    title = "TCQ-8: cost above a search of every level (mixture, D = .56)"
    rows = [(c, f"{100 * row['matched']:.4f} %", f"{100 * row['adapted']:.4f} %") for c, row in figures.items()]
    return [table(title, ("c", "matched tables", "adapted tables"), rows)]


_TABLES: dict[str, Callable[[Any], list[Table]]] = {
    "speed": _speed_tables,
    "parts": lambda figures: [search_parts.shown(figures)],
    "gap": _gap_tables,
    "mixture": _mixture_tables,
    "lanes": _lane_tables,
    "candidates": _candidate_tables,
}
