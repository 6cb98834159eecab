"""`encode` and `decode` as they are typed: which quantizer is taken, which is found, and what is shown meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from lic_dist.app.cli import app
from lic_dist.app.commands import codec as commands
from lic_dist.building.records import analytic_record
from lic_dist.codec import open_codec, open_decoder, tiles
from lic_dist.codec.container import Container
from lic_dist.codec.rans import BitstreamError
from lic_dist.models import adapters, packs
from lic_dist.models import checkpoint as checkpoints
from lic_dist.quantization.record import QuantizerRecord
from tests.conftest import picture


@pytest.fixture(scope="module")
def carrying(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with TCQ of 4 and 8 states, RDOQ, and the record of a cache that it was retrained from."""
    loaded = checkpoints.load(str(base))
    weights = np.full(12, 9.0)
    for name, states in (("tcq", 4), ("tcq", 8)):
        loaded.quantizers[f"tcq{states}"] = analytic_record(loaded, name, states, 0.6, 0.2, weights).to_json()
    loaded.quantizers["rdoq"] = analytic_record(loaded, "rdoq", 1, 1.0, 0.1, weights).to_json()
    loaded.quantizers["tcq32-cached"] = analytic_record(loaded, "tcq", 32, 0.7, 0.2, weights).to_json()
    path = tmp_path_factory.mktemp("carrying") / "c.pth.tar"
    checkpoints.save(loaded, path)
    return path


@pytest.fixture()
def photo(tmp_path: Path) -> Path:
    Image.fromarray(picture(4, 100, 150)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_encode_takes_the_carried_tcq_and_decode_finds_it(carrying: Path, photo: Path, tmp_path: Path) -> None:
    file, shown = tmp_path / "a.lic", tmp_path / "b.png"
    said = run("encode", photo, file, "--model", carrying)
    assert said.exit_code == 0 and "with tcq8" in said.output
    codec = open_codec(str(carrying), "tcq8")
    encoded = codec.encode(np.asarray(Image.open(photo)))
    assert file.read_bytes() == encoded.data
    assert run("decode", file, shown, "--model", carrying).exit_code == 0
    assert np.array_equal(np.asarray(Image.open(shown)), codec.picture(encoded))


@pytest.mark.parametrize("name", ["sq", "tcq4", "rdoq", "tcq32-cached"])
def test_decode_finds_every_quantizer_that_the_checkpoint_carries(
    carrying: Path, photo: Path, tmp_path: Path, name: str
) -> None:
    image = np.asarray(Image.open(photo))
    codec = open_codec(str(carrying), name)
    encoded = codec.encode(image)
    assert np.array_equal(open_decoder(encoded.data, str(carrying)).decode(encoded.data), codec.picture(encoded))


def test_encode_says_that_it_took_sq_where_no_tcq_is_carried(base: Path, photo: Path, tmp_path: Path) -> None:
    said = run("encode", photo, tmp_path / "a.lic", "--model", base)
    assert "with sq: the checkpoint carries no TCQ" in said.output
    assert "no TCQ" not in run("encode", photo, tmp_path / "a.lic", "--model", base, "--quantizer", "sq").output


def test_a_quantizer_that_is_not_carried_is_named_by_its_digest(carrying: Path, photo: Path, tmp_path: Path) -> None:
    loaded = checkpoints.load(str(carrying))
    other = replace(analytic_record(loaded, "tcq", 8, 0.5, 0.2, np.full(12, 9.0)), shift=0.1)
    other.save(tmp_path / "other.json")
    file, shown = tmp_path / "a.lic", tmp_path / "b.png"
    assert run("encode", photo, file, "--model", carrying, "--quantizer", tmp_path / "other.json").exit_code == 0
    with pytest.raises(BitstreamError) as caught:
        open_decoder(file.read_bytes(), str(carrying))
    assert other.decoding_digest[:8] in caught.value.message
    assert all(name in caught.value.hint for name in ("sq ", "tcq4 ", "tcq8 ", "rdoq ", "--quantizer RECORD"))
    assert run("decode", file, shown, "--model", carrying, "--quantizer", tmp_path / "other.json").exit_code == 0


def test_a_file_of_another_model_is_said_before_its_quantizer(carrying: Path, photo: Path) -> None:
    data = open_codec("base-small").encode(np.asarray(Image.open(photo))).data
    with pytest.raises(BitstreamError, match="another model"):
        open_decoder(data, str(carrying))
    old = replace(Container.unpack(data), model=bytes.fromhex("ff25ab5b")).pack()
    with pytest.raises(BitstreamError, match=r"made with the base-0\.013 of lic_dist 0\.1\.0") as caught:
        open_decoder(old, "base-0.013")
    assert "the old one is zoo/base-0.013.pth.tar of lic_dist 0.1.0" in caught.value.hint


def test_large_pictures_show_their_progress_to_the_last_tile(
    carrying: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "LARGE", 0)
    monkeypatch.setattr(tiles, "TILE", 64)
    monkeypatch.setattr(tiles, "STRIP", 64)
    file = tmp_path / "a.lic"
    assert "encoding: 2/2 parts" in run("encode", photo, file, "--model", carrying).output
    assert "decoding: 2/2 parts" in run("decode", file, tmp_path / "b.png", "--model", carrying).output
    record = QuantizerRecord.from_json(checkpoints.load(str(carrying)).quantizers["tcq8"])
    replace(record, refine=2).save(tmp_path / "refined.json")
    refined = run("encode", photo, file, "--model", carrying, "--quantizer", tmp_path / "refined.json").output
    assert "encoding: 20/20 parts" in refined  # 6 tiles of g_s three times
    monkeypatch.setattr(commands, "LARGE", 100 * 150)
    assert "parts" not in run("encode", photo, file, "--model", carrying).output


@pytest.fixture(scope="module")
def screen(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of the tiny model that changes its decoder."""
    model = checkpoints.load(str(base)).model
    names = adapters.attach(model, {"decoder": 1}, seed=0)
    with torch.no_grad():
        model.get_parameter(names[0]).add_(0.01)
    deltas = adapters.detach(model)
    path = tmp_path_factory.mktemp("packs") / "screen.pack"
    packs.save(packs.Pack(checkpoints.weights_digest(model), "base", deltas), path)
    return path


def test_a_pack_codes_and_its_files_ask_for_it(base: Path, screen: Path, photo: Path, tmp_path: Path) -> None:
    model, plain, coded = ("--model", base), tmp_path / "plain.lic", tmp_path / "coded.lic"
    assert run("encode", photo, plain, *model).exit_code == 0
    assert run("encode", photo, coded, *model, "--pack", screen).exit_code == 0
    assert len(plain.read_bytes()) == len(coded.read_bytes())  # of g_s alone: the same bits, of another model
    assert run("decode", coded, tmp_path / "a-decoded.png", *model, "--pack", screen).exit_code == 0
    codec = open_codec(f"{base}+{screen}")
    decoded = np.asarray(Image.open(tmp_path / "a-decoded.png"))
    assert np.array_equal(decoded, codec.decode(coded.read_bytes()))

    without = run("decode", coded, tmp_path / "b.png", *model).exception
    assert isinstance(without, BitstreamError) and without.hint is not None and "--pack" in without.hint
    needless = run("decode", plain, tmp_path / "b.png", *model, "--pack", screen).exception
    assert isinstance(needless, BitstreamError) and f"without the pack {screen}" in str(needless)
    other = run("encode", photo, plain, "--model", "base-small", "--pack", screen).exception
    assert "this pack is of another model than base-small" in str(other)
    badly_named = run("encode", photo, plain, *model, "--pack", tmp_path / "screen.bin").exception
    assert "the name of a pack ends in .pack" in str(badly_named)


def test_a_pack_is_described(screen: Path) -> None:
    said = run("models", "describe", screen).output
    assert "a pack of base, weights" in said and "tensors of g_s" in said and "low-rank, rank 1" in said
