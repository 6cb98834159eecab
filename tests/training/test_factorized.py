"""Finetuning where y has a factorized prior: rates by table and by cell, gradients, forms, and the prior's own job."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lic_dist import config
from lic_dist.building.records import analytic_record
from lic_dist.codec import walk
from lic_dist.codec.records import compressai_record
from lic_dist.models import checkpoint
from lic_dist.models.architectures import adapt
from lic_dist.models.parts import encoder_digest, freeze_all_but, trainable
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training import base as base_job
from lic_dist.training import finetune as job
from lic_dist.training.decoding import Decoding
from lic_dist.training.log import read_log
from lic_dist.training.rate import CellRate, ChannelRate
from lic_dist.training.samples import Batch, make_batch
from tests.conftest import picture
from tests.factorized import NAMES, skewed
from tests.training.several import TCQ, base_section, held_out, make_store
from tests.training.test_stages import FORMS


def record(kind: str, states: int = 8) -> QuantizerRecord:
    if kind == "unit":
        return compressai_record(skewed())
    return analytic_record(skewed(), kind, states, 0.6, 0.3, np.ones(24, np.float32))


def batch_of(made: QuantizerRecord, scale: float = 1.0) -> Batch:
    pixels = np.stack([picture(seed, 64, 64).transpose(2, 0, 1) for seed in (1, 2)])
    codec, quantizer = skewed().codec, Quantizer(made)
    with torch.no_grad():
        y = (scale * codec.analyse(torch.from_numpy(pixels).float() / 255)).half()
        z = codec.hyper_analyse(y.float())[0].short()
        k = walk.search(codec, (codec.sides[0].dequantize(z),), y.float(), quantizer).k
    rows = {"sample": np.arange(2), "pixels": pixels, "z": z.numpy(), "k": k.numpy(), "y": y.numpy()}
    return make_batch(quantizer, ("pixels", "z", "k", "y"), rows, (0, 0))


@pytest.mark.parametrize("kind", ["unit", "deadzone", "rdoq", "tcq"])
def test_rates_are_the_tables_and_the_priors_cells(kind: str) -> None:
    made = record(kind)
    batch = batch_of(made)
    batch.k[0, :, 0] = torch.tensor([400, -400, 32767, -32768])  # escapes
    rows = np.tile(np.arange(24)[:, None, None], (2, 1, 4, 4)) + 24 * batch.quantizer.numpy().astype(np.int32)
    exact = made.y_tables.bits(batch.k.numpy(), rows.astype(np.int32))
    by_table = ChannelRate(made)(batch.k, batch.quantizer)
    assert np.array_equal(by_table.numpy(), exact)
    model = skewed().codec
    assert model.prior is not None
    by_cell = CellRate(made, model.prior)(batch.k, batch.quantizer).detach().numpy()
    assert np.abs(by_cell - exact)[exact < 9].max() < 0.03  # the integers of the tables
    if kind == "unit":
        torch.testing.assert_close(
            torch.from_numpy(by_cell), -model.prior.likelihood(model.prior.medians() + batch.k).log2().detach()
        )


def test_cells_of_both_quantizers_of_a_trellis_sum_to_one() -> None:
    rate = CellRate(record("tcq"), skewed().codec.prior)  # type: ignore[arg-type]
    k = torch.arange(-60, 61, dtype=torch.int16).view(1, 1, -1, 1).expand(1, 24, -1, 1)
    for quantizer in (0, 1):
        total = torch.exp2(-rate(k, torch.full_like(k, quantizer).to(torch.uint8))).sum((2, 3))
        torch.testing.assert_close(total, torch.ones(1, 24), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["unit", "tcq"])
def test_the_priors_gradient_is_that_of_differences(kind: str) -> None:
    made = record(kind)
    batch = batch_of(made)
    model = copy.deepcopy(skewed().model)
    decoding = Decoding(model, made, "quantized", prior_trains=True)
    one = model.entropy_bottleneck.biases[1]
    freeze_all_but(model, trainable(model, "prior"))

    def bits() -> Tensor:
        return decoding(batch)[1]

    (gradient,) = torch.autograd.grad(bits(), [one])
    direction = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one.add_(1e-2 * direction)
        above = float(bits())
        one.sub_(2e-2 * direction)
        below = float(bits())
    assert (above - below) / 2e-2 == pytest.approx(float((gradient * direction).sum()), rel=0.02)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["unit", "tcq"])
def test_every_form_rebuilds_and_trains(name: str, kind: str) -> None:
    made, model = record(kind), copy.deepcopy(skewed(name).model)
    batch = batch_of(made)
    with torch.no_grad():
        x_hat = model.g_s(adapt(model).prior.medians() + batch.level)  # type: ignore[union-attr]
    parameters = freeze_all_but(model, trainable(model, "all-but-encoder"))
    for form, means in product(FORMS, ("likelihood", "search", "pixels")):
        decoding = Decoding(model, made, form, means_gradient=means, prior_trains=True)  # type: ignore[arg-type]
        decoded, bits = decoding(batch)
        if form in ("quantized", "likelihood"):
            torch.testing.assert_close(decoded, x_hat, rtol=0, atol=1e-4)
        found = torch.autograd.grad(100 * decoded.square().sum() + bits, parameters)
        assert all(bool(one.isfinite().all()) and bool(one.any()) for one in found), (form, means)


def test_a_frozen_prior_charges_the_records_tables() -> None:
    made, model = record("tcq"), copy.deepcopy(skewed().model)
    batch = batch_of(made)
    _, bits = Decoding(model, made)(batch)
    assert float(bits) == pytest.approx(float(ChannelRate(made)(batch.k, batch.quantizer).sum()), rel=1e-6)


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model after a few steps."""
    section = base_section(tmp_path_factory.mktemp("factorized"), NAMES[0], steps=40, lr=5e-3)
    return base_job.train(section, held_out(photos))


@pytest.mark.slow
def test_base_training_lowers_the_loss(trained: Path) -> None:
    rows = [row for row in read_log(trained.parent / "log.jsonl") if "held_out_L" in row]
    assert rows[-1]["held_out_L"] < 0.7 * rows[0]["held_out_L"]
    assert checkpoint.load(str(trained)).history[0]["auxiliary_loss"] < 1e-3 * 6


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["decoder", ["prior"], "decoder+hyper"], ids=str)
def test_each_recipe_is_a_job(recipe: str | list[str], trained: Path, tmp_path: Path) -> None:
    parent = checkpoint.load(str(trained))
    make_store(tmp_path / "cache.zarr", parent, TCQ)
    experiment = config.Experiment.model_validate(
        {
            "model": {"checkpoint": str(trained)},
            "cache": {"path": str(tmp_path / "cache.zarr")},
            "quantizer": TCQ.model_dump(),
            "engine": {"name": "local"},
            "finetune": {"recipe": recipe, "steps": 30, "batch": 4, "lr": 1e-2, "warmup": 2, "evaluate_every": 10,
                         "out": str(tmp_path / "out")},
        }
    )  # fmt: skip
    made = checkpoint.load(str(job.finetune(experiment)))
    assert encoder_digest(made.model) == encoder_digest(parent.model)
    entry = made.history[-1]
    assert entry["best_step"] > 0 and entry["held_out_best"]["L"] < entry["held_out_before"]["L"]
    moved = {
        name.split(".")[0]
        for (name, one), other in zip(made.model.named_parameters(), parent.model.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert ("g_s" in moved, "entropy_bottleneck" in moved) == (recipe != ["prior"], recipe != "decoder")
    assert len(moved) == (2 if recipe == "decoder+hyper" else 1)
    if recipe == ["prior"]:
        assert entry["held_out_best"]["psnr"] == entry["held_out_before"]["psnr"]
