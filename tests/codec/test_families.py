"""Every family's codec: its own decoder in a fresh process, CompressAI's bits, stages as its forward pass has them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lic_dist.building.records import analytic_record
from lic_dist.codec import fields, rans, tiles, walk
from lic_dist.codec.codec import ImageCodec, padding
from lic_dist.codec.container import Container
from lic_dist.codec.records import compressai_record
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import ModelSpec, adapt, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.protocol import Stage
from lic_dist.quantization.quantize import Quantizer
from tests.conftest import picture
from tests.forked import python

SIZES: dict[str, dict[str, Any]] = {
    "bmshj2018-factorized": {"N": 16, "M": 24},
    "bmshj2018-factorized-relu": {"N": 16, "M": 24},
    "bmshj2018-hyperprior": {"N": 16, "M": 24},
    "mbt2018-mean": {"N": 16, "M": 24},
    "mbt2018": {"N": 16, "M": 24},
    "cheng2020-anchor": {"N": 16, "M": 16},
    "cheng2020-attn": {"N": 16, "M": 16},
    "cheng2020-anchor-checkerboard": {"N": 16, "M": 16},
    "elic2022-official": {"N": 16, "M": 40, "groups": [4, 4, 8, 24]},
    "elic2022-chandelier": {"N": 16, "M": 40, "groups": [4, 4, 8, 24]},
    "minnen2020-charm": {"N": 16, "M": 24, "num_slices": 4, "max_support_slices": 2},
    "bmshj2018-hyperprior-vbr": {"N": 16, "M": 24, "gain": 0.13944, "vr_entbttlnck": True},
    "mbt2018-mean-vbr": {"N": 16, "M": 24, "gain": 0.13944},
    "mbt2018-vbr": {"N": 16, "M": 24, "gain": 0.13944},
}
SEVERAL = [name for name in SIZES if "gain" in SIZES[name] or not name.startswith(("bmshj2018", "mbt2018-mean"))]


@cache
def made(name: str) -> Checkpoint:
    """A model with random weights whose y has a standard deviation of 3, so that there is something to code."""
    torch.manual_seed(1)
    module: Any = build(name, **SIZES[name]).eval()
    *_, last = (layer for layer in module.g_a.modules() if isinstance(layer, torch.nn.Conv2d))
    with torch.no_grad():
        last.weight *= 3 / adapt(module).analyse(torch.rand(1, 3, 128, 128)).std()
        adapt(module).update()
    options = {key: value for key, value in SIZES[name].items() if key not in "NM"}
    return Checkpoint(module, ModelSpec(name, SIZES[name]["N"], SIZES[name]["M"], 0.01, options))


def record(loaded: Checkpoint, quantizer: str) -> Any:
    if quantizer == "sq":
        return compressai_record(loaded)
    return analytic_record(loaded, quantizer, 4, 0.7, 0.2, np.ones(loaded.codec.channels, np.float32))


DECODE = """
import sys
from pathlib import Path
import numpy as np
from lic_dist.codec.codec import ImageCodec
from lic_dist.models import checkpoint
from lic_dist.quantization.record import QuantizerRecord
import torch
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    loaded = checkpoint.load(str(folder / "checkpoint.pth.tar"))
    for record in sorted(folder.glob("*.json")):
        codec = ImageCodec(loaded.model, QuantizerRecord.load(record))
        for file in sorted(folder.glob(f"{record.stem}-*.lic")):
            np.save(file.with_suffix(".npy"), codec.decode(file.read_bytes()))
"""


@pytest.mark.slow
def test_a_fresh_process_decodes_what_each_family_wrote(tmp_path: Path) -> None:
    pictures = [picture(1, 1, 1), picture(2, 70, 130), picture(3, 33, 64)[..., 0]]
    expected: dict[Path, np.ndarray] = {}
    for name in SIZES:
        loaded = made(name)
        checkpoint.save(loaded, tmp_path / name / "checkpoint.pth.tar")
        for quantizer in ("sq", "rdoq", "tcq"):
            made_record = record(loaded, quantizer)
            made_record.save(tmp_path / name / f"{quantizer}.json")
            codec = ImageCodec(loaded.model, made_record, integer=quantizer == "rdoq")
            for number, image in enumerate(pictures):
                encoded = codec.encode(image)
                path = tmp_path / name / f"{quantizer}-{number}.lic"
                path.write_bytes(encoded.data)
                expected[path.with_suffix(".npy")] = codec.picture(encoded)
    folders = [tmp_path / name for name in SIZES]
    done = python(DECODE, *folders)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(expected) == 3 * 3 * len(SIZES)
    for path, image in expected.items():
        assert np.array_equal(np.load(path), image), path


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_sq_writes_the_bits_of_compressais_compress(name: str) -> None:
    """But for the flushes of strings, eight bytes each, of which CompressAI writes one a stage or more."""
    loaded, image = made(name), picture(5, 192, 256)
    left, right, top, bottom = padding(192, 256)
    x = torch.from_numpy(image.transpose(2, 0, 1)[None].copy()).float() / 255
    x = torch.nn.functional.pad(x, (left, right, top, bottom))
    at = {"inputscale": torch.tensor(SIZES[name]["gain"])} if "gain" in SIZES[name] else {}
    with torch.no_grad():
        theirs = loaded.model.compress(x, **at)
        decoded = loaded.model.decompress(theirs["strings"], theirs["shape"], **at)["x_hat"]
    strings = [len(one[0]) - 8 for one in theirs["strings"]]
    codec = ImageCodec(loaded.model, compressai_record(loaded))
    encoded = codec.encode(image)
    ours = encoded.coded_bits / 8 - 8 * (1 + bool(encoded.z.size))
    assert ours == pytest.approx(sum(strings), rel=1e-3, abs=4 * len(strings))
    x_hat = decoded[0, :, top : top + 192, left : left + 256].clamp(0, 1).permute(1, 2, 0).mul(255).round().numpy()
    assert np.abs(x_hat - codec.decode(encoded.data)).mean() < 0.2 / SIZES[name].get(
        "gain", 1
    )  # y in float16 may round a tie otherwise


@pytest.mark.parametrize("name", SIZES)
def test_estimated_bits_are_the_streams(name: str) -> None:
    loaded = made(name)
    codec = ImageCodec(loaded.model, record(loaded, "tcq"))
    encoded = codec.encode(picture(7, 128, 128))
    assert encoded.coded_bits == pytest.approx(codec.estimated_bits(encoded), rel=0.002, abs=160)
    decoded = codec.decode_latents(encoded.data)
    assert np.array_equal(decoded.k, encoded.k) and torch.equal(decoded.y_hat, encoded.y_hat)


@pytest.mark.parametrize("name", SIZES)
def test_given_y_hat_all_stages_are_those_of_the_walk(name: str) -> None:
    loaded, quantizer = made(name), Quantizer(record(made(name), "tcq"))
    codec = loaded.codec
    generator = torch.Generator().manual_seed(0)
    y = 3 * torch.randn(2, codec.channels, 8, 8, generator=generator)
    size = 8 * codec.strides.y // codec.strides.side
    z_hat = torch.randn(2, codec.sides[0].channels, size, size, generator=generator).round()
    with torch.no_grad():
        coded = walk.search(codec, (z_hat,), y, quantizer)
        again = walk.dequantize(codec, (z_hat,), coded.k, quantizer)
        sent = torch.empty_like(y)  # y_hat before corrections

        def keep(stage: Stage) -> torch.Tensor:
            value = walk._reconstruct(stage, coded.k, quantizer)
            stage.elements.put(sent, value)
            return value

        codec.drive((z_hat,), keep)
        given = codec.given((z_hat,), sent)
    assert torch.equal(again, coded.y_hat)
    assert len(nn.ModuleDict(dict(codec.nets))) == len(codec.nets)  # its names are taken by modules, as finetuning does
    torch.testing.assert_close(given.y_hat, coded.y_hat)
    error = (y - sent).double().square().sum((2, 3))
    torch.testing.assert_close(coded.error, error, rtol=1e-4, atol=1e-4)
    lanes = walk.lanes(codec, coded.k, coded.level)
    assert sum(plane.k.size for plane in lanes) == coded.k.numel()  # every element once


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.slow
def test_a_picture_of_many_tiles_goes_there_and_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, image = ImageCodec(made(name).model, record(made(name), "tcq")), picture(6, 450, 130)
    whole = codec.encode(image)
    monkeypatch.setattr(tiles, "TILE", 128)
    monkeypatch.setattr(tiles, "STRIP", 1)
    encoded = codec.encode(image)
    decoded = codec.decode_latents(encoded.data)
    assert codec.part_count(450, 130, encoding=True) > 1
    assert np.array_equal(decoded.k, encoded.k) and torch.equal(decoded.y_hat, encoded.y_hat)
    assert float((encoded.k != whole.k).mean()) < 0.02  # networks sum in another order
    assert np.array_equal(codec.picture(decoded), codec.picture(encoded))


@pytest.mark.parametrize("name", ["cheng2020-attn", "elic2022-official"])
@pytest.mark.parametrize("net", ["g_a", "g_s"])
@pytest.mark.slow
def test_fields_of_branches_are_those_that_gradients_reach(name: str, net: str) -> None:
    network = made(name).codec.nets[net]
    size, channels = (1024, 3) if net == "g_a" else (48, made(name).codec.channels)
    inputs = torch.randn(1, channels, size, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outputs = network(inputs)
    middle = outputs.shape[2] // 2
    outputs[:, :, middle : middle + 3].abs().sum().backward()
    assert inputs.grad is not None
    reached = inputs.grad.abs().sum((0, 1, 3)).nonzero()
    assert fields.receptive_field(network, middle, middle + 3) == (int(reached.min()), int(reached.max()) + 1)


def test_a_module_that_reads_everything_is_refused() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + x.mean((2, 3), keepdim=True)

    with pytest.raises(LicError, match="Everything depends on inputs too far away"):
        fields.receptive_field(Everything(), 4, 5)


@pytest.mark.parametrize("name", SIZES)
def test_a_state_dict_alone_is_recognised(name: str, tmp_path: Path) -> None:
    torch.save(made(name).model.state_dict(), tmp_path / "a.pth.tar")
    gain = f"@{SIZES[name]['gain']}" if "gain" in SIZES[name] else ""
    loaded = checkpoint.load(f"{tmp_path / 'a.pth.tar'}{gain}", lmbda=0.01)
    assert (loaded.spec.architecture, loaded.spec.N, loaded.spec.M) == (name, SIZES[name]["N"], SIZES[name]["M"])
    assert checkpoint.digest(loaded.model.state_dict()) == checkpoint.digest(made(name).codec.module.state_dict())


def test_the_decoders_machine_computes_other_scales_in_a_later_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = made("cheng2020-anchor-checkerboard")
    codec = ImageCodec(loaded.model, record(loaded, "tcq"))
    data = codec.encode(picture(9, 64, 64)).data
    true, calls = walk.level_index, 0

    def other(scales: Any, rule: str) -> Any:
        nonlocal calls
        calls += 1
        found = true(scales, rule)
        return found if calls == 1 else found.clamp(max=1)

    monkeypatch.setattr(walk, "level_index", other)
    with pytest.raises(LicError, match="computes other scales"):
        codec.decode(data)


def test_pictures_are_written(tmp_path: Path) -> None:
    loaded = made("elic2022-official")
    codec = ImageCodec(loaded.model, record(loaded, "sq"))
    image = codec.decode(codec.encode(picture(4, 40, 50)).data)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert image.shape == (40, 50, 3)


@pytest.mark.parametrize("name", ["mbt2018", "minnen2020-charm", "bmshj2018-factorized"])
def test_states_take_turns_through_all_stages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waves of a raster of few lanes, slices, and levels that are channels."""
    monkeypatch.setattr(rans, "INTERLEAVED_FROM", 0)
    codec = ImageCodec(made(name).model, record(made(name), "tcq"))
    encoded = codec.encode(picture(7, 65, 90))
    assert Container.unpack(encoded.data).interleaved
    assert np.array_equal(codec.decode_latents(encoded.data).k, encoded.k)
