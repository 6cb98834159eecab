"""Variable-rate models: CompressAI's latents at every gain, how a gain is named, and what it is part of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.codec import walk
from lic_dist.codec.codec import model_id
from lic_dist.codec.records import coder_tables, compressai_record
from lic_dist.codec.refine import answer_of, refine
from lic_dist.errors import UsageError
from lic_dist.evaluation.jobs import _matching
from lic_dist.models import checkpoint
from lic_dist.models.architectures import ModelSpec, adapt, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.gains import rate_at
from lic_dist.models.names import label
from lic_dist.models.parts import decoder_digest, encoder_digest, entropy_digest, model_digest, trainable
from lic_dist.models.protocol import Rate
from lic_dist.models.refine import Refinement
from lic_dist.models.stages import rounded_z
from lic_dist.quantization.quantize import Quantizer
from tests.conftest import picture
from tests.models.test_integer import by_the_book, invented, some_z, walked
from tests.models.test_integer_contexts import Walk, in_units

EACH = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bmshj2018-hyperprior-vbr", {}),
        ("bmshj2018-hyperprior-vbr", {"vr_entbttlnck": True}),
        ("mbt2018-mean-vbr", {"vr_entbttlnck": True}),
        ("mbt2018-vbr", {}),
    ],
)


def made(name: str, options: dict[str, Any], gain: float | None = None, N: int = 8, M: int = 12) -> Checkpoint:
    torch.manual_seed(2)
    module: Any = build(name, N, M, **options, **({} if gain is None else {"gain": gain})).eval()
    with torch.no_grad():
        module.g_a[6].weight *= 40
        module.h_a[4].weight *= 20
        last = module.entropy_parameters[4] if hasattr(module, "entropy_parameters") else module.h_s[4]
        last.bias[:M] = torch.linspace(0.1, 20, M)  # scales of many levels
    checkpoint.update_tables(module)
    return Checkpoint(module, ModelSpec(name, N, M, 0.01, {} if gain is None else {**options, "gain": gain}))


@EACH
@pytest.mark.parametrize("gain", [0.26874, 0.4])
def test_latents_of_sq_are_those_that_compressai_decodes(name: str, options: dict[str, Any], gain: float) -> None:
    loaded = made(name, options, gain)
    codec, seen = loaded.codec, {}
    x = torch.from_numpy(picture(3, 64, 128).transpose(2, 0, 1)[None].copy()) / 255
    for net in ("h_s", "g_s"):
        getattr(loaded.model, net).register_forward_pre_hook(lambda _, given, net=net: seen.update({net: given[0]}))
    with torch.no_grad():
        theirs: Any = loaded.model.compress(x, stage=2, s=0, inputscale=torch.tensor(gain))
        loaded.model.decompress(theirs["strings"], theirs["shape"], stage=2, s=0, inputscale=torch.tensor(gain))
        z_hat, y_hat = seen["h_s"], seen["g_s"]
        y = codec.analyse(x)
        ours = codec.sides[0].dequantize(rounded_z(codec, y).int())
        coded = walk.search(codec, (ours,), y, Quantizer(compressai_record(loaded)))
        codec.synthesise(coded.y_hat)
    torch.testing.assert_close(ours, z_hat, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen["g_s"], y_hat, rtol=0, atol=1e-4)
    assert float((coded.k != 0).float().mean()) > 0.2 and int(coded.level.unique().numel()) > 3
    error = (y - coded.y_hat).double().square().sum((2, 3))
    assert not torch.allclose(coded.error, error, rtol=1e-3)  # offsets count


@EACH
def test_an_offset_moves_what_sq_does_not_round_to_zero_and_keeps_signs_apart(
    name: str, options: dict[str, Any]
) -> None:
    codec = made(name, options, 0.5).codec
    z_hat = torch.zeros(1, 8, 1, 1)
    level = torch.zeros(1, 12, 4, 4)
    level[:, ::3], level[:, 1::3] = 2.0, -2.0
    with torch.no_grad():
        found = codec.follow((z_hat,), lambda stage: stage.means + stage.elements.take(level))
    moved = found.y_hat - found.means - level
    assert float(moved[:, 2::3].abs().max()) < 1e-5
    sizes = moved[level != 0] * level[level != 0].sign()
    scales = codec.gaussian.lower_bound_scale(found.scales)[level != 0]
    expected = -codec.module.QuantABCD(torch.stack((scales, torch.full_like(scales, 0.5)), -1))[..., 0]
    torch.testing.assert_close(sizes, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mbt2018-mean-vbr", "mbt2018-vbr"])
def test_refinement_lowers_the_loss_of_what_is_decoded(name: str) -> None:
    loaded = made(name, {}, 0.4)
    codec, quantizer = loaded.codec, Quantizer(compressai_record(loaded))
    x = torch.from_numpy(picture(3, 64, 64).transpose(2, 0, 1)[None].copy()) / 255
    losses = []
    with torch.no_grad():
        y = codec.analyse(x)
        sides_hat = (codec.sides[0].dequantize(rounded_z(codec, y).int()),)
        refinement = Refinement(4, 0.01)
        moved = refine(codec, sides_hat, y.half(), quantizer, answer_of(codec, x, refinement), refinement)
        for one in (y.half(), moved):
            coded = walk.search(codec, sides_hat, one.float(), quantizer)
            error = float((codec.synthesise(coded.y_hat) - x).double().square().sum())
            bits = walk.likelihood_bits(codec, sides_hat, coded.k, quantizer)
            losses.append(0.01 * 255**2 / 3 * error + bits)
    assert losses[1] < 0.999 * losses[0]


def test_a_step_of_z_gives_the_likelihood_of_its_cells() -> None:
    side = made("mbt2018-mean-vbr", {"vr_entbttlnck": True}, 0.1).codec.sides[0]
    step, tables = float(side.step.detach()), coder_tables(side.prior)  # type: ignore[attr-defined]
    assert step >= 0.5
    integers = torch.arange(-400, 401).reshape(1, 1, 1, -1).expand(1, 8, 1, -1)
    with torch.no_grad():
        z_hat = side.dequantize(integers)
        likelihood = side.likelihood(z_hat)
        assert torch.equal(torch.round(side.centred(z_hat)), integers.float())
    torch.testing.assert_close(z_hat[..., 1:] - z_hat[..., :-1], torch.full((1, 8, 1, 800), step), rtol=0, atol=1e-4)
    torch.testing.assert_close(likelihood.sum(3), torch.ones(1, 8, 1), rtol=0, atol=1e-2)
    rows = torch.arange(8).reshape(8, 1).expand(8, 21).numpy()
    bits = tables.bits(integers[0, :, 0, 390:411].numpy(), rows)
    assert abs(bits + likelihood[0, :, 0, 390:411].log2().numpy()).max() < 0.05


@pytest.mark.parametrize(
    ("name", "options"), [("mbt2018-mean-vbr", {"vr_entbttlnck": True}), ("mbt2018-vbr", {})], ids=lambda one: str(one)
)
def test_every_network_in_integers_is_the_definition(name: str, options: dict[str, Any]) -> None:
    model, z = invented(name, 4, 3, gain=0.26874, **options), some_z(1, 1, 4, 1, 1)
    codec, walk = adapt(model), Walk(model, z)
    for called, values, out in walk.calls:
        if called != "context_prediction":  # of single positions, as that of mbt2018
            assert np.array_equal(in_units(out), by_the_book(codec.nets[called], in_units(values))), called
    assert {called for called, _, _ in walk.calls} == set(walked(codec))
    (side,) = codec.sides
    step = round(4096 * float(torch.as_tensor(side.step).detach()))
    read = next(values for called, values, _ in walk.calls if called == "h_s")
    expected = [
        step * int(v) + round(4096 * m) for v, m in zip(z.flatten(), side.medians().flatten().tolist(), strict=True)
    ]
    assert in_units(read).flatten().tolist() == expected and (step == 4096) == (not options)


@EACH
@pytest.mark.slow
def test_a_gain_is_named_and_kept(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    free = made(name, options)
    path = tmp_path / "a.pth.tar"
    torch.save(free.model.state_dict(), path)  # as CompressAI saves it
    loaded = checkpoint.load(f"{path}@3")
    assert (loaded.spec.architecture, loaded.spec.lmbda) == (name, 0.013)
    assert loaded.spec.options["gain"] == loaded.codec.gain == 0.26874
    between = checkpoint.load(f"{path}@0.3")
    assert between.codec.gain == 0.3 and 0.013 < between.spec.lmbda < 0.025
    assert checkpoint.load(f"{path}@0.3", lmbda=0.02).spec.lmbda == 0.02
    assert checkpoint.load(str(path), lmbda=0.02, options={"gain": 0.3}).codec.gain == 0.3
    checkpoint.save(between, tmp_path / "tuned" / "checkpoint.pth.tar")
    again = checkpoint.load(str(tmp_path / "tuned"))
    assert again.spec == between.spec and model_digest(again.model) == model_digest(between.model)
    assert copy.deepcopy(again.model).gain == 0.3
    written = checkpoint.read(tmp_path / "tuned" / "checkpoint.pth.tar")["state_dict"]
    theirs = type(again.model).from_state_dict(written, **options)
    theirs.update(force=True, scale=torch.tensor(0.3))
    assert checkpoint.digest(theirs.state_dict()) == checkpoint.digest(again.model.state_dict())
    digests = [encoder_digest, entropy_digest, decoder_digest, model_digest, model_id]
    for digest in digests[:2] + digests[3:]:
        assert len({digest(one.model) for one in (loaded, between, checkpoint.load(f"{path}@0.31"))}) == 3
    for wrong, said in {
        str(path): "is a model of 8 rates",
        f"{path}@8": "no rate 8",
        f"{path}@1.5": "gain 1.5 is outside of 0.1 to 1",
        f"{tmp_path / 'tuned'}@3": "for gain 0.3 alone",
        "base-small@3": "a model of one rate takes no gain",
    }.items():
        with pytest.raises(UsageError, match=said):
            checkpoint.load(wrong)


def test_names_of_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert label("runs/a.pth.tar@3") == label("runs/a@3") == label("runs/a/checkpoint.pth.tar@3") == "a@3"
    for name in ("a", "b", "b@3"):
        (tmp_path / name).mkdir()
        checkpoint.save(made("mbt2018-vbr", {}, 0.4 if name == "b@3" else None), Path(name) / "checkpoint.pth.tar")
    assert _matching("[ab]@3") == ["a@3", "b@3"]
    assert checkpoint.absolute("a@3") == f"{tmp_path / 'a'}@3"
    assert checkpoint.load("a@3").codec.gain == 0.26874 and checkpoint.load("b@3").codec.gain == 0.4
    told = CliRunner().invoke(app, ["models", "describe", "a"]).output
    assert "rate @7: gain 1, lambda 0.18" in told and "lambda of each rate" in told
    assert "gain 0.4, lambda 0.01" in CliRunner().invoke(app, ["models", "describe", "b@3"]).output


def test_lambda_between_two_rates() -> None:
    rates = (Rate(0.1, 0.01), Rate(0.4, 0.16))
    assert [rate_at(rates, gain).lmbda for gain in (0.1, 0.2, 0.4)] == pytest.approx([0.01, 0.04, 0.16])


def test_compressais_zoo_has_one_file_for_all_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    early: dict[str, Tensor] = {**made("mbt2018-mean-vbr", {}).model.state_dict(), "QuantOffset": torch.zeros(1)}
    torch.save(early, tmp_path / "hub" / "checkpoints" / "mbt2018-mean-mse-vbr-45d095e9.pth.tar")
    assert checkpoint.load("compressai:mbt2018-mean-vbr/mse@7").spec.lmbda == 0.18


def test_what_trains_of_a_variable_rate_model() -> None:
    mean, raster = (made(name, {}, 0.5).model for name in ("mbt2018-mean-vbr", "mbt2018-vbr"))
    assert {"QuantABCD.0.weight", "g_s.0.weight"} <= set(trainable(mean, "decoder"))
    assert not any(name.startswith("QuantABCD") for name in trainable(raster, "decoder"))
    assert {"QuantABCD.0.weight", "scale_to_context.bias"} <= set(trainable(raster, "context"))
    with pytest.raises(UsageError, match="Gain belongs to the encoder"):
        trainable(mean, ["Gain"])
    assert adapt(mean).gain == 0.5
