"""The protocol of codec models: elements in lanes, and a walk of several stages."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lic_dist.errors import LicError
from lic_dist.models.architectures import adapt, build
from lic_dist.models.families.hyperprior import MeanScaleHyperprior
from lic_dist.models.protocol import Elements, Run, Sides, Stage
from lic_dist.models.stages import only_stage

EVEN, ODD = (np.flatnonzero(np.add.outer(np.arange(4), np.arange(4)).ravel() % 2 == parity) for parity in (0, 1))


class Checkerboard(MeanScaleHyperprior):
    """Two stages on a module of one: the means of the second half are moved by the mean of the first's y_hat, and the
    whole is corrected by a summand at the end."""

    def layout(self, height: int, width: int) -> tuple[Elements, ...]:
        return Elements(positions=EVEN), Elements(positions=ODD)

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        scales, means = run("h_s", sides_hat[0]).chunk(2, 1)
        even, odd = self.layout(*means.shape[2:])
        first = yield Stage(even.take(means), even.take(scales), even)
        moved = odd.take(means) + first.mean(2, keepdim=True)
        second = yield Stage(moved, odd.take(scales), odd)
        y_hat = torch.zeros_like(means)
        even.put(y_hat, first)
        odd.put(y_hat, second)
        return y_hat + 1


@pytest.mark.parametrize("channels", [slice(None), slice(1, 3)])
@pytest.mark.parametrize("positions", [None, np.array([5, 0, 19, 7])])
@pytest.mark.parametrize("along", ["positions", "channels"])
def test_elements_go_into_lanes_and_back(channels: slice, positions: np.ndarray | None, along: str) -> None:
    whole = torch.arange(120.0).reshape(2, 3, 4, 5)
    elements = Elements(channels, positions, along)  # type: ignore[arg-type]
    part = elements.take(whole)
    steps = range(20) if positions is None else positions.tolist()
    lanes = elements.to_lanes(part)
    expected = [[[whole[b, c].flatten()[p].item() for p in steps] for c in range(3)[channels]] for b in range(2)]
    if along == "channels":
        expected = [np.transpose(image).tolist() for image in expected]
    assert lanes.tolist() == [lane for image in expected for lane in image]
    assert torch.equal(elements.from_lanes(lanes, part), part)
    found = torch.zeros_like(whole)
    elements.put(found, part)
    assert torch.equal(elements.take(found), part) and int(found.count_nonzero()) == int(part.count_nonzero())


def two_stages() -> tuple[Checkerboard, Tensor]:
    torch.manual_seed(4)
    return Checkerboard(build("mbt2018-mean", 8, 12).eval()), torch.randn(2, 8, 1, 1)


def test_what_is_given_at_once_is_what_a_walk_finds() -> None:
    codec, z_hat = two_stages()
    y_hat = torch.randn(2, 12, 4, 4, requires_grad=True)
    found = codec.given((z_hat,), y_hat)
    walk = codec.walk((z_hat,), codec.run)
    stage = next(walk)
    for elements in codec.layout(4, 4):
        assert torch.equal(stage.means, elements.take(found.means))
        assert torch.equal(stage.scales, elements.take(found.scales))
        try:
            stage = walk.send(elements.take(y_hat))
        except StopIteration as done:
            assert torch.equal(done.value, y_hat + 1) and torch.equal(found.y_hat, done.value)
    (gradient,) = torch.autograd.grad(found.means.sum(), y_hat)
    assert bool((codec.layout(4, 4)[0].take(gradient) > 0).all()) and not codec.layout(4, 4)[1].take(gradient).any()


def test_several_stages_are_refused_where_one_is_served() -> None:
    codec, z_hat = two_stages()
    with pytest.raises(LicError, match="mbt2018-mean codes y in several stages"):
        only_stage(codec, (z_hat,))


def test_a_correction_of_y_hat_is_refused_where_none_is_served() -> None:
    class Corrected(MeanScaleHyperprior):
        def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
            y_hat = yield from super().walk(sides_hat, run)
            return y_hat + 1

    with pytest.raises(LicError, match="mbt2018-mean corrects y_hat after its stages"):
        only_stage(Corrected(two_stages()[0].module), (torch.zeros(1, 8, 1, 1),))


def test_one_stage_given_is_its_own() -> None:
    codec, z_hat = MeanScaleHyperprior(build("mbt2018-mean", 8, 12).eval()), torch.randn(1, 8, 1, 1)
    y_hat = torch.randn(1, 12, 4, 4)
    with torch.no_grad():
        found, stage = codec.given((z_hat,), y_hat), only_stage(codec, (z_hat,))
    assert torch.equal(found.means, stage.means) and torch.equal(found.scales, stage.scales)
    assert torch.equal(found.y_hat, y_hat)


def test_a_module_of_no_family_is_one_line() -> None:
    with pytest.raises(LicError, match="no family of models wraps a Sequential"):
        adapt(nn.Sequential())
