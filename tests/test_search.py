"""The trellis search: brute force, reference, kernel; quantizers at work; what TCQ brings on latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_dist.errors import LicError
from lic_dist.quantization import reference
from lic_dist.quantization.quantize import Quantizer, active, adapted_tables, search
from lic_dist.quantization.rates import (
    LEVELS,
    SCALES,
    CdfTables,
    analytic_pmf,
    level_index,
    search_rates,
    tables_from_pmf,
)
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.sensitivity import sensitivities
from lic_dist.quantization.trellis import CODE16, CODE32, ECM8, SCALAR, VVC4, Trellis, levels

STEP = 0.56
TABLES = tables_from_pmf(analytic_pmf(STEP, ECM8))
FLAT = tables_from_pmf(np.tile([[0.5, 0.125, 0.0625, 0.03125, 0.0]], (2 * LEVELS, 1)))  # whole bits: many ties
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
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (1, 1), (5, 63), (3, 64), (2, 65), (2, 131), (300, 3)])
def test_kernel_is_the_reference(machine: Trellis, shape: tuple[int, int]) -> None:
    r, level, weight = latents(*shape, seed=sum(shape))
    k, cost = search(r, level, weight, STEP, TABLES, machine)
    expected_k, expected_cost = reference.search(r, level, weight, STEP, TABLES, machine)
    assert k.dtype == np.int16 and cost.dtype == np.int64
    assert np.array_equal(cost, expected_cost) and np.array_equal(k, expected_k)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.05, 2.0),
    st.sampled_from([0.0, 1.0, 1024.0, 3e5, 1e30]),
    st.sampled_from([VVC4, ECM8]),
    st.booleans(),
)
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
    at_the_edge = np.full((2, 8), 65_000 * STEP, np.float32)
    assert search(at_the_edge, level, weight, STEP, TABLES, ECM8)[0].min() > 32_000


def record(machine: Trellis, step: float, channels: int) -> QuantizerRecord:
    return QuantizerRecord(
        name="sq" if machine is SCALAR else "tcq",
        states=machine.states,
        step=step,
        lmbda=0.013,
        lambda_scale=0.5,
        weights=np.linspace(0.01, 0.03, channels, dtype=np.float32),
        level_rule="nearest",
        y_tables=tables_from_pmf(analytic_pmf(step, machine)),
        z_tables=FLAT,
    )


def test_scalar_quantizer_rounds_half_to_even() -> None:
    quantizer = Quantizer(record(SCALAR, 1.0, 2))
    r = np.array([[0.5, 1.5, -0.5, -2.5], [2.51, -0.49, 7.0, 1e4]], np.float32)
    k = quantizer.quantize(r, np.zeros((2, 4), np.uint8))
    assert k.tolist() == [[0, 2, 0, -2], [3, 0, 7, 10_000]] and k.dtype == np.int16
    assert np.array_equal(quantizer.dequantize(k), k.astype(np.float32))
    with pytest.raises(LicError):
        quantizer.quantize(r * 1e4, np.zeros((2, 4), np.uint8))


def test_trellis_quantizer_takes_the_records_weights() -> None:
    quantizer = Quantizer(record(ECM8, STEP, 3))
    r, level, _ = latents(6, 40)
    weight = quantizer.record.lane_weights(2)
    expected = 256 * 0.03 * STEP**2 / (0.5 * 3 / (0.013 * 255**2))
    assert weight.shape == (6,) and weight.dtype == np.float32 and weight[5] == pytest.approx(expected)
    k = quantizer.quantize(r, level)
    assert np.array_equal(k, reference.search(r, level, weight, STEP, quantizer.record.y_tables, ECM8)[0])
    rows = quantizer.rows(k, level)
    assert rows.dtype == np.int32 and np.array_equal(rows, quantizer.active(k) * 64 + level.astype(np.int32))
    assert np.allclose(quantizer.bits(k, level), quantizer.record.y_tables.bits(k, rows).sum(axis=1))
    with pytest.raises(ValueError, match="whole images"):
        quantizer.quantize(r[:4], level[:4])


def test_adapted_tcq_saves_a_good_eighth_against_sq_at_equal_error() -> None:
    """METHOD section 2: -13 to -14 % rate for 8 states; here few latents, nine (D, c), lower hull."""
    rng = np.random.default_rng(0)
    sigma = np.exp(rng.normal(-0.5, 1.0, (512, 256))).astype(np.float32)
    latent, scale_level = (sigma * rng.standard_normal(sigma.shape)).astype(np.float32), level_index(sigma)
    pilot, rest = slice(0, 256), slice(256, 512)  # tables are adapted on one half and charged on the other

    def point(machine: Trellis, step: float, price: float) -> tuple[float, float]:
        weight = np.full(256, 256 / price, np.float32)
        tables = adapted_tables(latent[pilot], scale_level[pilot], weight, step, machine, passes=2)
        r, level = latent[rest], scale_level[rest]
        if machine is SCALAR:
            k = np.rint(r / np.float32(step)).astype(np.int16)
        else:
            k = search(r, level, weight, step, tables, machine)[0]
        q = active(k, machine)
        error = levels(k, q, step, machine) - r
        bits = tables.bits(k, q.astype(np.int32) * LEVELS + level)
        return float(bits.mean()), float(np.mean(error.astype(np.float64) ** 2))

    scalar_rate, scalar_error = point(SCALAR, 1.0, 1.0)
    points = np.array([point(ECM8, step, price) for step in (0.5, 0.56, 0.63) for price in (0.5, 0.8, 1.2)])
    slopes = np.exp(np.linspace(np.log(1), np.log(30), 200))
    hull_rate = max((points @ [1.0, slope]).min() - slope * scalar_error for slope in slopes)
    assert -0.155 < hull_rate / scalar_rate - 1 < -0.115


def test_sensitivity_of_a_linear_decoder_is_its_columns_square() -> None:
    torch.manual_seed(0)
    gain = torch.tensor([1.0, 2.0, 0.5, 0.0])
    matrix = torch.randn(3 * 64, 4 * 4, dtype=torch.float32) / 8

    def g_s(y_hat: torch.Tensor) -> torch.Tensor:
        scaled = y_hat * gain.view(1, -1, 1, 1)
        return (scaled.flatten(1) @ matrix.T).reshape(-1, 3, 8, 8)

    exact = (matrix.square().sum(0).reshape(4, 4).mean(1) * gain**2).numpy()
    mean, error = sensitivities(g_s, torch.randn(40, 4, 2, 2), probes=8, generator=torch.Generator(), batch=16)
    assert mean.dtype == np.float64 and np.all(np.abs(mean - exact) <= 4 * error)
    assert np.all(error[:3] < 0.1 * exact[:3]) and error[3] == 0
    with pytest.raises(ValueError, match="standard error"):
        sensitivities(g_s, torch.randn(1, 4, 2, 2), probes=1, generator=torch.Generator())


def test_levels_cover_the_scales() -> None:
    assert level_index(SCALES[-1:] * 100).tolist() == [63]
