"""A bucket in memory, whose process is killed before any of its writes, and may come back."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from lic_dist.cache.storage import Entry, Storage


class Killed(BaseException):
    """The process ends, and all that it had in flight is lost."""


@dataclass
class World:
    """All objects of all buckets, by URL, and how many writes are left before the process is killed (None: any).

    `order` draws the order of writes that a bucket takes at once. `written` are the contents that each object of data
    has had since its store was last cleared, in this order.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    left: int | None = None
    order: random.Random = field(default_factory=random.Random)
    written: dict[str, list[bytes]] = field(default_factory=dict)
    cleared: int = 0

    def reset(self, seed: int) -> None:
        self.__init__(order=random.Random(seed))  # type: ignore[misc]

    def spend(self) -> None:
        if self.left is not None:
            if self.left <= 0:  # and whatever another thread still tries
                raise Killed
            self.left -= 1


WORLD = World()


@dataclass(frozen=True)
class Memory(Storage):
    """The keys below a prefix; puts are whole, as a bucket's, and several at once come in any order."""

    url: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.url

    def url_of(self, key: str) -> str:
        return f"{self.url}/{key}"

    def get(self, key: str) -> bytes:
        try:
            return WORLD.objects[self.url_of(key)]
        except KeyError:
            raise FileNotFoundError(self.url_of(key)) from None

    def put(self, key: str, data: bytes) -> None:
        WORLD.spend()
        WORLD.objects[self.url_of(key)] = data
        if "/c/" in key and data not in (contents := WORLD.written.setdefault(key, [])):
            contents.append(data)

    def put_new(self, key: str, data: bytes) -> bool:
        if self.url_of(key) in WORLD.objects:
            return self.get(key) == data
        self.put(key, data)
        return True

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        for key in WORLD.order.sample(list(objects), len(objects)):
            self.put(key, objects[key])

    def delete(self, key: str) -> None:
        if self.url_of(key) in WORLD.objects:
            WORLD.spend()
            del WORLD.objects[self.url_of(key)]

    def entry(self, key: str) -> Entry | None:
        found = WORLD.objects.get(self.url_of(key))
        return None if found is None else Entry(len(found), time.time())

    def listing(self, prefix: str = "") -> dict[str, Entry]:
        below, skip = f"{self.url_of(prefix)}/" if prefix else f"{self.url}/", len(self.url) + 1
        found = {url[skip:]: Entry(len(data), 0.0) for url, data in WORLD.objects.items() if url.startswith(below)}
        return dict(sorted(found.items()))

    def names(self, prefix: str = "") -> list[str]:
        below = f"{self.url_of(prefix)}/" if prefix else f"{self.url}/"
        return sorted({url[len(below) :].split("/")[0] for url in WORLD.objects if url.startswith(below)})

    def clear(self) -> None:
        keys = [key for key in self.listing() if key != "zarr.json"]
        for key in [*WORLD.order.sample(keys, len(keys)), "zarr.json"]:
            self.delete(key)
            WORLD.cleared += 1
            WORLD.written.clear()

    def sibling(self, suffix: str) -> tuple[Storage, str]:
        around, _, name = self.url.rpartition("/")
        return Memory(around), f"{name.removesuffix('.zarr')}{suffix}"

    def absolute(self) -> Storage:
        return self

    def free_bytes(self) -> int | None:
        return None

    def zarr_store(self) -> Any:
        return MemoryStore(_Buffers(self), read_only=True)


class _Buffers(MutableMapping[str, Buffer]):
    """The objects of a storage as Zarr takes them."""

    def __init__(self, storage: Memory) -> None:
        self.storage = storage

    def __getitem__(self, key: str) -> Buffer:
        try:
            return default_buffer_prototype().buffer.from_bytes(self.storage.get(key))
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.storage.listing())

    def __len__(self) -> int:
        return len(self.storage.listing())

    def __setitem__(self, key: str, value: Buffer) -> None:
        raise PermissionError(key)

    def __delitem__(self, key: str) -> None:
        raise PermissionError(key)
