"""A decoder in 8 bits, made of a trained one: what layers lose when they are rounded, retrained, and as a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lic_dist import config
from lic_dist.building.build import build as build_cache
from lic_dist.config.experiment import parse
from lic_dist.errors import UsageError
from lic_dist.evaluation.jobs import arm_of
from lic_dist.models import checkpoint
from lic_dist.models.architectures import ModelSpec, adapt, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import encoder_digest, model_digest
from lic_dist.models.ranges import fit
from lic_dist.training import finetune as job
from lic_dist.training import loop
from tests.conftest import dying_at
from tests.training.test_finetune import document


def _floats() -> Checkpoint:
    """A model whose residual blocks do something."""
    torch.manual_seed(0)
    model = build("block-transform", 8, 16).eval()
    with torch.no_grad():
        for one in model.g_s.parameters():
            one.copy_(torch.randn(one.shape) / max(1, one[0].numel()) ** 0.5)
    return Checkpoint(model, ModelSpec("block-transform", 8, 16, 0.05))


def test_layers_retrained_lose_less_than_layers_rounded() -> None:
    floats = _floats().codec
    y_hat, unseen = torch.randn(40, 16, 8, 8).mul(2).split((32, 8))
    z_hat = torch.randn(32, 8, 2, 2).mul(4).round()

    def error(retrained: bool) -> float:
        made = adapt(build("block-transform-int8", 8, 16).eval())
        made.module.load_state_dict(floats.module.state_dict(), strict=False)
        fit(made, floats, z_hat, y_hat, retrained)
        with torch.no_grad():
            aim: Tensor = floats.synthesise(unseen)
            return float((made.synthesise(unseen) - aim).square().mean() / aim.var())

    nearest, retrained = error(False), error(True)
    assert 1e-6 < nearest < 0.01 and retrained < 0.9 * nearest


@pytest.fixture()
def experiment(photos: Path, tmp_path: Path) -> Callable[[str], config.Experiment]:
    """A job on a cache of `_floats`, by the folder that it writes to."""
    checkpoint.save(_floats(), base := tmp_path / "base.pth.tar")
    asked = {"recipe": "decoder+hyper", "int8": {"samples": 8, "steps": 2}, "steps": 4, "batch": 4, "lr": 1e-5}

    def made(out: str) -> config.Experiment:
        return config.Experiment.model_validate(
            document(base, photos, tmp_path / "store.zarr", tmp_path / out, **asked)
        )

    build_cache(made("any"))
    return made


@pytest.mark.slow
def test_a_job_makes_a_model_like_any_other(experiment: Callable[[str], config.Experiment], tmp_path: Path) -> None:
    made = checkpoint.load(str(job.finetune(experiment("out"))))
    nearest = checkpoint.load(str(tmp_path / "out" / "calibrated.pth.tar"))
    assert (arm_of(nearest), arm_of(made)) == ("int8", "decoder+hyper int8")
    assert made.spec.architecture == nearest.spec.architecture == "block-transform-int8"
    assert encoder_digest(made.model) == encoder_digest(_floats().model)


@pytest.mark.nightly
def test_a_job_that_is_killed_goes_on_to_the_same_bits(
    experiment: Callable[[str], config.Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoint.load(str(job.finetune(experiment("whole"))))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "take_step", dying_at(9))  # when all layers train together, after a state
        job.finetune(experiment("killed"))
    again = checkpoint.load(str(job.finetune(experiment("killed"))))
    assert model_digest(again.model) == model_digest(made.model)


@pytest.mark.parametrize(
    ("section", "said"),
    [({"recipe": "decoder", "int8": {}}, "changes h_s"), ({"rounds": 2, "int8": {}}, "made once")],
)
def test_what_does_not_go_with_it_is_one_line(section: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse({"finetune": section}, "a.yaml")


def test_a_family_without_a_form_is_refused(base: Path, photos: Path, store: Path, tmp_path: Path) -> None:
    asked = document(base, photos, store, tmp_path, recipe="decoder+hyper", int8={})
    with pytest.raises(UsageError, match="mbt2018-mean has no decoder in 8 bits"):
        job.finetune(config.Experiment.model_validate(asked))
