"""Several stores as one: shares that are exact at every place, orders that need nothing but a step, numbers."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from lic_dist.cache import store
from lic_dist.cache.mixing import MixedOrder, Shares, shuffled
from lic_dist.cache.mixture import Mixture, names_of
from lic_dist.cache.plan import Geometry, Plan
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.stream import ShardStream
from lic_dist.errors import LicError, UsageError
from tests.stores import GEOMETRY, build, create, make_plan

WEIGHTS = some.lists(some.floats(0.001, 1000).map(lambda value: round(value, 3)), min_size=1, max_size=4)


@given(WEIGHTS, some.integers(0, 300))
def test_any_place_is_found_by_arithmetic_and_has_its_share(weights: list[float], first: int) -> None:
    shares = Shares(weights)
    walked = list(islice(shares.walk(), first + 40))
    assert list(islice(shares.walk(first), 40)) == walked[first:]
    assert all(shares.place(store, number) == place for place, (store, number) in enumerate(walked))
    keys = [Fraction(2 * number + 1) / Fraction(str(weights[store])) for store, number in walked]
    assert keys == sorted(keys)  # Webster's method itself
    whole = sum(map(Fraction, map(str, weights)))
    for at, weight in enumerate(weights):
        had = sum(store == at for store, _ in walked)
        assert shares.count(at, first + 40) == had
        assert abs(had - len(walked) * Fraction(str(weight)) / whole) <= len(weights) / 2


def test_samples_in_ram_come_by_weight_each_store_by_epochs_of_its_own() -> None:
    shares = Shares([1, 3])
    numbers = shuffled([20, 6], shares, 5, 0, 96)
    small = numbers[numbers >= 20] - 20
    assert len(small) == 72 and all(sorted(small[at : at + 6]) == list(range(6)) for at in range(0, 72, 6))
    assert sorted(numbers[numbers < 20][:20]) == list(range(20))
    assert np.array_equal(shuffled([20, 6], shares, 5, 37, 96), numbers[37:])
    assert not np.array_equal(shuffled([20, 6], shares, 6, 0, 96), numbers)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine samples to train on in shards of four, one of them faulty; and five in shards of three."""
    folder = tmp_path_factory.mktemp("stores")
    paths = [folder / "a.zarr", folder / "b.zarr"]
    for path, planned in zip(paths, (make_plan(11, 4), make_plan(7, 3, seed=1)), strict=True):
        create(path, planned)
        build(path, planned)
    return paths


def mixture(stores: list[Path], weights: tuple[float, ...] = (1, 1.5)) -> Mixture:
    return Mixture([LatentCache.open(path) for path in stores], weights)


def test_a_mixture_numbers_samples_through_its_stores(stores: list[Path]) -> None:
    mixed = mixture(stores)
    first, second = mixed.stores
    assert mixed.shard_length == 4 and mixed.firsts == [0, 3] and mixed.names == ["a", "b"]
    parts = mixed.parts(held_out=False)
    assert np.array_equal(parts[0], first.indices(False)) and 5 not in parts[0]
    assert parts[1].tolist() == [12, 13, 14, 16]  # of shards 3 and 4; sample 4 of the second store is faulty
    arrays = ["pixels", "latents/z", "latents/y"]
    wanted = np.array([16, 3, 12, 0])
    for name, rows in mixed.load(arrays, wanted).items():
        expected = [
            second.load([name], [3]),
            first.load([name], [3]),
            second.load([name], [0]),
            first.load([name], [0]),
        ]
        assert rows.tobytes() == b"".join(one[name].tobytes() for one in expected)
    assert all(np.array_equal(rows, second.shard(1, arrays)[name]) for name, rows in mixed.shard(4, arrays).items())
    assert mixed.first(False, 5).tolist() == [0, 1, 12, 13, 14]  # two of five, and three
    assert np.array_equal(Mixture([first]).parts(True)[0], first.indices(True))


def test_streams_of_several_stores_are_the_same_for_any_ranks_workers_and_starts(stores: list[Path]) -> None:
    mixed, arrays = pickle.loads(pickle.dumps(mixture(stores, (1, 2)))), ["pixels"]

    def taken(step: int = 0, rank: int = 0, world: int = 1, count: int = 24) -> list[dict[str, np.ndarray]]:
        return list(islice(ShardStream(mixed, arrays, mixed.order(6, 1, 2), step, rank, world), count))

    whole = taken()
    halves = [
        np.concatenate([pair[0]["sample"], pair[1]["sample"]])
        for pair in zip(taken(0, 0, 2), taken(0, 1, 2), strict=True)
    ]
    assert all(np.array_equal(one["sample"], other) for one, other in zip(whole, halves, strict=True))
    for step in (1, 5, 13):
        assert all(
            np.array_equal(one["sample"], other["sample"])
            for one, other in zip(whole[step:], taken(step, count=24 - step), strict=True)
        )
    assert all(np.array_equal(one["pixels"], mixed.load(arrays, one["sample"])["pixels"]) for one in whole)
    served = Counter(np.concatenate([one["sample"] for one in whole]).tolist())
    of_first, of_second = ([served[number] for number in part] for part in mixed.parts(held_out=False))
    assert sum(of_first) == 48 and sum(of_second) == 96  # exactly by weight
    assert max(of_first) - min(of_first) <= 2  # by epochs of each stream
    assert max(of_second) - min(of_second) <= 4  # of shards of three and of one, dealt to two streams
    part = ShardStream(mixed, arrays, mixed.order(6, 1, 2)).for_worker(1, 2)
    assert np.array_equal(next(iter(part))["sample"], whole[0]["sample"][3:])
    assert np.array_equal(next(iter(mixed.stream(arrays, 6, seed=1, streams=2)))["sample"].numpy(), whole[0]["sample"])


def test_one_store_streams_as_it_does_alone(stores: list[Path]) -> None:
    cache = LatentCache.open(stores[0])
    part = [cache.indices(held_out=False)]
    of_one = MixedOrder(part, Shares([0.3]), 4, 6, seed=3, streams=2)
    alone = Mixture([cache]).order(6, seed=3, streams=2)
    streams = [ShardStream(cache, ["latents/z"], order, step=7) for order in (of_one, alone)]
    for one, other in islice(zip(*streams, strict=True), 9):
        assert np.array_equal(one["sample"], other["sample"]) and np.array_equal(one["latents/z"], other["latents/z"])


def test_what_does_not_mix_is_named(stores: list[Path], tmp_path: Path) -> None:
    other = Geometry(**{**vars(GEOMETRY), "crop": 64})
    planned = make_plan()
    store.create(str(tmp_path / "c.zarr"), Plan(planned.crops, other, 4, 2, {**planned.identity, "crop": 64}))
    with pytest.raises(LicError, match=r"c\.zarr and .*a\.zarr do not mix: crop"):
        mixture([stores[0], tmp_path / "c.zarr"])
    with pytest.raises(UsageError, match="6 streams, but at most 3 shards of a store"):
        mixture(stores).order(6, streams=6)
    assert names_of(["x/a.zarr", "s3://y/b.zarr/"]) == ["a", "b"]
    assert names_of(["x/a.zarr", "y/a.zarr"]) == ["x/a.zarr", "y/a.zarr"]
