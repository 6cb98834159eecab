"""Metrics by name: each adapter against its package, and what needs no package against its formula."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from lic_dist.config.experiment import MetricName
from lic_dist.errors import UsageError
from lic_dist.evaluation import metrics, separable
from lic_dist.evaluation.metrics import METRICS, measure, ms_ssim8, psnr8, require
from lic_dist.evaluation.separable import Separably
from lic_dist.models.compat import import_piq

Pair = tuple[np.ndarray, np.ndarray]

# of `pair`, by the packages themselves: piq 0.8.0, ssimulacra2 0.3.0, vmaf-torch 1.1.0, cvvdp 0.5.7, flip-evaluator 1.7
PIQ = {"ssim": "ssim", "iw-ssim": "information_weighted_ssim", "vif": "vif_p", "fsim": "fsim", "gmsd": "gmsd"}


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A smooth picture of 168 x 200 with edges, and one with noise, less contrast and a shift of colour."""
    y, x = np.mgrid[0:168, 0:200]
    waves = np.stack([128 + 60 * np.sin(x / 9 + c) + 40 * np.cos(y / 7 - c) + 20 * (x > y) for c in range(3)], axis=2)
    noise = np.random.default_rng(0).normal(0, 6, waves.shape)
    return tuple(np.clip(one, 0, 255).astype(np.uint8) for one in (waves, 8 + 0.9 * waves + noise))


def tensors(pair: Pair) -> list[torch.Tensor]:
    return [torch.from_numpy(one.transpose(2, 0, 1)[None] / np.float32(255)) for one in pair]


def test_the_table_has_the_configs_names() -> None:
    assert set(METRICS) == set(get_args(MetricName))


@pytest.mark.parametrize("name", PIQ)
def test_piqs_metrics_are_piqs(pair: Pair, name: str) -> None:
    original, decoded = tensors(pair)
    expected = float(getattr(import_piq(), PIQ[name])(decoded, original, data_range=1.0))
    assert METRICS[name].measure(*pair) == pytest.approx(expected, rel=2e-4)
    swapped = METRICS[name].measure(*pair[::-1])
    assert (swapped == pytest.approx(expected, rel=3e-5)) == (name not in ("iw-ssim", "vif"))  # which picture is which


def test_psnr_yuv_is_six_parts_luma() -> None:
    generator = np.random.default_rng(1)
    a, b = (generator.integers(0, 256, (9, 11, 3)).astype(np.uint8) for _ in range(2))
    matrix = np.array(  # BT.709 in full range, as printed in the standard
        [[0.2126, 0.7152, 0.0722], [-0.114572, -0.385428, 0.5], [0.5, -0.454153, -0.045847]]
    )
    errors = np.square((a.astype(float) - b) @ matrix.T).mean(axis=(0, 1))
    luma, *chroma = 10 * np.log10(255**2 / errors)
    assert METRICS["psnr-yuv"].measure(a, b) == pytest.approx((6 * luma + sum(chroma)) / 8, abs=1e-4)
    assert METRICS["psnr-yuv"].measure(a, a) == math.inf


def test_what_pip_brings_gives_what_it_gives_of_files(pair: Pair, tmp_path: Path) -> None:
    import flip_evaluator
    from ssimulacra2 import compute_ssimulacra2

    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for one, path in zip(pair, paths, strict=True):
        Image.fromarray(one).save(path)
    assert METRICS["ssimulacra2"].measure(*pair) == compute_ssimulacra2(*paths)
    assert METRICS["flip"].measure(*pair) == pytest.approx(flip_evaluator.evaluate(*paths, "LDR")[1], rel=1e-5)


def test_vmaf_is_of_luma_in_video_range(pair: Pair) -> None:
    import vmaf_torch

    grey = [np.repeat(one[..., 1:2], 3, axis=2) for one in pair]
    luma = [torch.from_numpy(16 + one[None, None, ..., 0] * np.float32(219 / 255)) for one in grey]
    model = vmaf_torch.VMAF(enable_motion=False)
    *features, score = model.compute_vmaf_features_and_score(*luma)
    assert METRICS["vmaf"].measure(*grey) == pytest.approx(float(score), abs=1e-3)
    assert float(features[0]) == 0 < float(score) < 100


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pycvvdp") is None, reason="the package cvvdp is not installed")
def test_cvvdp_is_that_of_floats(pair: Pair) -> None:
    found = METRICS["cvvdp"].measure(*pair)
    original, decoded = (one.astype(np.float32) / 255 for one in pair)
    assert found == pytest.approx(
        float(metrics._cvvdp_model().predict(decoded, original, dim_order="HWC")[0]), abs=1e-4
    )
    assert METRICS["cvvdp"].measure(pair[0], pair[0]) == 10 and 0 < found < 9.9


WITHOUT_TORCHVISION = [name for name in METRICS if name != "cvvdp"]  # which takes seconds to import


@pytest.mark.parametrize("name", WITHOUT_TORCHVISION)
def test_better_pictures_rise(pair: Pair, name: str) -> None:
    metric, (original, decoded) = METRICS[name], pair
    middle = np.round((original.astype(float) + decoded) / 2).astype(np.uint8)
    worse, better = metric.measure(original, decoded), metric.measure(original, middle)
    assert (better > worse) == (metric.better == "higher")
    assert metric.rising(better) > metric.rising(worse)
    assert metric.rising(metric.measure(original, original)) > metric.rising(better)


@pytest.mark.parametrize("name", WITHOUT_TORCHVISION)
def test_each_has_a_least_picture(pair: Pair, name: str) -> None:
    least = METRICS[name].least
    small = [np.ascontiguousarray(one[:least, -least:]) for one in pair]
    assert measure([name], *small)[name] is not None
    assert least == 1 or measure([name], *(one[1:] for one in small)) == {name: None}


def test_standard_figures_are_what_they_were(pair: Pair) -> None:
    found = measure(["psnr", "ms-ssim"], *pair)
    assert found == {"psnr": psnr8(*pair), "ms-ssim": ms_ssim8(*pair)}
    assert measure(["psnr", "flip"], pair[0], pair[0]) == {"psnr": None, "flip": 0.0}  # not finite
    with pytest.raises(ValueError, match="shapes"):
        measure(["psnr"], pair[0], pair[1][1:])


def test_a_missing_package_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    require(WITHOUT_TORCHVISION)
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    require(["psnr", "ms-ssim", "psnr-yuv"])
    with pytest.raises(UsageError, match=r"vmaf needs the package vmaf-torch \(pip install vmaf-torch\)"):
        require(["psnr", "vmaf"])


def test_scales_in_words_and_numbers() -> None:
    axes: dict[str, Any] = {name: (one.axis, one.rising(0.01)) for name, one in METRICS.items()}
    assert axes["psnr"] == ("PSNR [dB]", 0.01) and axes["vif"] == ("VIF", 0.01) and axes["cvvdp"][0] == "CVVDP [JOD]"
    assert axes["gmsd"] == ("GMSD [dB] = -10 log10(GMSD)", pytest.approx(20))
    assert axes["ms-ssim"] == ("MS-SSIM [dB] = -10 log10(1 - MS-SSIM)", pytest.approx(-10 * math.log10(0.99)))


@pytest.mark.parametrize(("high", "wide"), [(5, 5), (8, 8), (17, 17), (11, 1), (1, 11)])
def test_separable_windows_are_convolved_as_by_torch(high: int, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[int] = []
    plain = separable._shifted_sum

    def counted(planes: torch.Tensor, taps: list[float], dimension: int) -> torch.Tensor:
        summed.append(dimension)
        return plain(planes, taps, dimension)

    monkeypatch.setattr(separable, "_shifted_sum", counted)
    generator = torch.Generator().manual_seed(high)
    planes = torch.rand((2, 3, 40, 31), generator=generator)
    column, row = torch.rand(high, generator=generator), torch.rand(wide, generator=generator)
    window = torch.outer(column, row).repeat(3, 1, 1, 1)
    other = window.clone()
    other[0, 0, 0, 0] += 0.1
    for kernel, options in ((window, {}), (other, {}), (window, {"stride": 2}), (window, {"padding": 1})):
        expected = torch.conv2d(planes, kernel, groups=3, **options)
        with Separably():
            found = torch.nn.functional.conv2d(planes, weight=kernel, groups=3, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        steps = [dimension for dimension, taps in ((2, high), (3, wide)) if taps > 1]
        assert summed == (steps if kernel is window and not options else [])
        summed.clear()
