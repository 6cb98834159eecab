"""Images to bytes and back with real models and quantizers."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lic_dist.building.records import analytic_record
from lic_dist.codec import open_codec, rans
from lic_dist.codec.codec import ImageCodec, padding
from lic_dist.codec.container import OVERHEAD, Container
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.records import compressai_record
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import ModelSpec, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.rates import CdfTables
from lic_dist.quantization.record import QuantizerRecord
from tests.conftest import picture

_ROOMS = ("config", "building", "cache", "cluster", "engine", "evaluation", "training")
FORBIDDEN = (*(f"lic_dist.{room}" for room in _ROOMS), "ray", "zarr", "obstore", "pyarrow", "altair", "pandas", "yaml")


@pytest.fixture(scope="module")
def loaded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model with its latents made loud, so that streams are long and escapes occur."""
    path = tmp_path_factory.mktemp("loud") / "loud.pth.tar"
    made = checkpoint.load(str(base))
    with torch.no_grad():
        made.model.g_a[6].weight *= 25
    checkpoint.save(made, path)
    return checkpoint.load(str(path))


@pytest.fixture(scope="module")
def hyperprior(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny scale hyperprior, untrained, with latents of some size."""
    path = tmp_path_factory.mktemp("scale") / "scale.pth.tar"
    torch.manual_seed(1)
    model = build("bmshj2018-hyperprior", 8, 12).eval()
    with torch.no_grad():
        model.g_a[6].weight *= 400
        model.h_a[4].weight *= 3
        model.h_s[4].bias += 2
    checkpoint.save(Checkpoint(model, ModelSpec("bmshj2018-hyperprior", 8, 12, 0.05)), path)
    return checkpoint.load(str(path))


@pytest.fixture(scope="module", params=["mbt2018-mean", "bmshj2018-hyperprior"])
def either(request: pytest.FixtureRequest, loaded: Checkpoint, hyperprior: Checkpoint) -> Checkpoint:
    return {"mbt2018-mean": loaded, "bmshj2018-hyperprior": hyperprior}[request.param]


def codec_of(made: Checkpoint, quantizer: str) -> ImageCodec:
    if quantizer == "sq":
        return ImageCodec(made.model, compressai_record(made))
    name, states = quantizer.rstrip("0123456789"), int(quantizer.lstrip("abcdefghijklmnopqrstuvwxyz") or 1)
    record = analytic_record(made, name, states, 0.6, 0.2, np.full(12, 30.0))
    return ImageCodec(made.model, replace(record, shift=-0.05, spread=0.1) if name == "deadzone" else record)


@pytest.fixture(scope="module", params=["sq", "deadzone", "rdoq", "tcq4", "tcq8", "tcq16", "tcq32"])
def codec(request: pytest.FixtureRequest, either: Checkpoint) -> ImageCodec:
    return codec_of(either, request.param)


def test_a_long_stream_is_interleaved(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, image = codec_of(loaded, "tcq8"), picture(5, 100, 140)
    plain = codec.encode(image)
    held = Container.unpack(plain.data)
    monkeypatch.setattr(rans, "INTERLEAVED_FROM", len(held.y) + 1)
    assert not held.interleaved and codec.encode(image).data == plain.data
    monkeypatch.setattr(rans, "INTERLEAVED_FROM", len(held.y))
    long = codec.encode(image)
    other = Container.unpack(long.data)
    assert other == replace(held, y=other.y, interleaved=True) and 0 < len(other.y) - len(held.y) <= 24
    assert np.array_equal(codec.decode_latents(long.data).k, plain.k)
    for wrong in (replace(held, interleaved=True), replace(other, interleaved=False)):
        with pytest.raises(BitstreamError):
            codec.decode(wrong.pack())


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(1, 1), (64, 64), (65, 63), (30, 200), (130, 97)])
def test_decoded_indices_and_pixels_equal_the_encoders(codec: ImageCodec, height: int, width: int) -> None:
    image = picture(3, height, width)
    image = image if height != 65 else image[..., 0]
    encoded = codec.encode(image)
    decoded, k = codec.decode(encoded.data), codec.decode_latents(encoded.data).k
    assert decoded.shape == image.shape and np.array_equal(decoded, codec.picture(encoded))
    assert np.array_equal(k, encoded.k)
    assert np.abs(k).max() > 3 and encoded.container_bits == 8 * OVERHEAD <= 8 * 32
    # two streams of whole 32-bit words and a 64-bit state each
    estimated = codec.estimated_bits(encoded)
    assert estimated - 64 <= encoded.coded_bits <= estimated * 1.002 + 2 * 96


def test_a_grey_picture_has_one_plane(either: Checkpoint) -> None:
    codec = codec_of(either, "tcq8")
    grey = picture(4, 70, 90)[..., 1]
    coloured = codec.encode(np.repeat(grey[:, :, None], 3, axis=2))
    encoded = codec.encode(grey)
    held = Container.unpack(encoded.data)
    assert held.grey and (held.height, held.width) == grey.shape
    assert np.array_equal(encoded.k, coloured.k) and len(encoded.data) == len(coloured.data)
    mean = codec.decode(coloured.data).astype(float).mean(2)  # of colours that were rounded already
    assert np.abs(codec.decode(encoded.data) - mean).max() <= 1


def test_encoding_runs_neither_g_s_nor_likelihoods(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codec_of(loaded, "sq")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("not asked for")

    for part in (loaded.model.g_s, loaded.model.entropy_bottleneck, loaded.model.gaussian_conditional):
        monkeypatch.setattr(part, "forward", fail)
    encoded = codec.encode(picture(5, 64, 64))
    with pytest.raises(AssertionError, match="not asked for"):
        codec.picture(encoded)


def test_the_likelihood_is_compressais(either: Checkpoint) -> None:
    image = picture(5, 128, 192)
    codec = codec_of(either, "sq")
    x = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float() / 255
    with torch.no_grad():
        theirs = sum(-float(one.log2().sum()) for one in either.model(x)["likelihoods"].values())
    assert codec.likelihood_bits(codec.encode(image)) == pytest.approx(theirs, rel=2e-3)
    assert math.isnan(codec_of(either, "rdoq").likelihood_bits(codec.encode(image)))


def test_images_that_cannot_be_coded(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codec_of(loaded, "sq")
    for image in (np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="image|sides"):
            codec.encode(image)
    with pytest.raises(LicError, match="too large for this format"):  # before a network runs over it
        codec.encode(np.broadcast_to(np.uint8(0), (70_000, 9_000)))
    monkeypatch.setattr(loaded.model.h_a, "forward", lambda y: torch.full((1, 8, 1, 1), torch.inf))
    with pytest.raises(LicError, match="latents overflow"):
        codec.encode(np.zeros((8, 8), np.uint8))


def test_sq_writes_the_bytes_count_of_compressai(loaded: Checkpoint) -> None:
    image = picture(5, 128, 192)
    codec = codec_of(loaded, "sq")
    encoded = codec.encode(image)
    x = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float() / 255
    with torch.no_grad():
        theirs = loaded.model.compress(x)
        shown = loaded.model.decompress(theirs["strings"], theirs["shape"])["x_hat"]
    assert abs(encoded.coded_bits // 8 - sum(len(one[0]) for one in theirs["strings"])) <= 8
    eight_bit = shown[0].clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    differing = np.abs(codec.picture(encoded).astype(int) - eight_bit)
    assert differing.max() <= 1 or (differing > 1).mean() < 1e-3  # y rounded to float16 may flip a tie


def test_padding_is_compressais() -> None:
    from compressai.ops import compute_padding

    for height, width in [(1, 1), (64, 64), (65, 127), (512, 768), (321, 481)]:
        assert padding(height, width) == compute_padding(height, width, min_div=64)[0]


@pytest.mark.slow
def test_files_are_written_and_read_by_processes_that_know_nothing_of_caches(
    hyperprior: Checkpoint, tmp_path: Path
) -> None:
    """One process encodes, another decodes, by command and from Python; whatever else they import is an error.

    CompressAI itself reaches for pyarrow, and does without.
    """
    analytic_record(hyperprior, "tcq", 8, 0.6, 0.2, np.full(12, 30.0)).save(tmp_path / "tcq8" / "record.json")
    image = picture(7, 70, 90)
    Image.fromarray(image).save(tmp_path / "in.png")
    paths = {name: str(tmp_path / name) for name in ("in.png", "a.lic", "out.png", "tcq8")}
    options = ["--model", hyperprior.source, "--quantizer", paths["tcq8"]]

    def run(*arguments: str, then: str = "") -> None:
        probe = f"""
import sys
FORBIDDEN = {FORBIDDEN}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in FORBIDDEN:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.argv = {["lic-dist", *arguments, *options]}
from lic_dist.app.cli import app
app(standalone_mode=False)
{then}
assert not [name for name in FORBIDDEN if name in sys.modules]
"""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr

    run("encode", paths["in.png"], paths["a.lic"])
    python = f"""
import numpy
from PIL import Image
from lic_dist.codec import open_codec, rans
codec = open_codec({hyperprior.source!r}, {paths["tcq8"]!r})
shown, data = numpy.asarray(Image.open({paths["out.png"]!r})), open({paths["a.lic"]!r}, "rb").read()
assert numpy.array_equal(codec.decode(data), shown)
assert codec.encode(numpy.asarray(Image.open({paths["in.png"]!r}))).data == data
"""
    run("decode", paths["a.lic"], paths["out.png"], then=python)
    codec = open_codec(hyperprior.source, str(tmp_path / "tcq8" / "record.json"))
    assert np.array_equal(np.asarray(Image.open(paths["out.png"])), codec.picture(codec.encode(image)))


def test_a_quantizer_that_is_not_there_or_is_another_models(
    loaded: Checkpoint, hyperprior: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no quantizer 'tcq8'"):
        open_codec(loaded.source, "tcq8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no quantizer"):
        open_codec(loaded.source, str(tmp_path / "empty"))
    analytic_record(hyperprior, "rdoq", 1, 0.6, 0.2, np.ones(12)).save(tmp_path / "rdoq.json")
    with pytest.raises(UsageError, match="made for another model"):
        open_codec(loaded.source, str(tmp_path / "rdoq.json"))
    (tmp_path / "rdoq.json").write_text("{}")
    with pytest.raises(LicError, match="not a quantizer record"):
        open_codec(loaded.source, str(tmp_path / "rdoq.json"))


def test_another_model_another_quantizer_and_damage_are_one_clear_error(codec: ImageCodec) -> None:
    data = codec.encode(picture(9, 64, 64)).data
    other = ImageCodec(codec.model, replace(codec.record, step=0.7))
    with pytest.raises(BitstreamError, match="another quantizer"):
        other.decode(data)
    moved = copy.deepcopy(codec.model)
    with torch.no_grad():
        moved.g_s[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(BitstreamError, match="another model"):
        ImageCodec(moved, codec.record).decode(data)
    middle = len(data) // 2
    for damaged in (
        data[:-5],
        data[:40],
        b"",
        data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        data + b"\0",
    ):
        with pytest.raises(BitstreamError):
            codec.decode(damaged)


def test_scales_computed_differently_are_noticed(codec: ImageCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    data = codec.encode(picture(9, 64, 64)).data
    from lic_dist.codec import walk as module

    true = module.level_index
    monkeypatch.setattr(module, "level_index", lambda scales, rule: true(scales * 1.2, rule))
    with pytest.raises(BitstreamError, match="other scales"):
        codec.decode(data)


def test_any_search_may_write_for_a_decoder_and_a_record_without_z_is_refused(loaded: Checkpoint) -> None:
    record = analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.full(12, 30.0))
    other = replace(record, weights=np.full(12, 3.0, np.float32), lambda_scale=0.1, lmbda=0.5)
    image = picture(4, 64, 64)
    coded = ImageCodec(loaded.model, other).encode(image)
    assert np.array_equal(ImageCodec(loaded.model, record).decode_latents(coded.data).k, coded.k)
    with pytest.raises(LicError, match="channels of z"):
        ImageCodec(loaded.model, replace(record, z_tables=replace_rows(record)))


def replace_rows(record: QuantizerRecord) -> CdfTables:
    """The tables of z's first channel alone."""
    tables = record.z_tables
    return CdfTables(tables.cdf[:1], tables.size[:1], tables.offset[:1])
