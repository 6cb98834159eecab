"""The searches with rates that differ by the sign of the index, of tables by channel: brute force, and every engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lic_dist.quantization import reference, tensors
from lic_dist.quantization.quantize import rdoq, search
from lic_dist.quantization.rates import CdfTables, signed_rates
from lic_dist.quantization.trellis import ECM8, SCALAR, Trellis
from tests.quantization.test_search import MACHINES, STEP, TABLES, latents


def channel_tables(channels: int, quantizers: int, seed: int = 0) -> CdfTables:
    """Skewed tables, a row for each (quantizer, channel), some narrow and some with zero at an end."""
    rng = np.random.default_rng(seed)
    rows = channels * quantizers
    size = rng.integers(4, 12, rows)
    cdf = np.zeros((rows, 12), np.int32)
    for row, length in zip(cdf, size, strict=True):
        row[1:length] = np.append(np.sort(rng.choice(np.arange(1, 65536), length - 2, replace=False)), 65536)
    return CdfTables(cdf, size, -rng.integers(0, size - 2))


def channel_latents(lanes: int, steps: int, channels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals, the channel of each element, and weights."""
    r, _, weight = latents(lanes, steps, seed)
    level = np.broadcast_to((np.arange(lanes) % channels)[:, None], r.shape).astype(np.uint16)
    return r, np.ascontiguousarray(level), weight


@pytest.mark.parametrize("machine", [SCALAR, *MACHINES])
def test_rates_by_sign_find_the_best_of_all_sequences(machine: Trellis) -> None:
    """Costs of signed k as the coder charges them, every sequence of candidates, walked here by hand."""
    tables = channel_tables(5, machine.quantizers)
    r, level, weight = channel_latents(15, 4, 5)
    r[:, 2] *= 9  # escapes
    rates = signed_rates(tables)
    if machine is SCALAR:
        k, cost = reference.rdoq(r, level, weight, STEP, rates)
    else:
        k, cost = reference.search(r, level, weight, STEP, rates, machine)
        by_force = reference.brute_force(r, level, weight, STEP, rates, machine)
        assert np.array_equal(k, by_force[0]) and np.array_equal(cost, by_force[1])

    def offers(lane: int, at: int, quantizer: int) -> dict[int, int]:
        position = np.abs(r[lane, at]) * reference.inverse(STEP)
        if machine is SCALAR:
            union = {m: m for m in (0, max(int(np.rint(position)) - 1, 0), int(np.rint(position)))}
        else:
            smallest = max(1, int(position) - 1)
            union = {0: 0} | {(m + 1) // 2: m for m in range(smallest, smallest + 4) if m & 1 == quantizer}
        found = {}
        for magnitude, m in union.items():
            value = -magnitude if r[lane, at] < 0 else magnitude
            bits = tables.bits(np.array([value]), np.array([quantizer * 5 + level[lane, at]]))[0]
            found[value] = reference.distortion(position, m, weight[lane]) + int(np.rint(256 * bits))
        return found

    def paths(lane: int, at: int, state: int) -> dict[tuple[int, ...], int]:
        if at == r.shape[1]:
            return {(): 0}
        return {
            (value, *rest): price + later
            for value, price in offers(lane, at, machine.quantizer[state]).items()
            for rest, later in paths(lane, at + 1, machine.next_state[state][value & 1]).items()
        }

    for lane in range(len(r)):
        every = paths(lane, 0, 0)
        assert cost[lane] == min(every.values()) == every[tuple(k[lane].tolist())]
    assert len({tuple(row) for row in rates.costs.tolist()}) > 10 * machine.quantizers - 3  # hardly a row is symmetric


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (1, 1), (143, 35), (12, 131)])
def test_rates_by_sign_in_every_engine(machine: Trellis, shape: tuple[int, int]) -> None:
    channels = 150  # more than a byte of rows
    tables = channel_tables(channels, 2, seed=1)
    r, level, weight = channel_latents(*shape, channels, seed=sum(shape))
    r[:, :1] *= 500
    rates = signed_rates(tables)
    expected = reference.search(r, level, weight, STEP, rates, machine)
    scalar = signed_rates(channel_tables(channels, 1, seed=2))
    expected_rdoq = reference.rdoq(r, level, weight, STEP, scalar)
    for threads in (1, 2):
        found = search(r, level, weight, STEP, rates, machine, threads)
        assert all(np.array_equal(one, right) for one, right in zip(found, expected, strict=True))
        found = rdoq(r, level, weight, STEP, scalar, threads)
        assert all(np.array_equal(one, right) for one, right in zip(found, expected_rdoq, strict=True))
    on_device = [torch.from_numpy(one) for one in (r, level, weight)]
    for engine, its, right in ((tensors.search, rates, expected), (tensors.rdoq, scalar, expected_rdoq)):
        if r.size:
            held = tensors.DeviceRates.of(its, torch.device("cpu"), trellis=its is rates)
            rows = its.search_levels(*on_device[:2])
            arguments = (on_device[0], rows, on_device[2], float(reference.inverse(STEP)), held)
            found = engine(*arguments, *([machine] if its is rates else []))
            assert all(np.array_equal(np.asarray(one), other) for one, other in zip(found, right, strict=True))
    if r.size:
        with pytest.raises(ValueError, match="below 150"):
            search(r, level + np.uint16(channels), weight, STEP, rates, machine)


def test_rates_by_sign_of_symmetric_tables_are_the_rates() -> None:
    """But for the first escape, whose price depends on its sign; here none is near."""
    r, level, weight = latents(20, 70)
    expected = search(r, level, weight, STEP, TABLES, ECM8)
    for found, right in zip(search(r, level, weight, STEP, signed_rates(TABLES), ECM8), expected, strict=True):
        assert np.array_equal(found, right)
    with pytest.raises(ValueError, match="hold 0"):
        signed_rates(CdfTables(np.array([[0, 1, 2, 65536]]), np.array([4]), np.array([1])))


@pytest.mark.gpu
@pytest.mark.parametrize("machine", MACHINES)
def test_a_gpu_gives_the_reference_by_sign_and_by_step(machine: Trellis) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    r, level, weight = channel_latents(3000, 131, 150)
    r[:, 0] *= 500
    rates = signed_rates(channel_tables(150, 2))
    scalar = signed_rates(channel_tables(150, 1))
    for weights in (weight, weight[None, :131]):
        on_gpu = [torch.from_numpy(array).cuda() for array in (r, level, weights)]
        expected = search(r, level, weights, STEP, rates, machine), rdoq(r, level, weights, STEP, scalar)
        found = search(*on_gpu, STEP, rates, machine), rdoq(*on_gpu, STEP, scalar)
        for pair, right in zip(found, expected, strict=True):
            assert all(np.array_equal(one.cpu().numpy(), other) for one, other in zip(pair, right, strict=True))
