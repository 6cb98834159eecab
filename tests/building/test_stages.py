"""Stores of models of several stages, whose means depend on y_hat: built, quantized again, calibrated, repaired."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building.base_summary import base_summary
from lic_dist.building.build import build, repair, requantize
from lic_dist.building.estimate import describe, estimate
from lic_dist.building.job import check_cache, group_identity, load_parent, prepare
from lic_dist.building.latents import inputs_of
from lic_dist.building.pilot import record_location
from lic_dist.cache import store
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.codec import walk
from lic_dist.codec.codec import ImageCodec
from lic_dist.data import images
from lic_dist.data.photo import FAULTS
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.models.protocol import Elements
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.building.test_kill import assert_as_never_interrupted, build_quietly, markers_of
from tests.codec.test_families import SEVERAL
from tests.codec.test_families import made as made_with_random_weights
from tests.families import CHECKERED, SLICED, Checkered
from tests.stores import FIXED, contents, damage, experiment

pytestmark = pytest.mark.slow  # two families are trained
FAMILIES = (CHECKERED, SLICED)
BATCH = 4  # of `experiment`
Asked = Callable[..., config.Experiment]


@pytest.fixture(scope="module")
def asked(checkpoints: dict[str, Path], photos: Path) -> Asked:
    """Makes the experiment of a family and a store."""

    def made(family: str, path: Path, **changes: dict) -> config.Experiment:
        changes = {"quantizer": FIXED, **changes}
        model = {"architecture": family}
        return experiment(checkpoints[family], photos, path, **{"model": model, **changes})

    return made


@pytest.fixture(scope="module")
def staged(asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of each family. Not to be changed: see `copied`."""
    folder = tmp_path_factory.mktemp("stores")
    for number, family in enumerate(FAMILIES):
        build(asked(family, folder / f"{number}.zarr"))
    return {family: folder / f"{number}.zarr" for number, family in enumerate(FAMILIES)}


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder / source.name)
    shutil.copy(source.with_suffix(".manifest.parquet"), folder)
    return folder / source.name


def assert_walked(path: Path, family: Any, group: str = "tcq8") -> None:
    """Every shard holds what a walk of its y finds, in batches of the plan filled up with zeros."""
    cache, record = LatentCache.open(path), QuantizerRecord.from_json(LatentCache.open(path).record_json(group))
    side, quantizer = family.sides[0], Quantizer(record)
    for shard in range(cache.num_shards):
        fields = ("k", "bits", "distortion")
        names = ("latents/y", "latents/z", "samples/status", *(f"quantized/{group}/{name}" for name in fields))
        y, z, status, k, bits, distortion = cache.shard(shard, names).values()
        for first in range(0, len(y), BATCH):
            rows = slice(first, first + BATCH)
            filled = [np.zeros((BATCH, *one.shape[1:]), one.dtype) for one in (y, z)]
            for whole, part in zip(filled, (y[rows], z[rows]), strict=True):
                whole[: len(part)] = part
            with torch.no_grad():
                z_hat = side.dequantize(torch.from_numpy(filled[1]))
                coded = walk.search(family, (z_hat,), torch.from_numpy(filled[0]).float(), quantizer)
            of_y = walk.channel_bits(family, quantizer, coded.k, coded.level).sum(1)
            channels = np.broadcast_to(np.arange(z.shape[1])[:, None, None], z.shape[1:])
            of_z = [record.z_tables.bits(one.astype(np.int32), channels).sum() for one in filled[1]]
            good = status[rows] == 0
            count = len(good)
            assert np.array_equal(k[rows], coded.k.numpy()[:count] * good[:, None, None, None])
            np.testing.assert_allclose(bits[rows], ((of_y + of_z)[:count] * good), rtol=1e-6)
            expected = coded.error.numpy() @ record.weights.astype(float)
            np.testing.assert_allclose(distortion[rows], expected[:count] * good, rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_store_holds_what_a_walk_of_its_y_finds(name: str, asked: Asked, staged: dict[str, Path]) -> None:
    cache, parent = LatentCache.open(staged[name]), load_parent(asked(name, staged[name]))
    assert_walked(staged[name], parent.codec)
    assert verify(staged[name]) == []
    check_cache(cache, parent, "tcq8")
    k = cache.load(["quantized/tcq8/k"])["quantized/tcq8/k"]
    assert (k != 0).mean() > 0.05
    y_hat = inputs_of(parent.model, *_latents(cache), BATCH).quantize(_quantizer(cache)).y_hat
    again = walk.dequantize(
        parent.codec, (parent.codec.sides[0].dequantize(torch.from_numpy(_latents(cache)[1])),), torch.from_numpy(k),
        _quantizer(cache),
    )  # fmt: skip
    np.testing.assert_allclose(again.detach().numpy(), y_hat, atol=1e-5)


def _latents(cache: LatentCache) -> tuple[np.ndarray, np.ndarray]:
    read = cache.load(("latents/y", "latents/z"))
    return read["latents/y"], read["latents/z"]


def _quantizer(cache: LatentCache) -> Quantizer:
    return Quantizer(QuantizerRecord.from_json(cache.record_json("tcq8")))


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_every_family_of_several_stages_is_built(name: str, photos: Path, tmp_path: Path) -> None:
    checkpoint.save(made_with_random_weights(name), tmp_path / "model.pth.tar")
    build(experiment(tmp_path / "model.pth.tar", photos, tmp_path / "a.zarr", quantizer=FIXED))
    assert_walked(tmp_path / "a.zarr", checkpoint.load(str(tmp_path / "model.pth.tar")).codec)


def test_a_faulty_sample_is_zero_and_moves_no_neighbour(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = images.read_crops

    def read(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        pixels, status = original(*arguments)
        status[1::3] = FAULTS.index("truncated")
        return pixels, status

    monkeypatch.setattr(images, "read_crops", read)
    assert build(asked(CHECKERED, tmp_path / "a.zarr", images={"tolerate": 1.0})).faults == {"truncated": 9}
    assert_walked(tmp_path / "a.zarr", load_parent(asked(CHECKERED, tmp_path / "a.zarr")).codec)


@pytest.mark.parametrize("name", FAMILIES)
def test_requantizing_from_y_equals_building(
    name: str, asked: Asked, staged: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = copied(staged[name], tmp_path), {"quantizer": {**FIXED, "step": 0.6, "group": "finer"}}
    build(asked(name, tmp_path / "built.zarr", **other))
    monkeypatch.setattr("lic_dist.building.latents.analyse", lambda *_: pytest.fail("the encoder ran"))
    monkeypatch.setattr("lic_dist.data.images.read_crops", lambda *_: pytest.fail("photos were read"))
    assert requantize(asked(name, path, **other)).shards_built == 3
    caches = LatentCache.open(path), LatentCache.open(tmp_path / "built.zarr")
    for array in ("k", "bits", "distortion"):
        key = f"quantized/finer/{array}"
        ours, theirs = (cache.load([key])[key] for cache in caches)
        assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_any_number_of_workers_makes_the_same_bytes(
    asked: Asked, staged: dict[str, Path], tmp_path: Path, forked_workers: None
) -> None:
    path = copied(staged[CHECKERED], tmp_path)
    before = contents(path)
    for shard in range(3):
        store.invalidate_shard(path, shard, "tcq8")
        damage(path / f"quantized/tcq8/k/c/{shard}/0/0/0", "remove")
    assert requantize(asked(CHECKERED, path, engine={"encoders": 2})).shards_built == 3  # processes of this machine
    assert contents(path) == before


def test_a_build_that_is_cut_goes_on_to_the_same_bytes(
    asked: Asked, staged: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write, written = tmp_path / "a.zarr", store.write_shard, []

    def dying(*arguments: Any) -> Any:
        written.append(arguments[2])
        if len(written) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(store, "write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        build(asked(SLICED, path))
    store.invalidate_shard(path, 0, "tcq8")  # has latents, but no indices
    build(asked(SLICED, path))
    assert written == [0, 1, 1, 2, 0]
    assert contents(path) == contents(staged[SLICED])


@pytest.mark.slow
def test_killed_again_and_again_the_store_is_the_same(asked: Asked, staged: dict[str, Path], tmp_path: Path) -> None:
    path, done = tmp_path / "a.zarr", dict[Path, tuple[int, bytes]]()
    document = asked(CHECKERED, path).model_dump(mode="json")
    for _ in range(20):
        process = multiprocessing.get_context("forkserver").Process(target=build_quietly, args=(document,))
        process.start()
        while len(markers_of(path)) == len(done) and process.is_alive():
            time.sleep(0.005)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        found = markers_of(path)
        assert done.items() <= found.items()  # what has a marker is not touched again
        done = found
        if len(done) == 6:
            break
    build(asked(CHECKERED, path))
    assert_as_never_interrupted(path, staged[CHECKERED])


def test_repair_makes_what_is_damaged_and_latents_without_a_walk(
    asked: Asked, staged: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(staged[SLICED], tmp_path)
    before = contents(path)
    damage(path / "latents/y/c/1/0/0/0", "flip")
    damage(path / "quantized/tcq8/k/c/2/0/0/0", "cut")
    searched, search = [], walk.search
    monkeypatch.setattr(walk, "search", lambda *given: searched.append(1) or search(*given))
    assert repair(asked(SLICED, path), verify(path)) == 2  # y as it was: its indices still count
    assert contents(path) == before and verify(path) == []
    assert len(searched) == 2  # the batches of one shard


def test_a_second_group_without_y_comes_from_the_stored_pixels(
    asked: Asked, staged: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = {"cache": {"store_y": False}}
    build(asked(CHECKERED, tmp_path / "a.zarr", **bare))
    more = asked(CHECKERED, tmp_path / "a.zarr", quantizer={**FIXED, "group": "again"}, **bare)
    around, key = record_location(prepare(more).storage, "again")
    around.put(key, LatentCache.open(staged[CHECKERED]).record_json("tcq8").encode())
    monkeypatch.setattr("lic_dist.data.images.read_crops", lambda *_: pytest.fail("photos were read"))
    assert build(more).shards_built == 3
    cache = LatentCache.open(tmp_path / "a.zarr")
    read = cache.load(["quantized/again/k", "quantized/tcq8/k"])
    assert np.array_equal(read["quantized/again/k"], read["quantized/tcq8/k"])


@pytest.mark.parametrize("name", FAMILIES)
def test_bits_of_a_store_are_those_of_the_coder(name: str, asked: Asked, staged: dict[str, Path]) -> None:
    parent, cache = load_parent(asked(name, staged[name])), LatentCache.open(staged[name])
    codec = ImageCodec(parent.model, _quantizer(cache).record)
    read = cache.load(["pixels", "quantized/tcq8/k", "quantized/tcq8/bits"], np.arange(4))
    for pixels, k, bits in zip(*read.values(), strict=True):
        encoded = codec.encode(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        assert (encoded.k == k.reshape(encoded.k.shape)).mean() > 0.99  # of other batches, so that ties may differ
        assert codec.channel_bits(encoded).sum() + codec.side_bits(encoded) == pytest.approx(bits, rel=5e-3)
        assert -1 < encoded.coded_bits - bits < 160  # two streams are flushed


def test_another_layout_is_another_group(
    asked: Asked, staged: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, parent = LatentCache.open(staged[CHECKERED]), load_parent(asked(CHECKERED, staged[CHECKERED]))
    layout = Checkered.layout
    monkeypatch.setattr(Checkered, "layout", lambda self, h, w: layout(self, h, w)[::-1])
    with pytest.raises(LicError, match="layout_sha256"):
        check_cache(cache, parent, "tcq8")
    monkeypatch.setattr(Checkered, "layout", lambda self, h, w: (Elements(),))
    with pytest.raises(LicError, match="layout_sha256: store has .*, this job has nothing"):
        check_cache(cache, parent, "tcq8")


def test_context_networks_are_in_the_identity_of_a_group(asked: Asked, staged: dict[str, Path]) -> None:
    cache, parent = LatentCache.open(staged[SLICED]), load_parent(asked(SLICED, staged[SLICED]))
    with torch.no_grad():
        parent.codec.module.residual_second.bias.add_(1e-3)
    with pytest.raises(LicError, match="entropy_sha256") as caught:
        check_cache(cache, parent, "tcq8")
    assert "encoder" not in str(caught.value)


def test_the_identity_of_one_stage_says_no_layout(made: Path, base: Path, photos: Path) -> None:
    cache, parent = LatentCache.open(made), load_parent(experiment(base, photos, made))
    found = group_identity(parent, _quantizer(cache).record, cache.header.geometry)
    assert set(found) == {"record_sha256", "entropy_sha256"}


def test_a_plan_and_the_line_on_the_base_speak_of_the_walk(
    asked: Asked, staged: dict[str, Path], tmp_path: Path
) -> None:
    job = prepare(asked(SLICED, tmp_path / "a.zarr", engine={"name": "ray", "encoders": 3, "num_cpus": 4}))
    found = estimate(job)
    assert found.workers == {"read": 1, "code": 3} and set(found.seconds) == {"read", "code"}
    assert any("code" in line for line in describe(found))
    assert "SQ, 6 held-out crops" in base_summary(job)
    json.dumps(found.workers)


def test_what_a_family_does_not_support_is_refused_before_anything_is_built(asked: Asked, tmp_path: Path) -> None:
    with pytest.raises(LicError, match="checkered does not support refinement"):
        build(asked(CHECKERED, tmp_path / "a.zarr", quantizer={**FIXED, "refine": 2}))
    assert not (tmp_path / "a.zarr").exists()
