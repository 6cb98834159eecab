"""Jobs of models whose y has several stages: base training, finetuning with each recipe, resuming, masked weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building.calibrate import z_bits
from lic_dist.cache.reader import LatentCache
from lic_dist.codec import walk
from lic_dist.models import checkpoint
from lic_dist.models.checkpoint import Checkpoint, digest
from lic_dist.models.parts import RECIPES, encoder_digest, tensors
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training import base as base_job
from lic_dist.training import finetune as job
from lic_dist.training import loop
from lic_dist.training.log import read_log
from tests.conftest import dying_at
from tests.training.several import CHECKERED, FAMILIES, SLICED, TCQ, base_section, held_out


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "relaxation"), [(CHECKERED, "noise"), (SLICED, "mixed")])
def test_a_base_training_that_is_killed_goes_on_to_the_same_weights(
    architecture: str, relaxation: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"relaxation": relaxation, "ema": 0.5}
    whole = base_job.train(base_section(tmp_path / "whole", architecture, **changes), held_out(photos))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", dying_at(7))
        with pytest.raises(KeyboardInterrupt):
            base_job.train(base_section(tmp_path / "cut", architecture, **changes), held_out(photos))
    resumed = base_job.train(base_section(tmp_path / "cut", architecture, **changes), held_out(photos))
    one, other = (checkpoint.load(str(path), architecture).model.state_dict() for path in (whole, resumed))
    assert digest(one) == digest(other)


@pytest.mark.slow
@FAMILIES
def test_base_training_lowers_the_loss(architecture: str, trained: Callable[[str], Path]) -> None:
    rows = [row for row in read_log(trained(architecture).parent / "log.jsonl") if "held_out_L" in row]
    assert rows[-1]["held_out_L"] < 0.7 * rows[0]["held_out_L"]
    loaded = checkpoint.load(str(trained(architecture)), architecture)
    assert loaded.history[0]["auxiliary_loss"] < 1e-3 * 4


@pytest.mark.slow
def test_masked_weights_are_zero_wherever_a_digest_is_taken(trained: Callable[[str], Path], tmp_path: Path) -> None:
    path = trained(CHECKERED)
    written = checkpoint.read(path)["state_dict"]
    masked = written["context_prediction.mask"] == 0
    assert masked.any() and not written["context_prediction.weight"][masked].any()
    for file in sorted((path.parent / "states").glob("*.pth")):
        state = checkpoint.read(file)
        for weights in (state["model"], state["best"]["weights"]):
            assert not weights["context_prediction.weight"][masked].any()
    loaded = checkpoint.load(str(path), CHECKERED)
    before = digest(loaded.model.state_dict())
    with torch.no_grad():
        loaded.model.context_prediction(torch.randn(1, 6, 4, 4))
    assert digest(loaded.model.state_dict()) == before
    with torch.no_grad():
        loaded.model.context_prediction.weight += 1  # as CompressAI's files may have them, written after a step
    checkpoint.save(loaded, tmp_path / "a.pth.tar")
    again = checkpoint.load(str(tmp_path / "a.pth.tar"), CHECKERED)
    assert digest(again.model.state_dict()) == digest(loaded.model.state_dict()) != before
    assert not again.model.context_prediction.weight[masked].any()


def run(base: Path, store: Path, out: Path, architecture: str, **changes: object) -> Checkpoint:
    document = {
        "model": {"checkpoint": str(base), "architecture": architecture},
        "quantizer": TCQ.model_dump(),
        "cache": {"path": str(store)},
        "engine": {"name": "local"},
        "finetune": {"recipe": "decoder", "steps": 12, "batch": 4, "lr": 1e-3, "warmup": 2, "evaluate_every": 4,
                     "out": str(out), **changes},
    }  # fmt: skip
    return checkpoint.load(str(job.finetune(config.Experiment.model_validate(document))), architecture)


ARMS = [  # each in one family; test_stages.py has the gradients of every form in both
    (CHECKERED, "decoder", {}),
    (SLICED, "decoder+hyper", {}),
    (CHECKERED, "decoder+hyper", {}),
    (CHECKERED, "decoder+hyper", {"means": "search"}),
    (SLICED, "decoder+hyper", {"means": "pixels"}),
    (CHECKERED, "decoder+hyper", {"latents": "noise"}),
    (SLICED, "decoder+hyper", {"latents": "straight-through"}),
    (CHECKERED, ("context",), {}),
    (SLICED, ("context",), {}),
    (SLICED, "all-but-encoder", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "recipe", "how"), ARMS, ids=str)
def test_only_the_recipes_part_changes(
    architecture: str, recipe: str | tuple[str, ...], how: dict[str, str], trained: Callable[[str], Path],
    stored: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    parent = checkpoint.load(str(trained(architecture)), architecture)
    made = run(trained(architecture), stored(architecture), tmp_path, architecture, recipe=recipe, **how)
    before, after = parent.model.state_dict(), made.model.state_dict()
    changed = {name for name in tensors(parent.model, ("",)) if not torch.equal(before[name], after[name])}
    parts = RECIPES[recipe] if isinstance(recipe, str) else recipe
    allowed = parent.codec.prefixes(*parts, *(("context",) if "hyper" in parts else ()))
    assert all(name.startswith(allowed) for name in changed)
    assert encoder_digest(made.model) == encoder_digest(parent.model)
    entry = made.history[-1]
    assert entry["held_out_best"]["L"] <= entry["held_out_before"]["L"]
    if entry["best_step"]:
        assert changed
    if recipe in ("decoder", "decoder+hyper") and how.get("latents") is None:
        assert entry["best_step"]
    if recipe == "decoder+hyper" and entry["best_step"]:
        assert {name.split(".")[0] for name in changed} >= {"h_s", "g_s"}


@pytest.mark.slow
@FAMILIES
def test_a_finetuning_that_is_killed_goes_on_to_the_same_weights(
    architecture: str, trained: Callable[[str], Path], stored: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base, store = trained(architecture), stored(architecture)
    whole = run(base, store, tmp_path / "whole", architecture, recipe="decoder+hyper")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", dying_at(7))
        with pytest.raises(KeyboardInterrupt):
            run(base, store, tmp_path / "cut", architecture, recipe="decoder+hyper")
    resumed = run(base, store, tmp_path / "cut", architecture, recipe="decoder+hyper")
    assert digest(resumed.model.state_dict()) == digest(whole.model.state_dict())


@pytest.mark.slow
@FAMILIES
def test_held_out_figures_are_those_of_the_coder(
    architecture: str, trained: Callable[[str], Path], stored: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of the decoder alone: y_hat and bits before training, from the record's tables along the stages."""
    made = run(trained(architecture), stored(architecture), tmp_path, architecture, steps=4)
    parent = checkpoint.load(str(trained(architecture)), architecture)
    cache = LatentCache.open(stored(architecture))
    quantizer, codec = Quantizer(QuantizerRecord.from_json(cache.record_json("g"))), parent.codec
    read = cache.load(("pixels", "latents/y", "latents/z"), cache.indices(True))
    with torch.no_grad():
        sides_hat = (codec.sides[0].dequantize(torch.from_numpy(read["latents/z"])),)
        coded = walk.search(codec, sides_hat, torch.from_numpy(read["latents/y"]).float(), quantizer)
        x_hat = codec.synthesise(coded.y_hat).clamp(0, 1)
    x = torch.from_numpy(read["pixels"]).float() / 255
    mse = float((x_hat - x).double().square().mean())
    assert made.history[-1]["calibrated_before"]["psnr"] == pytest.approx(-10 * np.log10(mse), abs=1e-5)
    bits = (
        walk.channel_bits(codec, quantizer, coded.k, coded.level).sum()
        + z_bits(quantizer.record, read["latents/z"]).sum()
    )
    assert made.history[-1]["calibrated_before"]["bpp"] == pytest.approx(bits / x[:, 0].numel(), rel=1e-6)
