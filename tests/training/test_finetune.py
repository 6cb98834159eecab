"""Finetuning from a cache: exact, resumable, the frozen parts untouched, the same in one rank and two."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lic_dist import config
from lic_dist.building.build import build
from lic_dist.building.job import check_cache
from lic_dist.cache.mixing import Shares, shuffled
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.order import permutation
from lic_dist.cache.reader import LatentCache
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.records import compressai_record
from lic_dist.data import images
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.run import measure_image
from lic_dist.models import checkpoint
from lic_dist.models.architectures import family
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import RECIPES, decoder_digest, encoder_digest, entropy_digest, tensors
from lic_dist.models.stages import dequantize_z
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import SCALES
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training import finetune as job
from lic_dist.training import loop
from lic_dist.training.decoding import Decoding
from lic_dist.training.distributed import Ranks
from lic_dist.training.rate import IndexRate
from lic_dist.training.samples import Batch, Samples, ShuffledData, training_data
from tests.conftest import dying_at, picture
from tests.forked import python
from tests.stores import FIXED


def document(base: Path, photos: Path, store: Path, out: Path, shift: object = 0.05, **finetune: object) -> dict:
    return {
        "model": {"checkpoint": str(base)},
        "images": {"path": str(photos), "crop": 64, "variations": 3, "held_out": "valid"},
        "quantizer": {"name": "tcq", **FIXED, "shift": shift, "pilot": 8, "calibration": 4, "group": "tcq8"},
        "cache": {"path": str(store), "shard": 8, "batch": 4},
        "engine": {"name": "local"},
        "finetune": {"recipe": "decoder", "steps": 12, "batch": 4, "lr": 1e-3, "warmup": 2, "evaluate_every": 4,
                     "out": str(out), **finetune},
    }  # fmt: skip


def run(base: Path, photos: Path, store: Path, out: Path, **finetune: object) -> Checkpoint:
    made = job.finetune(config.Experiment.model_validate(document(base, photos, store, out, **finetune)))
    return checkpoint.load(str(made))


def prefixes(recipe: str) -> tuple[str, ...]:
    """What a recipe changes; with the prior, the outer quantiles that bound its tables follow."""
    parts = tuple(prefix for part in RECIPES[recipe] for prefix in family("mbt2018-mean").prefixes(part))
    return (*parts, "entropy_bottleneck.quantiles") if "prior" in RECIPES[recipe] else parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "latents"),
    [
        *((recipe, "quantized") for recipe in RECIPES),
        ("decoder+hyper", "noise"),
        ("all-but-encoder", "straight-through"),
    ],
)
def test_only_the_recipes_part_changes(
    recipe: str, latents: str, base: Path, photos: Path, store: Path, tmp_path: Path
) -> None:
    parent = checkpoint.load(str(base))
    shift = "auto" if recipe == "decoder" else 0.05
    made = run(base, photos, store, tmp_path, shift=shift, recipe=recipe, latents=latents)
    before, after = parent.model.state_dict(), made.model.state_dict()
    changed = {name for name in tensors(parent.model, ("",)) if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(prefixes(recipe)) for name in changed)
    assert encoder_digest(made.model) == encoder_digest(parent.model)
    assert decoder_digest(made.model) != decoder_digest(parent.model)
    entry = made.history[-1]
    record = QuantizerRecord.from_json(made.quantizers["tcq8"])
    cached = QuantizerRecord.from_json(LatentCache.open(store).record_json("tcq8"))
    assert (entropy_digest(made.model) == entropy_digest(parent.model)) == (recipe == "decoder")
    assert record.digest != cached.digest and entry["calibrated_after"]["L"] == pytest.approx(record.notes["L"])
    carried = [
        QuantizerRecord.from_json(text).digest for name, text in made.quantizers.items() if name == "tcq8-cached"
    ]
    assert carried == ([] if recipe == "all-but-encoder" else [cached.digest])  # of another prior of z
    assert entry["recipe"] == recipe and entry["cache"] == LatentCache.open(store).fingerprint
    assert entry["held_out_best"]["L"] <= entry["held_out_before"]["L"]


@pytest.mark.slow
def test_really_quantized_training_lowers_the_training_loss(
    base: Path, photos: Path, store: Path, tmp_path: Path
) -> None:
    made = run(base, photos, store, tmp_path, recipe="decoder+hyper", steps=60, evaluate_every=10)
    entry = made.history[-1]
    assert entry["best_step"] > 0 and entry["held_out_best"]["L"] < 0.98 * entry["held_out_before"]["L"]


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_weights(
    base: Path, photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(base, photos, store, tmp_path / "whole", latents="noise")
    monkeypatch.setattr(loop, "take_step", dying_at(7))
    with pytest.raises(KeyboardInterrupt):
        run(base, photos, store, tmp_path / "cut", latents="noise")
    monkeypatch.undo()
    resumed = run(base, photos, store, tmp_path / "cut", latents="noise")
    assert checkpoint.digest(resumed.model.state_dict()) == checkpoint.digest(whole.model.state_dict())


@pytest.mark.slow
def test_phases_and_lists_of_parts_train_what_they_name(base: Path, photos: Path, store: Path, tmp_path: Path) -> None:
    phases = [
        {"recipe": ["g_s.6"], "steps": 4, "lr": 1e-4},
        {"recipe": ["prior", "h_s.4.bias"], "steps": 4, "lr": 1e-3},
    ]
    made = run(base, photos, store, tmp_path, phases=phases, ema=0.5, schedule="plateau", evaluate_every=2)
    before, after = checkpoint.load(str(base)).model.state_dict(), made.model.state_dict()
    changed = {name for name in tensors(made.model, ("",)) if not torch.equal(before[name], after[name])}
    assert {"g_s.6.weight", "g_s.6.bias"} <= changed
    assert {name for name in changed if not name.startswith("entropy_bottleneck")} <= {
        "g_s.6.weight", "g_s.6.bias", "h_s.4.bias"
    }  # fmt: skip
    medians = ["entropy_bottleneck.quantiles"]
    assert all(torch.equal(before[name][:, 0, 1], after[name][:, 0, 1]) for name in medians)
    with pytest.raises(UsageError, match=r"g_a\.0\.bias belongs to the encoder"):
        run(base, photos, store, tmp_path / "x", recipe=["g_a.0"])


@pytest.mark.slow
def test_a_finished_job_is_left_as_it_is(
    base: Path, photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(base, photos, store, tmp_path)
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    monkeypatch.setattr(loop, "take_step", dying_at(1))
    monkeypatch.setattr("lic_dist.training.finish.calibrate", dying_at(1))
    run(base, photos, store, tmp_path, keep=5)
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


@pytest.mark.slow
def test_rounds_search_again_with_the_new_model_and_keep_all(
    base: Path, photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "a.zarr"
    shutil.copytree(store, own)
    monkeypatch.setattr(loop, "take_step", dying_at(15))  # in the third step of the second round
    with pytest.raises(KeyboardInterrupt):
        run(base, photos, own, tmp_path / "out", recipe="all-but-encoder", rounds=2)
    monkeypatch.undo()
    made = run(base, photos, own, tmp_path / "out", recipe="all-but-encoder", rounds=2)
    rows = json.loads((tmp_path / "out" / "rounds.json").read_text())
    first, second = (checkpoint.load(row["checkpoint"]) for row in rows)
    cache = LatentCache.open(own)
    group = f"tcq8-round2-{checkpoint.digest(first.model.state_dict())[:8]}"
    assert [row["group"] for row in rows] == ["tcq8", group]
    assert cache.record_json(group) == first.quantizers["tcq8"]
    check_cache(cache, first, group)  # of the first round's entropy model
    assert second.history[-1]["parent"] == checkpoint.digest(first.model.state_dict())
    assert rows[1]["before"] == pytest.approx(rows[0]["after"])  # the same model, quantizer and crops
    best = min(rows, key=lambda row: row["after"]["L"])
    assert checkpoint.digest(made.model.state_dict()) == checkpoint.digest(
        checkpoint.load(best["checkpoint"]).model.state_dict()
    )


@pytest.mark.slow
def test_a_cache_without_y_serves_the_decoder(base: Path, photos: Path, tmp_path: Path) -> None:
    without_y = document(base, photos, tmp_path / "a.zarr", tmp_path / "out")
    without_y["cache"]["store_y"] = False
    build(config.Experiment.model_validate(without_y))
    made = checkpoint.load(str(job.finetune(config.Experiment.model_validate(without_y))))
    assert made.quantizers["tcq8"] == LatentCache.open(tmp_path / "a.zarr").record_json("tcq8")
    for more, message in (
        ({"recipe": "decoder+hyper"}, "more than the decoder needs y"),
        ({"latents": "straight-through"}, "latents: straight-through needs y"),
        ({"rounds": 2}, "rounds need y"),
    ):
        without_y["finetune"] |= {"recipe": "decoder", "latents": "quantized", "rounds": 1, **more}
        with pytest.raises(UsageError, match=message):
            job.finetune(config.Experiment.model_validate(without_y))


@pytest.mark.slow
def test_the_means_are_moved_by_what_the_search_minimized(base: Path, store: Path) -> None:
    """Gradients of h_s are those of bits + lmbda 255^2 / (3 g) sum S_c (y - means - level)^2, written out here."""
    cache = LatentCache.open(store)
    record = QuantizerRecord.from_json(cache.record_json("tcq8"))
    batch = Samples(cache, {"tcq8": Quantizer(record)}, cache.indices(False), with_y=True).batch(np.arange(4))
    model = checkpoint.load(str(base)).model
    named = dict(model.h_s.named_parameters())

    def gradients(value: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(value, list(named.values())))

    x_hat, bits = Decoding(model, record, means_gradient="search")(batch)
    found = gradients(bits)
    scales, means = model.h_s(dequantize_z(model, batch.z)).chunk(2, 1)
    rate = IndexRate(record)(scales.clamp_min(0.11), batch.k, batch.quantizer).sum()
    weights = torch.from_numpy(record.weights.copy()).reshape(1, -1, 1, 1)
    error = (weights * (batch.y.float() - means - batch.level) ** 2).sum()
    expected = gradients(rate + record.lmbda * 255**2 / (3 * record.lambda_scale) * error)
    for name, one, other in zip(named, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()), msg=name)
    pixels, same = Decoding(model, record)(batch)
    assert torch.equal(x_hat, pixels) and torch.allclose(bits, same)
    assert x_hat.requires_grad  # g_s still learns from the picture
    with pytest.raises(RuntimeError, match="not have been used"):
        gradients(x_hat.sum())
    gradients(pixels.sum())

    fixed = Decoding(model, record, "likelihood", means_gradient="search")
    before, _ = fixed(batch)
    with torch.no_grad():
        model.h_s[4].bias += 0.3
    after, bits = fixed(batch)
    assert torch.equal(before, after)  # y_hat stays what the parent's means gave
    scales, means = model.h_s(dequantize_z(model, batch.z)).chunk(2, 1)
    noisy = model.gaussian_conditional._likelihood(batch.y.float() + batch.noise, scales, means)
    expected = gradients(-noisy.clamp_min(1e-9).log2().sum())
    for name, one, other in zip(named, gradients(bits), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()), msg=name)


@pytest.mark.slow
def test_half_precision_keeps_the_entropy_model_in_float32(
    base: Path, photos: Path, store: Path, tmp_path: Path
) -> None:
    cache = LatentCache.open(store)
    record = QuantizerRecord.from_json(cache.record_json("tcq8"))
    batch = Samples(cache, {"tcq8": Quantizer(record)}, cache.indices(False), with_y=True).batch(np.arange(4))
    model = checkpoint.load(str(base)).model
    for form in ("quantized", "likelihood", "noise", "straight-through"):
        (x_hat, bits), (rough, same) = (Decoding(model, record, form, bf16)(batch) for bf16 in (False, True))
        assert bits.dtype == same.dtype == rough.dtype == torch.float32
        assert torch.equal(bits, same) and not torch.equal(x_hat, rough)
        torch.testing.assert_close(rough, x_hat, rtol=0, atol=0.03)
    made = run(base, photos, store, tmp_path, recipe="decoder+hyper", precision="bf16", latents="straight-through")
    assert made.history[-1]["precision"] == "bf16"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_a_compiled_decoder_trains_and_is_saved_as_any(
    base: Path, photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=backend))  # inductor's C++ takes half a minute
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", False)  # to try each takes longer than all the rest
    plain = run(base, photos, store, tmp_path / "plain", steps=2)
    made = run(base, photos, store, tmp_path / "compiled", steps=2, compile=True)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compressais_own_evaluation_loads_the_result(base: Path, photos: Path, store: Path, tmp_path: Path) -> None:
    """The same bits and the same 8-bit PSNR as ours with its tables, for SQ."""
    run(base, photos, store, tmp_path / "out", recipe="all-but-encoder")
    (tmp_path / "pictures").mkdir()
    Image.fromarray(picture(9, 192, 256)).save(tmp_path / "pictures" / "a.png")
    code = (
        "import sys; from lic_dist.models.compat import import_torchvision; import_torchvision();"
        "from compressai.utils.eval_model.__main__ import main; main(sys.argv[1:])"
    )
    arguments = ["checkpoint", str(tmp_path / "pictures"), "-a", "mbt2018-mean", "-p"]
    told = python(code, *arguments, tmp_path / "out" / "checkpoint.pth.tar")
    assert told.returncode == 0, told.stderr[-2000:]
    theirs = json.loads(told.stdout[told.stdout.index("{") :])["results"]
    loaded = checkpoint.load(str(tmp_path / "out"))
    codec = ImageCodec(loaded.model, compressai_record(loaded))
    ours = measure_image(codec, images.read(tmp_path / "pictures" / "a.png"), "a.png").result
    assert theirs["bpp"][0] == pytest.approx(ours.bpp, abs=1e-9)


@pytest.mark.slow
def test_the_rate_agrees_with_the_coders_tables_at_the_levels(store: Path) -> None:
    record = QuantizerRecord.from_json(LatentCache.open(store).record_json("tcq8"))
    rate = IndexRate(record)
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
    samples = Samples(cache, {"tcq8": quantizer}, cache.indices(False), with_y=False)
    assert len(samples) == 18
    shuffled_data = ShuffledData(samples, seed=0, batch=6)
    numbers = np.concatenate([shuffled_data.numbers(step) for step in range(3)])
    assert sorted(numbers) == list(range(18))
    batch = samples.batch(np.array([3, 1]))
    stored = cache.load(("pixels", "quantized/tcq8/k"), cache.indices(False)[[3, 1]])
    assert np.array_equal(batch.pixels.numpy(), stored["pixels"])
    lanes = stored["quantized/tcq8/k"].reshape(24, -1)
    assert np.array_equal(batch.level.numpy().reshape(24, -1), quantizer.dequantize(lanes))


def test_an_epoch_in_ram_is_permuted_once_not_at_every_step() -> None:
    """Each step used to permute all samples, so that an epoch cost their square."""
    permutation.cache_clear()
    numbers = [shuffled([64], Shares([1]), 3, 8 * step, 8 * step + 8) for step in range(16)]
    assert permutation.cache_info().misses == 2
    for epoch in range(2):
        expected = np.random.default_rng((3, epoch)).permutation(64)
        assert np.array_equal(np.concatenate(numbers[8 * epoch : 8 * epoch + 8]), expected)


@pytest.mark.slow
def test_streamed_batches_hold_what_is_stored_and_are_the_same_for_any_ranks_and_workers(store: Path) -> None:
    cache = LatentCache.open(store)
    quantizer = Quantizer(QuantizerRecord.from_json(cache.record_json("tcq8")))

    def taken(rank: int, world: int, workers: int, first: int = 0, count: int = 6) -> list[Batch]:
        section = config.Finetune(batch=4, streams=2, workers=workers)
        training = training_data(Mixture([cache]), {"tcq8": quantizer}, True, section)
        assert training.identity == {"samples": 18, "streams": 2, "buffer": 8}
        with closing(training.batches(first, Ranks(rank, world, torch.device("cpu")))) as batches:
            return list(islice(batches, count))

    whole = taken(0, 1, 0)
    others = {
        "two ranks": [joined(pair) for pair in zip(taken(0, 2, 0), taken(1, 2, 0), strict=True)],
        "two workers": taken(0, 1, 2),
        "resumed": [*whole[:3], *taken(0, 1, 0, first=3, count=3)],
    }
    for what, batches in others.items():
        for one, other in zip(whole, batches, strict=True):
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one)), what
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lic_dist")]

    samples = Samples(cache, {"tcq8": quantizer}, cache.indices(False), with_y=True)
    row = int(np.flatnonzero((samples.arrays["pixels"] == whole[0].pixels[1].numpy()).all((1, 2, 3)))[0])
    one = samples.batch(np.array([row]))
    assert all(torch.equal(getattr(one, name)[0], getattr(whole[0], name)[1]) for name in vars(one))


def joined(parts: tuple[Batch, ...]) -> Batch:
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))


@pytest.mark.slow
def test_bytes_alone_choose_the_stream_and_a_job_keeps_its_order(
    base: Path, photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(base, photos, store, tmp_path / "whole", latents="noise", streams=2)
    monkeypatch.setattr("lic_dist.training.samples.IN_MEMORY", 10)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", dying_at(7))
        with pytest.raises(KeyboardInterrupt):
            run(base, photos, store, tmp_path / "cut", latents="noise")
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"buffer \(8 there, None here\), streams \(2 there, None here\)"):
        run(base, photos, store, tmp_path / "cut", latents="noise")
    with pytest.raises(UsageError, match=r"streams \(2 there, 1 here\)"):
        run(base, photos, store, tmp_path / "cut", latents="noise", streams=1)
    resumed = run(base, photos, store, tmp_path / "cut", latents="noise", streams=2)
    assert checkpoint.digest(resumed.model.state_dict()) == checkpoint.digest(whole.model.state_dict())


@pytest.mark.slow
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
