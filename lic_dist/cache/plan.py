"""The plan of a store, which every worker computes alike from the experiment.

It holds the samples in a fixed order, cut into shards of equal length, and the identity of the latents; `differences`
says how two identities differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lic_dist.data.photo import Crop
from lic_dist.errors import LicError


@dataclass(frozen=True)
class Geometry:
    """Sizes of one sample: pixels [3, crop, crop]; y and z [channels, size, size]. A model without a side latent has a
    z of no channels, as large as y, which is not stored.
    """

    crop: int
    y_channels: int
    y_size: int
    z_channels: int
    z_size: int


@dataclass(frozen=True)
class Plan:
    """What a store is to hold.

    `crops` are in the order of the store (training first, then held out). `shard` is the number of samples a shard.
    `batch` is the number of crops that the encoder takes at once; it changes the last bits of float results, so it is
    part of the plan. `identity` is a plain JSON record of everything that the latents depend on. `later` are the
    samples of the instalments that a store has grown by (chain.py); all else is of the first.

    Raises:
        LicError: no crops.
        ValueError: sizes below 1, or an identity that is not plain JSON.
    """

    crops: Sequence[Crop]
    geometry: Geometry
    shard: int
    batch: int
    identity: dict[str, Any]
    later: tuple[Sequence[Crop], ...] = ()

    def __post_init__(self) -> None:
        if not self.crops:
            raise LicError("no samples to cache", hint="is no photo as large as images.crop?")
        if self.shard < 1 or self.batch < 1:
            raise ValueError(f"shard {self.shard} and batch {self.batch} must be at least 1")
        canonical_json(self.identity)

    @property
    def num_samples(self) -> int:
        return len(self.crops)

    @property
    def num_shards(self) -> int:
        return num_shards(len(self.crops), self.shard)

    @cached_property
    def num_held_out(self) -> int:
        """Number of samples in the held-out part, which comes last."""
        from lic_dist.data.crops import Crops  # loads Arrow

        if isinstance(self.crops, Crops):
            return self.crops.num_held_out
        return sum(crop.held_out for crop in self.crops)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the identity's canonical JSON, in hex."""
        return fingerprint(self.identity)

    @cached_property
    def source_bytes(self) -> int:
        """Length in bytes of the longest source in UTF-8."""
        from lic_dist.data.crops import Crops

        if isinstance(self.crops, Crops):
            return max(1, self.crops.longest_source)
        return max(1, max(len(crop.source.encode()) for crop in self.crops))

    def crops_of(self, shard: int) -> Sequence[Crop]:
        """Return the samples of a shard; the last shard of an instalment may hold fewer than `shard`."""
        first = 0
        for crops in (self.crops, *self.later):
            if 0 <= shard - first < num_shards(len(crops), self.shard):
                return crops[(shard - first) * self.shard : (shard - first + 1) * self.shard]
            first += num_shards(len(crops), self.shard)
        raise ValueError(f"shard {shard} is not one of {first}")


def num_shards(num_samples: int, shard: int) -> int:
    """Return the number of shards that hold the samples: num_shards(130, 64) => 3."""
    return -(-num_samples // shard)


def canonical_json(record: Any) -> str:
    """Return one text for equal records: sorted keys, no spaces, ASCII. ValueError for what is not plain JSON."""
    try:
        return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"not plain JSON: {error}") from error


def fingerprint(record: Any) -> str:
    """Return the sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(record).encode()).hexdigest()


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return one line for each field that differs, nested keys dotted, sorted; an empty list for equal records.

    differences({"model": {"N": 48}}, {"model": {"N": 64}}) => ["model.N: store has 48, this job has 64"]
    """
    store, job = _flat(found), _flat(expected)
    lines = []
    for key in sorted(store.keys() | job.keys()):
        ours, theirs = store.get(key, "nothing"), job.get(key, "nothing")
        if ours != theirs:
            lines.append(f"{key}: store has {_short(ours, theirs)}, this job has {_short(theirs, ours)}")
    return lines


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = canonical_json(value)
    return flat


def _short(value: str, other: str) -> str:
    """Return a value for a message; a long one (mostly digests) is cut where its beginning shows the difference."""
    text = value.strip('"')
    if len(text) <= 32 or text[:8] == other.strip('"')[:8]:
        return text
    return f"{text[:8]}…"
