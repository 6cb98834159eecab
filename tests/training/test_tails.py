"""What latents cost beyond the floor of their likelihood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.errors import UsageError
from lic_dist.models.architectures import adapt, build
from lic_dist.models.protocol import Stage
from lic_dist.training.base import FLOOR_AT, RelaxedModel, bits_beyond_floor, train
from tests.training.test_base_training import section


@pytest.mark.parametrize("relaxation", ["noise", "mixed"])
def test_latents_beyond_the_floor_lead_means_and_scales_back(relaxation: str) -> None:
    """As CompressAI's bound is, they have no gradient: h_s says this of rare pictures for good."""
    model = build("mbt2018-mean", 4, 6).train()
    x = torch.rand(1, 3, 64, 64)
    gradients, bits = [], []
    with torch.no_grad():
        model.h_s[-1].weight.zero_()
        model.h_s[-1].bias[:6], model.h_s[-1].bias[6:] = 0.5, 1000.0  # scales, means
    for tails in (False, True):
        torch.manual_seed(0)
        cost = RelaxedModel(model, relaxation, tails=tails).train()(x)[1]
        gradients.append(torch.autograd.grad(cost, model.h_s[-1].bias)[0])
        bits.append(float(cost.detach()))
    assert torch.equal(gradients[0], torch.zeros(12))
    per_latent = (bits[1] - bits[0]) / (6 * 16)
    assert per_latent == pytest.approx(np.log2(999.5 / 0.5 / FLOOR_AT), rel=1e-3)
    assert bool((gradients[1][:6] < 0).all()) and bool((gradients[1][6:] > 0).all())  # wider, and down to y
    expected = 16 / np.log(2) / 0.5  # positions a channel, bits in the logarithm, by the scale itself
    assert gradients[1][:6].tolist() == pytest.approx([-expected] * 6, rel=1e-3)


def test_tails_cost_nothing_within_the_floor() -> None:
    codec = adapt(build("mbt2018-mean", 4, 6))
    at = Stage(torch.zeros(3), torch.tensor([1.0, 1.0, 0.01]))  # the last is raised to 0.11
    y = torch.tensor([6.49, 12.5, 0.5 + 0.11 * 24])
    assert float(bits_beyond_floor(codec, y[:1], Stage(at.means[:1], at.scales[:1]))) == 0
    assert float(bits_beyond_floor(codec, y, at)) == pytest.approx(1 + 2, rel=1e-5)
    assert float(codec.likelihood(y[:1], Stage(at.means[:1], at.scales[:1]))) == pytest.approx(1e-9, rel=0.1)


def test_a_prior_of_y_has_no_such_tails(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="train.tails: bmshj2018-factorized has no scales of y"):
        train(section(tmp_path, architecture="bmshj2018-factorized", tails=True), config.Images(path=tmp_path))
