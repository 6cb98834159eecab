"""Pixels to networks and back, against torch's operations one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lic_dist.codec.pixels import to_pixels, window
from tests.conftest import picture

CPU = torch.device("cpu")


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [((0, 64), (0, 64)), ((0, 32), (16, 48)), ((48, 64), (0, 9)), ((0, 3), (0, 64)), ((8, 20), (60, 64))],
)
def test_a_window_is_that_of_the_padded_picture(grey: bool, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    image = picture(4, 41, 50)
    image = image[..., 1] if grey else image
    colours = np.repeat(image[:, :, None], 3, 2) if grey else image
    padded = np.zeros((64, 64, 3), np.uint8)
    padded[11:52, 7:57] = colours
    of = slice(*rows), slice(*columns)
    expected = torch.from_numpy(padded[of]).permute(2, 0, 1)[None].float().div(255)
    found = window(image, *of, (11, 7), CPU)
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)


def test_every_value_is_rounded_as_torch_rounds_it() -> None:
    half = (torch.arange(512) / 2 + 0.25).div(255)
    values = torch.cat([half, torch.arange(512) / 510, half.nextafter(torch.tensor(0.0)), torch.linspace(-1, 2, 512)])
    x_hat = torch.stack([values, values.flip(0), values.roll(7)])[:, None]
    for layout in (x_hat, x_hat.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        out = np.empty((1, 2048, 3), np.uint8)
        assert to_pixels(layout, out)
        assert np.array_equal(out, x_hat.clamp(0, 1).mul(255).round().permute(1, 2, 0).byte().numpy())
        grey = np.empty((1, 2048), np.uint8)
        assert to_pixels(layout, grey)
        assert np.array_equal(grey, layout.clamp(0, 1).permute(1, 2, 0).mean(2).mul(255).round().byte().numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(20, 30, 3), (20, 30)])
def test_what_is_not_finite_is_told(value: float, shape: tuple[int, ...]) -> None:
    x_hat = torch.rand(3, 20, 30)
    assert to_pixels(x_hat, np.empty(shape, np.uint8))
    x_hat[1, 19, 29] = value
    assert not to_pixels(x_hat, np.empty(shape, np.uint8))
