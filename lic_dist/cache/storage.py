"""Storage of a store: a folder, or a prefix in an object store (S3, GCS, Azure). Keys are posix paths below it.

Both write a key whole or not at all: a folder writes a temporary file, syncs and renames it; an object store puts whole
objects. A failure is reported in one line, which says that finished shards are kept.
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
    """One object in a listing: its size in bytes, and when it was written, in seconds since 1970."""

    bytes: int
    modified: float


class Storage(ABC):
    """A folder, or a prefix in a bucket, as a map from keys to bytes. Picklable; equal if the location is equal.

    Every method raises LicError where the storage refuses or fails, and FileNotFoundError only where it says so.
    `sealed`: it is an export, which holds whole shards alone and no markers, and refuses to be written.
    """

    sealed = False

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Return the bytes of a key. Raises FileNotFoundError where there is none."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write a key, whole and durably, replacing an existing one."""

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Write a key unless it exists, for one of many callers; return True if this call's data is now stored."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a key, if it exists."""

    @abstractmethod
    def entry(self, key: str) -> Entry | None:
        """Return size and time of one key; None where there is none."""

    @abstractmethod
    def listing(self, prefix: str = "") -> dict[str, Entry]:
        """Return all keys below a prefix (a folder's name, or "" for everything)."""

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """Return the names right below a prefix, of folders and objects, sorted."""

    @abstractmethod
    def clear(self) -> None:
        """Remove everything."""

    @abstractmethod
    def sibling(self, suffix: str) -> tuple[Storage, str]:
        """Return the storage around this one, and a key in it: this one's name without `.zarr`, plus `suffix`."""

    @abstractmethod
    def absolute(self) -> Storage:
        """Return the same storage, independent of the working directory."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Return the free space in bytes; None where that has no meaning."""

    @abstractmethod
    def zarr_store(self) -> Any:
        """Return a read-only Zarr store of this storage."""

    def at(self, snapshot: int | str | None = None) -> Storage:
        """Return the storage as of a snapshot, by default the newest, where it keeps each apart; else itself."""
        return self

    def make(self) -> None:
        """Create the folder itself, where there is one. No other method does."""
        return

    def require_folder(self) -> None:
        """Refuse a path that cannot become a folder, such as a file. Raises LicError."""
        return

    def sweep(self, since: int = 0) -> None:
        """Remove the unfinished files of killed writers, but for those of shards before `since`."""
        return

    @abstractmethod
    def put_all(self, objects: Mapping[str, bytes]) -> None:
        """Write many keys, each as `put` does."""

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold an exclusive lock of this name. Storage without locks gives none: the engine's one owner a shard must
        do.
        """
        yield

    def get_json(self, key: str) -> Any:
        """Return the parsed content of a key; None where there is none that parses."""
        try:
            return json.loads(self.get(key))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
