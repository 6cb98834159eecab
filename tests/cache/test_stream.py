"""Streams, datasets and views of a cache: exact for any ranks, workers and resumption; nothing read twice or lost."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lic_dist.cache import store
from lic_dist.cache.order import Order, default_streams
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.stream import ShardStream
from lic_dist.cache.torch_data import CachedSamples, merge_workers
from lic_dist.data.photo import FAULTS
from lic_dist.errors import LicError, UsageError
from tests.stores import create, damage, make_plan, synthetic

ARRAYS = ("pixels", "latents/z", "quantized/tcq8/k")
SAMPLES, SHARD = 54, 4
LOST = 5  # a shard all of whose samples are faulty


def make_store(path: Path, samples: int = SAMPLES, shard: int = SHARD) -> Path:
    """The last two samples are held out; sample 1 of shard 1 is faulty, and all of shard LOST."""
    planned = make_plan(samples, shard)
    create(path, planned)
    for number in range(planned.num_shards):
        crops = planned.crops_of(number)
        arrays = synthetic(len(crops), number, faulty=1 if number == 1 else None)
        if number == LOST:
            arrays["samples/status"][:] = FAULTS.index("truncated")
        store.write_shard(path, planned.fingerprint, number, arrays, crops)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stream") / "a.zarr")


@pytest.fixture(scope="module")
def cache(path: Path) -> LatentCache:
    return LatentCache.open(path)


def open_stream(cache: LatentCache, arrays: tuple[str, ...], batch: int, seed: int = 0, **options) -> ShardStream:
    return cache.stream(arrays, batch, seed, **options).stream


def numbers(cache: LatentCache, count: int, **options) -> np.ndarray:
    """Sample numbers [count, batch] of the first batches."""
    return np.stack([batch["sample"] for batch in islice(open_stream(cache, (), **options), count)])


def stream_numbers(order: Order, stream: int, count: int) -> np.ndarray:
    buffers = order.buffers(stream)
    taken: list[int] = []
    while len(taken) < count:
        taken += next(buffers).samples.tolist()
    return np.array(taken[:count])


parts = st.builds(
    lambda chosen, length: (np.flatnonzero(np.array(chosen)), length),
    st.lists(st.booleans(), min_size=1, max_size=60).filter(any),
    st.integers(1, 9),
)


# order


@settings(max_examples=60, deadline=None)
@given(parts, st.integers(1, 24), st.integers(0, 3), st.integers(0, 40))
@pytest.mark.slow
def test_batches_are_the_shares_of_streams_from_any_step(part, batch, seed, step):
    samples, length = part
    order = Order(samples, length, batch, seed)
    expected = [stream_numbers(order, stream, (step + 2) * order.share) for stream in range(order.streams)]
    for stream, whole in enumerate(expected):
        first = step * order.share
        buffers = order.buffers(stream, first)
        buffer = next(buffers)
        served = buffer.samples[first - buffer.start :].tolist()
        while len(served) < 2 * order.share:
            following = next(buffers)
            assert following.start == first + len(served)
            served += following.samples.tolist()
        assert served[: 2 * order.share] == whole[first:].tolist()


@settings(max_examples=60, deadline=None)
@given(parts, st.integers(1, 24), st.integers(0, 3), st.integers(1, 4))
def test_an_epoch_is_every_sample_once_and_the_deal_stays_even(part, batch, seed, epochs):
    samples, length = part
    order = Order(samples, length, batch, seed)
    shards, streams = len(order.shards), order.streams
    buffers = [order.buffers(stream) for stream in range(streams)]
    dealt = np.zeros(streams, int)
    for epoch in range(epochs):
        seen: Counter[int] = Counter()
        for stream in range(streams):
            due = dealt[stream] + len(range((stream - epoch * shards) % streams, shards, streams))
            while dealt[stream] < due:
                buffer = next(buffers[stream])
                assert len(buffer.shards) <= order.buffer
                assert set(buffer.samples) == set(samples[np.isin(samples // length, buffer.shards)])
                seen.update(buffer.samples.tolist())
                dealt[stream] += len(buffer.shards)
            assert dealt[stream] == due  # no buffer reaches into the next epoch
        assert seen == Counter(samples.tolist())
        assert dealt.max() - dealt.min() <= 1


def test_numbers_of_streams():
    assert [default_streams(batch, 1000) for batch in (1, 8, 16, 24, 17, 64)] == [1, 8, 16, 12, 1, 16]
    assert [default_streams(16, shards) for shards in (1, 3, 5, 15)] == [1, 2, 4, 8]
    orders = [Order(np.arange(64 * 100), 64, batch) for batch in (16, 8, 1)]
    assert [(order.streams, order.buffer) for order in orders] == [(16, 1), (8, 2), (1, 16)]


@pytest.mark.slow
def test_few_shards_have_few_streams_and_say_so_to_many_ranks(tmp_path):
    small = LatentCache.open(make_store(tmp_path / "a.zarr", samples=11))
    stream = open_stream(small, (), batch=8)
    assert stream.order.streams == 2
    assert sorted(numbers(small, 1, batch=8)[0].tolist()) == [0, 1, 2, 3, 4, 6, 7, 8]
    with pytest.raises(UsageError, match="2 streams do not divide among 4 ranks.*only 3 shards with samples"):
        open_stream(small, (), batch=8, world=4)
    with pytest.raises(UsageError, match="4 streams, but only 3 shards"):
        open_stream(small, (), batch=8, streams=4)
    with pytest.raises(UsageError, match="3 streams do not divide a batch of 8"):
        open_stream(small, (), batch=8, streams=3)
    with pytest.raises(UsageError, match=r"8 streams do not divide among 3 ranks \(set streams to a multiple of 3"):
        open_stream(LatentCache.open(make_store(tmp_path / "b.zarr")), (), batch=24, streams=8, world=3)
    with pytest.raises(UsageError, match="3 workers for 2 streams"):
        stream.for_worker(0, 3)


def test_a_part_without_samples_is_an_error(tmp_path):
    planned = make_plan()
    create(tmp_path / "a.zarr", planned)
    with pytest.raises(LicError, match="no usable samples"):
        open_stream(LatentCache.open(tmp_path / "a.zarr"), (), batch=2)


# reading


def test_batches_hold_what_is_stored(cache):
    training = cache.indices(held_out=False)
    stored = cache.load(ARRAYS, training)
    for batch in islice(open_stream(cache, ARRAYS, batch=6, seed=3), 20):
        assert set(batch) == {"sample", *ARRAYS}
        places = np.searchsorted(training, batch["sample"])
        for name in ARRAYS:
            assert batch[name].dtype == stored[name].dtype
            np.testing.assert_array_equal(batch[name], stored[name][places])


def test_every_shard_is_read_once_an_epoch_and_no_other(cache, monkeypatch):
    reads = []
    monkeypatch.setattr(
        LatentCache, "shard", lambda self, shard, arrays: reads.append(shard) or read(self, shard, arrays)
    )
    training = cache.indices(held_out=False)
    shards = np.unique(training // SHARD)
    assert len(shards) == 12 and LOST not in shards and len(training) == 47
    stream = open_stream(cache, ("latents/z",), batch=1)  # one stream: its epoch is 47 steps
    batches = iter(stream)
    for epoch in range(1, 4):
        seen = np.concatenate([batch["sample"] for batch in islice(batches, len(training))])
        assert sorted(seen) == training.tolist()
        assert stream.reads == epoch * len(shards)
    batches.close()
    reads.clear()
    stream = open_stream(cache, ("latents/z",), batch=4, streams=4, buffer=1)
    batches = iter(stream)
    for _ in range(9):
        next(batches)
    batches.close()
    assert stream.reads == 12 and set(Counter(reads[:12]).values()) == {1}
    assert len(reads) <= 12 + len(stream.owned) * stream.order.buffer


read = LatentCache.shard


def test_resuming_reads_only_the_buffers_it_begins_in(cache, monkeypatch):
    reads = []
    monkeypatch.setattr(
        LatentCache, "shard", lambda self, shard, arrays: reads.append(shard) or read(self, shard, arrays)
    )
    batches = iter(open_stream(cache, ("latents/z",), batch=4, streams=4, buffer=1, step=100))
    next(batches)
    batches.close()
    assert 4 <= len(reads) <= 8


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(step=st.integers(0, 60), batch=st.sampled_from([1, 4, 6, 12]), seed=st.integers(0, 2))
def test_resumed_equals_uninterrupted(cache, step, batch, seed):
    whole = list(islice(open_stream(cache, ARRAYS, batch, seed), step + 3))[step:]
    resumed = islice(open_stream(cache, ARRAYS, batch, seed, step=step), 3)
    for one, other in zip(whole, resumed, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_seeds_differ_and_epochs_differ(cache):
    assert not np.array_equal(numbers(cache, 5, batch=4, seed=0), numbers(cache, 5, batch=4, seed=1))
    one = numbers(cache, 94, batch=1).ravel()
    assert not np.array_equal(one[:47], one[47:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2), (1, 3)])
def test_ranks_and_workers_change_nothing(cache, world, workers):
    expected = list(islice(open_stream(cache, ARRAYS, batch=8, seed=1, step=5), 14))
    ranks = []
    for rank in range(world):
        dataset = cache.stream(ARRAYS, batch=8, seed=1, step=5, rank=rank, world=world)
        context = "forkserver" if workers else None
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context)
        batches = merge_workers(loader)
        ranks.append(list(islice(batches, 14)))
        batches.close()
    for step, whole in enumerate(expected):
        for name, rows in whole.items():
            assert np.array_equal(torch.cat([one[step][name] for one in ranks]).numpy(), rows)


def test_a_stream_ends_its_threads_and_is_picklable(cache):
    stream = pickle.loads(pickle.dumps(open_stream(cache, ARRAYS, batch=4)))
    batches = iter(stream)
    next(batches)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("lic_dist-stream")]
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lic_dist-stream")]
    sample = 3 * 32 * 32 + 4 * 2 + 6 * 2 * 2 * 2
    assert stream.memory == 2 * 4 * 4 * SHARD * sample


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_damaged_shard_is_named(tmp_path, workers):
    path = make_store(tmp_path / "a.zarr", samples=22)
    cache = LatentCache.open(path)
    damage(path / "quantized/tcq8/k/c/2/0/0/0", "flip")
    dataset = cache.stream(ARRAYS, batch=4)
    context = "forkserver" if workers else None
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context)
    with pytest.raises(LicError, match="shard 2 of .*, array quantized/tcq8/k, does not decode"):
        list(islice(merge_workers(loader), 40))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lic_dist-stream")]


# torch, xarray, zarrs


@pytest.mark.slow
def test_the_dataset_gives_any_sample_and_keeps_few_blocks(cache):
    dataset = cache.dataset([*ARRAYS, "quantized/tcq8/bits"])
    training = cache.indices(held_out=False)
    assert len(dataset) == len(training) == 47
    stored = cache.load([*ARRAYS, "quantized/tcq8/bits"], training)
    chosen = [46, 0, 13, 0, 14, -1]
    for number, sample in zip(chosen, dataset.__getitems__(chosen), strict=True):
        assert sample["sample"] == training[number]
        assert all(np.array_equal(sample[name].numpy(), stored[name][number]) for name in stored)
    assert dataset.block == 4 and dataset.reads == 3
    dataset = CachedSamples(cache, ARRAYS, keep=2)
    for number in (0, 46, 0, 46, 13, 46, 0):
        assert torch.equal(dataset[number]["pixels"], torch.from_numpy(stored["pixels"][number]))
        assert len(dataset.blocks) <= 2
    assert dataset.reads == 4  # the block of 13 takes the place of that of 0, which is read again
    in_order = cache.dataset(ARRAYS)
    for number in range(len(in_order)):
        in_order[number]
    assert in_order.reads == 12
    with pytest.raises(IndexError):
        dataset[47]
    loader = DataLoader(cache.dataset(ARRAYS, held_out=True), batch_size=2)
    (batch,) = list(loader)
    assert batch["pixels"].shape == (2, 3, 32, 32) and batch["sample"].tolist() == [52, 53]


@pytest.mark.slow
def test_the_xarray_view_is_the_store(cache, path, monkeypatch):
    pytest.importorskip("xarray")
    view = cache.to_xarray()
    assert view.sizes["sample"] == SAMPLES
    assert view.attrs["fingerprint"] == cache.fingerprint and '"crop":32' in view.attrs["identity"]
    for name in (name for name in cache.names if name != "samples/status"):
        stored = cache.load([name])[name]
        assert view[name].dtype == stored.dtype
        np.testing.assert_array_equal(view[name].values, stored)
    assert view["source"].values[3] == "ordner/ä3.png" and view["held_out"].values.sum() == 2
    k = cache.load(["quantized/tcq8/k"])["quantized/tcq8/k"]
    lazy = view["quantized/tcq8/k"]
    np.testing.assert_array_equal(lazy[-1].values, k[-1])
    np.testing.assert_array_equal(lazy[50:3:-7, [4, 1], 1].values, k[50:3:-7][:, [4, 1], 1])
    np.testing.assert_array_equal(lazy.isel(sample=[9, 3, 9], channel=-1).values, k[[9, 3, 9], -1])
    shards = []
    monkeypatch.setattr(LatentCache, "rows", lambda self, *a: shards.append(a[0] // SHARD) or rows(self, *a))
    assert view["pixels"].isel(sample=[9, 11, 30]).mean("color").shape == (3, 32, 32)
    assert shards == [2, 7]


rows = LatentCache.rows


@pytest.mark.slow
def test_the_xarray_view_tells_of_damage(tmp_path):
    pytest.importorskip("xarray")
    path = make_store(tmp_path / "a.zarr", samples=10)
    view = LatentCache.open(path).to_xarray()
    (path / "latents/z/c/1/0/0/0").unlink()
    assert view["latents/z"][:4].values.any()
    with pytest.raises(LicError, match="shard 1"):
        view["latents/z"].load()


def zarrs_digest(path: str) -> list[int]:
    """Run in a spawned process: sums of whole shards as zarrs decodes them."""
    cache = LatentCache.open(path, pipeline="zarrs")
    return [int(rows.astype(np.int64).sum()) for shard in range(3) for rows in cache.shard(shard, ARRAYS).values()]


@pytest.mark.slow
def test_zarrs_reads_what_zarr_reads(tmp_path, cache, path):
    pytest.importorskip("zarrs")
    import multiprocessing

    fast = LatentCache.open(path, pipeline="zarrs")
    assert type(fast.array("pixels")._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
    assert type(cache.array("pixels")._async_array.codec_pipeline).__name__ == "BatchedCodecPipeline"
    for shard in range(cache.num_shards):
        for name in cache.names:
            np.testing.assert_array_equal(fast.shard(shard, [name])[name], cache.shard(shard, [name])[name])
    assert all(np.array_equal(fast[7][name], value) for name, value in cache[7].items())
    sums = [int(rows.astype(np.int64).sum()) for shard in range(3) for rows in cache.shard(shard, ARRAYS).values()]
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply_async(zarrs_digest, (str(path),)).get(60) == sums
    loader = DataLoader(fast.stream(ARRAYS, batch=4), None, num_workers=1, multiprocessing_context="forkserver")
    expected = islice(open_stream(cache, ARRAYS, batch=4), 8)
    for one, other in zip(islice(merge_workers(loader), 8), expected, strict=True):
        assert all(np.array_equal(one[name].numpy(), other[name]) for name in other)
    damaged = make_store(tmp_path / "a.zarr", samples=14)
    fast = LatentCache.open(damaged, pipeline="zarrs")
    assert fast.shard(1)["latents/z"].any()
    for how, what in (("flip", "does not decode"), ("cut", "does not decode"), ("remove", "has lost its object")):
        damage(damaged / "latents/z/c/1/0/0/0", how)
        with pytest.raises(LicError, match=f"shard 1 of .*latents/z, {what}"):
            fast.shard(1)
