"""Refinement beside stochastic Gumbel annealing: the draw, the schedule, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.benchmarks.refinement import crops
from lic_dist.benchmarks.relaxations import BETAS, RATE, annealed, descended, drawn_between, temperature
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.models.refine import Refinement
from lic_dist.models.stages import analyse, bits_of, dequantize_z, only_stage, to_input
from tests.codec.test_families import made
from tests.conftest import picture


def test_the_temperature_is_the_papers_at_any_number_of_passes() -> None:
    """min(.5, .5 exp(-.001 (t - 700))) at t of 2000."""
    for t in (0, 500, 700, 1000, 1999):
        assert temperature(t / 2000) == pytest.approx(min(0.5, 0.5 * math.exp(-0.001 * (t - 700))))


@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_draws_lie_in_their_cell_and_prefer_the_nearer_end(tau: float) -> None:
    """Upper with the probability that the two logits give: exp(-atanh(d) / tau) of either end's distance d."""
    generator = torch.Generator().manual_seed(0)
    for r in (-1.3, 0.0, 0.25, 2.9):
        values = torch.full((20_000,), r, dtype=torch.float64, requires_grad=True)
        drawn = drawn_between(values, tau, generator)
        part = r - math.floor(r)
        assert float(drawn.detach().min()) >= math.floor(r) and float(drawn.detach().max()) <= math.floor(r) + 1
        logits = [-math.atanh(min(max(one, 1e-6), 1 - 1e-6)) / tau for one in (part, 1 - part)]
        upper = float((drawn.detach() - math.floor(r) > 0.5).double().mean())
        assert upper == pytest.approx(1 / (1 + math.exp(min(logits[0] - logits[1], 700))), abs=0.015)
        (gradient,) = torch.autograd.grad(drawn.sum(), values)
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.slow
def test_annealing_lowers_the_loss_of_what_is_rounded() -> None:
    loaded = checkpoint.load("base-0.013")
    codec, lmbda = loaded.codec, 0.013
    x = to_input(torch.from_numpy(picture(3, 64, 64).transpose(2, 0, 1)[None].copy()), torch.device("cpu"))
    with torch.no_grad():
        y, z = analyse(loaded.model, x)
        sides_hat = (dequantize_z(loaded.model, z),)
        stage, refinement = only_stage(codec, sides_hat), Refinement(32, lmbda)
        moved = annealed(codec, x, y, sides_hat, refinement)
        costs = []
        for one in (y, moved):
            y_hat = torch.round(one.float() - stage.means) + stage.means
            squared = (codec.synthesise(y_hat) - x).square().sum()
            costs.append(float(lmbda * 255**2 / 3 * squared + bits_of(codec.likelihood(y_hat, stage))))
    assert costs[1] < 0.99 * costs[0]
    several = made("mbt2018").codec
    sides_hat = (torch.zeros(1, several.sides[0].channels, 1, 1),)
    with pytest.raises(LicError, match="several stages"), torch.no_grad():
        annealed(several, x, torch.zeros(1, several.channels, 4, 4), sides_hat, refinement)


def test_descent_is_adam_of_the_relaxed_loss() -> None:
    loaded = checkpoint.load("base-0.013")
    codec, refinement = loaded.codec, Refinement(3, 0.013)
    x = to_input(torch.from_numpy(picture(3, 64, 64).transpose(2, 0, 1)[None].copy()), torch.device("cpu"))
    with torch.no_grad():
        y, z = analyse(loaded.model, x)
        sides_hat = (dequantize_z(loaded.model, z),)
        stage = only_stage(codec, sides_hat)
    expected = y.float().requires_grad_(True)
    optimizer = torch.optim.Adam([expected], betas=BETAS)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / 3)
        squared = (codec.synthesise(expected) - x).square().sum()
        loss = 0.013 * 255**2 / 3 * squared + bits_of(codec.likelihood(expected, stage))
        (expected.grad,) = torch.autograd.grad(loss, expected)
        optimizer.step()
    apart = (descended(codec, x, y, sides_hat, refinement).float() - expected.detach()).abs()
    assert float((apart < 0.01).float().mean()) > 0.995 and float((expected.detach() - y).abs().mean()) > 0.05


@pytest.mark.slow
def test_the_command_measures_every_arm(tmp_path: Path) -> None:
    for seed in range(2):
        Image.fromarray(picture(seed, 260, 300)).save(tmp_path / f"{seed}.png")
    Image.fromarray(picture(2, 100, 300)).save(tmp_path / "small.png")
    out = tmp_path / "figures.json"
    command = ["bench", "refine", "--model", "base-0.013", "--images", str(tmp_path), "--quick", "--json", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["pictures"] == 2 and figures["distortion"] == {"mse": 1.0}
    _, tcq, sq, _, sga = figures["curves"].values()
    assert list(figures["curves"]) == ["SQ", "TCQ-8", "descent, SQ", "descent, TCQ-8", "SGA, SQ"]
    assert list(sq) == ["0", "4"]
    assert sq["0"]["L"] == sga["0"]["L"] > sq["4"]["L"] and tcq["0"]["L"] > tcq["4"]["L"]
    assert all(one["ms"] > 0 and one["bpp"] > 0 for arm in (sq, tcq, sga) for one in arm.values())
    assert list(figures["encode"]) == ["0", "4", "4, z too"] and figures["encode"]["0"]["ratio"] == 1
    assert figures["encode"]["4"]["ratio"] > 1
    with pytest.raises(LicError, match="no picture is as large as 256x256"):
        crops([tmp_path / "small.png"])
    assert np.array_equal(crops([tmp_path / "0.png"])[0], picture(0, 260, 300)[2:258, 22:278].transpose(2, 0, 1))
