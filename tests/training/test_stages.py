"""Training of models whose y has several stages: contexts, corrections, masked weights."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lic_dist.building.records import analytic_record
from lic_dist.cache.reader import LatentCache
from lic_dist.codec import walk
from lic_dist.errors import UsageError
from lic_dist.models.architectures import ModelSpec, adapt, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.families.hyperprior import MeanScaleHyperprior
from lic_dist.models.parts import trainable
from lic_dist.models.protocol import CodecModel, Elements, Given, Run, Sides, Stage
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.base import RelaxedModel
from lic_dist.training.decoding import Decoding
from lic_dist.training.samples import Batch, Samples, make_batch
from tests.training.several import CHECKERED, FAMILIES, SIZES, SLICED, TCQ, make_store

FORMS = ("quantized", "likelihood", "noise", "straight-through")


def model_of(architecture: str) -> CodecModel:
    """An untrained model whose means and scales are not tiny."""
    torch.manual_seed(3)
    codec = adapt(build(architecture, **SIZES).eval())
    with torch.no_grad():
        for part in codec.prefixes("hyper", "context"):
            for name, value in codec.module.named_parameters():
                if name.startswith(part):
                    value.mul_(4)
    return codec


def record_of(loaded: Checkpoint) -> QuantizerRecord:
    return analytic_record(loaded, "tcq", 8, 0.5, 0.1, np.ones(6, np.float32))


def batch_of(codec: CodecModel, record: QuantizerRecord, count: int = 4) -> Batch:
    """A batch with the k of the search, and levels and quantizers walked here lane by lane."""
    generator = np.random.default_rng(0)
    y = torch.from_numpy(generator.normal(0, 3, (count, 6, 4, 4)).astype(np.float16))
    z = torch.from_numpy(generator.integers(-4, 5, (count, 4, 1, 1)).astype(np.int16))
    noise = torch.from_numpy(generator.random(y.shape, np.float32) - np.float32(0.5))
    with torch.no_grad():
        k = walk.search(codec, (codec.sides[0].dequantize(z),), y.float(), Quantizer(record)).k
    level, active = levels_of(codec, k, record)
    pixels = torch.from_numpy(generator.integers(0, 256, (count, 3, 64, 64), np.uint8))
    return Batch(torch.arange(count), pixels, y, noise, z, k, level, active)


def levels_of(codec: CodecModel, k: Tensor, record: QuantizerRecord) -> tuple[Tensor, Tensor]:
    level, active, quantizer = torch.zeros(k.shape), torch.zeros(k.shape, dtype=torch.uint8), Quantizer(record)
    for elements in codec.layout(*k.shape[2:]):
        for image in range(len(k)):
            for channel in range(k.shape[1])[elements.channels]:
                at = slice(None) if elements.positions is None else torch.from_numpy(elements.positions)
                lane = k[image, channel].flatten()[at][None].contiguous()
                level[image, channel].view(-1)[at] = quantizer.dequantize(lane)[0]
                active[image, channel].view(-1)[at] = quantizer.active(lane)[0]
    return level, active


def loaded_of(architecture: str) -> Checkpoint:
    codec = model_of(architecture)
    codec.update()
    return Checkpoint(codec.module, ModelSpec(architecture, 4, 6, 0.05))


def slowly(codec: CodecModel, sides_hat: tuple[Tensor, ...], y_hat_of: Callable[[Stage], Tensor]) -> Given:
    """The walk written out, element by element."""
    steps = codec.walk(sides_hat, codec.run)
    found: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
    stage = next(steps)
    while True:
        where = np.arange(96).reshape(1, 6, 4, 4)
        taken = stage.elements.take(torch.from_numpy(where)).flatten().tolist()
        for image in range(len(stage.means)):
            pairs = zip(stage.means[image].flatten(), stage.scales[image].flatten(), strict=True)
            found |= {(image, *divmod(at, 16)): pair for at, pair in zip(taken, pairs, strict=True)}
        try:
            stage = steps.send(y_hat_of(stage))
        except StopIteration as done:
            means, scales = (torch.stack([found[key][part] for key in sorted(found)]) for part in (0, 1))
            shape = done.value.shape
            return Given(means.reshape(shape), scales.reshape(shape), done.value)


@FAMILIES
def test_gradients_of_one_pass_are_those_of_a_slow_walk(architecture: str) -> None:
    codec = model_of(architecture)
    codec.module.double()
    parameters = [value for name, value in codec.module.named_parameters()
                  if name.startswith(codec.prefixes("hyper", "context"))]  # fmt: skip
    y_hat = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    z_hat = torch.randn(2, 4, 1, 1, dtype=torch.float64, requires_grad=True)

    def gradients(found: Given) -> tuple[Tensor, ...]:
        bits = -codec.likelihood(y_hat, Stage(found.means, found.scales)).log2().sum()
        return torch.autograd.grad(bits + found.y_hat.square().sum(), [y_hat, z_hat, *parameters])

    one = codec.given((z_hat,), y_hat)
    other = slowly(codec, (z_hat,), lambda stage: stage.elements.take(y_hat))
    for left, right in zip([*one, *gradients(one)], [*other, *gradients(other)], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@FAMILIES
def test_batches_walk_the_trellis_stage_by_stage(architecture: str, tmp_path: Path) -> None:
    untrained = loaded_of(architecture)
    with torch.no_grad():
        untrained.model.g_a[6].weight.mul_(30)
    make_store(tmp_path / "a.zarr", untrained, TCQ, samples=8)
    cache = LatentCache.open(tmp_path / "a.zarr")
    record = QuantizerRecord.from_json(cache.record_json("g"))
    codec = model_of(architecture)
    numbers = cache.indices(False)
    found = Samples(cache, {"g": Quantizer(record)}, numbers, True, codec.layout(4, 4)).batch(np.arange(3))
    level, active = levels_of(codec, found.k, record)
    assert torch.equal(found.level, level) and torch.equal(found.quantizer, active)
    assert found.level.count_nonzero() and found.quantizer.count_nonzero()
    whole = Samples(cache, {"g": Quantizer(record)}, numbers, True).batch(np.arange(3))  # as if of one stage
    assert torch.equal(whole.level, level) == (architecture == SLICED)


def test_batches_walk_the_trellis_along_channels_too() -> None:
    """A raster of single positions, whose lanes are the channels of a position."""
    generator = np.random.default_rng(0)
    quantizer = Quantizer(record_of(loaded_of(CHECKERED)))
    k = generator.integers(-3, 4, (2, 6, 2, 2)).astype(np.int16)
    rows = {"pixels": np.zeros(2, np.uint8), "z": np.zeros(2, np.int16), "k": k, "sample": np.arange(2)}
    layout = tuple(Elements(positions=np.array([at]), along="channels") for at in range(4))
    batch = make_batch(quantizer, ("pixels", "z", "k"), rows, (0, 0), layout)
    for image, row, column in np.ndindex(2, 2, 2):
        lane = np.ascontiguousarray(k[image, :, row, column])[None]
        assert batch.level[image, :, row, column].tolist() == quantizer.dequantize(lane)[0].tolist()
        assert batch.quantizer[image, :, row, column].tolist() == quantizer.active(lane)[0].tolist()


@FAMILIES
def test_levels_that_follow_sigma_are_rebuilt_under_each_stages_scales(architecture: str) -> None:
    loaded = loaded_of(architecture)
    codec, plain = loaded.codec, record_of(loaded)
    batch = batch_of(codec, plain)
    sides_hat, record = (codec.sides[0].dequantize(batch.z),), replace(plain, shift=-0.1, spread=0.3)
    batch = replace(batch, level=levels_of(codec, batch.k, replace(plain, shift=-0.1))[0])
    with torch.no_grad():
        expected = walk.dequantize(codec, sides_hat, batch.k, Quantizer(record))
        assert (expected - walk.dequantize(codec, sides_hat, batch.k, Quantizer(plain))).abs().max() > 0.03
        for form, means in (("quantized", "pixels"), ("likelihood", "likelihood"), ("likelihood", "pixels")):
            decoding = Decoding(loaded.model, record, form, means_gradient=means)
            torch.testing.assert_close(decoding.make_y_hat(batch, sides_hat)[0], expected, rtol=0, atol=1e-5)


@FAMILIES
@pytest.mark.slow
def test_what_is_rebuilt_is_what_a_decoder_finds(architecture: str) -> None:
    loaded = loaded_of(architecture)
    record, codec = record_of(loaded), loaded.codec
    batch = batch_of(codec, record)
    sides_hat = (codec.sides[0].dequantize(batch.z),)
    with torch.no_grad():
        expected = walk.dequantize(codec, sides_hat, batch.k, Quantizer(record))
        assert torch.equal(Decoding(loaded.model, record)._rebuilt(batch, sides_hat)[0].y_hat, expected)
        assert torch.equal(Decoding(loaded.model, record)(batch)[0], codec.synthesise(expected))
        x_hat, _ = Decoding(loaded.model, record, "likelihood", means_gradient="likelihood")(batch)
        pixels, _ = Decoding(loaded.model, record, "likelihood")(batch)
    torch.testing.assert_close(x_hat, codec.synthesise(expected))
    torch.testing.assert_close(pixels, x_hat)


@FAMILIES
@pytest.mark.parametrize("means", ["likelihood", "search", "pixels"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_every_network_of_the_decoder_side(architecture: str, form: str, means: str) -> None:
    """Corrections learn from the picture; means from the rate, and from the picture with `pixels` alone."""
    loaded = loaded_of(architecture)
    record, codec = record_of(loaded), loaded.codec
    batch = batch_of(codec, record)
    decoding = Decoding(loaded.model, record, form, means_gradient=means)
    x_hat, bits = decoding(batch)
    names = trainable(loaded.model, "decoder+hyper")
    parameters = [loaded.model.get_parameter(name) for name in names]
    both = torch.autograd.grad(x_hat.square().sum() + bits, parameters, allow_unused=True, retain_graph=True)
    assert [name for name, one in zip(names, both, strict=True) if one is None or not one.any()] == []
    of_pixels = torch.autograd.grad(x_hat.square().sum(), parameters, allow_unused=True)
    moved = {name.split(".")[0] for name, one in zip(names, of_pixels, strict=True) if one is not None and one.any()}
    assert "g_s" in moved
    if architecture == SLICED:
        assert {"residual", "residual_second"} <= moved
    else:
        assert ("h_s" in moved) == (means == "pixels" and form in ("quantized", "likelihood"))


@FAMILIES
def test_the_search_cost_is_differentiated_through_the_contexts(architecture: str) -> None:
    """Bits and weighted error of rebuilt stages, written out over a slow walk in float64."""
    loaded = loaded_of(architecture)
    record = record_of(loaded)
    batch = batch_of(loaded.codec, record)
    decoding = Decoding(loaded.model, record, means_gradient="search").double()
    codec = adapt(loaded.model)
    named = {name: value for name, value in loaded.model.named_parameters()
             if name.startswith(codec.prefixes("hyper", "context"))}  # fmt: skip
    _, bits = decoding(batch)
    found = torch.autograd.grad(bits, list(named.values()), allow_unused=True)
    sides_hat = (codec.sides[0].dequantize(batch.z),)
    other = slowly(codec, sides_hat, lambda stage: stage.means + stage.elements.take(batch.level))
    error = (batch.y - other.means - batch.level).square().sum()
    weight = float(np.float32(record.lmbda * 255**2 / (3 * record.lambda_scale)))
    rate = decoding.rate(codec.gaussian.lower_bound_scale(other.scales), batch.k, batch.quantizer).sum()
    expected = torch.autograd.grad(rate + weight * error, list(named.values()), allow_unused=True)
    for name, one, right in zip(named, found, expected, strict=True):
        assert (one is None) == (right is None), name
        if one is not None:
            torch.testing.assert_close(one, right, rtol=1e-8, atol=1e-8 * float(right.abs().max()), msg=name)


@FAMILIES
def test_the_parents_contexts_stay_when_the_networks_move(architecture: str) -> None:
    loaded = loaded_of(architecture)
    record, codec = record_of(loaded), loaded.codec
    batch = batch_of(codec, record)
    sides_hat = (codec.sides[0].dequantize(batch.z),)
    decoding = Decoding(loaded.model, record, "likelihood", means_gradient="likelihood")
    fixed = decoding._rebuilt(batch, sides_hat)[1].detach()
    with torch.no_grad():
        loaded.model.h_s[4].bias += 0.3
    x_hat, bits = decoding(batch)
    found = codec.given(sides_hat, fixed)
    assert torch.equal(x_hat, codec.synthesise(found.y_hat))
    of_y = codec.likelihood(batch.y.float() + batch.noise, Stage(found.means, found.scales)).log2().sum()
    torch.testing.assert_close(bits, -of_y - codec.sides[0].likelihood(sides_hat[0]).log2().sum())


@FAMILIES
@pytest.mark.parametrize("relaxation", ["noise", "mixed"])
def test_the_relaxed_model_sees_in_its_contexts_what_its_decoder_sees(architecture: str, relaxation: str) -> None:
    codec = model_of(architecture)
    relaxed = RelaxedModel(codec.module, relaxation).train()
    x = torch.rand(2, 3, 64, 64).contiguous(memory_format=relaxed._format)  # in whose order noise is drawn
    torch.manual_seed(1)
    x_hat, bits = relaxed(x)
    torch.manual_seed(1)
    y = codec.analyse(x)
    (z,) = codec.hyper_analyse(y)
    z_hat, of_z = codec.sides[0].prior(z)
    z_hat = torch.round(z) if relaxation == "mixed" else z_hat  # medians are zero
    noisy = y + torch.empty_like(y).uniform_(-0.5, 0.5)

    def y_hat(stage: Stage) -> Tensor:
        part = stage.elements.take(y)
        rounded = torch.round(part - stage.means) + stage.means
        return rounded if relaxation == "mixed" else stage.elements.take(noisy)

    found = slowly(codec, (z_hat,), y_hat)
    of_y = codec.likelihood(noisy, Stage(found.means, found.scales))
    torch.testing.assert_close(x_hat, codec.synthesise(found.y_hat))
    torch.testing.assert_close(bits, -(of_y.log2().sum() + of_z.log2().sum()))


def test_hyper_has_the_context_in_it_and_the_context_trains_alone() -> None:
    model = model_of(CHECKERED).module

    def layers(*recipe: str) -> set[str]:
        return {name.split(".")[0] for name in trainable(model, recipe)}

    assert layers("hyper") == {"h_s", "context_prediction", "entropy_parameters"}
    assert layers("context") == {"context_prediction", "entropy_parameters"}
    assert layers("h_s", "context_prediction") == {"h_s", "context_prediction"}
    assert layers("decoder", "hyper") == {name.split(".")[0] for name in trainable(model, "decoder+hyper")}
    with pytest.raises(UsageError, match="mbt2018-mean has nothing of context"):
        trainable(build("mbt2018-mean", 4, 6), ["context"])


@pytest.mark.slow
def test_a_correction_after_a_single_stage_learns_from_the_picture() -> None:
    """With each form y_hat of the decoder is the corrected one; the means move by the picture with `pixels` alone."""

    class Corrected(MeanScaleHyperprior):
        def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
            y_hat = yield from super().walk(sides_hat, run)
            return y_hat * gain

    torch.manual_seed(3)
    gain, model = torch.tensor(1.5, requires_grad=True), build("mbt2018-mean", **SIZES)
    codec = Corrected(model)
    codec.update()
    record = record_of(Checkpoint(model, ModelSpec("mbt2018-mean", 4, 6, 0.05)))
    batch = batch_of(codec, record)
    bias = model.h_s[4].bias
    for form, means in product(FORMS, ("likelihood", "search", "pixels")):
        decoding = Decoding(model, record, form, means_gradient=means)
        decoding._codec = codec
        x_hat, _ = decoding(batch)
        found, moved = torch.autograd.grad(x_hat.sum(), [gain, bias], allow_unused=True)
        assert bool(found != 0), (form, means)
        assert (moved is not None) == (means == "pixels" and form in ("quantized", "likelihood")), (form, means)
