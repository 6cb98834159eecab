"""Quantizers at work: SQ, dead zone, RDOQ and TCQ from records, on arrays and tensors; adaptation; what they save."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lic_dist.errors import LicError
from lic_dist.quantization import reference
from lic_dist.quantization.adaptation import (
    adaptation_rounds,
    count_indices,
    factorized_record,
    gaussian_record,
    record_from_counts,
    sum_counts,
)
from lic_dist.quantization.distributions import analytic_pmf
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import LEVELS, SCALES, level_index, signed_rates
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.sensitivity import error_costs, sensitivities
from lic_dist.quantization.trellis import CODE16, CODE32, ECM8, SCALAR, VVC4, Trellis, register, trellis
from tests.quantization.test_rates import laplace
from tests.quantization.test_search import STEP, latents

WEIGHTS = np.linspace(0.01, 0.03, 3, dtype=np.float32)
EVERY = [
    gaussian_record("sq", 1.0, WEIGHTS, 0.013),
    replace(gaussian_record("deadzone", 0.9, WEIGHTS, 0.013, rounding=0.35), shift=-0.07),
    replace(gaussian_record("tcq", 0.7, WEIGHTS, 0.013, lambda_scale=0.1, trellis=trellis(8)), shift=0.08),
    gaussian_record("rdoq", 0.9, WEIGHTS, 0.013, 0.3),
    *(gaussian_record("tcq", 0.56, WEIGHTS, 0.013, 0.3, machine) for machine in (VVC4, ECM8, CODE16, CODE32)),
]


def record(machine: Trellis, step: float, channels: int) -> QuantizerRecord:
    name = "sq" if machine is SCALAR else "tcq"
    return gaussian_record(name, step, np.linspace(0.01, 0.03, channels, dtype=np.float32), 0.013, 0.5, machine)


@pytest.mark.parametrize("record", EVERY, ids=lambda record: f"{record.name}{record.states}")
def test_arrays_and_tensors_give_the_same_on_every_thread(record: QuantizerRecord) -> None:
    quantizer = Quantizer(QuantizerRecord.from_json(record.to_json()))
    r, level, _ = latents(3 * 200, 33)
    k = quantizer.quantize(r, level)
    assert np.array_equal(quantizer.quantize(r, level, threads=3), k)
    in_torch = [torch.from_numpy(array) for array in (r, level)]
    k_torch = quantizer.quantize(*in_torch, threads=2)
    assert k_torch.dtype == torch.int16 and np.array_equal(k_torch.numpy(), k)
    for method, arguments in (("active", ()), ("dequantize", ()), ("rows", (1,)), ("bits", (1,))):
        on_arrays = getattr(quantizer, method)(k, *(level for _ in arguments))
        on_tensors = getattr(quantizer, method)(k_torch, *(in_torch[1] for _ in arguments))
        assert isinstance(on_tensors, torch.Tensor) and on_tensors.numpy().dtype == on_arrays.dtype
        assert np.array_equal(on_tensors.numpy(), on_arrays)
    error = np.abs(quantizer.dequantize(k) - r)
    assert error.max() < 3 * record.step * record.trellis.quantizers and np.all(k * r >= 0)


@pytest.mark.parametrize("record", EVERY, ids=lambda record: f"{record.name}{record.states}")
def test_odd_latents_are_defined(record: QuantizerRecord) -> None:
    quantizer = Quantizer(record)
    r, level, _ = latents(3, 9)
    for bad, message in ((np.nan, "finite"), (-np.inf, "finite"), (1e5, "16-bit")):
        broken = r.copy()
        broken[2, 8] = bad
        for values in (broken, torch.from_numpy(broken)):
            with pytest.raises(LicError, match=message):
                quantizer.quantize(values, torch.from_numpy(level) if isinstance(values, torch.Tensor) else level)
    for shape in ((0, 9), (3, 0), (0, 0)):
        assert quantizer.quantize(np.zeros(shape, np.float32), np.zeros(shape, np.uint8)).shape == shape
    zeros = quantizer.quantize(np.zeros_like(r), level_index(np.zeros_like(r)))  # scales of zero are the least level
    assert not zeros.any() and not np.signbit(quantizer.dequantize(zeros)).any()
    with pytest.raises(ValueError, match="levels are uint8"):
        quantizer.quantize(r, level.astype(np.int64))
    half = torch.from_numpy(r).bfloat16()
    k = quantizer.quantize(half, torch.from_numpy(level))
    assert np.array_equal(k.numpy(), quantizer.quantize(half.float().numpy(), level))


def test_scales_that_are_not_numbers_have_a_level_too() -> None:
    odd = np.array([0.0, -1.0, -np.inf, np.inf, np.nan], np.float32)
    assert level_index(odd).tolist() == level_index(torch.from_numpy(odd)).tolist() == [0, 0, 0, 63, 63]


def test_levels_lie_the_further_out_the_smaller_sigma() -> None:
    plain = gaussian_record("tcq", 0.5, np.ones(1, np.float32), 0.013, trellis=ECM8)
    spread = replace(plain, shift=-0.25, spread=0.2)
    k, scales = np.array([[2, -1, 0, 1]], np.int16), np.array([0.02, 0.2, 0.2, 40])  # Q0, Q0, Q0, Q1
    level = level_index(scales.astype(np.float32))[None]
    quantizer = Quantizer(spread)
    assert quantizer.active(k).tolist() == [[0, 0, 0, 1]]
    further = [np.minimum(1, 0.2 * 0.5 / SCALES[one]) for one in level[0]]
    expected = 0.5 * np.array([4 - 0.25 + further[0], -(2 - 0.25 + further[1]), 0, 1 - 0.25 + further[3]])
    assert quantizer.dequantize(k, level)[0] == pytest.approx(expected, abs=1e-6)
    of_tensors = quantizer.dequantize(torch.from_numpy(k), torch.from_numpy(level))
    assert np.array_equal(of_tensors.numpy(), quantizer.dequantize(k, level))
    assert quantizer.unspread(k)[0] == pytest.approx([1.875, -0.875, 0, 0.375])
    with pytest.raises(ValueError, match="levels of the scales"):
        quantizer.dequantize(k)
    again = QuantizerRecord.from_json(spread.to_json())
    assert (again.spread, again.digest) == (0.2, spread.digest)
    assert len({one.decoding_digest for one in (spread, replace(spread, spread=0.1), replace(spread, spread=0))}) == 3
    assert '"spread"' not in plain.to_json()  # older records keep their digests
    with pytest.raises(ValueError, match="0 without scales"):
        replace(factorized_record("sq", 1.0, np.ones(7), 0.013, laplace), spread=0.1)


def test_levels_of_each_scale_have_shifts_of_their_own() -> None:
    plain = gaussian_record("tcq", 0.5, np.ones(1, np.float32), 0.013, trellis=ECM8)
    shifts = np.linspace(-0.3, 0.3, LEVELS).astype(np.float32)
    record = replace(plain, spread=0.1, level_shifts=shifts)
    assert record.shifts == pytest.approx(np.minimum(1, 0.1 * 0.5 / SCALES) + shifts)
    k, level = np.array([[2, -1, 0]], np.int16), np.array([[5, 60, 9]], np.uint8)
    expected = 0.5 * np.array([4 + record.shifts[5], -(2 + record.shifts[60]), 0])
    assert Quantizer(record).dequantize(k, level)[0] == pytest.approx(expected, abs=1e-6)
    again = QuantizerRecord.from_json(record.to_json())
    assert again.level_shifts is not None and np.array_equal(again.level_shifts, shifts)
    others = (record, replace(record, level_shifts=None), replace(record, level_shifts=-shifts))
    assert again.digest == record.digest and len({one.decoding_digest for one in others}) == 3
    for wrong in (shifts[1:], np.full(LEVELS, 1.5), np.full(LEVELS, np.nan)):
        with pytest.raises(ValueError, match="level_shifts are"):
            replace(plain, level_shifts=wrong)
    with pytest.raises(ValueError, match="level_shifts are"):
        replace(factorized_record("sq", 1.0, np.ones(LEVELS), 0.013, laplace), level_shifts=shifts)


def test_dead_zone_and_a_shift() -> None:
    r = np.array([[0.6, 0.64, -0.66, 1.64], [1.66, -2.7, 0.0, 5.5], [0.1, 0.2, 0.3, -0.7]], np.float32)
    plain = gaussian_record("deadzone", 1.0, np.ones(3, np.float32), 0.013, rounding=0.35)
    k = Quantizer(plain).quantize(r, np.zeros(r.shape, np.uint8))
    assert k.tolist() == [[0, 0, -1, 1], [2, -3, 0, 5], [0, 0, 0, -1]]
    shifted = replace(plain, shift=-0.0233)
    assert Quantizer(shifted).dequantize(k)[1].tolist() == pytest.approx([1.9767, -2.9767, 0, 4.9767], abs=1e-4)
    pmf = analytic_pmf(1.0, SCALAR, 0.35)
    assert np.abs(pmf[:, 0] + 2 * pmf[:, 1:].sum(axis=1) - 1).max() < 2e-9
    drawn = np.abs(np.random.default_rng(0).normal(0, SCALES[30], 400_000))
    assert abs((drawn < 0.65).mean() - pmf[30, 0]) < 0.004


@pytest.mark.slow
def test_a_users_trellis_is_three_lines_away() -> None:
    mine = Trellis("mine2", quantizer=(0, 1), next_state=((0, 1), (1, 0)))
    register(mine)
    register(mine)
    assert trellis("mine2") is mine
    with pytest.raises(ValueError, match="another machine"):
        register(replace(mine, next_state=((1, 0), (0, 1))))
    made = gaussian_record("tcq", 0.6, WEIGHTS, 0.013, 0.3, mine)
    r, level, _ = latents(30, 65)
    k = Quantizer(made).quantize(r, level)
    assert np.array_equal(k, reference.search(r, level, made.lane_weights(10), 0.6, made.y_tables, mine)[0])
    assert QuantizerRecord.from_json(made.to_json()).trellis == mine


def test_counts_of_shards_add_up_to_the_same_record() -> None:
    start = gaussian_record("tcq", 0.56, WEIGHTS, 0.013, 0.3, ECM8)
    r, level, _ = latents(30, 64)
    parts = [(r[first : first + 6], level[first : first + 6]) for first in range(0, 30, 6)]
    whole, split = (list(adaptation_rounds(start, shards, rounds=2)) for shards in ([(r, level)], parts))
    assert [one.digest for one in whole] == [one.digest for one in split] and len(whole) == 2
    assert whole[1].notes["rounds"] == 2 and whole[1].notes["rates"] == "adapted"
    merged = record_from_counts(start, sum_counts(count_indices(Quantizer(start), part) for part in reversed(parts)))
    assert merged.digest == whole[0].digest
    plain = gaussian_record("sq", 1.0, WEIGHTS, 0.013)
    assert [len(list(adaptation_rounds(plain, parts, rounds))) for rounds in (0, 1, 5)] == [0, 1, 1]


BY_CHANNEL = [
    factorized_record("sq", 1.0, np.ones(7), 0.013, laplace),
    factorized_record("deadzone", 0.9, np.ones(7), 0.013, laplace, rounding=0.35),
    factorized_record("rdoq", 0.9, np.full(7, 0.02), 0.013, laplace, 3.0),
    *(
        replace(factorized_record("tcq", 0.56, np.full(7, 0.02), 0.013, laplace, 3.0, machine), shift=0.1)
        for machine in (VVC4, ECM8, CODE16, CODE32)
    ),
]


def channel_samples(images: int, steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Residuals of the Laplacians of `laplace` for seven channels, and the channel of each element."""
    level = np.tile(np.arange(7, dtype=np.uint8)[:, None], (images, steps))
    drawn = np.random.default_rng(seed).laplace(0, 0.3 + level.astype(np.float64)) + (level % 5 - 2.0) * 0.7
    return drawn.astype(np.float32), level


@pytest.mark.parametrize(
    "record",
    [pytest.param(one, marks=[pytest.mark.slow] * (one.states > 8)) for one in BY_CHANNEL],
    ids=lambda record: f"{record.name}{record.states}",
)
def test_tables_by_channel(record: QuantizerRecord) -> None:
    quantizer = Quantizer(QuantizerRecord.from_json(record.to_json()))
    r, level = channel_samples(30, 40)
    k = quantizer.quantize(r, level)
    assert np.array_equal(quantizer.quantize(r, level, threads=2), k)
    assert np.array_equal(quantizer.quantize(torch.from_numpy(r), torch.from_numpy(level)).numpy(), k)
    assert quantizer.quantize(r.T, level.T, channels=level[None, :, 0]).shape == k.T.shape
    rows = quantizer.active(k).astype(np.int32) * 7 + level
    assert np.array_equal(quantizer.rows(k, level), rows) and rows.max() == 7 * record.trellis.quantizers - 1
    assert np.allclose(quantizer.bits(k, level), record.y_tables.bits(k, rows).sum(axis=1))
    if record.kind.searched:
        engine = reference.search if record.kind.trellis else reference.rdoq
        more = [record.trellis] if record.kind.trellis else []
        inputs = (r, level, record.lane_weights(30), record.step, signed_rates(record.y_tables))
        assert np.array_equal(k, engine(*inputs, *more)[0])
    with pytest.raises(ValueError, match="below 7"):
        quantizer.quantize(r, level + np.uint8(1))
    fresh_r, fresh_level = channel_samples(300, 40, seed=1)
    parts = [(fresh_r[first::2], fresh_level[first::2], fresh_level[first::2, 0]) for first in (0, 1)]
    (whole,), (split,) = (
        list(adaptation_rounds(record, shards, rounds=1, cdf=laplace)) for shards in ([(fresh_r, fresh_level)], parts)
    )
    assert whole.digest == split.digest and whole.notes == {"rates": "adapted", "rounds": 1}
    before, after = (float(one.y_tables.bits(k, rows).sum()) for one in (record, whole))
    assert after < (1.003 if record.name in ("sq", "deadzone") else 0.999) * before  # a search leans towards zero
    with pytest.raises(ValueError, match="cdf of their prior"):
        record_from_counts(record, count_indices(quantizer, (r, level)))


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


@pytest.mark.parametrize("record", EVERY, ids=lambda record: f"{record.name}{record.states}")
def test_a_part_of_the_channels(record: QuantizerRecord) -> None:
    """Lanes of some channels, in any order, are searched as among whole images; so are lanes along channels."""
    quantizer = Quantizer(record)
    r, level, _ = latents(12, 40)
    whole, part = quantizer.quantize(r, level), np.array([4, 0, 11, 7])
    for channels in (part % 3, torch.from_numpy(part % 3)):
        assert np.array_equal(quantizer.quantize(r[part], level[part], channels=channels), whole[part])
    along = np.array([[2, 0, 1, 1, 2]])
    k = quantizer.quantize(r[:, :5], level[:, :5], channels=along)
    if record.kind.searched:
        weight = record.channel_weights[along]
        inputs = (r[:, :5], level[:, :5], weight, record.step, record.y_tables)
        searched = reference.search(*inputs, record.trellis) if record.kind.trellis else reference.rdoq(*inputs)
        assert np.array_equal(k, searched[0])
        for wrong, message in ((np.array([0, 3]), "channels are"), (np.array([-1, 0]), "channels are"), ([0], "fit")):
            with pytest.raises(ValueError, match=message):
                quantizer.quantize(r[:2], level[:2], channels=wrong)
    assert np.array_equal(quantizer.dequantize(k), quantizer.dequantize(k[::-1])[::-1])  # each lane from state 0


@pytest.mark.parametrize(
    ("name", "machine", "least", "most"), [("tcq", ECM8, -0.155, -0.115), ("rdoq", SCALAR, -0.10, -0.055)]
)
@pytest.mark.slow
def test_adapted_searches_save_at_equal_error(name: str, machine: Trellis, least: float, most: float) -> None:
    """Published for Gaussians: -13 to -14 % rate for 8 states, RDOQ -8; here few latents, nine (D, c), lower hull."""
    rng = np.random.default_rng(0)
    sigma = np.exp(rng.normal(-0.5, 1.0, (512, 256))).astype(np.float32)
    latent, scale_level = (sigma * rng.standard_normal(sigma.shape)).astype(np.float32), level_index(sigma)
    pilot, rest = slice(0, 256), slice(256, 512)  # tables are adapted on one half and charged on the other

    def point(name: str, machine: Trellis, step: float, price: float) -> tuple[float, float]:
        weights = np.full(256, 3 / (0.013 * 255**2 * step**2 * price), np.float32)  # 256 / price in lane_weights
        record = gaussian_record(name, step, weights, 0.013, trellis=machine)
        *_, record = adaptation_rounds(record, [(latent[pilot], scale_level[pilot])], rounds=2)
        quantizer, r, level = Quantizer(record), latent[rest], scale_level[rest]
        k = quantizer.quantize(r, level)
        error = quantizer.dequantize(k) - r
        return float(quantizer.bits(k, level).sum() / k.size), float(np.mean(error.astype(np.float64) ** 2))

    scalar_rate, scalar_error = point("sq", SCALAR, 1.0, 1.0)
    steps = (0.5, 0.56, 0.63) if name == "tcq" else (0.8, 0.9, 1.0)
    points = np.array([point(name, machine, step, price) for step in steps for price in (0.5, 0.8, 1.2)])
    if name == "rdoq":
        points = np.array([point(name, machine, step, price) for step in steps for price in (0.05, 0.1, 0.2)])
    slopes = np.exp(np.linspace(np.log(1), np.log(30), 200))
    hull_rate = max((points @ [1.0, slope]).min() - slope * scalar_error for slope in slopes)
    assert least < hull_rate / scalar_rate - 1 < most


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


def test_cost_of_errors_is_the_sensitivity_of_a_linear_decoder_and_more_where_small_latents_are_suppressed() -> None:
    generator = torch.Generator().manual_seed(0)
    gain, nothing = torch.tensor([1.0, 2.0, 0.5, 0.0]).view(1, -1, 1, 1), torch.zeros(64, 4, 4, 4)
    y = torch.randn(64, 4, 4, 4, generator=generator)
    y[:, 3] = 0

    def linear(y_hat: torch.Tensor) -> torch.Tensor:
        return y_hat * gain

    cost, error = error_costs(linear, torch.round(y), y, linear(y), batch=24)
    assert cost.dtype == np.float64 and cost == pytest.approx([1, 4, 0.25, 0]) and np.all(error < 1e-6)

    def suppressing(y_hat: torch.Tensor) -> torch.Tensor:  # its derivative at zero is a third of that elsewhere
        return y_hat * (1 - 2 / 3 * torch.exp(-8 * y_hat.square()))

    at_zero, _ = sensitivities(suppressing, nothing, 1, generator)
    cost, error = error_costs(suppressing, nothing, y, y)
    assert at_zero == pytest.approx([1 / 9] * 4, rel=0.2) and cost[:3] == pytest.approx([1 / 3] * 3) and cost[3] == 0
    helped, _ = error_costs(linear, y + 0.1, y, linear(y + 0.2))  # the errors are for the better
    assert not helped.any()
    with pytest.raises(ValueError, match="standard error"):
        error_costs(linear, y[:1], y[:1], y[:1])


def test_levels_cover_the_scales() -> None:
    assert level_index(SCALES[-1:] * 100).tolist() == [63]
