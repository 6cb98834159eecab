"""Training options: the compaction term, and phases that freeze parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lic_dist import config
from lic_dist.errors import UsageError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import build
from lic_dist.training import base as job
from lic_dist.training import loop
from tests.conftest import dying_at

TWO = ({"recipe": "all", "steps": 6, "lr": 1e-3}, {"recipe": ["decoder", "prior"], "steps": 6, "lr": 1e-3})


def section(out: Path, **changes: object) -> config.Train:
    sizes = {"N": 4, "M": 6, "lmbda": 0.05, "steps": 6, "batch": 2, "crop": 64, "lr": 1e-3, "warmup": 2}
    return config.Train(**{**sizes, "evaluate_every": 4, "out": out, **changes})


def trained(out: Path, photos: Path, **changes: object) -> dict[str, torch.Tensor]:
    made = job.train(section(out, **changes), config.Images(path=photos, held_out="valid"))
    tensors: dict[str, torch.Tensor] = checkpoint.load(str(made)).model.state_dict()
    return tensors


def test_compaction_is_the_coding_gain_in_bits() -> None:
    wide = torch.tensor([3.0, -3.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)  # a variance of 9
    assert float(job.compaction_bits(wide.repeat(1, 5, 1, 1))) == pytest.approx(0, abs=1e-4)
    y = torch.cat((wide, torch.zeros(2, 3, 4, 4)), 1)
    four = torch.tensor([9.0, 0, 0, 0]) + 1 / 12
    gain = four.mean() / four.prod() ** 0.25
    assert float(job.compaction_bits(y)) == pytest.approx(-0.5 * y.numel() * float(gain.log2()), rel=1e-5)


def test_compaction_costs_in_training_alone() -> None:
    torch.manual_seed(0)
    model, x = build("mbt2018-mean", 4, 6), torch.rand(2, 3, 64, 64)
    plain, weighed = (job.RelaxedModel(model, "mixed", compaction=weight) for weight in (0.0, 2.0))
    bits = []
    for one in (plain, weighed):
        torch.manual_seed(1)
        bits.append(float(one.train()(x)[1].detach()))
    y = job.adapt(model).analyse(x)
    assert bits[1] - bits[0] == pytest.approx(2 * float(job.compaction_bits(y)), rel=1e-3)
    assert torch.equal(plain.eval()(x)[1], weighed.eval()(x)[1])


@pytest.mark.slow
def test_what_a_phase_freezes_stays_to_the_bit(photos: Path, tmp_path: Path) -> None:
    first, both = trained(tmp_path / "first", photos), trained(tmp_path / "both", photos, phases=TWO)
    one_phase = trained(tmp_path / "one", photos, steps=1, lr=1.0, phases=TWO[:1])  # instead of steps and lr
    moved = {name for name in first if not torch.equal(first[name], both[name])}
    assert all(torch.equal(first[name], one_phase[name]) for name in first)
    assert not [name for name in moved if name.startswith(("g_a.", "h_a.", "h_s."))]
    assert {name.split(".")[0] for name in moved} == {"g_s", "entropy_bottleneck"}


@pytest.mark.slow
def test_a_job_killed_about_the_end_of_a_phase_goes_on_to_the_same_weights(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"phases": TWO, "compaction": 0.1}
    whole = trained(tmp_path / "whole", photos, **both)
    for step in (6, 7, 9):  # a phase's last, the next one's first, and one after its first state
        with monkeypatch.context() as patch:
            patch.setattr(loop, "take_step", dying_at(step))
            with pytest.raises(KeyboardInterrupt):
                trained(tmp_path / str(step), photos, **both)
        resumed = trained(tmp_path / str(step), photos, **both)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), step


def test_phases_of_parts_that_are_not_there_are_one_line() -> None:
    model = build("mbt2018-mean", 4, 6)
    assert {name.split(".")[0] for name in job._trained(model, ("encoder",))} == {"g_a", "h_a"}
    assert len(job._trained(model, "all")) == sum(not one.endswith(".quantiles") for one, _ in model.named_parameters())
    with pytest.raises(UsageError, match="nothing is named 'g_x'"):
        job._trained(model, ("g_x",))
    assert len(job._trained(model, ("entropy_bottleneck",))) == len(job._trained(model, ("prior",))) > 0


def test_options_that_are_not_used_are_in_no_identity(tmp_path: Path) -> None:
    plain = section(tmp_path).identity({"out"})
    assert {"phases", "compaction"}.isdisjoint(plain)
    assert section(tmp_path, phases=TWO[:1], compaction=0.1).identity({"out"}).keys() - plain == {
        "phases",
        "compaction",
    }
