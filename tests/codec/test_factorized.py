"""Codecs whose y has a factorized prior: CompressAI's integers and bits, one stream, tables of the right kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lic_dist.building.records import analytic_record
from lic_dist.codec import tiles, walk
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.container import Container
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.records import compressai_record, fits
from lic_dist.errors import LicError
from lic_dist.quantization import reference
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import signed_rates
from lic_dist.quantization.record import QuantizerRecord
from tests.codec.test_families import made
from tests.conftest import picture
from tests.factorized import skewed

KINDS = ("sq", "deadzone", "rdoq", "tcq")


def record(name: str) -> QuantizerRecord:
    if name == "sq":
        return compressai_record(skewed())
    strength = 0.4 if name == "deadzone" else 0.2
    return replace(analytic_record(skewed(), name, 8, 0.7, strength, np.linspace(0.5, 2, 24)), shift=0.05)


def test_sq_codes_compressais_integers_by_its_tables() -> None:
    loaded, image = skewed(), picture(5, 64, 128)
    codec, prior = ImageCodec(loaded.model, record("sq")), loaded.model.entropy_bottleneck
    encoded = codec.encode(image)
    with torch.no_grad():
        y = loaded.codec.analyse(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()).float() / 255).half().float()
        symbols = prior.quantize(y, "symbols", loaded.codec.prior.medians())
        (theirs,) = prior.compress(y)
        whole = prior.decompress([theirs], y.shape[2:])
    assert np.array_equal(encoded.k, symbols[0].flatten(1)) and np.unique(encoded.k).size > 12
    assert torch.equal(encoded.y_hat, whole)
    assert encoded.z.size == 0 and Container.unpack(encoded.data).z == b""
    assert abs(encoded.coded_bits / 8 - len(theirs)) <= 4
    assert encoded.coded_bits == pytest.approx(codec.estimated_bits(encoded), abs=64)
    assert codec.likelihood_bits(encoded) == pytest.approx(codec.estimated_bits(encoded), rel=0.002)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 3), (70, 129, 3), (33, 64)])
def test_any_picture_goes_there_and_back(kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(2, *shape[:2])[..., 0] if len(shape) == 2 else picture(1, *shape[:2])
    codec = ImageCodec(skewed().model, record(kind))
    encoded = codec.encode(image)
    decoded = codec.decode_latents(encoded.data)
    assert np.array_equal(decoded.k, encoded.k) and torch.equal(decoded.y_hat, encoded.y_hat)
    assert np.array_equal(codec.decode(encoded.data), codec.picture(encoded)) and decoded.shape == shape
    assert encoded.coded_bits == pytest.approx(codec.estimated_bits(encoded), abs=64)
    monkeypatch.setattr(tiles, "TILE", 64)
    again = codec.encode(image)
    assert float((again.k != encoded.k).mean()) < 0.02  # g_a sums in another order
    assert np.array_equal(codec.decode_latents(again.data).k, again.k)


def test_refined_latents_cost_less_of_what_is_refined() -> None:
    image, plain = picture(4, 64, 64), replace(record("tcq"), lmbda=1e-2)
    losses = []
    for steps in (0, 4):
        codec = ImageCodec(skewed().model, replace(plain, refine=steps))
        encoded = codec.encode(image)
        assert np.array_equal(codec.decode(encoded.data), codec.picture(encoded))
        with torch.no_grad():
            x_hat = skewed().codec.synthesise(encoded.y_hat)[0].numpy()
        error = np.square(x_hat * 255 - image.transpose(2, 0, 1)).mean()
        losses.append(plain.lmbda * error + codec.estimated_bits(encoded) / 64**2)
    assert losses[1] < 0.995 * losses[0]


@pytest.mark.parametrize("kind", ["rdoq", "tcq"])
def test_the_search_is_the_best_of_all_by_the_priors_skewed_tables(kind: str) -> None:
    """Short lanes of real residuals against every path, and whole ones against the definition."""
    made_record, codec = record(kind), skewed().codec
    y = torch.randn(1, 24, 2, 2, generator=torch.Generator().manual_seed(0)) * 6 + codec.prior.medians()
    coded = walk.search(codec, (torch.empty(1, 0, 2, 2),), y, Quantizer(made_record))
    r = (y - codec.prior.medians())[0].flatten(1).numpy()
    level = np.ascontiguousarray(np.broadcast_to(np.arange(24, dtype=np.uint16)[:, None], r.shape))
    assert np.array_equal(coded.level[0].flatten(1).numpy(), level)
    rates = signed_rates(made_record.y_tables)
    inputs = (r, level, made_record.lane_weights(1), made_record.step, rates)
    best = reference.rdoq(*inputs) if kind == "rdoq" else reference.brute_force(*inputs, made_record.trellis)
    assert np.array_equal(coded.k[0].flatten(1).numpy(), best[0])
    assert len({tuple(row) for row in rates.costs.tolist()}) > 40  # hardly a row is symmetric, or another's


def test_analytic_tables_of_sq_are_compressais_but_for_rounding() -> None:
    codec = ImageCodec(skewed().model, record("sq"))
    encoded = codec.encode(picture(5, 64, 128))
    own = analytic_record(skewed(), "sq", 1, 1.0, 1.0, np.ones(24))
    ours, theirs = (float(ImageCodec(skewed().model, one).channel_bits(encoded).sum()) for one in (own, record("sq")))
    assert ours == pytest.approx(theirs, rel=2e-3)


def test_tables_of_another_kind_and_a_side_stream_are_refused() -> None:
    loaded, gaussian = skewed(), made("mbt2018-mean")
    by_scale = analytic_record(gaussian, "sq", 1, 1.0, 1.0, np.ones(24))
    with pytest.raises(LicError, match="tables of y are by scale, the model's by channel"):
        ImageCodec(loaded.model, by_scale)
    with pytest.raises(LicError, match="tables of y are by channel, the model's by scale"):
        ImageCodec(gaussian.model, record("sq"))
    assert fits(record("tcq"), loaded.model) and not fits(by_scale, loaded.model)
    codec = ImageCodec(loaded.model, record("sq"))
    container = Container.unpack(codec.encode(picture(1, 64, 64)).data)
    with pytest.raises(BitstreamError, match="holds a side latent"):
        codec.decode(replace(container, z=bytes(8)).pack())


def test_the_integer_form_has_no_network_to_run() -> None:
    codec, image = ImageCodec(skewed().model, record("tcq"), integer=True), picture(3, 80, 64)
    data = codec.encode(image).data
    plain = ImageCodec(skewed().model, record("tcq"))
    assert Container.unpack(data).integer and np.array_equal(plain.decode(data), codec.decode(data))
    assert Container.unpack(data).y == Container.unpack(plain.encode(image).data).y
