"""Where training begins: the Karhunen-Loeve transform of pictures, y at another lambda's step, bounds that let go."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lic_dist.errors import LicError
from lic_dist.models.architectures import adapt, build
from lic_dist.models.layers import MOST_MEAN, DenormalizeGaussians, bounded
from tests.conftest import HYPERPRIORS, picture
from tests.families import CHECKERED


def pictures(count: int = 6) -> Tensor:
    whole = np.stack([picture(seed, 128, 128).transpose(2, 0, 1) for seed in range(count)])
    return torch.from_numpy(whole).float().div(255)


def started(M: int, x: Tensor, lmbda: float) -> nn.Module:
    torch.manual_seed(0)
    model = build("block-transform", N=4, M=M).eval()
    adapt(model).start(x, lmbda)
    return model


@torch.no_grad()
def test_the_start_keeps_the_most_of_pictures_that_so_many_channels_of_two_steps_can() -> None:
    x, M = pictures(), 20
    model = started(M, x, 0.013)
    codec = adapt(model)
    y = codec.analyse(x)
    gain = float(model.g_a[-1].gain[0])
    assert 1 / gain**2 == pytest.approx(18 / (math.log(2) * 0.013 * 255**2))
    # the first step is a rotation, so that all of 16x16 pixels is left to the second: its axes are theirs
    blocks = F.pixel_unshuffle(F.pixel_unshuffle(x - x.mean(), 8), 2).transpose(0, 1).flatten(1).double()
    expected = torch.linalg.eigvalsh(blocks @ blocks.T / blocks.size(1)).flip(0)
    coefficients = (y / gain).transpose(0, 1).flatten(1).double()
    found = coefficients @ coefficients.T / coefficients.size(1)
    torch.testing.assert_close(found, torch.diag(expected[:M]), rtol=1e-3, atol=1e-4)
    error = (codec.synthesise(y) - x).double().square().mean()
    torch.testing.assert_close(error, expected[M:].sum() / 768, rtol=1e-3, atol=1e-7)
    deviations = expected[:M].sqrt().float() * gain
    torch.testing.assert_close(model.h_a[0].deviation, deviations.clamp(min=0.15), rtol=1e-3, atol=0)
    scales, means = codec.run("h_s", codec.hyper_analyse(y)[0]).chunk(2, 1)
    in_deviations = (scales / model.h_s[-1].deviation[:, None, None]).log()
    assert -1.5 < float(in_deviations.mean()) < 0 and float((means / deviations[:, None, None]).abs().mean()) < 1


def test_a_start_that_a_family_or_its_sizes_do_not_have_is_one_line() -> None:
    x = torch.rand(2, 3, 64, 64)
    with pytest.raises(LicError, match="mbt2018-mean has no start that is fitted to pictures"):
        adapt(build("mbt2018-mean", 4, 6)).start(x, 0.01)
    model = build("block-transform", 1, 769)
    with pytest.raises(LicError, match="M is 769: the transform of pictures has 768 channels"):
        adapt(model).start(x, 0.01)


@torch.no_grad()
@pytest.mark.parametrize("architecture", HYPERPRIORS)
def test_a_rescaled_model_says_the_same_of_y_in_other_units(architecture: str) -> None:
    x, factor = pictures(2), 4.0
    if architecture == "block-transform":
        model = started(12, x, 0.013)
    else:
        torch.manual_seed(0)
        model = build(architecture, 8, 12).eval()
    codec = adapt(model)
    y = codec.analyse(x)
    z = codec.hyper_analyse(y)
    before, x_hat = codec.given(z, y), codec.synthesise(y)
    codec.rescale(factor)
    moved = codec.analyse(x)
    torch.testing.assert_close(moved, factor * y)
    torch.testing.assert_close(codec.hyper_analyse(moved), z)
    after = codec.given(z, moved)
    torch.testing.assert_close(after.means, factor * before.means)
    torch.testing.assert_close(after.scales, factor * before.scales)
    torch.testing.assert_close(codec.synthesise(factor * y), x_hat)


def test_a_subclass_with_a_context_network_does_not_inherit_the_rescaling() -> None:
    with pytest.raises(LicError, match="checkered cannot rescale y"):
        adapt(build(CHECKERED, 4, 6)).rescale(2.0)


def test_a_mean_said_far_out_comes_back() -> None:
    """With a plain clamp it stayed: h_s said means of 36,000 deviations for rare photos."""
    said = torch.tensor([[-1.0, 36000.0, -1.0, -36000.0]]).view(2, 2, 1, 1).requires_grad_(True)
    layer = DenormalizeGaussians(1)
    means = layer(said).chunk(2, 1)[1]
    assert means.flatten().tolist() == [MOST_MEAN, -MOST_MEAN]
    means.square().sum().backward()  # y is zero
    assert said.grad[:, 1].flatten().tolist() == [2 * MOST_MEAN, -2 * MOST_MEAN]  # a step against it leads back


@pytest.mark.parametrize(("gradient", "passed"), [(1.0, [0.0, 1.0, 1.0]), (-1.0, [-1.0, -1.0, 0.0])])
def test_gradients_that_lead_out_of_the_bounds_stop_there(gradient: float, passed: list[float]) -> None:
    values = torch.tensor([-3.0, 0.5, 3.0], requires_grad=True)
    found = bounded(values, -1.0, 1.0)
    assert found.tolist() == [-1.0, 0.5, 1.0]
    (gradient * found).sum().backward()
    assert values.grad.tolist() == passed
