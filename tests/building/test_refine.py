"""Refinement in a cache: groups of one store with and without, from photos or from the store, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lic_dist.building.build import build, requantize
from lic_dist.building.job import check_group, group_identity, prepare
from lic_dist.building.latents import encode, quantizer_input, refined
from lic_dist.cache.plan import Geometry
from lic_dist.cache.reader import LatentCache
from lic_dist.codec.refine import VERSION
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.stores import FIXED, contents, experiment

ASKED = {**FIXED, "refine": 2}


def group(found: dict[str, bytes], name: str) -> dict[str, bytes]:
    """The objects of a group's arrays, by what comes after its name."""
    before = f"quantized/{name}/"
    return {key.removeprefix(before): one for key, one in found.items() if key.startswith(before) and "/c/" in key}


@pytest.mark.slow
def test_a_refined_group_lies_beside_a_plain_one_over_the_same_latents(
    base: Path, photos: Path, tmp_path: Path
) -> None:
    plain, store, lean = tmp_path / "plain.zarr", tmp_path / "refined.zarr", tmp_path / "lean.zarr"
    build(experiment(base, photos, plain, quantizer=FIXED))
    build(experiment(base, photos, store, quantizer=ASKED))
    found, other = contents(store), contents(plain)
    assert all(found[key] == other[key] for key in found if key.startswith(("pixels", "latents", "samples")))
    assert group(found, "tcq8") != group(other, "tcq8")
    assert LatentCache.open(plain).header.fingerprint == LatentCache.open(store).header.fingerprint

    requantize(experiment(base, photos, plain, quantizer={**ASKED, "group": "moved"}))
    assert group(contents(plain), "moved") == group(found, "tcq8")
    build(experiment(base, photos, lean, quantizer=ASKED, cache={"store_y": False}))
    assert group(contents(lean), "tcq8") == group(found, "tcq8")

    cache = LatentCache.open(store)
    record, loaded = QuantizerRecord.from_json(cache.record_json("tcq8")), checkpoint.load(str(base))
    read = cache.shard(0, ("pixels", "latents/y", "latents/z", "quantized/tcq8/k", "samples/status"))
    y, z, batch = read["latents/y"], read["latents/z"], cache.header.batch
    aim = refined(loaded.model, read["pixels"], y, z, Quantizer(record), batch)
    own = quantizer_input(loaded.model, aim, z, batch).quantize(Quantizer(record)).k
    good = read["samples/status"] == 0
    assert record.refine == 2 and np.array_equal(own[good], read["quantized/tcq8/k"][good])

    other_decoder = checkpoint.load(str(base))
    with torch.no_grad():
        other_decoder.model.g_s[0].weight *= 1.01
    checkpoint.save(other_decoder, tmp_path / "other.pth.tar")
    build(experiment(tmp_path / "other.pth.tar", photos, plain, quantizer=FIXED))  # a plain group does not see it
    with pytest.raises(LicError, match="decoder_sha256: "):
        build(experiment(tmp_path / "other.pth.tar", photos, store, quantizer=ASKED))


def test_latents_that_are_not_finite_are_reported_and_spoil_no_neighbour() -> None:
    broken = checkpoint.load("base-0.0035")
    record = QuantizerRecord.from_json(broken.quantizers["tcq8"])
    hot, cold = np.full((1, 3, 64, 64), 255, np.uint8), np.zeros((1, 3, 64, 64), np.uint8)
    with torch.no_grad():
        first = next(one for one in broken.model.g_a.modules() if isinstance(one, torch.nn.Conv2d))
        first.bias.zero_()
        first.weight.fill_(1e36)
    quantizer, aims = Quantizer(record), []
    for pixels in (np.concatenate([cold, hot]), np.concatenate([cold, cold])):
        latents, overflow = encode(broken.model, pixels, 2)
        aims.append(refined(broken.model, pixels, latents.y, latents.z, quantizer, 2))
    assert list(encode(broken.model, np.concatenate([cold, hot]), 2)[1]) == [False, True]
    assert np.isfinite(aims[0]).all() and aims[0][0].tobytes() == aims[1][0].tobytes()


def test_a_group_refined_by_an_older_version_is_read_and_not_gone_on_with() -> None:
    loaded = checkpoint.load("base-0.0035")
    record = replace(QuantizerRecord.from_json(loaded.quantizers["tcq8"]), refine=2)
    geometry = Geometry(crop=64, y_channels=loaded.spec.M, y_size=4, z_channels=loaded.spec.N, z_size=1)
    identity = group_identity(loaded, record, geometry)
    assert identity["refinement"] == VERSION
    cache: Any = SimpleNamespace(
        storage="a.zarr",
        record_json=lambda group: record.to_json(),
        header=SimpleNamespace(geometry=geometry),
        group_attributes=lambda group: {"identity": identity},
    )
    check_group(cache, loaded, "tcq8", grows=True)
    del identity["refinement"]
    check_group(cache, loaded, "tcq8")
    with pytest.raises(LicError, match="refinement: store has nothing, this job has 2"):
        check_group(cache, loaded, "tcq8", grows=True)


def test_a_repair_needs_no_quantizer(base: Path, photos: Path, tmp_path: Path) -> None:
    asked = experiment(base, photos, tmp_path / "a.zarr", quantizer=ASKED)
    none = asked.model_copy(update={"quantizer": None})
    assert prepare(asked).plan.fingerprint == prepare(none).plan.fingerprint


@pytest.mark.slow
def test_calibration_adapts_tables_to_what_refinement_makes(base: Path, photos: Path, tmp_path: Path) -> None:
    """A round more than without, and less L than that of the last one before."""
    asked = {"name": "tcq", "states": 8, "group": "tcq8", "lambda_scale": 0.5, "step": 0.6, "shift": 0.0}
    build(experiment(base, photos, tmp_path / "a.zarr", quantizer={**asked, "refine": 4}))
    build(experiment(base, photos, tmp_path / "b.zarr", quantizer=asked))
    moved, plain = (
        QuantizerRecord.from_json(LatentCache.open(tmp_path / one).record_json("tcq8")).notes
        for one in ("a.zarr", "b.zarr")
    )
    assert moved["adaptation"][:-1] == plain["adaptation"] and moved["calibration"] == plain["calibration"]
    assert moved["L"] == moved["adaptation"][-1]["L"] < 0.995 * plain["L"]
