"""Where the time of the trellis search goes: the compiled search with its parts left out, one more put back each time.

The variants are made from the text of `viterbi._search` itself. The loops, with every call left out, come first; what
a part costs is what the search takes longer once it is back, the parts before it in place. All variants run in turn
within a round; figures are the thread's CPU time, medians over the rounds.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import time
from typing import Any

import numpy as np
from numba import njit
from rich.table import Table

from lic_dist.benchmarks.data import LatentSamples
from lic_dist.benchmarks.tables import table
from lic_dist.progress import Progress
from lic_dist.quantization import viterbi
from lic_dist.quantization.jit import search_inputs
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import search_rates
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.reference import inverse
from lic_dist.quantization.selection import field, steps_at_once, words

# In the search's order, what it calls there; of `call_pointer` the address. `kept` is where decisions are written:
# left out, it is one place, which stays in the first cache.
PARTS: dict[str, tuple[str, ...]] = {
    "|r|/D, where its rates lie, largest |r|": ("tile_candidates",),
    "rates of candidates looked up, transposed": ("look_up", "look_up_escapes"),
    "branch costs: five distortions, zero against its class": ("branch_costs",),
    "add-compare-select alone": ("select_more", "select_one"),
    "decisions kept for the traceback": ("kept",),
    "least metric of each tile, best final state": ("_reduce", "_best_final"),
    "traceback": ("back",),
    "path transposed, k from r again": ("_indices",),
}
LOOPS, REST = "loops alone", "checks, memory for k and decisions"


class _Without(ast.NodeTransformer):
    def __init__(self, names: set[str]) -> None:
        self._names = names

    def _keep(self, node: Any) -> Any:
        value = node.value
        if isinstance(node, ast.Assign) and "kept" in self._names and ast.unparse(node.targets[0]) == "kept":
            return ast.parse("kept = decisions_at").body[0]
        if isinstance(value, ast.Call):
            called = ast.unparse(value.func)
            if {called, ast.unparse(value.args[0]) if called == "call_pointer" else ""} & self._names:
                return ast.Pass()
        return node

    visit_Expr = visit_Assign = _keep


def text_without(names: set[str]) -> str:
    """Return the text of the search without the calls of these names."""
    return ast.unparse(_Without(names).visit(ast.parse(textwrap.dedent(inspect.getsource(viterbi._search)))))


def _compiled_without(names: set[str]) -> Any:
    namespace = dict(vars(viterbi))
    exec(compile(text_without(names), viterbi.__file__, "exec"), namespace)
    return njit(nogil=True)(namespace["_search"])


def timed(record: QuantizerRecord, samples: LatentSamples, rounds: int) -> dict[str, dict[str, float]]:
    """Return of each part of a TCQ search ns a latent and its share of `Quantizer.quantize`."""
    quantizer = Quantizer(record)
    rates, states = search_rates(record.y_tables), record.trellis.states
    weight = record.lane_weights(len(samples.r) // len(record.weights))
    lanes, steps = samples.r.shape
    k, cost = np.empty((lanes, steps), np.int16), np.empty(lanes, np.int64)
    memory = viterbi.decision_memory(viterbi.block_width(lanes), steps, states)
    shape, loops = (words(states), field(states), steps_at_once(states)), viterbi.machine_loops(record.trellis)[1]
    tables = rates.quads, rates.zero_pairs, rates.reach, rates.flag
    given = *search_inputs(samples.r, samples.level, weight), np.float32(inverse(record.step)), *tables, *memory
    left = {name for names in PARTS.values() for name in names}
    variants = [_compiled_without(left)]
    for names in PARTS.values():
        left -= set(names)
        variants.append(_compiled_without(left))
    runs: list[Any] = [lambda one=one: one(*given, states, shape, loops, k, cost) for one in variants]
    runs.append(lambda: quantizer.quantize(samples.r, samples.level))
    seconds: list[list[float]] = []
    with Progress("parts of the search", rounds + 1, "round") as bar:
        for number in range(rounds + 1):  # the first one compiles and warms up
            taken = [0.0]
            for run in runs:
                begun = time.thread_time()
                run()
                taken.append(time.thread_time() - begun)
            if number:
                seconds.append(taken)
            bar.advance()
    found = np.array(seconds)
    parts = np.diff(found, axis=1)
    return {
        name: {
            "ns": 1e9 * float(np.median(parts[:, number])) / samples.r.size,
            "share": float(np.median(parts[:, number] / found[:, -1])),
        }
        for number, name in enumerate((LOOPS, *PARTS, REST))
    }


def shown(figures: dict[str, dict[str, float]]) -> Table:
    """Return the table of what `timed` found."""
    rows = [(name, f"{one['ns']:.2f}", f"{100 * one['share']:.0f} %") for name, one in figures.items()]
    total = sum(one["ns"] for one in figures.values())
    rows.append(("sum", f"{total:.2f}", f"{1e3 / total:.0f} M latents/s"))
    return table("TCQ-8 on one core, latents of the shipped model: its parts", ("", "ns a latent", "share"), rows)
