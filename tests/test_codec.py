"""Images to bytes and back with real models and quantizers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist.building.records import analytic_record
from lic_dist.codec.records import compressai_record
from lic_dist.codec.codec import ImageCodec, padding
from lic_dist.codec.container import OVERHEAD
from lic_dist.codec.rans import BitstreamError
from lic_dist.models import checkpoint
from lic_dist.models.checkpoint import Checkpoint

from .conftest import picture


@pytest.fixture(scope="module")
def loaded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model with its latents made loud, so that streams are long and escapes occur."""
    path = tmp_path_factory.mktemp("loud") / "loud.pth.tar"
    made = checkpoint.load(str(base))
    with torch.no_grad():
        made.model.g_a[6].weight *= 25
    checkpoint.save(made, path)
    return checkpoint.load(str(path))


@pytest.fixture(scope="module", params=["sq", "deadzone", "rdoq", "tcq4", "tcq8", "tcq16", "tcq32"])
def codec(request: pytest.FixtureRequest, loaded: Checkpoint) -> ImageCodec:
    if request.param == "sq":
        return ImageCodec(loaded.model, compressai_record(loaded))
    name, states = request.param.rstrip("0123456789"), int(request.param.lstrip("abcdefghijklmnopqrstuvwxyz") or 1)
    record = analytic_record(loaded, name, states, 0.6, 0.2, np.full(12, 30.0))
    return ImageCodec(loaded.model, replace(record, shift=-0.05) if name == "deadzone" else record)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (64, 64), (65, 63), (30, 200), (130, 97)])
def test_decoded_indices_and_pixels_equal_the_encoders(codec: ImageCodec, height: int, width: int) -> None:
    image = picture(3, height, width)
    encoded = codec.encode(image)
    decoded, k = codec.decode_with_indices(encoded.data)
    assert decoded.shape == image.shape and np.array_equal(decoded, codec.reconstruction(encoded))
    assert np.array_equal(k, encoded.k)
    assert np.abs(k).max() > 3 and encoded.container_bits == 8 * OVERHEAD <= 8 * 32
    # two streams of whole 32-bit words and a 64-bit state each
    assert codec.estimated_bits(encoded) - 64 <= encoded.coded_bits <= codec.estimated_bits(encoded) * 1.002 + 2 * 96


def test_sq_writes_the_bytes_count_of_compressai(loaded: Checkpoint) -> None:
    image = picture(5, 128, 192)
    codec = ImageCodec(loaded.model, compressai_record(loaded))
    encoded = codec.encode(image)
    x = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float() / 255
    with torch.no_grad():
        theirs = loaded.model.compress(x)
        shown = loaded.model.decompress(theirs["strings"], theirs["shape"])["x_hat"]
    assert abs(encoded.coded_bits // 8 - sum(len(one[0]) for one in theirs["strings"])) <= 8
    eight_bit = shown[0].clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    differing = np.abs(codec.reconstruction(encoded).astype(int) - eight_bit)
    assert differing.max() <= 1 or (differing > 1).mean() < 1e-3  # y rounded to float16 may flip a tie


def test_padding_is_compressais() -> None:
    from compressai.ops import compute_padding

    for height, width in [(1, 1), (64, 64), (65, 127), (512, 768), (321, 481)]:
        assert padding(height, width) == compute_padding(height, width, min_div=64)[0]


def test_a_file_decodes_in_a_fresh_process(loaded: Checkpoint, tmp_path: Path) -> None:
    image = picture(7, 70, 90)
    record = analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.full(12, 30.0))
    record.save(tmp_path / "record.json")
    codec = ImageCodec(loaded.model, record)
    encoded = codec.encode(image)
    (tmp_path / "a.lic").write_bytes(encoded.data)
    options = ["--model", loaded.source, "--quantizer", str(tmp_path / "record.json")]
    command = [sys.executable, "-m", "lic_dist", "decode", str(tmp_path / "a.lic"), str(tmp_path / "a.png"), *options]
    subprocess.run(command, check=True, env={**__import__("os").environ, "OMP_NUM_THREADS": "1"})
    from lic_dist import images

    assert np.array_equal(images.read(tmp_path / "a.png"), codec.reconstruction(encoded))


def test_another_model_another_quantizer_and_damage_are_one_clear_error(codec: ImageCodec, loaded: Checkpoint) -> None:
    data = codec.encode(picture(9, 64, 64)).data
    other = ImageCodec(loaded.model, analytic_record(loaded, "tcq", 4, 0.7, 0.2, np.ones(12)))
    with pytest.raises(BitstreamError, match="another quantizer"):
        other.decode(data)
    moved = checkpoint.load(loaded.source)
    with torch.no_grad():
        moved.model.g_s[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(BitstreamError, match="another model"):
        ImageCodec(moved.model, codec.record).decode(data)
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
    from lic_dist.codec import codec as module

    true = module.level_index
    monkeypatch.setattr(module, "level_index", lambda scales, rule: true(scales * 1.2, rule))
    with pytest.raises(BitstreamError, match="other scales"):
        codec.decode(data)
