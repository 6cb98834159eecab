"""Finetuning from a cache: exact, resumable, the frozen parts untouched, the same in one rank and two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lic_dist import config
from lic_dist.building.build import build
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import RECIPES, decoder_digest, encoder_digest, entropy_digest, tensors
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import SCALES
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training import finetune as job
from lic_dist.training import loop
from lic_dist.training.loop import take_step
from lic_dist.training.rate import IndexRate
from lic_dist.training.samples import Samples


def document(base: Path, photos: Path, store: Path, out: Path, **finetune: object) -> dict:
    return {
        "model": {"checkpoint": str(base)},
        "images": {"path": str(photos), "crop": 64, "variations": 3, "held_out": "valid"},
        "quantizer": {"name": "tcq", "step": 0.5, "lambda_scale": 0.1, "pilot": 8, "calibration": 4, "group": "tcq8"},
        "cache": {"path": str(store), "shard": 8, "batch": 4},
        "engine": {"name": "local"},
        "finetune": {"recipe": "decoder", "steps": 12, "batch": 4, "lr": 1e-3, "warmup": 2, "evaluate_every": 4,
                     "out": str(out), **finetune},
    }  # fmt: skip


@pytest.fixture(scope="module")
def store(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "a.zarr"
    build(config.Experiment.model_validate(document(base, photos, path, path)))
    return path


def run(base: Path, photos: Path, store: Path, out: Path, **finetune: object) -> Checkpoint:
    made = job.finetune(config.Experiment.model_validate(document(base, photos, store, out, **finetune)))
    return checkpoint.load(str(made))


@pytest.mark.parametrize("latents", ["quantized", "noise"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_only_the_recipes_part_changes(
    recipe: str, latents: str, base: Path, photos: Path, store: Path, tmp_path: Path
) -> None:
    parent = checkpoint.load(str(base))
    made = run(base, photos, store, tmp_path, recipe=recipe, latents=latents)
    before, after = parent.model.state_dict(), made.model.state_dict()
    changed = {name for name in tensors(parent.model, ("",)) if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(RECIPES[recipe]) for name in changed)
    assert encoder_digest(made.model) == encoder_digest(parent.model)
    assert decoder_digest(made.model) != decoder_digest(parent.model)
    record = QuantizerRecord.from_json(made.quantizers["tcq8"])
    parents = QuantizerRecord.from_json(LatentCache.open(store).record_json("tcq8"))
    assert (entropy_digest(made.model) == entropy_digest(parent.model)) == (recipe == "decoder")
    assert (record.digest == parents.digest) == (recipe == "decoder")
    entry = made.history[-1]
    assert entry["recipe"] == recipe and entry["cache"] == LatentCache.open(store).fingerprint
    assert entry["held_out_best"][0] <= entry["held_out_before"][0]


def test_really_quantized_training_lowers_the_training_loss(
    base: Path, photos: Path, store: Path, tmp_path: Path
) -> None:
    made = run(base, photos, store, tmp_path, recipe="decoder+hyper", steps=60, evaluate_every=10)
    entry = made.history[-1]
    assert entry["best_step"] > 0 and entry["held_out_best"][0] < 0.98 * entry["held_out_before"][0]


def test_a_killed_job_goes_on_to_the_same_weights(
    base: Path, photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(base, photos, store, tmp_path / "whole", latents="noise")
    steps = 0

    def die(*arguments: object) -> float:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise KeyboardInterrupt
        return take_step(*arguments)

    monkeypatch.setattr(loop, "take_step", die)
    with pytest.raises(KeyboardInterrupt):
        run(base, photos, store, tmp_path / "cut", latents="noise")
    monkeypatch.undo()
    resumed = run(base, photos, store, tmp_path / "cut", latents="noise")
    assert checkpoint.digest(resumed.model.state_dict()) == checkpoint.digest(whole.model.state_dict())


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(base: Path, photos: Path, store: Path, tmp_path: Path) -> None:
    one = run(base, photos, store, tmp_path / "one", recipe="decoder+hyper")
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(document(base, photos, store, tmp_path / "two", recipe="decoder+hyper")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "lic_dist", "finetune", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = checkpoint.load(str(tmp_path / "two"))
    for name, value in tensors(one.model, RECIPES["decoder+hyper"]).items():
        if name.endswith(
            "gamma"
        ):  # of no effect in this tiny model: Adam turns the rounding of its gradient into steps
            continue
        torch.testing.assert_close(two.model.state_dict()[name], value, rtol=1e-4, atol=2e-6)
    losses = [loop.read_log(tmp_path / part / "log.jsonl")[-1]["held_out_L"] for part in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_rate_agrees_with_the_coders_tables_at_the_levels(store: Path) -> None:
    record = QuantizerRecord.from_json(LatentCache.open(store).record_json("tcq8"))
    rate = IndexRate(record, 40)
    generator = np.random.default_rng(0)
    level = generator.integers(0, 64, (5, 200)).astype(np.uint8)
    k = generator.integers(-40, 41, (5, 200)).astype(np.int16)
    quantizer = Quantizer(record)
    scales = torch.from_numpy(SCALES[level])
    bits = rate(scales, torch.from_numpy(k), torch.from_numpy(quantizer.active(k)))
    exact = record.y_tables.bits(np.abs(k), quantizer.rows(k, level))
    other = record.y_tables.bits(-np.abs(k), quantizer.rows(k, level))
    assert np.allclose(bits.numpy(), (exact + other) / 2, atol=2e-3)  # an escape's two signs may differ
    scales.requires_grad_(True)
    rate(scales * 1.01, torch.from_numpy(k), torch.from_numpy(quantizer.active(k))).sum().backward()
    assert torch.isfinite(scales.grad).all() and scales.grad.abs().sum() > 0


def test_batches_are_functions_of_the_step_and_cover_an_epoch(store: Path) -> None:
    cache = LatentCache.open(store)
    quantizer = Quantizer(QuantizerRecord.from_json(cache.record_json("tcq8")))
    samples = Samples(cache, "tcq8", quantizer, held_out=False, with_y=False)
    assert len(samples) == 18
    numbers = np.concatenate([samples.numbers(0, step, 6, slice(0, 6)) for step in range(3)])
    assert sorted(numbers) == list(range(18))
    halves = [samples.numbers(0, 5, 6, slice(first, first + 3)) for first in (0, 3)]
    assert np.array_equal(np.concatenate(halves), samples.numbers(0, 5, 6, slice(0, 6)))
    batch = samples.batch(np.array([3, 1]))
    stored = cache.load(("pixels", "quantized/tcq8/k"), cache.indices(False)[[3, 1]])
    assert np.array_equal(batch.pixels.numpy(), stored["pixels"])
    lanes = stored["quantized/tcq8/k"].reshape(24, -1)
    assert np.array_equal(batch.level.numpy().reshape(24, -1), quantizer.dequantize(lanes))


def test_a_memory_map_serves_the_same_batches(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LatentCache.open(store)
    quantizer = Quantizer(QuantizerRecord.from_json(cache.record_json("tcq8")))
    plain = Samples(cache, "tcq8", quantizer, held_out=False, with_y=True).batch(np.arange(5))
    monkeypatch.setattr("lic_dist.training.samples.IN_MEMORY", 10)
    mapped = Samples(cache, "tcq8", quantizer, held_out=False, with_y=True)
    assert isinstance(mapped.arrays["pixels"], np.memmap)
    assert all(torch.equal(getattr(plain, name), getattr(mapped.batch(np.arange(5)), name)) for name in vars(plain))


def test_a_wrong_cache_and_a_wrong_batch_are_refused(
    base: Path, photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoint.load(str(base))
    with torch.no_grad():
        other.model.g_a[0].bias += 0.1
    checkpoint.save(other, tmp_path / "other.pth.tar")
    with pytest.raises(LicError, match=r"model\.encoder_sha256"):
        run(tmp_path / "other.pth.tar", photos, store, tmp_path / "x")
    with pytest.raises(LicError, match="no cache"):
        run(base, photos, tmp_path / "none.zarr", tmp_path / "x")
    without_y = document(base, photos, tmp_path / "no-y.zarr", tmp_path / "y", recipe="decoder+hyper")
    without_y["cache"]["store_y"] = False
    build(config.Experiment.model_validate(without_y))
    with pytest.raises(UsageError, match="needs y"):
        job.finetune(config.Experiment.model_validate(without_y))
    run(base, photos, store, tmp_path / "x")
    with pytest.raises(UsageError, match="steps"):
        run(base, photos, store, tmp_path / "x", steps=13)
