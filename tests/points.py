"""Points of results that tests share: by formula, at several lambdas."""

from __future__ import annotations

import math
from dataclasses import replace

from lic_dist.evaluation.results import ImageResult, Point
from lic_dist.reporting.page import vega


def image_result(name: str, bpp: float, psnr: float) -> ImageResult:
    """With an MS-SSIM in dB of psnr / 2 - 5, so that an image's BD-rate by MS-SSIM is that by PSNR."""
    return ImageResult(
        name, 512, 768, bpp, psnr, 1 - 10 ** -(psnr / 20 - 0.5), 0.999 * bpp, 0.99 * bpp, 0.0005, 0.5, 0.25
    )


def measured(quantizer: str, factor: float = 1.0, lambdas: int = 5, images: int = 3) -> list[Point]:
    """Points on PSNR = 6 log2(bpp) + 36 + image, with rates times `factor` (more for later images)."""
    points = []
    for step in range(lambdas):
        base = 0.1 * 2.0**step
        rows = tuple(
            image_result(f"{n}.png", base * (n + 1) * factor ** (n + 1), 36 + n + 6 * math.log2(base))
            for n in range(images)
        )
        points.append(Point(f"q{step}.pth.tar", quantizer, 0.0018 * 2**step, rows, record=quantizer))
    return points


def detailed(points: list[Point]) -> list[Point]:
    """With what an evaluation tells of channels and indices."""
    return [
        replace(point, channel_bits=(0.2, 0.5 - n / 100, 0.1), k_counts=tuple(range(17)), z_bpp=0.01)
        for n, point in enumerate(points)
    ]


def of_arm(points: list[Point], arm: str) -> list[Point]:
    return [replace(point, arm=arm) for point in points]


def markup(page: str) -> str:
    """A report's page without the libraries in it, which hold addresses and markup of their own."""
    assert page.count(vega()) == 1
    return page.replace(vega(), "")
