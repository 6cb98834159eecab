"""Latents per second of each quantizer (costs, search and traceback), compared with other searches of the same data.

Every arm of a table runs once a round, in turn, so that ratios hold while the machine's speed drifts. Figures are
medians over the rounds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from lic_dist.benchmarks import exhaustive
from lic_dist.benchmarks.data import LatentSamples, label, record_at_price
from lic_dist.building.threads import one_thread
from lic_dist.progress import Progress
from lic_dist.quantization import tensors
from lic_dist.quantization.adaptation import adaptation_rounds
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import search_rates
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.reference import inverse
from lic_dist.quantization.trellis import CODE16, CODE32, CODE64, ECM8, SCALAR, VVC4, Trellis

SEARCHES: tuple[Trellis, ...] = (VVC4, ECM8, CODE16, CODE32, CODE64)
THREADED = 1 << 24  # latents that are shared out over threads
BASELINE_LANES = 72  # of the data that the slow baselines get
NNCODEC_DENSITY = 2  # of its steps: 2^2 an octave


@dataclass(frozen=True)
class Arm:
    """A search to time: a call that handles so many latents."""

    name: str
    latents: int
    run: Callable[[], Any]


def record(name: str, machine: Trellis, step: float, price: float, samples: LatentSamples) -> QuantizerRecord:
    """Return an adapted quantizer whose bit costs `price` squared steps (the mean over channels)."""
    start = record_at_price(name, machine, step, price, samples.weights)
    *_, last = adaptation_rounds(start, [(samples.r, samples.level)], rounds=2)
    return last


def arms(samples: LatentSamples, step: float, price: float) -> list[Arm]:
    """Return every quantizer on one core, then the baselines of TCQ-8 on a part of the lanes."""
    made: list[Arm] = []
    for name, machine in [("sq", SCALAR), ("deadzone", SCALAR), ("rdoq", SCALAR), *(("tcq", one) for one in SEARCHES)]:
        scalar_step = step if name == "tcq" else 1.6 * step  # about the same rate
        quantizer = Quantizer(record(name, machine, scalar_step, price if name == "tcq" else price / 2.5, samples))

        def run(quantizer: Quantizer = quantizer) -> Any:
            return quantizer.quantize(samples.r, samples.level)

        made.append(Arm(label(name, machine), samples.r.size, run))
    return made + _baselines(samples, record("tcq", ECM8, step, price, samples))


def _baselines(samples: LatentSamples, tcq8: QuantizerRecord) -> list[Arm]:
    weight = tcq8.lane_weights(len(samples.r) // len(tcq8.weights))
    r_torch, level_torch, weight_torch = map(torch.from_numpy, (samples.r, samples.level, weight))
    rates = tensors.DeviceRates.of(search_rates(tcq8.y_tables), torch.device("cpu"), trellis=True)
    part = slice(0, min(BASELINE_LANES, len(samples.r)))
    r, level = samples.r[part], samples.level[part]
    inside = np.abs(r) / tcq8.step < 2 * search_rates(tcq8.y_tables).largest - 8
    r = np.where(inside, r, 0).astype(np.float32)

    def torch_viterbi() -> Any:
        return tensors.search(r_torch, level_torch, weight_torch, float(inverse(tcq8.step)), rates, ECM8)

    def scalar_reference() -> Any:
        return exhaustive.search(r, level, weight[part], tcq8.step, tcq8.y_tables, ECM8, every=False)

    made = [
        Arm("baseline: torch Viterbi, 8 states", samples.r.size, torch_viterbi),
        Arm("baseline: scalar reference compiled, 8 states", r.size, scalar_reference),
    ]
    return made + (
        [Arm("baseline: NNCodec C++, 8 states", r.size, _nncodec(r, tcq8.step))] if find_spec("nncodec") else []
    )


def _nncodec(r: np.ndarray, step: float) -> Callable[[], Any]:
    """Return NNCodec's search at its nearest step, (4 + (qp & 3)) / 4 * 2^(qp >> 2), with its default settings."""
    from nncodec.extensions import deepCABAC

    steps = {qp: (4 + (qp & 3)) / 4 * 2.0 ** (qp >> 2) for qp in range(-24, 9)}
    qp = min(steps, key=lambda one: abs(np.log(steps[one] / step)))

    def run() -> Any:
        encoder = deepCABAC.Encoder()
        encoder.initCtxModels(10, 0)
        k = np.zeros(r.shape, np.int32)
        encoder.quantLayer(r, k, 1, NNCODEC_DENSITY, qp, 0.1, 10, 0, 0)
        return k

    return run


@one_thread()
def timed(made: list[Arm], rounds: int, title: str) -> dict[str, dict[str, float]]:
    """Return by arm ns a latent and M latents a second (medians), and the median ratio of its time to tcq8's in a
    round.
    """
    seconds: dict[str, list[float]] = {arm.name: [] for arm in made}
    for arm in made:  # compiles and warms up
        arm.run()
    with Progress(title, rounds, "round") as bar:
        for _ in range(rounds):
            for arm in made:
                started = time.perf_counter()
                arm.run()
                seconds[arm.name].append((time.perf_counter() - started) / arm.latents)
            bar.advance()
    by_arm = {name: np.array(values) for name, values in seconds.items()}
    return {
        name: {
            "ns": 1e9 * float(np.median(values)),
            "millions_per_second": 1e-6 / float(np.median(values)),
            "times_tcq8": float(np.median(values / by_arm["tcq8"])),
        }
        for name, values in by_arm.items()
    }


def threads(samples: LatentSamples, step: float, price: float, rounds: int) -> dict[str, float]:
    """Return the speed-up of TCQ-8 on two cores, and on all: medians of ratios within a round.

    A call takes a tenth of a second, because a scheduler needs up to ten milliseconds to give a new thread its own
    core.
    """
    quantizer = Quantizer(record("tcq", ECM8, step, price, samples))
    samples = samples.repeated(max(1, THREADED // samples.r.size))
    counts = sorted({1, min(2, os.cpu_count() or 1), os.cpu_count() or 1})
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(rounds + 1):
        for count in counts:
            started = time.perf_counter()
            quantizer.quantize(samples.r, samples.level, threads=count)
            if number:
                seconds[count].append(time.perf_counter() - started)
    one = np.array(seconds[1])
    return {str(count): float(np.median(one / np.array(seconds[count]))) for count in counts[1:]}
