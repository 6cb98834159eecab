"""Decoders retrained on progressive files that are cut: groups of bit planes at several lambdas of one cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lic_dist import config
from lic_dist.building.build import build, requantize
from lic_dist.building.calibrate import channel_weights
from lic_dist.building.latents import Latents, inputs_of
from lic_dist.cache.reader import LatentCache
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.progressive import ProgressiveCodec
from lic_dist.codec.records import local_record, preferred_quantizer
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.parts import encoder_digest, model_digest
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.finetune import finetune
from tests import stores
from tests.conftest import picture

pytestmark = pytest.mark.slow
BASE, CUTS = "base-small", (0.05, 0.005)  # lambdas
GROUPS = [f"embedded@{lmbda:g}" for lmbda in CUTS]
SECTION = {"groups": GROUPS, "recipe": "decoder", "steps": 4, "batch": 4, "lr": 1e-6, "warmup": 1, "tolerance": 1}


@pytest.fixture(scope="module")
def cut_store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuts") / "a.zarr"
    build(experiment(photos, path, CUTS[0]))
    requantize(experiment(photos, path, CUTS[1]))
    return path


def experiment(photos: Path, store: Path, lmbda: float, **sections: Any) -> config.Experiment:
    quantizer = {"name": "embedded", "group": "auto", "lmbda": lmbda}
    return stores.experiment(Path(BASE), photos, store, quantizer=quantizer, **sections)


def test_a_decoder_learns_cuts_of_one_cache(photos: Path, cut_store: Path, tmp_path: Path) -> None:
    cache = LatentCache.open(str(cut_store))
    bits = [cache.load((f"quantized/{group}/bits",), cache.indices(False)) for group in GROUPS]
    more, less = (float(next(iter(found.values())).sum()) for found in bits)
    assert more > less > 0

    job = experiment(photos, cut_store, CUTS[0], finetune={**SECTION, "out": str(tmp_path / "out")})
    made, parent = checkpoint.load(str(finetune(job))), checkpoint.load(BASE)
    assert encoder_digest(made.model) == encoder_digest(parent.model)
    assert model_digest(made.model) != model_digest(parent.model)
    assert set(GROUPS) <= set(made.quantizers)
    assert preferred_quantizer(made, progressive=True) == GROUPS[0] and preferred_quantizer(made) == "sq"

    sizes = []
    for group in GROUPS:
        record = local_record(made, group)
        assert record.digest == QuantizerRecord.from_json(cache.record_json(group)).digest
        with pytest.raises(LicError, match="of progressive files"):
            ImageCodec(made.model, record)
        codec = ProgressiveCodec(made.model, record)
        coded = codec.encode(picture(3, 64, 96))
        decoded = codec.decode_latents(coded.data)
        assert np.array_equal(decoded.k, coded.k)
        sizes.append(len(coded.data))
    assert sizes[0] > sizes[1]

    hyper = {**SECTION, "recipe": "decoder+hyper", "out": str(tmp_path / "hyper")}
    with pytest.raises(UsageError, match="the decoder alone trains"):
        finetune(experiment(photos, cut_store, CUTS[0], finetune=hyper))


def test_what_orders_the_symbols_is_known_as_well_as_what_a_search_weighs(cut_store: Path) -> None:
    cache, base = LatentCache.open(str(cut_store)), checkpoint.load(BASE)
    samples = Latents(*cache.load(("pixels", "latents/y", "latents/z"), cache.indices(False)[:4]).values())
    inputs = inputs_of(base.model, samples.y, samples.z, 4)
    of_planes, of_tcq = (
        channel_weights(base, config.Quantizer(name=name), inputs, samples)[0] for name in ("embedded", "tcq")
    )
    assert np.array_equal(of_planes, of_tcq)


@pytest.mark.parametrize("key, value", [("step", 2.0), ("shift", 0.1), ("spread", 0.1), ("refine", 4)])
def test_bit_planes_have_no_settings(photos: Path, cut_store: Path, key: str, value: float) -> None:
    asked = stores.experiment(Path(BASE), photos, cut_store, quantizer={"name": "embedded", "group": "b", key: value})
    with pytest.raises(UsageError, match=f"quantizer.{key}: bit planes are the same everywhere"):
        requantize(asked)


def test_bit_planes_are_of_one_stage(cut_store: Path) -> None:
    record = QuantizerRecord.from_json(LatentCache.open(str(cut_store)).record_json(GROUPS[0]))
    r, level = np.zeros((1, 12), np.float32), np.zeros((1, 12), np.uint8)
    with pytest.raises(LicError, match="in one stage"):
        Quantizer(record).quantize(r, level, channels=level)
