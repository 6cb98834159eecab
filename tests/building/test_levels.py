"""Fitted levels of reconstruction: they lie where the picture's error is least, and calibration makes use of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lic_dist import config
from lic_dist.building.calibrate import calibrate, measure
from lic_dist.building.latents import Latents, QuantizerInput, encode, inputs_of, squared_error
from lic_dist.building.levels import CUTS, LARGEST, fit_level_shifts, fit_points
from lic_dist.building.pilot import check_record
from lic_dist.building.records import analytic_record
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import LEVELS
from lic_dist.quantization.record import POINTS, QuantizerRecord
from tests.conftest import picture
from tests.factorized import skewed
from tests.families import CHECKERED
from tests.training.test_stages import loaded_of

SECTION = config.Quantizer(name="tcq", weights="rounding", spread="fitted", adapt_rounds=1)


@pytest.fixture(scope="module")
def loaded() -> Checkpoint:
    return checkpoint.load("base-0.013")


def samples_of(loaded: Checkpoint, *seeds: int) -> Latents:
    pixels = np.stack([picture(seed, 64, 64).transpose(2, 0, 1) for seed in seeds])
    return encode(loaded.model, pixels, 4)[0]


@pytest.fixture(scope="module")
def samples(loaded: Checkpoint) -> Latents:
    return samples_of(loaded, *range(6))


@pytest.fixture(scope="module")
def inputs(loaded: Checkpoint, samples: Latents) -> QuantizerInput:
    found = inputs_of(loaded.model, samples.y, samples.z, 4)
    assert isinstance(found, QuantizerInput)
    return found


def test_no_common_move_of_a_scale_lowers_the_error_further(
    loaded: Checkpoint, samples: Latents, inputs: QuantizerInput
) -> None:
    """By brute force: the scales that most non-zero indices have are moved by a tenth of a step both ways."""
    record = replace(QuantizerRecord.from_json(loaded.quantizers["tcq8"]), shift=0, spread=0, level_shifts=None)
    fitted = fit_level_shifts(loaded, record, samples, inputs, 6).shifts
    assert fitted.shape == (LEVELS,) and float(np.abs(fitted).max()) <= LARGEST
    k = Quantizer(record).quantize(inputs.residual, inputs.level)

    def error(level_shifts: np.ndarray) -> float:
        moved = Quantizer(replace(record, level_shifts=level_shifts)).dequantize(k, inputs.level)
        return squared_error(loaded.model, inputs.means + moved.reshape(inputs.means.shape), samples.pixels)

    least = error(fitted)
    assert least < 0.985 * error(np.zeros(LEVELS))
    for level in np.bincount(inputs.level[k != 0], minlength=LEVELS).argsort()[-3:]:
        for by in (-0.1, 0.1):
            assert error(fitted + np.float32(by) * (np.arange(LEVELS) == level)) > least


def test_a_scale_that_is_not_seen_stays(loaded: Checkpoint, samples: Latents, inputs: QuantizerInput) -> None:
    record = QuantizerRecord.from_json(loaded.quantizers["tcq8"])
    fitted = fit_level_shifts(loaded, replace(record, level_shifts=None), samples, inputs, 2).shifts
    k, seen = Quantizer(record).quantize(inputs.residual, inputs.level), 2 * loaded.codec.channels
    unseen = np.bincount(inputs.level[:seen][k[:seen] != 0], minlength=LEVELS) == 0
    assert unseen.any() and not fitted[unseen].any() and fitted[~unseen].any()


def test_points_of_bit_planes_lower_the_error_of_every_cut(
    loaded: Checkpoint, samples: Latents, inputs: QuantizerInput
) -> None:
    weights = np.full(loaded.codec.channels, 0.026, np.float32)
    record = analytic_record(loaded, "embedded", 1, 1.0, 1.0, weights)
    points = fit_points(loaded, record, samples, inputs, 6)
    assert points.shape == POINTS and 0 < float(np.abs(points).max()) <= LARGEST

    def error(price: float, points: np.ndarray) -> float:
        quantizer = Quantizer(replace(record, lambda_scale=price, points=points))
        values = quantizer.dequantize(quantizer.quantize(inputs.residual, inputs.level), inputs.level)
        return squared_error(loaded.model, inputs.means + values.reshape(inputs.means.shape), samples.pixels)

    changes = [np.log(error(price, points) / error(price, np.zeros(POINTS))) for price in CUTS]
    assert np.mean(changes) < -0.002
    for by in (-0.1, 0.1):  # no common move is better
        assert np.mean([np.log(error(price, points + by) / error(price, points)) for price in CUTS]) > 0


@pytest.mark.slow
def test_calibration_fits_levels_for_each_trial(loaded: Checkpoint, samples: Latents) -> None:
    held_out = samples_of(loaded, 7, 8)
    record = calibrate(loaded, SECTION, samples, held_out, 4)
    assert record.level_shifts is not None and record.shift == 0 and record.notes["fitted"] == 6
    measured = measure(loaded, record, held_out, inputs_of(loaded.model, held_out.y, held_out.z, 4))
    assert measured.L == record.notes["L"] <= min(one["L"] for one in record.notes["calibration"])
    check_record(record, SECTION, loaded, "here")
    with pytest.raises(LicError, match="fitted levels: store has true, this job has false"):
        check_record(record, SECTION.model_copy(update={"spread": "auto"}), loaded, "here")


@pytest.mark.slow
def test_calibration_fits_points_where_a_cut_asks(loaded: Checkpoint, samples: Latents) -> None:
    section = config.Quantizer(name="embedded", weights="rounding", spread="fitted", lmbda=0.026)
    at_lambda = checkpoint.at_lambda(loaded, 0.026)
    record = calibrate(at_lambda, section, samples, samples_of(loaded, 7, 8), 4)
    assert record.points is not None and record.points.any() and record.level_shifts is None
    assert record.notes["fitted"] == 6
    check_record(record, section, at_lambda, "here")
    with pytest.raises(LicError, match="fitted levels: store has true, this job has false"):
        check_record(record, section.model_copy(update={"spread": 0.0}), at_lambda, "here")


def test_models_without_one_set_of_scales_are_refused() -> None:
    staged = loaded_of(CHECKERED)
    with pytest.raises(UsageError, match="code y in one stage"):
        calibrate(staged, SECTION, samples_of(staged, 0), samples_of(staged, 1), 1)
    factorized = skewed()
    with pytest.raises(UsageError, match="no scales"):
        calibrate(factorized, SECTION, samples_of(factorized, 0), samples_of(factorized, 1), 1)
