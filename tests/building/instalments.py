"""The rows that a store must have, by its instalments: what tests/building/lifelong.py compares a store with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lic_dist.data.crops import plan_crops
from lic_dist.data.manifest import Manifest
from lic_dist.data.photo import Crop
from tests.building.jobs_in_memory import CROP, HELD_OUT, SHARD


@dataclass(frozen=True)
class Part:
    """An instalment as it must be: the digest of its photos, its samples in order, and the rows that it masks."""

    photos: str
    crops: tuple[Crop, ...]
    masked: tuple[int, ...] = ()


def part_of(photos: Manifest, masked: Sequence[int] = ()) -> Part:
    return Part(photos.digest, tuple(plan_crops(photos, CROP, 1, 0, HELD_OUT)), tuple(masked))


class Rows:
    """The rows of a chain of instalments, by arithmetic of its own."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.crops: dict[int, Crop] = {}
        self.masked: set[int] = set()
        shard = 0
        for part in parts:
            self.crops |= {shard * SHARD + row: crop for row, crop in enumerate(part.crops)}
            self.masked |= {*part.masked}
            shard += -(-len(part.crops) // SHARD)
        self.shards = shard

    @property
    def live(self) -> dict[int, Crop]:
        return {row: crop for row, crop in self.crops.items() if row not in self.masked}

    def of(self, shard: int) -> list[int]:
        return [row for row in range(shard * SHARD, (shard + 1) * SHARD) if row in self.crops]
