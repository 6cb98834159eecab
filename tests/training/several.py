"""Two small families whose y has two stages, and a store of theirs that is written without the building room."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lic_dist import config
from lic_dist.building.calibrate import settings_of
from lic_dist.building.job import geometry_of, group_identity, model_identity
from lic_dist.building.latents import encode
from lic_dist.building.records import analytic_record
from lic_dist.cache import store
from lic_dist.cache.plan import Plan
from lic_dist.codec import walk
from lic_dist.data.photo import Crop
from lic_dist.models import checkpoint
from lic_dist.models.compat import import_compressai
from lic_dist.models.families.hyperprior import MeanScaleHyperprior
from lic_dist.models.protocol import Elements, Run, Sides, Stage, one_layout
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.conftest import picture

import_compressai()
import compressai.models  # noqa: E402
from compressai.layers import CheckerboardMaskedConv2d  # noqa: E402

CHECKERED, SLICED = "tests.training.several:Checkered", "tests.training.several:Sliced"
SIZES = {"N": 4, "M": 6}
FAMILIES = pytest.mark.parametrize("architecture", [CHECKERED, SLICED], ids=["checkered", "sliced"])


class CheckeredModule(compressai.models.MeanScaleHyperprior):
    """As CompressAI's Cheng2020AnchorCheckerboard, on the transforms of `mbt2018-mean`."""

    def __init__(self, N: int, M: int) -> None:
        super().__init__(N, M)
        self.context_prediction = CheckerboardMaskedConv2d(M, 2 * M, kernel_size=5, padding=2)
        self.entropy_parameters = nn.Sequential(nn.Conv2d(4 * M, 3 * M, 1), nn.LeakyReLU(), nn.Conv2d(3 * M, 2 * M, 1))


class Checkered(MeanScaleHyperprior):
    """Half of the positions without a context, the other half with theirs."""

    name = "checkered"
    module_class = CheckeredModule
    parts = {**MeanScaleHyperprior.parts, "context": ("context_prediction.", "entropy_parameters.")}
    supports = frozenset()

    @classmethod
    def fits(cls, state: Any) -> bool:
        return "context_prediction.mask" in state

    @property
    def nets(self) -> dict[str, nn.Module]:
        more = {name: getattr(self.module, name) for name in ("context_prediction", "entropy_parameters")}
        return {**super().nets, **more}

    def layout(self, height: int, width: int) -> tuple[Elements, ...]:
        parity = np.add.outer(np.arange(height), np.arange(width)).ravel() % 2
        return tuple(Elements(positions=np.flatnonzero(parity == one)) for one in (1, 0))

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        features = run("h_s", one_layout(sides_hat[0]))
        context = torch.zeros_like(features)
        y_hat = features.new_zeros(len(features), self.channels, *features.shape[2:])
        for elements in self.layout(*features.shape[2:]):
            scales, means = run("entropy_parameters", one_layout(torch.cat((features, context), 1))).chunk(2, 1)
            value = yield Stage(elements.take(means), elements.take(scales), elements)
            y_hat = y_hat.clone()  # networks before saw the former
            elements.put(y_hat, value)
            context = run("context_prediction", one_layout(y_hat))
        return y_hat


class SlicedModule(compressai.models.MeanScaleHyperprior):
    """Two slices of channels with a prediction of each one's residual, as in ChARM (Minnen and Singh 2020)."""

    def __init__(self, N: int, M: int) -> None:
        super().__init__(N, M)
        self.second = nn.Conv2d(2 * M + M // 2, M, 1)
        self.residual = nn.Conv2d(M // 2, M // 2, 1)
        self.residual_second = nn.Conv2d(M, M // 2, 1)


class Sliced(MeanScaleHyperprior):
    name = "sliced"
    module_class = SlicedModule
    parts = {**MeanScaleHyperprior.parts, "context": ("second.", "residual.", "residual_second.")}
    supports = frozenset()

    @classmethod
    def fits(cls, state: Any) -> bool:
        return "residual_second.weight" in state

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {**super().nets, **{name: getattr(self.module, name) for name in ("second", *RESIDUALS)}}

    def layout(self, height: int, width: int) -> tuple[Elements, ...]:
        half = self.channels // 2
        return Elements(slice(0, half)), Elements(slice(half, 2 * half))

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        features, done = run("h_s", one_layout(sides_hat[0])), []
        for elements, residual in zip(self.layout(1, 1), RESIDUALS, strict=True):
            if done:
                scales, means = run("second", one_layout(torch.cat((features, *done), 1))).chunk(2, 1)
            else:
                scales, means = (elements.take(one) for one in features.chunk(2, 1))
            value = yield Stage(means, scales, elements)
            done.append(value + 0.5 * torch.tanh(run(residual, one_layout(torch.cat((*done, value), 1)))))
        return torch.cat(done, 1)


RESIDUALS = ("residual", "residual_second")


TCQ = config.Quantizer(name="tcq", states=8, step=0.5, lambda_scale=0.1, shift=0.0, pilot=8, calibration=4, group="g")


def held_out(photos: Path) -> config.Images:
    return config.Images(path=photos, held_out="valid")


def base_section(out: Path, architecture: str, **changes: object) -> config.Train:
    settings = {
        **SIZES, "architecture": architecture, "lmbda": 0.05, "steps": 12, "batch": 4, "crop": 64, "lr": 3e-3,
        "warmup": 4, "quantile_steps": 300, "evaluate_every": 4, "relaxation": "mixed", "out": out, **changes,
    }  # fmt: skip
    return config.Train(**settings)


def make_store(path: Path, parent: checkpoint.Checkpoint, section: config.Quantizer, samples: int = 20) -> None:
    """A store of crops 64x64, two shards, the last four held out; k are those of the search along the stages."""
    crops = tuple(
        Crop(f"{n}.png", hashlib.sha256(b"%d" % n).hexdigest(), 0, 0, False, n >= samples - 4) for n in range(samples)
    )
    identity = {"format": 1, "model": model_identity(parent), "crop": 64}
    plan = Plan(crops, geometry_of(parent, 64), samples // 2, 4, identity)
    made = analytic_record(parent, section.name, 8, float(section.step), float(section.lambda_scale), np.ones(6))
    record: QuantizerRecord = replace(made, notes={"rates": section.rates, "settings": settings_of(section)})
    store.create(str(path), plan)
    store.create_group(str(path), section.group, record.to_json(), group_identity(parent, record))
    codec, quantizer = parent.codec, Quantizer(record)
    for shard in range(plan.num_shards):
        numbers = range(shard * plan.shard, (shard + 1) * plan.shard)
        pixels = np.stack([picture(n, 64, 64).transpose(2, 0, 1) for n in numbers])
        latents, _ = encode(parent.model, pixels, plan.batch)
        with torch.no_grad():
            sides_hat = (codec.sides[0].dequantize(torch.from_numpy(latents.z)),)
            coded = walk.search(codec, sides_hat, torch.from_numpy(latents.y).float(), quantizer)
        arrays = {
            "pixels": pixels,
            "latents/y": latents.y,
            "latents/z": latents.z,
            "samples/status": np.zeros(len(pixels), np.uint8),
            f"quantized/{section.group}/k": coded.k.numpy(),
            f"quantized/{section.group}/bits": np.ones(len(pixels), np.float32),
            f"quantized/{section.group}/distortion": np.ones(len(pixels), np.float32),
        }
        store.write_shard(str(path), plan.fingerprint, shard, arrays, plan.crops_of(shard), {"all": 0.1})
