"""The chain of a store that grows: its instalments, and the arithmetic over them.

The first instalment is what a build makes. Each append adds one: photos (whole new shards after the last), or masked
samples, or both. A *snapshot* is a prefix of the chain, named by the number of its last instalment: 0 is the store as
it was built. Its digest hashes over all of it, each instalment's over that of the one before.

A sample's number is its row, for ever: rows that fill up the last shard of an instalment count, and have status 255.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lic_dist.cache.storage import Storage
from lic_dist.errors import LicError

FOLDER = "_chain"
NAMES = f"{FOLDER}/names"  # of snapshots, an object each
MOST_SAMPLES = 2**40  # most samples in a store
Count = Annotated[int, Field(ge=0, le=MOST_SAMPLES)]


@dataclass(frozen=True)
class Instalment:
    """One instalment: where its shards begin, its samples (training first, then held out), and what it masks.

    `source_bytes` is the length of its longest path in UTF-8, `manifest_sha256` the digest of its photos' manifest,
    `mask_sha256` that of the object with the numbers of the samples it masks ("" where it masks none). `complete`: all
    its latents are written. `time` is when it was declared, and is never compared.
    """

    first_shard: Count
    num_samples: Count
    num_held_out: Count
    source_bytes: Count
    manifest_sha256: str
    num_masked: Count
    mask_sha256: str
    digest: str
    time: str
    complete: bool

    @property
    def content(self) -> Instalment:
        """The instalment without what is never compared."""
        return replace(self, time="", complete=True)


def next_digest(before: str, manifest_sha256: str, mask_sha256: str) -> str:
    """Return the chain's digest after an instalment: sha256 over the one before, its manifest's and its mask's."""
    return hashlib.sha256(f"{before} {manifest_sha256} {mask_sha256}".encode()).hexdigest()


def is_chain(chain: Sequence[Instalment], shard: int, fingerprint: str) -> bool:
    """Return whether instalments follow each other without gaps, the last alone may be incomplete, and all digests are
    right.
    """
    end, digest = 0, fingerprint
    for number, one in enumerate(chain):
        digest = next_digest(digest, one.manifest_sha256, one.mask_sha256) if number else digest
        whole = one.complete or number == len(chain) - 1 > 0
        if (one.first_shard, one.digest) != (end, digest) or one.num_held_out > one.num_samples or not whole:
            return False
        end += -(-one.num_samples // shard)
    return True


class Shards:
    """How many samples each shard of a chain holds; `length` samples a shard with padding."""

    def __init__(self, chain: Sequence[Instalment], length: int) -> None:
        self.length = length
        self.firsts = [one.first_shard for one in chain]
        self.samples = [one.num_samples for one in chain]
        self.num_shards = self.firsts[-1] + -(-self.samples[-1] // length)
        filled = [first * length + count for first, count in zip(self.firsts, self.samples, strict=True) if count]
        self.num_rows = filled[-1]

    def instalment(self, shard: int) -> int:
        """Return the number of the instalment that a shard belongs to."""
        return bisect_right(self.firsts, shard) - 1  # of several that begin there, the last has samples

    def count(self, shard: int) -> int:
        """Return the number of samples in a shard, without padding."""
        number = self.instalment(shard)
        return min(self.length, self.samples[number] - (shard - self.firsts[number]) * self.length)

    def counts(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `count` of many shards."""
        firsts, samples = np.array(self.firsts), np.array(self.samples)
        number = np.searchsorted(firsts, shards, side="right") - 1
        counts: NDArray[np.int64] = np.minimum(self.length, samples[number] - (shards - firsts[number]) * self.length)
        return counts


def manifest_key(manifest_sha256: str) -> str:
    """Return the key of the manifest of an instalment's photos."""
    return f"{FOLDER}/{manifest_sha256[:16]}.parquet"


def mask_key(mask_sha256: str) -> str:
    """Return the key of an instalment's mask."""
    return f"{FOLDER}/{mask_sha256[:16]}.mask.json"


def mask_document(samples: NDArray[np.int64]) -> bytes:
    """Return the object of a mask: the numbers of the samples, ascending, as JSON."""
    return json.dumps(samples.tolist(), separators=(",", ":")).encode()


def masked_by(storage: Storage, instalment: Instalment) -> NDArray[np.int64]:
    """Return the numbers of the samples that an instalment masks. Raises LicError where its mask is lost or altered."""
    if not instalment.mask_sha256:
        return np.arange(0)
    key = mask_key(instalment.mask_sha256)
    try:
        data = storage.get(key)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != instalment.mask_sha256:
        raise LicError(f"{storage}/{key} is lost or altered", hint="put it back; an older snapshot does without")
    found: list[Any] = json.loads(data)
    return np.array(found, np.int64)
