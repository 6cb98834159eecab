"""Factorized priors of y: CompressAI's forward and distributions, identities, and what recipes train."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lic_dist.codec.records import compressai_record
from lic_dist.models import checkpoint
from lic_dist.models.architectures import adapt, build
from lic_dist.models.parts import encoder_digest, entropy_digest, parameter_counts, trainable
from lic_dist.models.recognise import recognise
from lic_dist.models.stages import analyse, only_side, only_stage
from lic_dist.training.base import RelaxedModel
from tests.conftest import picture
from tests.factorized import NAMES, skewed

EACH = pytest.mark.parametrize("name", NAMES)


def pixels() -> Tensor:
    return torch.from_numpy(picture(3, 64, 128).transpose(2, 0, 1)[None].copy()).float() / 255


@EACH
def test_it_is_told_by_its_tensors_and_has_no_side_latent(name: str) -> None:
    model = build(name, 8, 12)
    assert recognise(model.state_dict()) == (name, {"N": 8, "M": 12})
    assert type(adapt(model)).name == name and only_side(adapt(model)).channels == 0
    assert set(parameter_counts(model)) == {"encoder", "decoder", "prior"}
    y, z = analyse(model.eval(), pixels())
    assert y.shape == (1, 12, 4, 8) and z.shape == (1, 0, 4, 8) and z.dtype == torch.int32


@EACH
def test_evaluation_and_relaxed_training_are_compressais_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = copy.deepcopy(skewed(name).model), pixels()
    monkeypatch.setattr(Tensor, "uniform_", lambda values, *_: values.fill_(0.3))  # drawn in another order there
    for training in (False, True):
        relaxed, theirs = RelaxedModel(model.train(training), "noise").train(training), model(x)
        x_hat, bits = relaxed(x)
        torch.testing.assert_close(x_hat, theirs["x_hat"], rtol=0, atol=1e-5)
        torch.testing.assert_close(bits, -theirs["likelihoods"]["y"].log2().sum(), rtol=1e-5, atol=0)
        bits.backward()
        assert all(bool(one.grad.isfinite().all()) for one in model.entropy_bottleneck.biases)


def test_one_stage_has_the_medians_for_means_and_no_scales() -> None:
    codec = skewed().codec
    stage = only_stage(codec, (torch.empty(2, 0, 3, 5),))
    medians = codec.module.entropy_bottleneck.quantiles[:, 0, 1].detach()
    assert stage.scales is None and torch.equal(stage.means[1, :, 2, 4], medians) and float(medians.abs().min()) > 0.001
    plane = stage.elements.channel_plane(stage.means)
    assert plane.dtype == torch.uint16 and torch.equal(plane[1, :, 2, 4].int(), torch.arange(24, dtype=torch.int32))


def test_likelihood_cdf_and_tables_are_compressais() -> None:
    codec = skewed().codec
    y = 8 * torch.randn(2, 24, 3, 5)
    prior, own = codec.module.entropy_bottleneck, codec.prior
    rounded = prior(y, training=False)
    torch.testing.assert_close(own.likelihood(rounded[0]), rounded[1], rtol=1e-5, atol=1e-8)
    channel = np.array([[3], [0], [17]])
    below = own.cdf(channel, np.array([[-0.5, 0.5], [1.5, 2.5], [-3.5, -2.5]]))
    middle = torch.zeros(1, 24, 1, 1)
    for row, k in enumerate((0, 2, -3)):
        expected = own.likelihood(middle + k + own.medians())[0, channel[row, 0], 0, 0]
        assert np.diff(below[row])[0] == pytest.approx(expected.item(), rel=1e-4)
    tables = compressai_record(skewed()).y_tables
    k = np.tile(np.arange(-2, 3, dtype=np.int32), (24, 1))
    rows = np.broadcast_to(np.arange(24, dtype=np.int32)[:, None], k.shape)
    values = torch.from_numpy(k).float()[None, :, :, None] + own.medians()
    expected = -own.likelihood(values).log2()[0, :, :, 0].detach().numpy()
    assert np.abs(tables.bits(k, rows) - expected)[expected < 8].max() < 0.02
    assert not tables.symmetric and tables.holds_zero


def test_digests_see_the_medians_as_the_encoders() -> None:
    model = copy.deepcopy(skewed().model)
    before = encoder_digest(model), entropy_digest(model)
    with torch.no_grad():
        model.entropy_bottleneck.biases[0][0, 0, 0] += 1
        model.entropy_bottleneck.quantiles[0, 0, 2] += 1
    assert encoder_digest(model) == before[0] and entropy_digest(model) != before[1]
    with torch.no_grad():
        model.entropy_bottleneck.quantiles[0, 0, 1] += 0.25
    assert encoder_digest(model) != before[0]


def test_every_recipe_trains_what_it_says() -> None:
    model = skewed().model
    parts = {
        recipe: {name.split(".")[0] for name in trainable(model, recipe)}
        for recipe in ("decoder", "decoder+hyper", "all-but-encoder", "prior")
    }
    assert parts["decoder"] == {"g_s"} and parts["prior"] == {"entropy_bottleneck"}
    assert trainable(model, "decoder+hyper") == trainable(model, "all-but-encoder")
    assert parts["decoder+hyper"] == {"g_s", "entropy_bottleneck"}
    assert not any("quantiles" in name for name in trainable(model, "prior"))


def test_a_checkpoint_goes_there_and_back(tmp_path: Path) -> None:
    checkpoint.save(skewed(), tmp_path / "a.pth.tar")
    loaded = checkpoint.load(str(tmp_path / "a.pth.tar"))
    assert loaded.spec == skewed().spec
    assert compressai_record(loaded).digest == compressai_record(skewed()).digest


def test_a_file_of_compressais_zoo_is_told_by_name_and_tensors(tmp_path: Path) -> None:
    old = {"matrices": "_matrices", "biases": "_biases", "factors": "_factors"}
    state = {
        ".".join(old.get(part, part) for part in name.split(".")): value
        for name, value in skewed().model.state_dict().items()
    }
    assert any("._matrices." in name for name in state)
    torch.save(state, tmp_path / "bmshj2018-factorized-prior-4-8b56ab72.pth.tar")
    loaded = checkpoint.load(str(tmp_path / "bmshj2018-factorized-prior-4-8b56ab72.pth.tar"))
    assert (loaded.spec.architecture, loaded.spec.lmbda) == (NAMES[0], 0.013)
    assert entropy_digest(loaded.model) == entropy_digest(skewed().model)
