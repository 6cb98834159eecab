"""Loader processes where /dev/shm is small, as in containers."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lic_dist.cache.order import Order
from lic_dist.cache.reader import LatentCache
from lic_dist.data.manifest import scan
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training import photos as photo_crops
from lic_dist.training import shared_memory
from lic_dist.training.distributed import Ranks
from lic_dist.training.samples import StreamedData


@pytest.fixture()
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SHARED", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=65536))


def test_a_finetuning_with_processes_is_refused_in_one_line(small: None, made: Path) -> None:
    import torch

    cache = LatentCache.open(str(made))
    order = Order(cache.indices(held_out=False), cache.header.shard, 8, 0, 2)
    quantizer = Quantizer(QuantizerRecord.from_json(cache.record_json("tcq8")))
    ranks = Ranks(0, 1, torch.device("cpu"))
    with pytest.raises(LicError, match="0.1 MB free; 2 loader processes hand batches through 0.") as caught:
        StreamedData(cache, {"tcq8": quantizer}, False, order, 2).batches(0, ranks)
    assert "workers: 0" in caught.value.hint and "--shm-size" in caught.value.hint
    batches = StreamedData(cache, {"tcq8": quantizer}, False, order, 0).batches(0, ranks)  # threads need none
    assert len(next(batches).sample) == 8
    batches.close()


def test_a_base_training_decodes_in_its_own_process(small: None, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_crops, "IN_MEMORY", 0)
    crops = photo_crops.RandomCrops(open_source(photos), list(scan(photos)), 64, 0)
    assert photo_crops.batches(crops, 0, 2, 8, slice(None)).num_workers == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    assert photo_crops.batches(crops, 0, 2, 8, slice(None)).num_workers == photo_crops.PROCESSES


@pytest.mark.parametrize(("free", "short"), [(999, True), (1000, False)])
def test_each_process_makes_two_batches_ahead(
    free: int, short: bool, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert (shared_memory.shortage(200, 2) is not None) == short
    assert shared_memory.shortage(10**9, 0) is None
