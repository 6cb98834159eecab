"""The sliced Wasserstein distance against one written out in loops, and what it says of pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve
from scipy.stats import wasserstein_distance

from lic_dist.evaluation import sliced_wasserstein as module
from lic_dist.evaluation.sliced_wasserstein import laplacian_pyramid, levels, swd
from tests.conftest import picture


def plain(a: np.ndarray, b: np.ndarray) -> float:
    """The same in float64, patch by patch and direction by direction; scipy has convolution and distance."""
    window = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1])[:, :, None] / 256
    drawn = np.random.default_rng(module.SEED).standard_normal((module.DIRECTIONS, 147))
    directions = [one / np.sqrt((one**2).sum()) for one in drawn]
    pair, found = [one.astype(float) for one in (a, b)], []
    for left in reversed(range(levels(*a.shape[:2]))):
        details, smaller = [], []
        for one in pair:
            low = convolve(one, window, mode="mirror")[::2, ::2]
            spread = np.zeros_like(one)
            spread[::2, ::2] = low
            details.append(one - convolve(spread, 4 * window, mode="mirror") if left else one)
            smaller.append(low)
        rows, columns = details[0].shape[0] - 6, details[0].shape[1] - 6
        order = np.random.default_rng(module.SEED).permutation(rows * columns)[: module.PATCHES]
        at = [(place // columns, place % columns) for place in order]
        sets = [np.stack([one[y : y + 7, x : x + 7] for y, x in at]) for one in details]  # [n, 7, 7, 3]
        mean, deviation = (f(sets[0], axis=(0, 1, 2)) for f in (np.mean, np.std))
        flat = [((one - mean) / np.maximum(deviation, 1)).transpose(0, 3, 1, 2).reshape(-1, 147) for one in sets]
        found.append(np.mean([wasserstein_distance(*(one @ direction for one in flat)) for direction in directions]))
        pair = smaller
    return float(np.mean(found))


@pytest.mark.parametrize("sides", [(16, 23), (67, 65)])
def test_it_is_what_loops_make_of_it(sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATCHES", 150)  # of 170 of the smaller picture's patches
    module._positions.cache_clear()
    a = picture(1, *sides)
    b = np.clip(0.9 * a + np.random.default_rng(0).normal(5, 9, a.shape), 0, 255).astype(np.uint8)
    assert swd(a, b) == pytest.approx(plain(a, b), rel=1e-4)
    module._positions.cache_clear()


def test_levels_sum_up_to_the_picture() -> None:
    assert [levels(*sides) for sides in ((16, 900), (31, 31), (32, 40), (512, 768))] == [1, 1, 2, 5]
    x = torch.from_numpy(picture(2, 70, 65).transpose(2, 0, 1)[None]).float()
    found = laplacian_pyramid(x, 3)
    assert [tuple(one.shape[2:]) for one in found] == [(70, 65), (35, 33), (18, 17)]
    whole = found[-1]
    for detail in found[-2::-1]:
        spread = torch.zeros_like(detail)
        spread[..., ::2, ::2] = whole
        whole = detail + 4 * module._smoothed(spread)
    torch.testing.assert_close(whole, x, rtol=0, atol=1e-3)


def test_textures_count_and_where_they_lie_does_not() -> None:
    generator = np.random.default_rng(3)
    a, other = (generator.normal(128, 20, (128, 128, 3)).clip(0, 255).astype(np.uint8) for _ in range(2))
    blurred = np.round(convolve(a.astype(float), np.ones((3, 3, 1)) / 9)).astype(np.uint8)
    assert swd(a, a) == 0
    assert np.square(a.astype(float) - other).mean() > np.square(a.astype(float) - blurred).mean()
    assert swd(a, other) < 0.5 * swd(a, blurred)  # MSE takes the blur for the better picture
