"""What networks cost, against counts by hand."""

from __future__ import annotations

import pytest

from lic_dist.models import checkpoint
from lic_dist.models.architectures import adapt, family
from lic_dist.models.complexity import NetCost, complexity


def test_the_published_counts_of_mbt2018_mean() -> None:
    """g_a: four 5x5 convolutions by stride 2, a GDN of 1x1 after the first three; h_s: 5x5, 5x5, 3x3."""
    N, M = 128, 192
    found = complexity(family("mbt2018-mean").build(N=N, M=M))
    taps = (3 * N / 4 + N * N / 16 + N * N / 64 + N * M / 256) * 25
    norms = N * N / 4 + N * N / 16 + N * N / 64
    assert found["g_a"].kmac == pytest.approx((taps + norms) / 1000)
    assert found["h_a"].kmac == pytest.approx((9 * M * N / 256 + 25 * N * N / 1024 + 25 * N * N / 4096) / 1000)
    assert found["h_a"].parameters == 9 * M * N + 2 * 25 * N * N + 3 * N
    assert set(found) == {"g_a", "h_a", "g_s", "h_s"}


def test_the_shipped_base_is_a_quarter_of_it() -> None:
    found = complexity(checkpoint.load("base-small").model)
    assert found["g_s"].parameters == sum(
        one.numel() for name, one in checkpoint.load("base-small").model.named_parameters() if name.startswith("g_s")
    )
    zoo = complexity(checkpoint.load("base-0.013").model)
    assert round(zoo["g_a"].kmac, 1) == round(zoo["g_s"].kmac, 1) == 10.1


def test_networks_of_the_entropy_model_are_counted_stage_by_stage() -> None:
    """A checkerboard's context network sees all of y in one pass, a raster's the rows above in waves."""
    model = family("cheng2020-anchor-checkerboard").build(N=16, M=16)
    found = complexity(model)
    assert list(found) == list(adapt(model).nets)
    assert found["context_0"] == NetCost(pytest.approx(25 * 16 * 32 / 256 / 1000), 25 * 16 * 32 + 32)
    none = complexity(family("bmshj2018-factorized").build(N=8, M=12))
    assert none.get("h_a", NetCost(0, 0)) == NetCost(0, 0)
