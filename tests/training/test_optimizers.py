"""Muon against torch's own, its steps, and exact resuming of a job that trains with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lic_dist import config
from lic_dist.models.architectures import build
from lic_dist.training import loop as module
from lic_dist.training.loop import PhasePlan
from lic_dist.training.optimizers import RMS, Muon, Together, make_optimizer, orthogonalized
from tests.conftest import dying_at
from tests.training.test_course import bits, run

SHAPES = ((6, 4, 3, 3), (8, 6, 1, 1), (24, 3, 1, 1), (6, 4, 3, 3))  # two of equal sides, one that is higher than wide


def kernels() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.slow  # torch's own imports its compiler
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own from 2.9 on")
def test_muon_is_torchs_own_on_each_kernel_as_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # so that theirs computes in float32 too
    ours = kernels()
    theirs = [nn.Parameter(one.detach().flatten(1).clone()) for one in ours]
    mine = Muon(ours, lr=0.1)
    other = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        before = [one.detach().clone() for one in ours]
        set_gradients(ours, step)
        for one, its in zip(ours, theirs, strict=True):
            its.grad = one.grad.flatten(1)  # type: ignore[union-attr]
        mine.step()
        other.step()
        for one, its, start in zip(ours, theirs, before, strict=True):
            moved = one.detach() - start
            torch.testing.assert_close(one.flatten(1), its, rtol=1e-5, atol=1e-5)
            assert 0.4 * RMS < float(moved.square().mean().sqrt()) / 0.1 < 1.5 * RMS


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(2, 12, 40, generator=generator)))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_a_kernel_without_a_gradient_stays() -> None:
    parameters = kernels()
    set_gradients(parameters, 0)
    parameters[1].grad = None
    before = [one.detach().clone() for one in parameters]
    Muon(parameters, lr=0.1).step()
    assert [torch.equal(one, its) for one, its in zip(parameters, before, strict=True)] == [False, True, False, False]


def test_kernels_that_mix_channels_go_to_muon_and_all_else_to_adam() -> None:
    model = build("block-transform", N=4, M=6)
    names = {id(value): name for name, value in model.named_parameters()}
    made = make_optimizer("muon", list(model.parameters()), 1e-3)
    assert isinstance(made, Together)
    chosen = [names[id(one)] for one in made.optimizers[0].param_groups[0]["params"]]
    assert "g_a.1.weight" in chosen and "h_s.4.weight" in chosen and "g_s.1.body.1.weight" in chosen
    assert not [one for one in chosen if not one.endswith("weight") or "body.0" in one]  # depthwise, biases, priors
    rest = [names[id(one)] for one in made.optimizers[1].param_groups[0]["params"]]
    assert {*chosen, *rest} == {name for name, _ in model.named_parameters()}
    assert type(make_optimizer("adam", list(model.parameters()), 1e-3)) is torch.optim.Adam


class Convolutions(nn.Module):
    """Two layers that read the batch of the loop's other tests, [4, 3], as pictures of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.tanh(self.a(x[:, :, None, None] + 0.1 * torch.randn(4, 3, 1, 1))))
        return found.flatten(1)


PHASES = (PhasePlan(("a.weight", "a.bias"), 7, 0.1), PhasePlan(("b.weight",), 6, 0.05))  # the second: Muon alone


def test_a_job_with_muon_killed_at_any_step_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = run(tmp_path / "whole", Convolutions(), PHASES, optimizer="muon")
    _, adams = run(tmp_path / "adam", Convolutions(), PHASES)
    assert bits(model) != bits(adams)
    for step in (2, 5, 9, 12):
        out = tmp_path / f"cut{step}"
        with monkeypatch.context() as patch:
            patch.setattr(module, "take_step", dying_at(step))
            with pytest.raises(KeyboardInterrupt):
                run(out, Convolutions(), PHASES, optimizer="muon")
        resumed, other = run(out, Convolutions(), PHASES, optimizer="muon")
        assert bits(other) == bits(model) and resumed.done == whole.done, step


def test_keys_that_came_later_are_in_no_identity_unless_they_are_set() -> None:
    for section, kept in ((config.Train(), "relaxation"), (config.Finetune(), "recipe")):
        assert kept in section.identity(set()) and not section.LATER & {*section.identity(set())}
    said = config.Train(optimizer="muon", options={"depth": 3}).identity({"out"})
    assert said["optimizer"] == "muon" and said["options"] == {"depth": 3} and "out" not in said
