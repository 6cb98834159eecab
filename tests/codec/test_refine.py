"""Searching again by the decoder's answer: the steps by the book, less L, each image for itself, the same files."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from lic_dist.building.latents import encode, refined
from lic_dist.codec import tiles, walk
from lic_dist.codec.codec import ImageCodec, padding
from lic_dist.codec.refine import CLEAR, FIRST, FLATTEST, FURTHEST, LAST, answer_of, refine
from lic_dist.models import checkpoint
from lic_dist.models import refine as precision
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.refine import Refinement, costs_and_gradient, decoded, fast_bfloat16
from lic_dist.models.stages import analyse, dequantize_z, known_stage, to_input
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.conftest import picture

STEPS = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded() -> Checkpoint:
    return checkpoint.load("base-0.0035")


@pytest.fixture(scope="module")
def record(loaded: Checkpoint) -> QuantizerRecord:
    return QuantizerRecord.from_json(loaded.quantizers["tcq8"])


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode in float32 on every machine."""
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: False)


def windows(count: int, size: int = 64) -> np.ndarray:
    return np.stack([picture(seed, size, size).transpose(2, 0, 1) for seed in range(count)])


@torch.no_grad()
def by_the_book(loaded: Checkpoint, quantizer: Quantizer, x: Tensor, y: Tensor, z_hat: Tensor, steps: int) -> Tensor:
    """The module's text for one image of a model of one stage, with loops over channels: the target of the least L."""
    model, step, weight = loaded.model, quantizer.record.step, quantizer.record.lmbda * 255**2 / 3
    target, curvature, length, tried = y.float(), None, 1.0, []
    parts = [FIRST * (LAST / FIRST / steps**2) ** (one / max(steps - 1, 1)) for one in range(steps)] + [0.0]
    for part in parts:
        coded = walk.search(loaded.codec, (z_hat,), target, quantizer)
        (plane,) = coded.planes()
        shifts = (quantizer.dequantize(plane.k, plane.level) - quantizer.lattice(plane.k)).reshape(target.shape)
        lattice = coded.y_hat - torch.from_numpy(shifts)
        y_hat = coded.y_hat.clone().requires_grad_(True)
        with torch.enable_grad():
            error = (model.g_s(y_hat) - x).square().sum()
        (slope,) = torch.autograd.grad(error, y_hat)
        tried.append((weight * float(error.detach()) + float(quantizer.bits(plane.k, plane.level).sum()), target))
        if len(tried) > 1 and tried[-1][0] > tried[-2][0]:
            length /= 2
        errors = target - lattice
        along = [-float((slope[0, c] * errors[0, c]).detach().sum()) for c in range(target.shape[1])]
        size = [float(errors[0, c].square().sum()) for c in range(target.shape[1])]
        least = FLATTEST * sum(along) / sum(size)
        seen = [max(one / other, least) if other else least for one, other in zip(along, size, strict=True)]
        curvature = (
            seen if curvature is None else [(one + other) / 2 for one, other in zip(curvature, seen, strict=True)]
        )
        aim = torch.stack(
            [(-slope[:, c] / curvature[c]).clamp(-FURTHEST * step, FURTHEST * step) for c in range(len(curvature))], 1
        )
        target = (target + part * length * (aim - errors)).half().float()
    loss, found = min(tried[1:], key=lambda one: one[0])
    return (found if loss < tried[0][0] * (1 - CLEAR) else y).half()


@pytest.mark.parametrize(("name", "steps"), [("tcq8", 1), ("tcq8", 5), ("rdoq", 3), ("sq-adapted", 3)])
@pytest.mark.usefixtures("float32")
def test_steps_are_those_of_the_book(loaded: Checkpoint, name: str, steps: int) -> None:
    quantizer = Quantizer(QuantizerRecord.from_json(loaded.quantizers[name]))
    x = to_input(torch.from_numpy(windows(1, 128)), CPU)
    y, z = analyse(loaded.model, x)
    z_hat, refinement = dequantize_z(loaded.model, z), Refinement(steps, quantizer.record.lmbda)
    found = refine(loaded.codec, (z_hat,), y, quantizer, answer_of(loaded.codec, x, refinement), refinement)
    expected = by_the_book(loaded, quantizer, x, y, z_hat, steps)
    assert found.dtype == torch.float16 and not torch.equal(found, y)
    assert float((found.float() - expected.float()).abs().max()) < 0.01  # sums in another order


@pytest.mark.parametrize("name", ["tcq8", "rdoq", "sq-adapted"])
def test_no_picture_ends_with_more_loss_than_it_had(loaded: Checkpoint, name: str) -> None:
    """By the coder's tables and the decoder's own pictures; even where a step overshoots."""
    record = QuantizerRecord.from_json(loaded.quantizers[name])
    pixels = np.concatenate([windows(4), np.full((1, 3, 64, 64), 77, np.uint8)])
    latents, _ = encode(loaded.model, pixels, 5)
    x, losses = to_input(torch.from_numpy(pixels), CPU), []
    for steps in (0, 1, 2, 8):
        quantizer = Quantizer(replace(record, refine=steps))
        aim = torch.from_numpy(refined(loaded.model, pixels, latents.y, latents.z, quantizer, 5)).float()
        with torch.no_grad():
            z_hat = dequantize_z(loaded.model, torch.from_numpy(latents.z))
            coded = walk.search(loaded.codec, (z_hat,), aim, quantizer)
            errors = (loaded.codec.synthesise(coded.y_hat) - x).double().square().sum((1, 2, 3)).numpy()
        bits = walk.channel_bits(loaded.codec, quantizer, coded.k, coded.level).sum(1)
        losses.append(record.lmbda * 255**2 / 3 * errors + bits)
    plain, *others = losses
    assert all((one <= plain * (1 + 1e-6)).all() for one in others)
    assert others[-1].sum() < (0.985 if name == "tcq8" else 0.999) * plain.sum()


def test_a_refined_file_costs_less_and_decodes_without_knowing(loaded: Checkpoint, record: QuantizerRecord) -> None:
    image, costs = picture(3, 150, 200), []
    plain = ImageCodec(loaded.model, record)
    for steps in (0, 1, 8):
        coded = ImageCodec(loaded.model, replace(record, refine=steps)).encode(image)
        error = np.square(plain.decode(coded.data).astype(float) - image).mean()
        costs.append(record.lmbda * error + coded.coded_bits / (150 * 200))
    assert costs[1] <= costs[0] and costs[2] < 0.99 * costs[0]


def test_images_of_a_batch_are_refined_each_for_itself(loaded: Checkpoint, record: QuantizerRecord) -> None:
    pixels, quantizer = windows(3), Quantizer(replace(record, refine=STEPS))
    latents, _ = encode(loaded.model, pixels, 2)

    def aims(*chosen: int) -> np.ndarray:
        part = list(chosen)
        return refined(loaded.model, pixels[part], latents.y[part], latents.z[part], quantizer, 2)

    together = aims(0, 1, 2)
    assert together[2].tobytes() == aims(2, 1)[0].tobytes() == aims(2)[0].tobytes()
    assert (together != latents.y).any(axis=(1, 2, 3)).all()
    assert refined(loaded.model, pixels, latents.y, latents.z, Quantizer(record), 2) is latents.y


def test_a_decoder_that_does_not_care_moves_no_index(loaded: Checkpoint, record: QuantizerRecord) -> None:
    """A gradient of zero, and one that is not finite."""
    x = to_input(torch.from_numpy(windows(2)), CPU)
    y, z = analyse(loaded.model, x)
    sides_hat, quantizer = (dequantize_z(loaded.model, z),), Quantizer(record)
    plain = walk.search(loaded.codec, sides_hat, y.float(), quantizer)
    for value in (0.0, torch.nan, torch.inf):
        slope = torch.full(y.shape, value)
        aim = refine(
            loaded.codec,
            sides_hat,
            y,
            quantizer,
            lambda y_hat, _, slope=slope: (torch.ones(2), slope),
            Refinement(3, 0.01),
        )
        coded = walk.search(loaded.codec, sides_hat, aim.float(), quantizer)
        bits = [walk.channel_bits(loaded.codec, quantizer, one.k, one.level).sum() for one in (coded, plain)]
        assert bool(torch.isfinite(aim).all()) and bits[0] <= bits[1]


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("shape", [(300, 330), (65, 129)])
def test_the_answer_in_tiles_is_the_whole_images_without_its_padding(
    loaded: Checkpoint, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(5, *shape)
    left, right, top, bottom = padding(*shape)
    inside = slice(top, top + shape[0]), slice(left, left + shape[1])
    padded = np.pad(image, ((top, bottom), (left, right), (0, 0)), constant_values=99)
    x = to_input(torch.from_numpy(padded.transpose(2, 0, 1).copy())[None], CPU)
    y = torch.randn((1, loaded.spec.M, x.shape[2] // 16, x.shape[3] // 16), generator=torch.Generator().manual_seed(0))
    part = y.clone().requires_grad_(True)
    error = ((loaded.model.g_s(part) - x)[..., inside[0], inside[1]]).square().sum()
    (whole,) = torch.autograd.grad(error, part)
    monkeypatch.setattr(tiles, "TILE", 128)
    grid = tiles.Grid.of(*shape, loaded.codec.strides)
    answer = partial(
        tiles.answer, loaded.codec, grid, lambda rows, columns: x[..., rows, columns], inside, Refinement(1, 0.01)
    )
    errors, slope = answer(y, True)
    assert torch.allclose(slope, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    with torch.no_grad():
        alone, nothing = answer(y, False)
    assert nothing is None and float(errors) == pytest.approx(float(error.detach()), rel=1e-5)
    assert float(alone) == pytest.approx(float(errors), rel=1e-6)


def test_a_decoder_in_bfloat16_says_nearly_what_it_says_in_float32(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences of errors, by which targets are judged, within CLEAR of these; and the way to go."""
    x = to_input(torch.from_numpy(windows(2, 128)), CPU)
    y, _ = analyse(loaded.model, x)
    generator = torch.Generator().manual_seed(0)
    places = [torch.round(y.float() + width * torch.randn(y.shape, generator=generator)) for width in (0.0, 0.1)]
    found: dict[bool, list[tuple[Tensor, Tensor]]] = {}
    for fast in (False, True):
        monkeypatch.setattr(precision, "fast_bfloat16", lambda device, fast=fast: fast)
        found[fast] = [
            costs_and_gradient(one, lambda part: (decoded(loaded.codec, part) - x).square().sum((1, 2, 3)))
            for one in places
        ]
    (first, slope), (second, _) = found[False]
    (other_first, other_slope), (other_second, _) = found[True]
    assert slope.dtype == other_slope.dtype == torch.float32 and not torch.equal(slope, other_slope)
    assert float(((second - first) - (other_second - other_first)).abs().max()) < CLEAR * float(first.min())
    assert float((slope - other_slope).norm() / slope.norm()) < 0.05


def test_bfloat16_is_for_cpus_that_multiply_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, expected in (({"amx_bf16": True}, True), ({"amx_bf16": False, "avx512_bf16": True}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert fast_bfloat16(CPU) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not fast_bfloat16(CPU) and not fast_bfloat16(torch.device("meta"))


def test_the_networks_of_z_run_once(loaded: Checkpoint, record: QuantizerRecord) -> None:
    x = to_input(torch.from_numpy(windows(1)), CPU)
    y, z = analyse(loaded.model, x)
    sides_hat, quantizer, asked = (dequantize_z(loaded.model, z),), Quantizer(record), []

    def run(name: str, values: Tensor) -> Tensor:
        asked.append(name)
        return loaded.codec.run(name, values)

    refinement = Refinement(2, record.lmbda)
    given = loaded.codec, sides_hat, y, quantizer, answer_of(loaded.codec, x, refinement), refinement, run
    found = refine(*given)
    assert asked == ["h_s"]
    assert torch.equal(refine(*given, known=known_stage(loaded.codec, sides_hat, y.shape[2:])), found)
    assert asked == ["h_s"]


def test_a_record_keeps_its_steps_and_its_digest_names_them(record: QuantizerRecord) -> None:
    moved = replace(record, refine=STEPS)
    assert QuantizerRecord.from_json(moved.to_json()).refine == STEPS
    assert moved.digest != record.digest and moved.decoding_digest == record.decoding_digest
    assert '"refine"' not in record.to_json()
    with pytest.raises(ValueError, match="number of steps, not -1"):
        replace(record, refine=-1)
