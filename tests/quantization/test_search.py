"""The searches: brute force, the reference, and every engine against it: same indices, same cost."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_dist.errors import LicError
from lic_dist.quantization import candidates, reference, scalar, selection, tensors, viterbi
from lic_dist.quantization.distributions import analytic_pmf
from lic_dist.quantization.quantize import active, rdoq, search
from lic_dist.quantization.rates import LEVELS, CdfTables, level_index, search_rates, tables_from_pmf
from lic_dist.quantization.trellis import CODE16, CODE32, CODE64, ECM8, SCALAR, VVC4, Trellis, levels
from tests.forked import python
from tests.quantization.test_trellis import NNCODEC8

ROOT = Path(__file__).parents[2]
STEP = 0.56
TABLES = tables_from_pmf(analytic_pmf(STEP, ECM8))
FLAT = tables_from_pmf(np.tile([[0.5, 0.125, 0.0625, 0.03125, 0.0]], (2 * LEVELS, 1)))  # whole bits: many ties
SCALAR_TABLES = tables_from_pmf(analytic_pmf(0.5, SCALAR))
SCALAR_FLAT = tables_from_pmf(np.tile([[0.5, 0.125, 0.0625, 0.03125, 0.0]], (LEVELS, 1)))
MACHINES = [VVC4, ECM8, CODE16, CODE32]


def latents(lanes: int, steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals, levels and weights of mixed scales, some zeros and some large values."""
    rng = np.random.default_rng(seed)
    sigma = np.exp(rng.normal(-0.5, 1.3, (lanes, steps))).clip(0.05, 300).astype(np.float32)
    r = (sigma * rng.standard_normal((lanes, steps))).astype(np.float32)
    r[rng.random(r.shape) < 0.05] = 0
    weight = np.exp(rng.uniform(np.log(30), np.log(3000), lanes)).astype(np.float32)
    return r, level_index(sigma), weight


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("tables", [TABLES, FLAT], ids=["analytic", "ties"])
def test_reference_is_the_best_of_all_sequences(machine: Trellis, tables: CdfTables) -> None:
    r, level, weight = latents(12, 5)
    if tables is FLAT:
        r, weight = np.rint(r / 0.28).astype(np.float32) * np.float32(0.25), np.full(12, 1024, np.float32)
    step = 0.5 if tables is FLAT else STEP
    k, cost = reference.search(r, level, weight, step, tables, machine)
    k_brute, cost_brute = reference.brute_force(r, level, weight, step, tables, machine)
    assert np.array_equal(cost, cost_brute)
    assert np.array_equal(k, k_brute)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "shape",
    [
        *[(0, 7), (3, 0), (1, 1), (5, 63), (3, 64), (2, 65), (2, 131), (300, 3)],
        pytest.param((143, 67), marks=pytest.mark.slow),
    ],
)
def test_kernel_is_the_reference(machine: Trellis, shape: tuple[int, int]) -> None:
    r, level, weight = latents(*shape, seed=sum(shape))
    k, cost = search(r, level, weight, STEP, TABLES, machine)
    expected_k, expected_cost = reference.search(r, level, weight, STEP, TABLES, machine)
    assert k.dtype == np.int16 and cost.dtype == np.int64
    assert np.array_equal(cost, expected_cost) and np.array_equal(k, expected_k)


@pytest.mark.slow
def test_sixty_four_states_whose_decisions_take_two_words() -> None:
    for lanes, steps in ((12, 5), (143, 67), (2, 131)):
        r, level, weight = latents(lanes, steps, seed=lanes)
        expected = reference.search(r, level, weight, STEP, TABLES, CODE64)
        for found in (
            search(r, level, weight, STEP, TABLES, CODE64),
            _in_torch(tensors.search, r, level, weight, CODE64),
        ):
            assert all(np.array_equal(one, right) for one, right in zip(found, expected, strict=True))
        if steps == 5:
            brute = reference.brute_force(r, level, weight, STEP, TABLES, CODE64)
            assert all(np.array_equal(one, right) for one, right in zip(brute, expected, strict=True))


def machine_of(states: int) -> Trellis:
    """Every state entered by an even and by an odd index, from anywhere: two permutations."""
    rng = np.random.default_rng(states)
    even, odd = rng.permutation(states), rng.permutation(states)
    while (even == odd).any():
        odd = rng.permutation(states)
    quantizer = tuple(int(bit) for bit in rng.permutation(np.arange(states) & 1))
    return Trellis(f"any{states}", quantizer, tuple(zip(even.tolist(), odd.tolist(), strict=True)))


ANY_SIZE = """
import os
import numpy as np
from numba import config
from lic_dist.quantization import reference, viterbi
from lic_dist.quantization.quantize import search
from tests.quantization.test_search import STEP, TABLES, latents, machine_of
config.CACHE_DIR = os.environ["CACHE"]  # of what is compiled from here on, by no process before
for states in (6, 40):
    machine = machine_of(states)
    for lanes, steps in ((3, 71), (17, 13)):
        r, level, weight = latents(lanes, steps, seed=lanes)
        expected = reference.search(r, level, weight, STEP, TABLES, machine)
        for one, right in zip(search(r, level, weight, STEP, TABLES, machine), expected, strict=True):
            assert np.array_equal(one, right), states
    print(states, *(loop.cache_hits for loop in viterbi.machine_loops(machine)[0]))
"""


@pytest.mark.slow
def test_machines_of_any_size_are_compiled_once_for_all_processes(tmp_path: Path) -> None:
    """And the indices of what is compiled and of what is loaded are the reference's."""
    for expected in ("6 0 0 0 0, 40 0 0 0 0", "6 1 1 1 1, 40 1 1 1 1"):
        done = python(ANY_SIZE, environment={**os.environ, "CACHE": str(tmp_path)}, timeout=250)
        assert ", ".join(done.stdout.splitlines()) == expected, done.stderr[-2000:]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (1, 1), (12, 5), (2, 65), (143, 35)])
def test_weights_of_the_steps(machine: Trellis, shape: tuple[int, int]) -> None:
    """Where a lane runs along the channels of a position: [1, steps] instead of [lanes], in every engine."""
    r, level, _ = latents(*shape, seed=sum(shape))
    weight = latents(shape[1], 1)[2][None]
    expected = reference.search(r, level, weight, STEP, TABLES, machine)
    for threads in (1, 2):
        for one, right in zip(search(r, level, weight, STEP, TABLES, machine, threads), expected, strict=True):
            assert np.array_equal(one, right)
    if r.size:
        for one, right in zip(_in_torch(tensors.search, r, level, weight, machine), expected, strict=True):
            assert np.array_equal(one, right)
    if shape == (12, 5):
        brute = reference.brute_force(r, level, weight, STEP, TABLES, machine)
        assert np.array_equal(brute[0], expected[0]) and np.array_equal(brute[1], expected[1])
    if shape[0] == 143:
        q = active(expected[0], machine)
        error = (levels(expected[0], q, STEP, machine) - r).astype(np.float64) / STEP
        bits = TABLES.bits(expected[0], q.astype(np.int32) * LEVELS + level)
        assert np.allclose((256 * bits + weight * error**2).sum(axis=1), expected[1], rtol=2e-3)
    least = reference.rdoq(r, level, weight, 0.5, SCALAR_TABLES)
    rates = tensors.DeviceRates.of(search_rates(SCALAR_TABLES), torch.device("cpu"), trellis=False)
    in_torch = tensors.rdoq(*map(torch.from_numpy, (r, level, weight)), float(reference.inverse(0.5)), rates)
    for found in (rdoq(r, level, weight, 0.5, SCALAR_TABLES), in_torch):
        assert all(np.array_equal(np.asarray(one), right) for one, right in zip(found, least, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.05, 2.0),
    st.sampled_from([0.0, 1.0, 1024.0, 3e5, 1e30]),
    st.sampled_from(MACHINES),
    st.booleans(),
)
@pytest.mark.slow
def test_kernel_is_the_reference_for_any_step_and_weight(
    seed: int, step: float, weight: float, machine: Trellis, ties: bool
) -> None:
    """Weights of 1e30 saturate every distortion, 0 leaves rate alone; whole-bit tables and a grid: ties."""
    r, level, _ = latents(3, 70, seed)
    tables = FLAT if ties else TABLES
    if ties:
        r = (np.rint(r * 4) * np.float32(step) / 4).astype(np.float32)
    weights = np.full(3, weight, np.float32)
    k, cost = search(r, level, weights, step, tables, machine)
    expected_k, expected_cost = reference.search(r, level, weights, step, tables, machine)
    assert np.array_equal(cost, expected_cost) and np.array_equal(k, expected_k)


def test_kernel_contracts_no_float_operation_and_counts_escapes() -> None:
    """|r|/D near 3,000 with large weights: one fused multiply-subtract would shift costs by dozens."""
    rng = np.random.default_rng(5)
    r = rng.uniform(-1700, 1700, (40, 66)).astype(np.float32)
    level = rng.integers(0, LEVELS, r.shape).astype(np.uint8)
    weight = np.full(40, 4e5, np.float32)
    k, cost = search(r, level, weight, STEP, TABLES, ECM8)
    expected_k, expected_cost = reference.search(r, level, weight, STEP, TABLES, ECM8)
    assert np.array_equal(cost, expected_cost) and np.array_equal(k, expected_k)
    assert np.abs(k).max() > search_rates(TABLES).largest
    position = np.abs(r) * reference.inverse(STEP)
    nearest = np.floor(position).astype(np.float32)
    exact = np.abs(r).astype(np.float64) * float(reference.inverse(STEP)) - nearest
    assert (np.abs((position - nearest) ** 2 - exact**2) * 4e5).max() > 10  # the test can see the difference


def test_cost_is_that_of_the_indices() -> None:
    r, level, weight = latents(20, 200)
    k, cost = search(r, level, weight, STEP, TABLES, ECM8)
    q = active(k, ECM8)
    bits = TABLES.bits(k, q.astype(np.int32) * LEVELS + level)
    error = (levels(k, q, STEP, ECM8) - r).astype(np.float64) / STEP
    real = (256 * bits + weight[:, None] * error**2).sum(axis=1)
    assert np.allclose(real, cost, rtol=2e-3)
    assert np.all((k == 0) | (r == 0) | (np.sign(k) == np.sign(r)))


def test_bad_latents_end_in_one_line() -> None:
    r, level, weight = latents(2, 8)
    for bad, message in ((np.nan, "finite"), (np.inf, "finite"), (4e4, "16-bit")):
        broken = r.copy()
        broken[1, 3] = bad
        with pytest.raises(LicError, match=message):
            search(broken, level, weight, STEP, TABLES, ECM8)
    with pytest.raises(ValueError, match="below 64"):
        search(r, level + np.uint8(64), weight, STEP, TABLES, ECM8)
    with pytest.raises(ValueError, match="no trellis"):
        search(r, level, weight, STEP, TABLES, SCALAR)
    for wrong in (weight[:1], weight[:, None], np.ones((2, 8), np.float32)):
        with pytest.raises(ValueError, match="do not fit"):
            search(r, level, wrong, STEP, TABLES, ECM8)
    for wrong in (np.float32([[1] * 7 + [-1]]), np.float32([1, np.inf])):
        with pytest.raises(ValueError, match="finite numbers"):
            search(r, level, wrong, STEP, TABLES, ECM8)
    at_the_edge = np.full((2, 8), 65_000 * STEP, np.float32)
    assert search(at_the_edge, level, weight, STEP, TABLES, ECM8)[0].min() > 32_000


@pytest.mark.parametrize("tables", [SCALAR_TABLES, SCALAR_FLAT], ids=["analytic", "ties"])
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (1, 1), (40, 65), (2, scalar.RUN + 9)])
def test_rdoq_is_the_reference_in_every_engine(tables: CdfTables, shape: tuple[int, int]) -> None:
    r, level, weight = latents(*shape, seed=sum(shape))
    if tables is SCALAR_FLAT:
        r, weight = np.rint(r / 0.25).astype(np.float32) * np.float32(0.25), np.full(len(r), 1024, np.float32)
    r[:, :1] *= 40  # escapes
    expected = reference.rdoq(r, level, weight, 0.5, tables)
    rates = tensors.DeviceRates.of(search_rates(tables), torch.device("cpu"), trellis=False)
    in_torch = tensors.rdoq(*map(torch.from_numpy, (r, level, weight)), float(reference.inverse(0.5)), rates)
    for k, cost in (rdoq(r, level, weight, 0.5, tables), rdoq(r, level, weight, 0.5, tables, threads=2), in_torch):
        assert np.array_equal(np.asarray(k), expected[0]) and np.array_equal(np.asarray(cost), expected[1])
    if r.size:
        plain = np.rint(r * reference.inverse(0.5))
        bits = tables.bits(plain.astype(np.int32), level.astype(np.int32)) * 256
        rounded = bits + weight[:, None] * (r / 0.5 - plain).astype(np.float64) ** 2
        assert np.all(expected[1] <= rounded.sum(axis=1) + 2 * r.shape[1] + 512)  # never dearer than rounding


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("shape", [(2, 1), (3, 64), (40, 131)])
def test_the_torch_engine_is_the_reference(machine: Trellis, shape: tuple[int, int]) -> None:
    r, level, weight = latents(*shape, seed=sum(shape))
    r[:, 0] *= 500  # beyond every table
    k, cost = _in_torch(tensors.search, r, level, weight, machine)
    expected_k, expected_cost = search(r, level, weight, STEP, TABLES, machine)
    assert np.array_equal(cost, expected_cost) and np.array_equal(k, expected_k)
    q = tensors.active(torch.from_numpy(k), machine)
    assert np.array_equal(q.numpy(), active(k, machine))


def test_blocks_of_lanes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    r, level, weight = latents(50, 70)
    whole = _in_torch(tensors.search, r, level, weight, ECM8)
    monkeypatch.setattr(tensors, "LANES", 7)
    split = _in_torch(tensors.search, r, level, weight, ECM8)
    assert all(np.array_equal(one, other) for one, other in zip(whole, split, strict=True))


def _in_torch(engine: Any, r: np.ndarray, level: np.ndarray, weight: np.ndarray, machine: Trellis) -> Any:
    rates = tensors.DeviceRates.of(search_rates(TABLES), torch.device("cpu"), trellis=True)
    inputs = map(torch.from_numpy, (r, level, weight))
    return [one.numpy() for one in engine(*inputs, float(reference.inverse(STEP)), rates, machine)]


@pytest.mark.parametrize("machine", MACHINES)
def test_memory_is_a_bit_a_state_and_four_bits_a_latent_of_a_block(machine: Trellis) -> None:
    for lanes in (1, 100, 128, 129, 100_000):
        width = viterbi.block_width(lanes)
        assert width <= candidates.BLOCK and width - 16 < -(-lanes // -(-lanes // width)) <= width
        held = sum(array.nbytes for array in viterbi.decision_memory(width, 512, machine.states))
        assert 8 * held == (machine.states + 4) * 512 * width


def test_compiled_searches_are_kept_apart() -> None:
    one, other = (selection.identity(machine) for machine in (ECM8, replace(ECM8, next_state=NNCODEC8)))
    assert one.startswith("8_") and one != other
    loops, _ = viterbi.machine_loops(ECM8)
    assert {loop.__name__ for loop in loops} == {f"{name}_{one}" for name in ("select4", "select1", "trace4", "trace1")}
    assert viterbi.machine_loops(ECM8)[0] is loops


def test_one_compiled_search_serves_levels_of_both_widths_weights_of_both_forms_and_read_only_latents() -> None:
    r, level, weight = latents(3, 9)
    r.setflags(write=False)
    for chosen in (level, level.astype(np.uint16)):
        for weights in (weight, np.full((1, 9), 99, np.float32)):
            search(r, chosen, weights, STEP, TABLES, ECM8)
            rdoq(r, chosen, weights, 0.5, SCALAR_TABLES)
    assert len(viterbi.search.signatures) == len(scalar._rdoq.signatures) == 1


TRITON = """
import numpy as np, torch
from lic_dist.quantization import reference, tensors, triton_search
from lic_dist.quantization.quantize import search
from lic_dist.quantization.rates import search_rates, signed_rates
from tests.quantization.test_search import CODE64, MACHINES, STEP, TABLES, latents
from tests.quantization.test_signed import channel_latents, channel_tables

shapes = [(3, 130), (40, 10), (2, 9), (3, 8), (3, 8), (1, 1), (40, 7)]  # every 64 steps metrics are reduced
for machine, shape in zip([*MACHINES, CODE64, MACHINES[1], MACHINES[1]], shapes, strict=True):
    r, level, weight = latents(*shape, seed=3)
    r[:, 0] *= 500
    if shape == (40, 7):
        weight = weight[None, :7]
    rates = tensors.DeviceRates.of(search_rates(TABLES), torch.device("cpu"), trellis=True)
    inputs = map(torch.from_numpy, (r, level, weight))
    k, cost = triton_search.search(*inputs, float(reference.inverse(STEP)), rates, machine)
    expected_k, expected_cost = search(r, level, weight, STEP, TABLES, machine)
    assert np.array_equal(k.numpy(), expected_k) and np.array_equal(cost.numpy(), expected_cost), machine.name
    if machine.states > 8:
        continue
    tables = signed_rates(channel_tables(150, 2))
    r, channel, weight = channel_latents(shape[0], min(shape[1], 10), 150, seed=3)
    rates = tensors.DeviceRates.of(tables, torch.device("cpu"), trellis=True)
    rows = tables.search_levels(torch.from_numpy(r), torch.from_numpy(channel))
    inputs = (torch.from_numpy(r), rows, torch.from_numpy(weight), float(reference.inverse(STEP)))
    k, cost = triton_search.search(*inputs, rates, machine)
    expected_k, expected_cost = search(r, channel, weight, STEP, tables, machine)
    assert np.array_equal(k.numpy(), expected_k) and np.array_equal(cost.numpy(), expected_cost), machine.name
print("the same")
"""


@pytest.mark.slow
def test_tritons_interpreter_gives_the_reference() -> None:
    """In a process that has not imported Triton: it decides then whether it interprets."""
    pytest.importorskip("triton")
    command, environment = [sys.executable, "-c", TRITON], {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert done.stdout.strip() == "the same", done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "by_step"), [*((one, False) for one in [*MACHINES, CODE64]), (ECM8, True)])
def test_triton_compiles_for_a_gpu_and_fuses_no_product_with_a_sum(machine: Trellis, by_step: bool) -> None:
    """For Hopper, without one: down to its machine code."""
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    import triton

    from lic_dist.quantization import triton_search

    kernel = triton_search.kernel(machine, by_step)
    kind = {4: "u8", 8: "u8", 16: "i16", 32: "i32", 64: "i64"}[machine.states]
    pointers = {"position": "fp32", "level": "u8", "weight": "fp32", "quads": "i64", "decisions": kind, "zeros": "u8"}
    pointers |= {"magnitude": "i16", "cost": "i64"} | dict.fromkeys(("zero_pairs", "reach", "flag", "branches"), "i32")
    signature = {
        name: "constexpr" if name == "THREADS" else f"*{pointers[name]}" if name in pointers else "i32"
        for name in kernel.arg_names
    }
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs={"THREADS": triton_search.THREADS})
    made = triton.compile(source, target=backends.GPUTarget("cuda", 90, 32), options={"num_warps": 2})
    assert len(made.asm["cubin"]) > 10_000 and "fma.rn.f32" not in made.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("machine", [*MACHINES, CODE64])
def test_a_gpu_gives_the_reference(machine: Trellis) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    r, level, weight = latents(3000, 131)
    r[:, 0] *= 500
    expected = search(r, level, weight, STEP, TABLES, machine)
    on_gpu = [torch.from_numpy(array).cuda() for array in (r, level, weight)]
    rates = tensors.DeviceRates.of(search_rates(TABLES), on_gpu[0].device, trellis=True)
    in_torch = tensors.search(*on_gpu, float(reference.inverse(STEP)), rates, machine)
    for k, cost in (search(*on_gpu, STEP, TABLES, machine), in_torch):
        assert k.is_cuda and np.array_equal(k.cpu().numpy(), expected[0])
        assert np.array_equal(cost.cpu().numpy(), expected[1])
    assert np.array_equal(active(k, machine).cpu().numpy(), active(expected[0], machine))


def test_distortion_saturates_at_any_step() -> None:
    most = 1 << 20  # 1/256 bit
    differences = np.float32([1023.5, 1024, 1100, 1447, 1449, 3e4])
    expected = [round(1023.5**2), *[most] * 5]
    assert [int(candidates.distortion(one, np.float32(1))) for one in differences] == expected
