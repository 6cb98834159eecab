"""What quantizers take of latents: once for all of them, or a walk for each; calibration and adaptation by walks."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lic_dist import config
from lic_dist.building.calibrate import calibrate, channel_weights
from lic_dist.building.latents import (
    Latents,
    QuantizerInput,
    WalkedInput,
    encode,
    in_one_stage,
    inputs_of,
    quantizer_input,
)
from lic_dist.building.records import analytic_record
from lic_dist.codec import walk
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import adapt, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.families.hyperprior import MeanScaleHyperprior
from lic_dist.models.protocol import Run, Sides
from lic_dist.quantization.adaptation import adaptation_rounds
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.sensitivity import sensitivities
from tests.conftest import picture
from tests.families import CHECKERED, SLICED, Checkered

FAMILIES = (CHECKERED, SLICED)
BATCH = 4


@pytest.fixture(scope="module")
def encoded(checkpoints: dict[str, Path]) -> dict[str, tuple[Checkpoint, Latents]]:
    """A model of each family, and the latents of eleven pictures: the third batch is not full."""
    pixels = np.stack([picture(40 + seed, 64, 64).transpose(2, 0, 1) for seed in range(11)])
    loaded = {name: checkpoint.load(str(checkpoints[name]), name) for name in FAMILIES}
    return {name: (one, encode(one.model, pixels, BATCH)[0]) for name, one in loaded.items()}


def some(latents: Latents, which: slice) -> Latents:
    return Latents(latents.pixels[which], latents.y[which], latents.z[which])


def test_what_is_one_stage_and_what_is_walked() -> None:
    class Corrected(MeanScaleHyperprior):
        def walk(self, sides_hat: Sides, run: Run) -> Generator:
            y_hat: Tensor = yield from super().walk(sides_hat, run)
            return y_hat + 1

    for architecture in ("mbt2018-mean", "bmshj2018-hyperprior"):
        assert in_one_stage(adapt(build(architecture, 8, 12)), (4, 4), (1, 1))
    assert not in_one_stage(Corrected(build("mbt2018-mean", 8, 12)), (4, 4), (1, 1))
    y, z = np.zeros((1, 12, 4, 4), np.float16), np.zeros((1, 8, 1, 1), np.int16)
    assert isinstance(inputs_of(build("mbt2018-mean", 8, 12), y, z, 1), QuantizerInput)
    walked = build(CHECKERED, 8, 12)
    assert isinstance(inputs_of(walked, y, z, 1), WalkedInput)
    with pytest.raises(LicError, match="several stages"):
        quantizer_input(walked, y, z, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_lowers_L_and_notes_what_a_walk_measures(
    name: str, encoded: dict[str, tuple[Checkpoint, Latents]]
) -> None:
    parent, latents = encoded[name]
    section = config.Quantizer(name="tcq", states=8, shift=0.05)
    held_out = some(latents, slice(7, None))
    begin = analytic_record(parent, "tcq", 8, 1.0, 1.0, np.ones(6))  # bits far too dear
    record = calibrate(parent, section, some(latents, slice(0, 7)), held_out, BATCH, warm_start=begin)
    trials = {(one["strength"], one["step"]): one["L"] for one in record.notes["calibration"]}
    assert record.notes["L"] == min(trials.values()) == trials[record.strength, record.step] < trials[1.0, 1.0]
    assert len({step for _, step in trials}) > 2
    codec, quantizer = parent.codec, Quantizer(record)
    with torch.no_grad():
        sides_hat, y = (codec.sides[0].dequantize(torch.from_numpy(held_out.z)),), torch.from_numpy(held_out.y).float()
        coded = walk.search(codec, sides_hat, y, quantizer)
        x = torch.from_numpy(held_out.pixels) / 255
        whole = (codec.synthesise(one).clamp(0, 1) for one in (coded.y_hat, codec.given(sides_hat, y).y_hat))
        mse, unquantized = (float((one - x).double().square().mean()) for one in whole)
    assert record.notes["mse"] == pytest.approx(mse, rel=1e-4)
    assert record.notes["mse_unquantized"] == pytest.approx(unquantized, rel=1e-4)
    assert record.notes["adaptation"][-1]["L"] == record.notes["L"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "along"), [(CHECKERED, "channels"), *((name, "positions") for name in FAMILIES)])
def test_tables_are_adapted_on_the_residuals_of_a_walk(
    name: str, along: str, encoded: dict[str, tuple[Checkpoint, Latents]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if along == "channels":
        layout = Checkered.layout
        monkeypatch.setattr(
            Checkered, "layout", lambda *given: tuple(replace(one, along=along) for one in layout(*given))
        )
    parent, latents = encoded[name]
    inputs = inputs_of(parent.model, latents.y, latents.z, BATCH)
    record = analytic_record(parent, "tcq", 8, 0.7, 0.1, np.linspace(1, 5, 6))
    parts, quantizer = inputs.parts(record), Quantizer(record)
    found = inputs.quantize(quantizer)
    assert sum(part[0].size for part in parts) == latents.y.size
    k = [quantizer.quantize(*part[:2], 1, *part[2:]) for part in parts]
    bits = sum(quantizer.bits(one, part[1]).sum() for one, part in zip(k, parts, strict=True))
    assert bits == pytest.approx(found.bits.sum(), rel=1e-9)
    assert np.array_equal(np.sort(np.concatenate([one.ravel() for one in k])), np.sort(found.k.ravel()))
    (adapted,) = adaptation_rounds(record, parts, 1)
    assert inputs.quantize(Quantizer(adapted)).bits.sum() < found.bits.sum()


@pytest.mark.slow
def test_sensitivities_are_those_at_y_hat_of_rounding_with_its_correction(
    encoded: dict[str, tuple[Checkpoint, Latents]],
) -> None:
    parent, latents = encoded[SLICED]
    codec, half = parent.codec, parent.codec.channels // 2
    with torch.no_grad():
        y, z_hat = torch.from_numpy(latents.y).float(), codec.sides[0].dequantize(torch.from_numpy(latents.z))
        steps = codec.walk((z_hat,), codec.run)
        stage = next(steps)
        stage = steps.send(torch.round(y[:, :half] - stage.means) + stage.means)
        with pytest.raises(StopIteration) as done:
            steps.send(torch.round(y[:, half:] - stage.means) + stage.means)
    expected, _ = sensitivities(codec.synthesise, done.value.value, 4, torch.Generator().manual_seed(0))
    inputs = inputs_of(parent.model, latents.y, latents.z, BATCH)
    weights, notes = channel_weights(parent, config.Quantizer(), inputs, latents)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    assert len(notes["weights_standard_error"]) == codec.channels
