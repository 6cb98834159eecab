"""Refinement by MSE, MS-SSIM or both: gradients, pictures of every size, tiles, records and stores."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lic_dist import config
from lic_dist.building.pilot import check_record
from lic_dist.building.refined import asked_refinement, record_fields
from lic_dist.codec import tiles
from lic_dist.codec.codec import ImageCodec
from lic_dist.errors import LicError
from lic_dist.evaluation.metrics import ms_ssim8
from lic_dist.models import checkpoint, refine
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.distortion import mirrored
from lic_dist.models.refine import BALANCED, Refinement
from lic_dist.models.stages import to_input
from lic_dist.quantization.record import QuantizerRecord
from tests.conftest import picture

MIXED = {"mse": 1.0, "ms-ssim": 100.0}
EVERY = ({"mse": 2.0}, {"ms-ssim": 100.0}, MIXED)


@pytest.fixture(scope="module")
def loaded() -> Checkpoint:
    return checkpoint.load("base-0.013")


@pytest.fixture(scope="module")
def record(loaded: Checkpoint) -> QuantizerRecord:
    return QuantizerRecord.from_json(loaded.quantizers["tcq8"])


@pytest.mark.parametrize("weights", EVERY)
@pytest.mark.parametrize("shape", [(20, 30), (170, 165)])
def test_the_gradient_is_the_slope_of_the_error(weights: dict[str, float], shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise, way = (torch.rand((2, 3, *shape), generator=generator, dtype=torch.float64) for _ in range(3))
    errors, x_hat = Refinement(1, 0.01, weights).errors, (0.7 * x + 0.3 * noise).requires_grad_(True)
    (gradient,) = torch.autograd.grad(errors(x_hat, x).sum(), x_hat)
    with torch.no_grad():
        slope = (errors(x_hat + 1e-5 * way, x) - errors(x_hat - 1e-5 * way, x)).sum() / 2e-5
    assert float(slope) == pytest.approx(float((gradient * way).sum()), rel=1e-6)


def test_an_error_is_the_loss_in_bits_by_the_weight_of_squared_errors() -> None:
    """lmbda 255^2 / 3 times it is lmbda D times the pixels: 255^2 MSE and 1 - MS-SSIM, the sum of the pictures'."""
    x, x_hat = (torch.rand((2, 3, 176, 200), generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    x_hat = (x + 0.1 * x_hat).clamp(0, 1).mul(255).round() / 255
    x = x.mul(255).round() / 255
    similar = 0.0
    for one, other in zip(x_hat, x, strict=True):
        found = ms_ssim8(*(part.mul(255).byte().numpy().transpose(1, 2, 0) for part in (one, other)))
        assert found is not None
        similar += found
    pixels = 176 * 200
    expected = 255**2 * float((x_hat - x).square().mean()) * 2 * pixels + 100 * pixels * (2 - similar)
    assert float(Refinement(1, 1.0, MIXED).errors(x_hat, x).sum()) * 255**2 / 3 == pytest.approx(expected, rel=1e-3)


def test_a_small_picture_is_continued_by_its_mirror_image() -> None:
    x = torch.arange(3.0).reshape(1, 1, 1, 3)
    assert mirrored(x, 8)[0, 0, 0].tolist() == [0, 1, 2, 2, 1, 0, 0, 1]
    assert mirrored(x, 8).shape == (1, 1, 8, 8) and mirrored(x, 1) is x


def test_pictures_without_likeness_move_nothing_by_ms_ssim() -> None:
    x = torch.rand((1, 3, 176, 176), generator=torch.Generator().manual_seed(0))
    opposite = (1 - x).requires_grad_(True)
    (gradient,) = torch.autograd.grad(Refinement(1, 0.01, MIXED).errors(opposite, x).sum(), opposite)
    assert torch.equal(gradient, 2 * (opposite.detach() - x))


@pytest.mark.slow
def test_steps_for_both_lower_the_loss_and_raise_ms_ssim(loaded: Checkpoint, record: QuantizerRecord) -> None:
    image, found = picture(3, 192, 192), []
    plain = ImageCodec(loaded.model, record)
    both = {"mse": 1.0, "ms-ssim": 4 * BALANCED / record.lmbda}
    for steps, weights in ((0, both), (4, {"mse": 1.0}), (4, both)):
        made = ImageCodec(loaded.model, replace(record, refine=steps, refine_distortion=weights)).encode(image)
        decoded = plain.decode(made.data)
        error = np.square(decoded.astype(float) - image).mean()
        found.append((record.lmbda * error + made.coded_bits / (192 * 192), ms_ssim8(decoded, image) or 0.0))
    losses, similar = zip(*found, strict=True)
    assert losses[1] < 0.995 * losses[0] and losses[2] < 0.995 * losses[0] and similar[2] > max(similar[:2])


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 200, 3), (64, 48)])
@pytest.mark.parametrize("weights", EVERY[1:])
def test_pictures_of_any_size_are_refined_and_decode(
    loaded: Checkpoint, record: QuantizerRecord, shape: tuple[int, ...], weights: dict[str, float]
) -> None:
    image = picture(4, *shape[:2])[..., : shape[2] if len(shape) > 2 else 1].reshape(shape)
    codec = ImageCodec(loaded.model, replace(record, refine=2, refine_distortion=weights))
    encoded = codec.encode(image)
    assert codec.decode(encoded.data).tobytes() == codec.picture(encoded).tobytes()


def test_tiles_are_measured_each_for_itself(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of the tiles' errors, of what the picture covers of them; the smaller tile is below 161 pixels."""
    monkeypatch.setattr(refine, "fast_bfloat16", lambda device: False)
    x = to_input(torch.from_numpy(picture(5, 192, 320).transpose(2, 0, 1)[None].copy()), torch.device("cpu"))
    inside, refinement = (slice(0, 180), slice(0, 310)), Refinement(1, 0.01, MIXED)
    y = torch.randn((1, loaded.spec.M, 12, 20), generator=torch.Generator().manual_seed(0))
    part = y.clone().requires_grad_(True)
    x_hat = loaded.model.g_s(part)
    halves = slice(0, 192), slice(192, 310)
    total = sum(refinement.errors(x_hat[..., :180, span], x[..., :180, span]) for span in halves)
    (whole,) = torch.autograd.grad(total, part)
    monkeypatch.setattr(tiles, "TILE", 192)
    grid = tiles.Grid.of(180, 310, loaded.codec.strides)
    errors, slope = tiles.answer(
        loaded.codec, grid, lambda rows, columns: x[..., rows, columns], inside, refinement, y, True
    )
    assert torch.allclose(slope, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    assert float(errors) == pytest.approx(float(total.detach()), rel=1e-5)


def test_a_record_names_the_distortion_and_older_ones_keep_their_digest(record: QuantizerRecord) -> None:
    moved = replace(record, refine=8)
    assert replace(moved, refine_distortion={"mse": 1}).digest == moved.digest
    assert '"refine_distortion"' not in moved.to_json()
    mixed = replace(moved, refine_distortion=MIXED)
    assert QuantizerRecord.from_json(mixed.to_json()).refine_distortion == MIXED
    assert mixed.digest != moved.digest and mixed.decoding_digest == moved.decoding_digest
    for wrong in ({}, {"mse": 0.0}, {"lpips": 1.0}, {"mse": float("inf")}):
        with pytest.raises(ValueError, match="refine_distortion has positive weights of mse, ms-ssim"):
            replace(moved, refine_distortion=wrong)
    for broken in ([], {"mse": None}, {"mse": "1"}):
        text = json.dumps({**json.loads(mixed.to_json()), "refine_distortion": broken})
        with pytest.raises(LicError, match="not a quantizer record"):
            QuantizerRecord.from_json(text)


def section(**keys: Any) -> config.Quantizer:
    return config.Quantizer(**{"refine": 8, **keys})


def test_a_section_says_what_is_weighed() -> None:
    assert asked_refinement(None, 0.013).steps == 0
    assert asked_refinement(section(), 0.013) == Refinement(8, 0.013)
    assert asked_refinement(section(refine_distortion={"ms-ssim": 3}), 0.013).distortion == {"ms-ssim": 3.0}
    balanced = [asked_refinement(section(refine_distortion="balanced"), lmbda) for lmbda in (0.0035, 0.013)]
    assert [one.lmbda * one.distortion["ms-ssim"] for one in balanced] == pytest.approx([BALANCED] * 2)
    for wrong in ("lpips", {"lpips": 1}, {}, {"mse": 0}):
        with pytest.raises(ValidationError):
            section(refine_distortion=wrong)
    assert section().identity(set()) == section(refine_distortion="mse").identity(set())
    assert "refine_distortion" not in section().identity(set())


def test_a_record_of_another_distortion_is_refused(loaded: Checkpoint, record: QuantizerRecord) -> None:
    mixed = asked_refinement(section(refine_distortion=MIXED), 0.013)
    made = replace(record, notes={"rates": record.notes["rates"]}, **record_fields(mixed))
    same = {"rates": record.notes["rates"], "spread": record.spread}
    check_record(made, section(**same, refine_distortion=MIXED), loaded, "here")
    with pytest.raises(LicError, match="here is another quantizer: .*refine_distortion"):
        check_record(made, section(**same, refine_distortion="ms-ssim"), loaded, "here")
