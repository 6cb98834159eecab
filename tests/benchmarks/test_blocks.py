"""`bench blocks`: what it makes of curves and errors that are known."""

from __future__ import annotations

import numpy as np
import pytest

from lic_dist.benchmarks.blocks import BANDS, MENDED, PLAIN, WHOLE, _by_band, compared
from lic_dist.codec.blocks import Layout
from tests.benchmarks.test_progressive import rows


def test_a_tenth_more_rate_is_ten_percent_of_bits_and_of_bd_rate() -> None:
    def points(factor: float) -> list[list]:
        return [list(one) for one in zip(rows("a", factor, 4), rows("b", 3 * factor, 4), strict=True)]

    made = {WHOLE: points(1), PLAIN: points(1.1), MENDED: points(1.05)}
    details = [
        {"model": f"m{place}", "lmbda": 0.01 * 2**place, "bytes": {}, "mse": {}} for place in range(len(made[WHOLE]))
    ]
    found = compared(made, details)
    for kind, change in ((PLAIN, 10), (MENDED, 5)):
        for quality in ("psnr", "ms-ssim"):
            assert found[f"{kind}, {quality}"]["images"] == pytest.approx(change)
    for one in found["models"]:
        assert one["bits"]["mean"] == pytest.approx(10) and one[PLAIN]["psnr"]["mean"] == pytest.approx(0)
        assert 0 < one[MENDED]["L"]["mean"] < one[PLAIN]["L"]["mean"] < 10
    assert not {f"{PLAIN}, psnr"} & compared(made | {name: some[:1] for name, some in made.items()}, details[:1]).keys()


def test_errors_count_by_the_distance_to_an_edge_within_the_picture() -> None:
    layout = Layout(128, 70, 64)  # one lying edge, none upright
    picture = np.zeros((128, 70, 3), np.uint8)
    shown = picture.copy()
    shown[63], shown[64 + 5], shown[0] = 2, 1, 1
    counts, errors = _by_band(picture, None, layout), _by_band(picture, shown, layout)
    assert counts.sum() == 3 * 128 * 70 and counts.tolist()[:3] == [420, 420, 840]
    expected = {0: 4 * 3 * 70, BANDS.index(4): 3 * 70, BANDS.index(32): 3 * 70}
    assert {band: error for band, error in enumerate(errors.tolist()) if error} == expected
