"""The searches on tensors of any device, operation by operation in torch, for GPUs without Triton.

The integers equal those of the compiled searches: every float operation is a separate torch operation, so that none is
fused. The trellis search takes the lanes in blocks, which bounds its memory, and its costs in tiles of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lic_dist.quantization.candidates import BIT, SATURATION, TILE
from lic_dist.quantization.rates import SearchRates
from lic_dist.quantization.trellis import Trellis
from lic_dist.quantization.viterbi import UNREACHED

LANES = 1 << 16  # of a block


@dataclass(frozen=True)
class DeviceRates:
    """`SearchRates` on a device; int32 tensors of the same names, int64 quads."""

    costs: Tensor
    reach: Tensor
    flag: Tensor
    quads: Tensor
    zero_pairs: Tensor

    @classmethod
    def of(cls, rates: SearchRates, device: torch.device, trellis: bool) -> DeviceRates:
        """Copy rates to a device; quads and zero_pairs only for a trellis search (rates of two quantizers)."""
        empty = np.empty(0, np.int64)
        arrays = (
            rates.costs,
            rates.reach,
            rates.flag,
            rates.quads if trellis else empty,
            rates.zero_pairs if trellis else empty,
        )
        return cls(*(torch.tensor(array, device=device) for array in arrays))

    def cost(self, row: Tensor, magnitude: Tensor) -> Tensor:
        """Return the costs int32 of |k| = magnitude in a row, equal shapes, for any magnitude."""
        last = self.costs.shape[1] - 1
        row = row.long()
        inside = self.costs[row, magnitude.clamp(max=last).long()]
        value = 2 * (magnitude - self.reach[row] - 1)
        nibbles = sum(((value >= 16**power).int() for power in range(5)), torch.zeros_like(value))
        return torch.where(magnitude <= last, inside, self.flag[row] + BIT * (4 + 4 * nibbles))


def distortion(difference: Tensor, weight: Tensor) -> Tensor:
    """Return the rounded distortion, int32, in 1/256 bit of differences in steps."""
    return torch.round((difference * difference * weight).clamp(max=float(SATURATION))).int()


def rdoq(r: Tensor, level: Tensor, weight: Tensor, inverse_step: float, rates: DeviceRates) -> tuple[Tensor, Tensor]:
    """Search as `scalar.rdoq` does: return (k int16 [lanes, steps], cost int64 [lanes])."""
    position, weight = r.abs() * inverse_step, weight[:, None] if weight.ndim == 1 else weight
    nearest = torch.round(position).int()
    best = torch.zeros_like(nearest)
    least = distortion(position, weight) + rates.cost(level, best)
    for magnitude in ((nearest - 1).clamp(min=0), nearest):
        cost = distortion(position - magnitude.float(), weight) + rates.cost(level, magnitude)
        better = cost < least
        best, least = torch.where(better, magnitude, best), torch.where(better, cost, least)
    return torch.where(r < 0, -best, best).short(), least.sum(dim=1, dtype=torch.int64)


def search(
    r: Tensor, level: Tensor, weight: Tensor, inverse_step: float, rates: DeviceRates, trellis: Trellis
) -> tuple[Tensor, Tensor]:
    """Search as `viterbi.search_lanes` does: return (k int16 [lanes, steps], cost int64 [lanes])."""
    k, cost = torch.empty(r.shape, dtype=torch.int16, device=r.device), torch.zeros(len(r), dtype=torch.int64)
    cost = cost.to(r.device)
    for first in range(0, len(r), LANES):
        block = slice(first, first + LANES)
        weights = weight[block] if weight.ndim == 1 else weight
        magnitude, cost[block] = _search_block(r[block], level[block], weights, inverse_step, rates, trellis)
        k[block] = torch.where(r[block] < 0, -magnitude, magnitude).short()
    return k, cost


def active(k: Tensor, trellis: Trellis) -> Tensor:
    """Return the active quantizer of each index k int16 [lanes, steps], uint8; the machine walks all lanes at once."""
    found = torch.zeros(k.shape, dtype=torch.uint8, device=k.device)
    quantizer = torch.tensor(trellis.quantizer, dtype=torch.uint8, device=k.device)
    next_state = torch.tensor(trellis.next_state, device=k.device).flatten()
    state = torch.zeros(len(k), dtype=torch.int64, device=k.device)
    for step in range(k.shape[1] if trellis.states > 1 else 0):
        found[:, step] = quantizer[state]
        state = next_state[2 * state + (k[:, step] & 1)]
    return found


def _search_block(
    r: Tensor, level: Tensor, weight: Tensor, inverse_step: float, rates: DeviceRates, trellis: Trellis
) -> tuple[Tensor, Tensor]:
    lanes, steps = r.shape
    position, row = (r.abs() * inverse_step).T.contiguous(), level.T.contiguous().long()
    weights = weight.expand(steps, lanes) if weight.ndim == 1 else weight.T.expand(steps, lanes)
    previous, number = torch.tensor(trellis.entering_branches(), device=r.device).flatten(0, 1).T
    word = torch.int32 if trellis.states <= 32 else torch.int64
    bit = torch.arange(trellis.states, dtype=word, device=r.device)[:, None]
    metric = torch.full((trellis.states, lanes), UNREACHED, dtype=torch.int32, device=r.device)
    metric[0] = 0
    cost = torch.zeros(lanes, dtype=torch.int64, device=r.device)
    decisions, zeros = [], []  # a tile each: packed
    for start in range(0, steps, TILE):
        run = slice(start, start + TILE)
        branch, taken = _branch_costs(position[run], row[run], weights[run], rates)
        chosen = []
        for one in branch:
            both = (metric[previous] + one[number]).view(trellis.states, 2, lanes)
            second = both[:, 1] < both[:, 0]
            chosen.append((second.to(bit.dtype) << bit).sum(dim=0, dtype=bit.dtype))
            metric = torch.minimum(both[:, 0], both[:, 1])
        decisions.append(_packed(torch.stack(chosen), trellis.states))
        zeros.append(_packed(taken, 4))
        least = metric.amin(dim=0)
        metric, cost = metric - least, cost + least
    final = metric.amin(dim=0)
    state = (metric == final).int().argmax(dim=0)  # the lowest state of least metric
    magnitude = torch.empty((steps, lanes), dtype=torch.int32, device=r.device)
    for tile in range(len(decisions) - 1, -1, -1):
        start = tile * TILE
        length = min(TILE, steps - start)
        chosen_tile, taken = _unpacked(decisions[tile], trellis.states, length), _unpacked(zeros[tile], 4, length)
        m0 = _smallest(position[start : start + length])
        for step in range(length - 1, -1, -1):
            entered = 2 * state + ((chosen_tile[step] >> state) & 1)
            m = _member(m0[step], number[entered])
            zero = (taken[step] >> number[entered]) & 1
            magnitude[start + step] = torch.where(zero == 1, 0, (m + 1) >> 1)
            state = previous[entered]
    return magnitude.T, cost + final


def _smallest(position: Tensor) -> Tensor:
    """Return the smallest union level of the candidates, m0."""
    return (position.int() - 1).clamp(min=1)


def _member(smallest: Tensor, number: Tensor | int) -> Tensor:
    """Return the union level of a branch class among m0..m0+3."""
    return smallest + ((number - smallest) & 3)


def _branch_costs(position: Tensor, row: Tensor, weight: Tensor, rates: DeviceRates) -> tuple[Tensor, Tensor]:
    """Return costs int32 [steps, 4, lanes] of the branch classes, and which take zero, in nibbles [steps, lanes]."""
    smallest = _smallest(position)
    last = rates.quads.shape[1] - 1
    quad = rates.quads[row, smallest.clamp(max=last).long()]
    pair, none = rates.zero_pairs[row], distortion(position, weight)
    levels = len(rates.quads)
    beyond = bool((smallest > last).any())
    costs = []
    for number in range(4):
        m = _member(smallest, number)
        rate = ((quad >> 16 * number) & 0xFFFF).int()
        if beyond:
            rate = torch.where(smallest > last, rates.cost((m & 1) * levels + row, (m + 1) >> 1), rate)
        costs.append(distortion(position - m.float(), weight) + rate)
    zero0, zero1 = none + (pair & 0xFFFF), none + (pair >> 16)
    taken = (zero0 <= costs[0]).int() | (zero1 <= costs[3]).int() << 3
    costs[0], costs[3] = torch.minimum(zero0, costs[0]), torch.minimum(zero1, costs[3])
    return torch.stack(costs, dim=1), taken


def integer_of(bits: int) -> torch.dtype:
    """Return the smallest integer type of so many bits, 5 to 64."""
    return torch.uint8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32 if bits <= 32 else torch.int64


def _packed(values: Tensor, bits: int) -> Tensor:
    """Pack values of so many bits, int32 or int64 [steps, lanes]: two steps to a byte where they fit, else one integer
    a step.
    """
    if bits > 4:
        return values.to(integer_of(bits))
    even, odd = values[0::2], values[1::2]
    whole = even.clone()
    whole[: len(odd)] |= odd << 4
    return whole.to(torch.uint8)


def _unpacked(packed: Tensor, bits: int, steps: int) -> Tensor:
    """Invert `_packed`, extending sign bits: int32 or int64 [steps, lanes]."""
    if bits > 4:
        return packed.int() if bits <= 32 else packed
    whole = packed.int()
    return torch.stack((whole & 15, whole >> 4), dim=1).flatten(0, 1)[:steps]
