"""Adapters: the pack that a finetuning writes makes its checkpoint of the base, also when it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lic_dist.config import Finetune
from lic_dist.evaluation.jobs import arm_of
from lic_dist.models import checkpoint, packs
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.names import label
from lic_dist.models.parts import encoder_digest, entropy_digest, model_digest
from lic_dist.training import loop
from tests.conftest import Once, dying_at
from tests.training.test_finetune import run

LAST = {"mse": 1, "idempotence": 0}  # a control, of which the last weights are kept
RANKS = {"decoder": 1, "hyper": 1}
FEW = {"recipe": "adapters", "adapters": RANKS, "steps": 6, "evaluate_every": 3, "distortion": LAST, "tolerance": 1}


@pytest.fixture(scope="module")
def adapted(base: Path, photos: Path, store: Path, once: Once) -> Path:
    """The folder of a finetuning of adapters. Not to be changed."""
    return once("adapted", lambda folder: run(base, photos, store, folder / "domain", **FEW)) / "domain"


@pytest.mark.slow
def test_base_and_pack_are_the_checkpoint(base: Path, adapted: Path) -> None:
    parent, made = checkpoint.load(str(base)), checkpoint.load(str(adapted))
    loaded = checkpoint.load(f"{base}+{adapted / 'domain.pack'}")
    assert made.history[-1]["best_step"] > 0 and arm_of(made) == arm_of(loaded) == "adapters of decoder+hyper control"
    assert model_digest(loaded.model) == model_digest(made.model) != model_digest(parent.model)
    assert made.model.state_dict().keys() == parent.model.state_dict().keys()
    assert encoder_digest(loaded.model) == encoder_digest(parent.model)
    assert entropy_digest(loaded.model) != entropy_digest(parent.model)
    changed = [
        name
        for name, value in parent.model.named_parameters()
        if not torch.equal(value, loaded.model.get_parameter(name))
    ]
    assert {name.partition(".")[0] for name in changed} == {"g_s", "h_s"}
    assert loaded.quantizers == {"tcq8": made.quantizers["tcq8"]}
    pack = packs.read(adapted / "domain.pack")
    assert pack.of == label(str(base)) and pack.entry == made.history[-1]


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_pack(
    base: Path, photos: Path, store: Path, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job() -> Checkpoint:
        return run(base, photos, store, tmp_path / "domain", **FEW)

    monkeypatch.setattr(loop, "take_step", dying_at(5))
    with pytest.raises(KeyboardInterrupt):
        job()
    monkeypatch.undo()
    job()
    whole, resumed = (packs.read(folder / "domain.pack") for folder in (adapted, tmp_path / "domain"))
    assert {**whole.entry, "out": ""} == {**resumed.entry, "out": ""}
    for name, delta in whole.deltas.items():
        other = resumed.deltas[name]
        assert all((getattr(delta, of) == getattr(other, of)).all() for of in ("exponents", "left", "right"))


@pytest.mark.slow
def test_a_decoders_pack_leaves_the_bits_and_one_that_harms_is_empty(
    base: Path, photos: Path, store: Path, tmp_path: Path
) -> None:
    settings = {**FEW, "adapters": {"decoder": 1}}
    parent, made = checkpoint.load(str(base)), run(base, photos, store, tmp_path / "a", **settings)
    assert entropy_digest(made.model) == entropy_digest(parent.model)
    assert arm_of(made) == "adapters of decoder control" and packs.read(tmp_path / "a/a.pack").deltas
    made = run(base, photos, store, tmp_path / "b", **{**settings, "distortion": "mse", "tolerance": 0, "lr": 0.01})
    assert model_digest(made.model) == model_digest(parent.model)
    assert packs.read(tmp_path / "b/b.pack").deltas == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 2}, "rounds 1"),
        ({"phases": [{"recipe": "decoder", "steps": 1, "lr": 1}]}, "adapters are of recipe adapters"),
        ({"adapters": {"decoder": 0}}, "greater than or equal to 1"),
        (
            {"phases": [{"recipe": one, "steps": 1, "lr": 1} for one in ("decoder", "adapters")]},
            "a pack is of adapters alone",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Finetune.model_validate({**FEW, "out": "x", **wrong})
