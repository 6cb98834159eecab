"""Training of every family of several stages: CompressAI's own relaxation, and every form of finetuning."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lic_dist.building.records import analytic_record
from lic_dist.codec import walk
from lic_dist.models.architectures import adapt
from lic_dist.models.parts import QUANTILES, freeze_all_but, trainable
from lic_dist.models.stages import rounded_z
from lic_dist.quantization.quantize import Quantizer
from lic_dist.training.base import RelaxedModel
from lic_dist.training.decoding import Decoding
from lic_dist.training.samples import make_batch
from tests.codec.test_families import SEVERAL, made
from tests.conftest import picture
from tests.training.test_stages import FORMS

STEPPED = "bmshj2018-hyperprior-vbr"  # CompressAI decodes noisy z of it, and takes the rate of other cells
EACH = pytest.mark.parametrize("name", SEVERAL)
OWN = {"mbt2018": "noise", "cheng2020-anchor": "noise", "cheng2020-attn": "noise"}  # CompressAI's; "mixed" of others


def pixels() -> Tensor:
    whole = np.stack([picture(seed, 128, 128).transpose(2, 0, 1) for seed in (1, 2)])
    return torch.from_numpy(np.ascontiguousarray(whole))


def fresh(name: str) -> nn.Module:
    return copy.deepcopy(made(name).model)


@pytest.mark.parametrize("name", [name for name in SEVERAL if name != STEPPED])
def test_the_relaxed_model_is_compressais_in_training(name: str) -> None:
    """What the decoder makes of the same noise; rates apart by noise, which CompressAI draws a second time for some."""
    model, x = fresh(name).train(), pixels().float() / 255
    relaxation = OWN.get(name, "mixed")
    relaxed = RelaxedModel(model, relaxation).train()
    x = x.contiguous(memory_format=relaxed._format)  # in whose order noise is drawn
    torch.manual_seed(0)
    x_hat, bits = relaxed(x)
    torch.manual_seed(0)
    theirs = model(x)
    torch.testing.assert_close(x_hat, theirs["x_hat"], rtol=0, atol=1e-6 * max(1, float(x_hat.detach().abs().max())))
    of_all = -sum(one.log2().sum() for one in theirs["likelihoods"].values())
    torch.testing.assert_close(bits, of_all, rtol=0.06, atol=0)


@EACH
@pytest.mark.parametrize("relaxation", ["noise", "mixed"])
def test_all_that_trains_has_a_gradient(name: str, relaxation: str) -> None:
    """Two ranks would wait for a parameter without one."""
    model, x = fresh(name), pixels().float() / 255
    x_hat, bits = RelaxedModel(model, relaxation).train()(x)
    (100 * x_hat.square().sum() + bits).backward()
    for one, parameter in model.named_parameters():
        if parameter.requires_grad and not one.endswith(QUANTILES):
            assert bool(parameter.grad.isfinite().all()), one


@pytest.mark.slow
@EACH
def test_every_form_of_finetuning_rebuilds_and_trains(name: str) -> None:
    loaded, model, x = made(name), fresh(name), pixels()[..., :64, :64]
    codec = adapt(model)
    quantizer = Quantizer(analytic_record(loaded, "tcq", 8, 0.5, 0.1, np.ones(codec.channels, np.float32)))
    with torch.no_grad():
        y = codec.analyse(x.float() / 255).half()
        z = rounded_z(codec, y.float()).short()
        coded = walk.search(codec, (codec.sides[0].dequantize(z),), y.float(), quantizer)
        x_hat = codec.synthesise(coded.y_hat)
    rows = {"sample": torch.arange(2), "pixels": x, "z": z, "k": coded.k, "y": y}
    arrays = {one: values.numpy() for one, values in rows.items()}
    batch = make_batch(quantizer, ("pixels", "z", "k", "y"), arrays, (0, 0), codec.layout(*y.shape[2:]))
    names = trainable(model, "all-but-encoder")
    parameters = freeze_all_but(model, names)
    for form, means in product(FORMS, ("likelihood", "search", "pixels")):
        decoded, bits = Decoding(model, quantizer.record, form, means_gradient=means)(batch)
        if form in ("quantized", "likelihood"):
            torch.testing.assert_close(decoded, x_hat, rtol=0, atol=1e-3 * max(1, float(x_hat.detach().abs().max())))
        found = torch.autograd.grad(100 * decoded.square().sum() + bits, parameters)
        assert all(bool(one.isfinite().all()) for one in found), (form, means)
