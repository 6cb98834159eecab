"""The trellis search on GPUs, one thread a lane: Triton kernels generated from the state machine's tables.

Needs the extra `gpu` (Triton); `tensors.py` gives the same integers without it. A kernel walks its lanes forward,
two steps at a time, the path metrics of all states in registers, and writes decisions (a bit a state) and zeros (a
nibble a step) to memory laid out [steps, lanes], so that neighbouring threads write neighbouring bytes; then it walks
back and writes the magnitudes. |r|/D comes computed: no product is left in the kernel that could be fused with a sum.
"""

from __future__ import annotations

import hashlib
import linecache
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lic_dist.quantization.candidates import BIT, SATURATION
from lic_dist.quantization.tensors import DeviceRates, integer_of
from lic_dist.quantization.trellis import Trellis
from lic_dist.quantization.viterbi import UNREACHED

THREADS = 64  # lanes a program searches
FLIGHT = 1 << 18  # lanes whose decisions lie in memory at once

_SOURCE = """
@triton.jit
def search(position, level, weight, quads, zero_pairs, reach, flag, branches, decisions, zeros, magnitude, cost,
           lanes, steps, columns, levels, THREADS: tl.constexpr):
    lane = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    live = lane < lanes
{lane_weight}
    total = tl.zeros([THREADS], tl.int64)
{start}
    for pair in range(0, (steps + 1) // 2):
        taken = tl.zeros([THREADS], tl.int32)
        packed = tl.zeros([THREADS], {word})
        for half in tl.static_range(2):
            step = 2 * pair + half
            inside = live & (lane * 0 + step < steps)
            p = tl.load(position + step * lanes + lane, mask=inside, other=0.0)
            row = tl.load(level + step * lanes + lane, mask=inside, other=0).to(tl.int32)
{step_weight}
            m0 = tl.maximum(p.to(tl.int32) - 1, 1)
            quad = tl.load(quads + row.to(tl.int64) * columns + tl.minimum(m0, columns - 1), mask=inside, other=0)
            zero = tl.load(zero_pairs + row, mask=inside, other=0)
            beyond = m0 > columns - 1
{costs}
            none = distortion(p, w)
            z0 = none + (zero & 0xFFFF)
            z1 = none + (zero >> 16)
            nibble = (z0 <= b0).to(tl.int32) | ((z1 <= b3).to(tl.int32) << 3)
            b0 = tl.minimum(z0, b0)
            b3 = tl.minimum(z1, b3)
{select}
            taken = taken | (nibble << (4 * half))
{store}
        tl.store(zeros + pair * lanes + lane, taken.to(tl.uint8), mask=live)
{store_pair}
        if (pair & 31) == 31:
            least = m_0
{reduce}
            total += least.to(tl.int64)
    state = tl.zeros([THREADS], tl.int32)
    final = m_0
{final}
    tl.store(cost + lane, total + final.to(tl.int64), mask=live)
    tl.debug_barrier()  # what one thread wrote another may read
    for back in range(0, steps):
        step = steps - 1 - back
        p = tl.load(position + step * lanes + lane, mask=live, other=0.0)
        m0 = tl.maximum(p.to(tl.int32) - 1, 1)
        bits = tl.load(decisions + {decision_row} * lanes + lane, mask=live, other=0).to({word})
        entered = tl.load(branches + 2 * state + ((bits >> ({decision_shift} + state)) & 1), mask=live, other=0)
        state = entered >> 2
        number = entered & 3
        nibble = tl.load(zeros + (step // 2) * lanes + lane, mask=live, other=0).to(tl.int32) >> (4 * (step % 2))
        m = ((m0 + 3 - number) & -4) + number
        k = tl.where(((nibble >> number) & 1) == 1, 0, (m + 1) >> 1)
        tl.store(magnitude + step * lanes + lane, k.to(tl.int16), mask=live)
"""


@triton.jit
def distortion(difference, weight):  # type: ignore[no-untyped-def]
    """Return the rounded, saturated distortion in 1/256 bit (half to even, by adding and subtracting 1.5 * 2^23)."""
    value = tl.minimum(difference * difference * weight, SATURATION_)
    return ((value + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def escape(m, row, levels, reach, flag, mask):  # type: ignore[no-untyped-def]
    """Return the rate of union level m as an escape: its flag, the number of nibbles, and the nibbles."""
    at = (m & 1) * levels + row
    value = 2 * (((m + 1) >> 1) - tl.load(reach + at, mask=mask, other=0) - 1)
    nibbles = (value >= 1).to(tl.int32) + (value >= 16).to(tl.int32) + (value >= 256).to(tl.int32)
    nibbles += (value >= 4096).to(tl.int32) + (value >= 65536).to(tl.int32)
    return tl.load(flag + at, mask=mask, other=0) + BIT_ * (4 + 4 * nibbles)


SATURATION_, BIT_ = tl.constexpr(float(SATURATION)), tl.constexpr(BIT)


def search(
    r: Tensor, level: Tensor, weight: Tensor, inverse_step: float, rates: DeviceRates, trellis: Trellis
) -> tuple[Tensor, Tensor]:
    """Search as `tensors.search` does: return (k int16 [lanes, steps], cost int64 [lanes]), on the device of r."""
    lanes, steps = r.shape
    k = torch.empty((lanes, steps), dtype=torch.int16, device=r.device)
    cost = torch.zeros(lanes, dtype=torch.int64, device=r.device)
    if not lanes or not steps:
        return k, cost
    flight = max(THREADS, min(FLIGHT, (2**31 - 1) // steps))  # offsets are 32 bits wide
    for first in range(0, lanes, flight):
        block = slice(first, first + flight)
        weights = weight[block] if weight.ndim == 1 else weight
        k[block] = _search_block(r[block], level[block], weights, inverse_step, rates, trellis, cost[block])
    return k, cost


def _search_block(
    r: Tensor, level: Tensor, weight: Tensor, inverse_step: float, rates: DeviceRates, trellis: Trellis, cost: Tensor
) -> Tensor:
    lanes, steps = r.shape
    position = (r.abs() * inverse_step).T.contiguous()
    pairs = (steps + 1) // 2
    kind = integer_of(trellis.states)
    decisions = torch.empty((pairs if trellis.states <= 4 else steps, lanes), dtype=kind, device=r.device)
    zeros = torch.empty((pairs, lanes), dtype=torch.uint8, device=r.device)
    magnitude = torch.empty((steps, lanes), dtype=torch.int16, device=r.device)
    packed = [state << 2 | number for pair in trellis.entering_branches() for state, number in pair]
    branches = torch.tensor(packed, dtype=torch.int32, device=r.device)
    kernel(trellis, weight.ndim == 2)[(triton.cdiv(lanes, THREADS),)](
        position,
        level.T.contiguous(),
        weight,
        rates.quads,
        rates.zero_pairs,
        rates.reach,
        rates.flag,
        branches,
        decisions,
        zeros,
        magnitude,
        cost,
        lanes,
        steps,
        rates.quads.shape[1],
        rates.quads.shape[0],
        THREADS=THREADS,
        num_warps=THREADS // 32,
    )
    magnitude = magnitude.T
    return torch.where(r < 0, -magnitude, magnitude)


@lru_cache(maxsize=64)
def kernel(trellis: Trellis, by_step: bool = False) -> Any:
    """Return the kernel of a machine, compiled by Triton from source with a variable for each state.

    `by_step` takes the weights by step instead of by lane.
    """
    states, small = trellis.states, trellis.states <= 4
    start = [f"m_{s} = tl.full([THREADS], {UNREACHED if s else 0}, tl.int32)" for s in range(states)]
    costs = []
    for number in range(4):
        costs += [
            f"m = ((m0 + 3 - {number}) & -4) + {number}",
            f"rate = ((quad >> {16 * number}) & 0xFFFF).to(tl.int32)",
            "if tl.max(beyond.to(tl.int32)) == 1:",
            "    rate = tl.where(beyond, escape(m, row, levels, reach, flag, inside & beyond), rate)",
            f"b{number} = distortion(p - m.to(tl.float32), w) + rate",
        ]
    word = "tl.int32" if states <= 32 else "tl.int64"
    select = [f"chosen = tl.zeros([THREADS], {word})"]
    for s, ((lower, lower_class), (upper, upper_class)) in enumerate(trellis.entering_branches()):
        select += [
            f"x = m_{lower} + b{lower_class}",
            f"y = m_{upper} + b{upper_class}",
            f"n_{s} = tl.minimum(x, y)",
            f"chosen = chosen | ((y < x).to({word}) << {s})",
        ]
    select += [f"m_{s} = tl.where(inside, n_{s}, m_{s})" for s in range(states)]
    kind = f"tl.{integer_of(states)}".replace("torch.", "")
    one = "packed = packed | (chosen << (4 * half))"
    store = [one if small else f"tl.store(decisions + step * lanes + lane, chosen.to({kind}), mask=inside)"]
    store_pair = ["tl.store(decisions + pair * lanes + lane, packed.to(tl.uint8), mask=live)"] if small else []
    reduce = [f"least = tl.minimum(least, m_{s})" for s in range(1, states)]
    reduce += [f"m_{s} = m_{s} - least" for s in range(states)]
    final = [
        line
        for s in range(1, states)
        for line in (f"state = tl.where(m_{s} < final, {s}, state)", f"final = tl.minimum(final, m_{s})")
    ]
    by_lane = [] if by_step else ["w = tl.load(weight + lane, mask=live, other=0.0)"]
    every_step = ["w = tl.load(weight + step + 0 * lane, mask=inside, other=0.0)"] if by_step else []
    source = _SOURCE.format(
        word=word,
        lane_weight=_indented(by_lane, 4),
        step_weight=_indented(every_step, 12),
        start=_indented(start, 4),
        costs=_indented(costs, 12),
        select=_indented(select, 12),
        store=_indented(store, 12),
        store_pair=_indented(store_pair, 8),
        reduce=_indented(reduce, 12),
        final=_indented(final, 4),
        decision_row="(step // 2)" if small else "step",
        decision_shift="4 * (step % 2)" if small else "0",
    )
    name = f"<{__name__} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # where Triton reads it
    namespace = {"triton": triton, "tl": tl, "distortion": distortion, "escape": escape, "__name__": __name__}
    exec(compile(source, name, "exec"), namespace)
    return namespace["search"]


def _indented(lines: list[str], spaces: int) -> str:
    return "\n".join(" " * spaces + line for line in lines)
