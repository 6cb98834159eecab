"""Where a store lies: a folder, or a prefix in an object store (S3, GCS, Azure). Keys are posix paths below it.

A key is seen whole or not at all, on both: a folder writes beside and renames, brought to disk first; an object store
puts whole objects. Failures of either are one line, and say that finished shards are kept.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

KEPT = "every shard that has a marker is kept; build again to go on"


@dataclass(frozen=True)
class Entry:
    """What a listing tells of an object: its size in bytes and when it was written, in seconds since 1970."""

    bytes: int
    modified: float


class Storage(ABC):
    """A folder or a bucket's prefix. Picklable, compared by where it is.

    Every method raises LicError where the place refuses or fails; FileNotFoundError only where that is said.
    """

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The bytes of a key. FileNotFoundError where there is none."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write a key, whole and durably; one that is there is replaced."""

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Write a key that is not there, once for many callers; True where it now holds this data by this call."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a key; nothing happens where there is none."""

    @abstractmethod
    def entry(self, key: str) -> Entry | None:
        """Size and time of one key; None where there is none."""

    @abstractmethod
    def listing(self, prefix: str = "") -> dict[str, Entry]:
        """All keys below a prefix (a folder's name, or "" for the whole place)."""

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """Names of what lies right below a prefix, folders and objects, sorted."""

    @abstractmethod
    def clear(self) -> None:
        """Remove everything below the place."""

    @abstractmethod
    def sibling(self, suffix: str) -> tuple[Storage, str]:
        """The place around this one, and a key in it named like this one without its `.zarr`, with `suffix`."""

    @abstractmethod
    def absolute(self) -> Storage:
        """The same place, as seen from any folder."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes free, or None where that has no meaning."""

    @abstractmethod
    def zarr_store(self) -> Any:
        """The place as a read-only store for Zarr."""

    def make(self) -> None:
        """Make the place itself, where that has a meaning: nothing else does."""
        return

    def require_folder(self) -> None:
        """Refuse a place that can hold nothing: a file. Raises LicError."""
        return

    def sweep(self) -> None:
        """Remove what writers that were killed have left unfinished."""
        return

    @abstractmethod
    def put_all(self, objects: Mapping[str, bytes]) -> None:
        """`put` many."""

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Be alone under this name; where the place has no locks the engine's rule (one owner a shard) stands alone."""
        yield

    def get_json(self, key: str) -> Any:
        """The parsed content of a key; None where there is none, or none that parses."""
        try:
            return json.loads(self.get(key))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
