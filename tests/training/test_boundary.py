"""The network for edges of blocks: what it is trained on, exact resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lic_dist.building.build import build
from lic_dist.cache.reader import LatentCache
from lic_dist.codec.block_codec import BlockCodec, of_bytes
from lic_dist.data.photo import SQUARE
from lic_dist.errors import UsageError
from lic_dist.models import checkpoint
from lic_dist.models.boundary import Boundary, mended
from lic_dist.models.parts import model_digest
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training import boundary, loop
from lic_dist.training.finetune import finetune
from tests import stores
from tests.conftest import Once, dying_at

CROP, SIDE = 64, 64 * SQUARE
FEW = {"recipe": "boundary", "steps": 6, "evaluate_every": 3, "batch": 4, "lr": 4e-3}


@pytest.fixture(scope="module")
def squares(base: Path, photos: Path, once: Once) -> Path:
    """A store of squares of `photos` by `base`. Not to be changed."""

    def built(folder: Path) -> None:
        images = {"squares": True, "variations": 4}
        build(stores.experiment(base, photos, folder / "a.zarr", images=images, quantizer=stores.FIXED))

    return once("squares", built) / "a.zarr"


def train(base: Path, photos: Path, store: Path, out: Path, **keys: object) -> Path:
    given = {**FEW, "out": str(out), **keys}
    return finetune(stores.experiment(base, photos, store, quantizer=stores.FIXED, finetune=given))


@pytest.mark.slow
def test_squares_are_pieces_of_photos_in_blocks(base: Path, photos: Path, squares: Path) -> None:
    parent, cache = checkpoint.load(str(base)), LatentCache.open(squares)
    record = QuantizerRecord.from_json(cache.record_json("tcq8"))
    codec, mirrored = BlockCodec(parent.model, record, threads=1), 0
    for held_out, count in ((False, 6), (True, 2)):
        found = boundary._decoded(cache, parent, record, "tcq8", held_out, 0)
        assert len(found.paths) == count and found.decoded.shape == (count, 3, SIDE, SIDE)
        for number, path in enumerate(found.paths):
            rows = cache.samples["source"] == path
            y, x = (int(cache.samples[name][rows].min()) for name in ("crop_y", "crop_x"))
            flip = bool(cache.samples["flip"][rows][0])
            photo = np.asarray(Image.open(photos / path))[y : y + SIDE, x : x + SIDE]
            shown = np.ascontiguousarray(photo[:, ::-1] if flip else photo)
            assert np.array_equal(found.original[number].transpose(1, 2, 0), shown)
            encoded = codec.encode(shown, CROP)
            decoded = codec.decode(of_bytes(encoded.data)).astype(int)
            assert np.abs(decoded - found.decoded[number].transpose(1, 2, 0)).mean() < 0.02
            streams = sum(size - 2 for size in encoded.head.sizes)  # and states, 4 to 5 bytes more than they tell
            assert 8 * (streams - 8 * SQUARE**2) < found.bits[number] < 8 * streams
            mirrored += flip
    assert 0 < mirrored < 8


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(
    base: Path, photos: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = checkpoint.load(str(train(base, photos, squares, tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "take_step", dying_at(5))
        train(base, photos, squares, tmp_path / "killed")
    resumed = checkpoint.load(str(train(base, photos, squares, tmp_path / "killed")))
    assert len(whole.boundary) == 6 and all(
        torch.equal(resumed.boundary[name], value) for name, value in whole.boundary.items()
    )
    parent, entry = checkpoint.load(str(base)), whole.history[-1]
    assert model_digest(whole.model) == model_digest(parent.model)
    assert entry["held_out_best"]["L"] < entry["held_out_before"]["L"] and entry["best_step"] > 0
    assert entry["held_out_best"]["bpp"] == entry["held_out_before"]["bpp"]
    cached = LatentCache.open(squares).record_json("tcq8")
    assert QuantizerRecord.from_json(whole.quantizers["tcq8"]).digest == QuantizerRecord.from_json(cached).digest


@pytest.mark.slow
def test_crops_that_were_coded_whole_train_a_control(
    base: Path, photos: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(base, photos, made, tmp_path, steps=2, evaluate_every=2)
    assert "coded whole: a control" in capsys.readouterr().out and checkpoint.load(str(out)).boundary


@pytest.mark.parametrize(
    ("keys", "named"),
    [({"rounds": 2}, "one cache"), ({"distortion": "ms-ssim"}, "MSE"), ({"latents": "noise"}, "MSE")],
)
def test_what_does_not_fit_is_refused(
    base: Path, photos: Path, made: Path, tmp_path: Path, keys: dict[str, object], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        train(base, photos, made, tmp_path, **keys)


def test_of_many_squares_an_even_part_is_taken() -> None:
    paths = [f"a/{number % 7}.png" for number in range(700)] + [f"b/{number}.png" for number in range(300)]
    found = boundary.evenly(paths, 100, 3)
    assert len(set(found.tolist())) == 100 and (np.diff(found) > 0).all()
    taken = [paths[number] for number in found]
    assert sum(one.startswith("a/") for one in taken) == 70
    assert all(9 <= taken.count(f"a/{number}.png") <= 11 for number in range(7))
    assert np.array_equal(found, boundary.evenly(paths, 100, 3))
    assert not np.array_equal(found, boundary.evenly(paths, 100, 4))
    assert boundary.evenly(paths, 1000, 3).tolist() == list(range(1000))


@pytest.mark.slow
def test_of_a_large_cache_it_says_how_many_squares_it_takes(
    base: Path,
    photos: Path,
    squares: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(boundary, "MOST_SQUARES", 4)
    train(base, photos, squares, tmp_path, steps=2, evaluate_every=2)
    assert "trains on 4 of 6 squares, and is judged by 2 of 2" in capsys.readouterr().out


def test_a_fresh_network_changes_nothing_and_a_trained_one_edges_alone() -> None:
    squares = torch.rand(2, 3, 64, 64) * 255
    network = Boundary()
    assert torch.equal(mended(network, squares), squares)
    torch.nn.init.ones_(network.layers[-1].bias)
    changed = (mended(network, squares) - squares).round()
    assert (changed[:, :, 28:36, 28:36] == 16).all()  # both edges' corrections, of 8 each
    assert (changed[:, :, :28, 28:36] == 8).all() and (changed[:, :, 28:36, 36:] == 8).all()
    assert not changed[:, :, :28, :28].any() and not changed[:, :, 36:, 36:].any()
