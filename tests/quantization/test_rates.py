"""Rate tables: levels, analytic and adapted distributions, integer tables against CompressAI's coder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_dist.models.compat import import_compressai
from lic_dist.quantization import kernels, rates
from lic_dist.quantization.distributions import adapted_pmf, analytic_pmf, count, factorized_pmf, pmf_shape
from lic_dist.quantization.rates import (
    LEVELS,
    SCALES,
    CdfTables,
    bits_table,
    level_index,
    search_rates,
    tables_from_pmf,
    tables_from_signed_pmf,
)
from lic_dist.quantization.trellis import ECM8, SCALAR


@pytest.fixture(scope="module")
def tcq_tables() -> CdfTables:
    return tables_from_pmf(analytic_pmf(0.56, ECM8))


def test_nearest_level_is_the_nearest_in_log_sigma() -> None:
    scales = np.exp(np.random.default_rng(0).uniform(np.log(0.05), np.log(400), 4000)).astype(np.float32)
    brute = np.abs(np.log(scales)[:, None] - np.log(SCALES)[None]).argmin(axis=1)
    assert np.array_equal(level_index(scales), brute)
    assert np.array_equal(level_index(SCALES), np.arange(LEVELS))
    in_torch = level_index(torch.from_numpy(scales).reshape(40, 100))
    assert in_torch.dtype == torch.uint8 and np.array_equal(in_torch.numpy().ravel(), brute)


@pytest.mark.parametrize("rule", ["nearest", "above"])
def test_every_kind_of_number_has_the_level_of_a_search_of_the_thresholds(rule: str) -> None:
    edges = rates._THRESHOLDS[rule]
    beside = [np.nextafter(edges, np.float32(sign)) for sign in (0, np.inf)]
    random = np.random.default_rng(2).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)  # NaN among them
    numbers = np.concatenate([edges, *beside, random, np.float32([0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45])])
    assert np.array_equal(level_index(numbers, rule), np.searchsorted(edges, numbers))


def test_above_is_compressais_build_indexes() -> None:
    compressai = import_compressai()
    table = compressai.models.google.get_scale_table()
    assert np.allclose(table.numpy(), SCALES, rtol=1e-6)
    gaussian = compressai.entropy_models.GaussianConditional(SCALES.tolist())
    random = np.exp(np.random.default_rng(1).uniform(np.log(0.01), np.log(500), 2000)).astype(np.float32)
    scales = np.concatenate([random, SCALES, np.nextafter(SCALES, np.float32(1e9)), [0.0, -1.0]]).astype(np.float32)
    expected = gaussian.build_indexes(torch.from_numpy(scales)).numpy()
    assert np.array_equal(level_index(scales, "above"), expected)
    assert np.array_equal(level_index(torch.from_numpy(scales), "above").numpy(), expected)


@pytest.mark.parametrize("machine", [SCALAR, ECM8])
@pytest.mark.parametrize("step", [0.3, 0.56, 1.0])
def test_analytic_rows_sum_to_one(machine, step: float) -> None:
    pmf = analytic_pmf(step, machine)
    assert pmf.shape[0] == LEVELS * machine.quantizers
    assert np.abs(pmf[:, 0] + 2 * pmf[:, 1:].sum(axis=1) - 1).max() < 2e-9


def test_analytic_cells_against_samples() -> None:
    level, step = 30, 0.6
    r = np.abs(np.random.default_rng(2).normal(0, SCALES[level], 400_000)) / step
    q0 = np.floor((r + 1) / 2)
    q1 = np.where(r < 0.5, 0, np.maximum(1, np.floor(r / 2 + 1)))
    pmf = analytic_pmf(step, ECM8)
    for row, k in ((level, q0), (LEVELS + level, q1)):
        for magnitude in range(4):
            share = (k == magnitude).mean() / (1 if magnitude == 0 else 2)
            assert abs(share - pmf[row, magnitude]) < 0.004


def test_golden_row() -> None:
    half_normal = np.array([[0.5, 0.125, 0.0625, 0.03125, 0.0]])
    tables = tables_from_pmf(half_normal)
    assert tables.offset.tolist() == [-3] and tables.size.tolist() == [9]
    assert np.diff(tables.cdf[0]).tolist() == [2048, 4096, 8192, 32768, 8192, 4096, 2048, 4096]
    assert tables.costs(5).tolist() == [[256, 768, 1024, 1280, 1024 + 1536, 1024 + 256 * 8]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=300), st.floats(0, 0.2))
def test_tables_are_whole_and_symmetric(masses: list[float], tail: float) -> None:
    pmf = np.array([masses]) + 1e-15
    pmf *= (1 - tail) / (pmf[0, 0] + 2 * pmf[0, 1:].sum())
    tables = tables_from_pmf(pmf)  # __post_init__ proves: from 0, strictly rising, to 65536
    assert tables.symmetric
    frequencies = np.diff(tables.cdf[0])[tables.reach()[0] : -1]
    kept = pmf[0, : len(frequencies)]
    assert np.all(np.abs(frequencies - kept * 65536) <= 2 + 0.02 * kept * 65536)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=100), st.integers(256, 65536))
def test_proportional_counts_are_those_of_the_definition(masses: list[float], total: int) -> None:
    shares, weight = np.array(masses) / max(sum(masses), 1.0), np.arange(len(masses)) % 2 + 1

    def rounded(factor: float) -> np.ndarray:
        return np.maximum(1, np.floor(shares * factor + 0.5)).astype(np.int64)

    low, high = 0.0, 2.0 * total
    for _ in range(64):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if (weight * rounded(middle)).sum() <= total else (low, middle)
    assert np.array_equal(kernels.proportional_frequencies(shares, weight, total), rounded(low))


def test_integer_tables_lose_little_against_the_distribution() -> None:
    pmf = analytic_pmf(1.0, SCALAR)
    table = bits_table(tables_from_pmf(pmf), pmf.shape[1] - 1)[0].astype(np.float64)
    both = np.where(np.arange(pmf.shape[1]) == 0, 1, 2)
    entropy = -(both * pmf * np.log2(np.maximum(pmf, 1e-300))).sum(axis=1)
    expected = (both * pmf * table).sum(axis=1)
    assert (expected - entropy).max() < 0.004 and (expected - entropy).min() > -1e-6
    assert np.all(np.diff(table[:, :64], axis=1) > -7)  # an escape's first sign average may fall, never the row


@pytest.mark.parametrize("spread", [1.0, 9.0])
def test_bits_are_the_length_of_compressais_stream(tcq_tables: CdfTables, spread: float) -> None:
    """spread 9: a good part of the indices are escapes."""
    ans = import_compressai().ans
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 2 * LEVELS, 60_000).astype(np.int32)
    k = np.rint(rng.standard_normal(len(rows)) * SCALES[rows % LEVELS] * spread).astype(np.int32)
    k[:50] = [-32768, 32767, 4000, -4000, 2, -2, 3, -3, 90, -90] * 5
    encoder = ans.BufferedRansEncoder()
    arrays = (tcq_tables.cdf.tolist(), tcq_tables.size.tolist(), tcq_tables.offset.tolist())
    encoder.encode_with_indexes(k.tolist(), rows.tolist(), *arrays)
    stream = encoder.flush()
    assert abs(8 * len(stream) / tcq_tables.bits(k, rows).sum() - 1) < 1e-3
    assert ans.RansDecoder().decode_with_indexes(stream, rows.tolist(), *arrays) == k.tolist()
    escaped = np.abs(k) > tcq_tables.reach()[rows]
    assert escaped.mean() > (0.1 if spread > 1 else 0.0)


def test_costs_and_bits_agree_also_past_the_table(tcq_tables: CdfTables) -> None:
    rates = search_rates(tcq_tables)
    for row in (0, 5, 63, 64, 100, 127):
        reach = int(tcq_tables.reach()[row])
        for magnitude in (
            0,
            1,
            reach,
            reach + 1,
            reach + 2,
            reach + 9,
            reach + 200,
            rates.largest + 1,
            30_000,
        ):
            k = np.array([magnitude, -magnitude])
            mean_bits = tcq_tables.bits(k, np.full(2, row)).mean()
            assert abs(rates.cost(row, magnitude) - 256 * mean_bits) <= 0.501
    largest = rates.largest + 50
    table = bits_table(tcq_tables, largest)
    assert table.shape == (2, LEVELS, largest + 1) and table.dtype == np.float32
    assert np.array_equal(np.rint(256 * table.reshape(128, -1).astype(np.float64)), tcq_tables.costs(largest))


def test_rows_of_compressais_own_tables_serve(tcq_tables: CdfTables) -> None:
    gaussian = import_compressai().entropy_models.GaussianConditional(SCALES.tolist())
    gaussian.update()
    tables = CdfTables(gaussian._quantized_cdf.numpy(), gaussian._cdf_length.numpy(), gaussian._offset.numpy())
    assert tables.rows == LEVELS
    assert 2.0 < tables.bits(np.zeros(1, np.int32), np.array([level_index(np.float32(1.6))]))[0] < 2.1


def test_broken_tables_are_refused(tcq_tables: CdfTables) -> None:
    cdf = tcq_tables.cdf.copy()
    cdf[3, 2] = cdf[3, 1]
    with pytest.raises(ValueError, match="rises"):
        CdfTables(cdf, tcq_tables.size, tcq_tables.offset)
    wrapped = np.array([[0, 65536, 2**31 - 1, -(2**31), -1, 65536]])  # rises strictly, were it not for 32 bits
    for table, offset in ((wrapped, 0), (np.array([[0, 3, 9, 70, 99, 65536]]), 2**31 - 1)):
        with pytest.raises(ValueError, match="between 0 and 65536"):
            CdfTables(table, np.array([6]), np.array([offset]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        tables_from_pmf(np.array([[1e20, 0.1, 0.1, 0.1]]))
    with pytest.raises(ValueError, match="rows lie outside"):
        tcq_tables.bits(np.zeros(1, np.int32), np.array([128]))
    with pytest.raises(ValueError, match="symmetric"):
        CdfTables(tcq_tables.cdf, tcq_tables.size, tcq_tables.offset + 1).costs(3)


def laplace(channel: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The cdf of a factorized prior: Laplacians of another width and centre for each channel."""
    at = (value - (channel % 5 - 2) * 0.7) / (0.3 + channel)
    return np.where(at < 0, 0.5 * np.exp(np.minimum(at, 0)), 1 - 0.5 * np.exp(-np.maximum(at, 0)))


@pytest.mark.parametrize(("machine", "rounding"), [(SCALAR, 0.5), (SCALAR, 0.35), (ECM8, 0.5)])
def test_cells_of_a_factorized_prior_against_samples(machine, rounding: float) -> None:
    step, rng = 0.6, np.random.default_rng(4)
    pmf = factorized_pmf(laplace, 3, step, machine, rounding)
    assert pmf.shape == pmf_shape(step, machine, 3) and np.abs(pmf.sum(axis=1) - 1).max() < 1e-9
    middle = pmf.shape[1] // 2
    for channel in range(3):
        r = (rng.laplace(0, 0.3 + channel, 400_000) + (channel % 5 - 2) * 0.7) / step
        size, sign = np.abs(r), np.sign(r)
        if machine is SCALAR:
            indices = [sign * np.floor(size + rounding)]
        else:
            q1 = np.where(size < 0.5, 0, np.maximum(1, np.floor(size / 2 + 1)))
            indices = [sign * np.floor((size + 1) / 2), sign * q1]
        for quantizer, k in enumerate(indices):
            for value in range(-4, 5):
                assert abs((k == value).mean() - pmf[quantizer * 3 + channel, middle + value]) < 0.004


def test_a_factorized_prior_is_compressais() -> None:
    torch.manual_seed(0)
    prior = import_compressai().entropy_models.EntropyBottleneck(4)
    with torch.no_grad():
        prior.quantiles[:, 0, 1] = torch.tensor([-1.0, 0.3, 2.0, 0.0])
    medians = prior.quantiles[:, 0, 1].detach().numpy()[:, None]

    def cdf(channel: np.ndarray, value: np.ndarray) -> np.ndarray:
        at = torch.from_numpy((value + medians)[:, None]).float()
        with torch.no_grad():
            return torch.sigmoid(prior._logits_cumulative(at, stop_gradient=True))[:, 0].double().numpy()

    pmf = factorized_pmf(cdf, 4, 1.0, SCALAR)
    k = np.arange(-6, 7)
    with torch.no_grad():
        y = torch.from_numpy(k[None, None, :, None] + medians[None, :, :, None]).float()
        _, likelihood = prior.eval()(y, training=False)
    middle = pmf.shape[1] // 2
    assert np.abs(pmf[:, middle + k[0] : middle + k[-1] + 1] - likelihood[0, :, :, 0].numpy()).max() < 1e-6


def test_tables_by_channel_lose_little_and_are_cut_at_each_side() -> None:
    pmf = factorized_pmf(laplace, 5, 0.5, ECM8)
    tables = tables_from_signed_pmf(pmf)
    assert tables.rows == 10 and tables.holds_zero and not tables.symmetric
    middle = pmf.shape[1] // 2
    k = np.arange(pmf.shape[1]) - middle
    bits = tables.bits(np.tile(k, (10, 1)), np.tile(np.arange(10)[:, None], (1, len(k))))
    entropy = -(pmf * np.log2(np.maximum(pmf, 1e-300))).sum(axis=1)
    assert ((pmf * bits).sum(axis=1) - entropy).max() < 0.005
    for row in range(10):
        below, above = -tables.offset[row], tables.offset[row] + tables.size[row] - 3
        assert pmf[row, middle - below - 1] * 65536 < 0.25 and pmf[row, middle + above + 1] * 65536 < 0.25
    narrow = tables_from_signed_pmf(np.array([[0, 0, 0, 0, 1.0], [0, 0, 1.0, 0, 0], [0, 0, 0, 0, 0]]))
    assert (narrow.offset.tolist(), narrow.size.tolist()) == ([-1] * 3, [5] * 3)  # K itself is "K or more"
    assert np.diff(narrow.cdf[1]).tolist() == [1, 65533, 1, 1] and np.diff(narrow.cdf[2])[-1] == 65533
    for wrong in (np.ones((2, 4)) / 4, np.ones((2, 3)) / 3, np.full((1, 5), 1.5)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            tables_from_signed_pmf(wrong)


def test_signed_counts_and_their_adaptation() -> None:
    k = np.array([[0, -1, 1, 7], [-32768, 2, 0, 0]], np.int16)
    level = np.array([[0, 0, 0, 1], [1, 1, 1, 1]], np.uint16)
    counts = count(k, level, SCALAR, 2, 5, signed=True)
    assert counts.tolist() == [[0, 1, 1, 1, 0], [1, 0, 2, 0, 2]]
    prior = factorized_pmf(laplace, 1, 0.56, ECM8)
    counts = np.zeros(prior.shape, np.int64)
    assert np.allclose(adapted_pmf(counts, prior, signed=True), np.maximum(prior, 1e-12), rtol=1e-9)
    middle = prior.shape[1] // 2
    counts[:, middle - 1 : middle + 2] = [10**8, 10**9, 3 * 10**8]
    adapted = adapted_pmf(counts, prior, signed=True)
    assert np.allclose(adapted[:, middle - 1 : middle + 2], [[1 / 14, 10 / 14, 3 / 14]], rtol=1e-4)
    assert adapted.min() > 0


def test_counts_add_up_and_take_the_large_ones_last() -> None:
    k = np.array([[0, -1, 1, 7], [-32768, 2, 0, 0]], np.int16)
    level = np.array([[0, 0, 0, 1], [1, 1, 1, 1]], np.uint8)
    counts = count(k, level, SCALAR, 2, 4)
    assert counts.tolist() == [[1, 2, 0, 0], [2, 0, 1, 2]]
    halves = count(k[:1], level[:1], SCALAR, 2, 4) + count(k[1:], level[1:], SCALAR, 2, 4)
    assert np.array_equal(halves, counts)


def test_counts_follow_the_state_machine_of_their_lane() -> None:
    random = np.random.default_rng(3)
    k, level = random.integers(-3, 4, (5, 40), np.int16), random.integers(0, 6, (5, 40), np.uint8)
    expected = np.zeros((12, 3), np.int64)
    for lane in range(5):
        state = 0
        for index, one in zip(k[lane], level[lane], strict=True):
            expected[ECM8.quantizer[state] * 6 + one, min(abs(index), 2)] += 1
            state = ECM8.next_state[state][index & 1]
    assert np.array_equal(count(k, level, ECM8, 6, 3), expected)
    for wrong in (level[:4], level + np.uint8(3)):
        with pytest.raises(ValueError, match=r"shape|outside 0\.\.5"):
            count(k, wrong, ECM8, 6, 3)


def test_adaptation_starts_at_the_prior_and_ends_at_the_counts() -> None:
    prior = analytic_pmf(0.56, ECM8)
    nothing = adapted_pmf(np.zeros(prior.shape, np.int64), prior)
    assert np.allclose(nothing, np.maximum(prior, 1e-12), rtol=1e-9)
    counts = np.zeros(prior.shape, np.int64)
    counts[:, :3] = [10**9, 2 * 10**8, 0]
    adapted = adapted_pmf(counts, prior)
    assert np.allclose(adapted[:, :2], [[1 / 1.2, 0.1 / 1.2]], rtol=1e-4)
    assert adapted.min() > 0
    assert tables_from_pmf(adapted).symmetric
