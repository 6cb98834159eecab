"""Columns of one number a sample: read object by object, as Zarr reads them, and never altered."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from lic_dist.cache import columns
from lic_dist.cache.folder import Folder
from lic_dist.cache.inspect import inspect
from lic_dist.cache.parallel import read_each
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.storage import Entry
from lic_dist.training.sources import not_held_out


class Counting(Folder):
    """A folder that counts its calls."""

    calls: Counter[str] = Counter()

    def get(self, key: str) -> bytes:
        self.calls[f"get {key.split('/c/')[0]}"] += "/c/" in key
        return super().get(key)

    def listing(self, prefix: str = "") -> Any:
        self.calls[f"listing {prefix}"] += 1
        return super().listing(prefix)

    def entry(self, key: str) -> Entry | None:
        self.calls["entry"] += "/c/" in key
        return super().entry(key)

    def absolute(self) -> Counting:
        return self


@pytest.fixture()
def counting(built: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(Counting, "calls", Counter())
    return Counting(built)


def test_columns_are_read_object_by_object_without_zarr(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zarr takes a millisecond a shard, which is minutes where a million photos are opened for training."""
    with monkeypatch.context() as patch:
        patch.setattr(columns, "plain_spec", lambda *_: None)
        by_zarr = LatentCache.open(counting).samples
    counting.calls.clear()

    def refuse(*_: Any) -> Any:
        raise AssertionError("Zarr reads")

    monkeypatch.setattr(zarr.Array, "__getitem__", refuse)
    cache = LatentCache.open(counting)
    for name, values in cache.samples.items():
        assert np.array_equal(values, by_zarr[name]) and values.dtype == by_zarr[name].dtype
    assert {name: n for name, n in counting.calls.items() if n and name.startswith("get")} == dict.fromkeys(
        (f"get samples/{name}" for name in by_zarr), cache.num_shards
    )
    assert cache.column("quantized/tcq8/bits", [1, 2]).tolist() == [1024, 0, 1024, 1024, 1024, 1024]
    assert not_held_out(cache) == []


def test_no_bit_of_a_column_is_read_altered(built: Path) -> None:
    cache = LatentCache.open(built)
    spec = columns.plain_spec(cache.storage, cache.header, "samples/status")
    assert spec is not None
    data = (built / "samples/status/c/1").read_bytes()
    assert columns.decode(spec, 4, data).tolist() == [0, 3, 0, 0]
    for bit in range(8 * len(data)):
        cut = bytearray(data)
        cut[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            columns.decode(spec, 4, bytes(cut))
    for size in range(len(data)):
        with pytest.raises(ValueError):
            columns.decode(spec, 4, data[:size])


def test_arrays_of_other_codecs_are_left_to_zarr(built: Path) -> None:
    document = built / "samples/status/zarr.json"
    document.write_text(document.read_text().replace('"zstd"', '"lz4"'))
    cache = LatentCache.open(built)
    assert columns.plain_spec(cache.storage, cache.header, "samples/status") is None
    assert columns.plain_spec(cache.storage, cache.header, "samples/nothing") is None
    assert cache.usable.tolist() == [n != 5 for n in range(10)]


def test_inspect_lists_a_store_once(counting: Counting) -> None:
    inspect(counting)
    assert counting.calls["listing "] == 1 and counting.calls["entry"] == 0


def test_a_column_of_most_shards_takes_one_listing_for_all_looks_at_markers(counting: Counting) -> None:
    cache = LatentCache.open(counting)
    cache.column("quantized/tcq8/bits", [0])
    assert counting.calls["listing "] == 0 and counting.calls["entry"] > 0
    counting.calls.clear()
    for _ in range(2):
        assert len(cache.column("quantized/tcq8/bits", [0, 1, 2])) == 10
    assert counting.calls["listing "] == 1 and counting.calls["entry"] == 0


@pytest.mark.parametrize("count", [0, 1, 127, 1000])
def test_objects_are_read_in_order_and_the_first_error_is_raised(count: int) -> None:
    assert read_each(lambda n: n * n, range(count)) == [n * n for n in range(count)]
    with pytest.raises(ZeroDivisionError, match="division"):
        read_each(lambda n: n // (n - 3), range(4))
