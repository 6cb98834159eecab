"""The cut of bit planes by a record's price, against what a progressive file of that slope holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lic_dist.codec.progressive import decode_units, encode_units
from lic_dist.quantization.adaptation import gaussian_record
from lic_dist.quantization.embedded import Embedded, gains, planes, slope_of
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import SCALES
from lic_dist.quantization.record import POINTS, QuantizerRecord

M, IMAGES, STEPS = 6, 3, 40
LAMBDAS = (0.05, 0.0067, 0.0008)


def latents(seed=0, beyond=0.0):
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 64, (IMAGES * M, STEPS)).astype(np.uint8)
    r = (rng.standard_normal(level.shape) * SCALES[level] + beyond * rng.standard_cauchy(level.shape)).astype(
        np.float32
    )
    return np.clip(r, -30000, 30000), level


def record(lmbda):
    weights = np.float32(10.0) ** np.linspace(-6, -4, M).astype(np.float32)
    return gaussian_record("embedded", 1.0, weights, lmbda)


def with_points(made):
    points = np.random.default_rng(3).uniform(-0.3, 0.3, POINTS)
    return replace(made, points=points.astype(np.float32))


@pytest.mark.parametrize("lmbda", LAMBDAS)
@pytest.mark.parametrize("beyond", [0.0, 5.0])
def test_a_cut_is_what_a_file_of_that_slope_tells(lmbda, beyond):
    made = record(lmbda)
    quantizer, least = Quantizer(made), slope_of(made.lambda_q)
    r, level = latents(beyond=beyond)
    k = quantizer.quantize(r, level)
    found, bits = quantizer.dequantize(k, level), quantizer.bits(k, level)
    for image in range(IMAGES):
        lanes = slice(image * M, (image + 1) * M)
        units, known = encode_units(level[lanes], gains(made.weights), r[lanes], least, count=5)
        assert np.array_equal(known.indices(), k[lanes])
        assert np.array_equal(known.values(), found[lanes])
        assert np.array_equal(decode_units(level[lanes], gains(made.weights), units).values(), found[lanes])
        size = 8 * sum(len(unit.stream) for unit in units)
        assert bits[lanes].sum() <= size <= 1.01 * bits[lanes].sum() + 64 * len(units)


def test_less_is_known_where_lambda_is_less():
    r, level = latents()
    known, errors = [], []
    for quantizer in map(Quantizer, map(record, LAMBDAS)):
        k = quantizer.quantize(r, level)
        known.append(quantizer.bits(k, level).sum())
        errors.append(np.square(quantizer.dequantize(k, level) - r).sum())
    assert known == sorted(known, reverse=True)
    assert errors == sorted(errors)


def test_tensors_of_images_give_what_lanes_give():
    made = record(0.0067)
    quantizer = Quantizer(made)
    r, level = latents(1)
    k = quantizer.quantize(r, level)
    whole = [torch.from_numpy(one.reshape(IMAGES, M, 5, 8)) for one in (r, level, k)]
    embedded = Embedded(made)
    assert torch.equal(embedded.quantize(*whole[:2]), whole[2])
    values, bits = (method(whole[2], whole[1]).numpy().reshape(k.shape) for method in (embedded.values, embedded.bits))
    assert np.array_equal(values, quantizer.dequantize(k, level))
    assert np.array_equal(bits.sum(axis=1), quantizer.bits(k, level))


def test_k_of_the_finest_quantizer_is_that_of_the_planes():
    r, level = latents(2)
    k = Quantizer(record(1e6)).quantize(r, level)
    magnitude = planes().magnitudes(r)
    assert np.array_equal(np.abs(k), magnitude)
    assert np.array_equal(np.sign(k), np.sign(r) * (magnitude > 0))


@pytest.mark.parametrize("change", [{"step": 0.5}, {"shift": 0.1}, {"spread": 0.1}, {"refine": 2}])
def test_an_embedded_record_has_no_other_settings(change):
    with pytest.raises(ValueError, match="an embedded record has"):
        replace(record(0.0067), **change)


def test_points_move_the_values_of_their_nodes_alone():
    made = with_points(record(0.0067))
    r, level = latents(4)
    plain, moved = Quantizer(replace(made, points=None)), Quantizer(made)
    k = moved.quantize(r, level)
    assert np.array_equal(k, plain.quantize(r, level))
    assert np.array_equal(moved.bits(k, level), plain.bits(k, level))
    embedded = Embedded(made)
    plane, magnitude = (one.numpy() for one in embedded.known(torch.from_numpy(k), torch.from_numpy(level)))
    share = made.points[level, np.clip(plane, 0, 2), np.clip(magnitude, 1, 3) - 1]
    expected = plain.dequantize(k, level) * (1 + share)
    assert np.allclose(moved.dequantize(k, level), expected, rtol=1e-6, atol=0) and (expected != 0).any()


def test_a_file_decodes_with_the_points_of_a_cut():
    made = with_points(record(0.0067))
    r, level = latents(5)
    lanes = slice(0, M)
    k = Quantizer(made).quantize(r, level)
    units, known = encode_units(level[lanes], gains(made.weights), r[lanes], slope_of(made.lambda_q), count=5)
    expected = Quantizer(made).dequantize(k, level)[lanes]
    assert np.array_equal(known.values(made.points), expected)
    assert np.array_equal(decode_units(level[lanes], gains(made.weights), units).values(made.points), expected)


def test_points_are_kept_and_are_of_bit_planes_alone():
    made = with_points(record(0.0067))
    again = QuantizerRecord.from_json(made.to_json())
    assert np.array_equal(again.points, made.points) and again.digest == made.digest
    assert made.decoding_digest != record(0.0067).decoding_digest
    for change in ({"name": "sq"}, {"points": made.points[:, :2]}, {"points": made.points + 2}):
        with pytest.raises(ValueError, match="points are numbers below 1"):
            replace(made, **change)
