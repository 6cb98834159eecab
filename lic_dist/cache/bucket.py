"""Storage in an object store, through obstore: the keys below a prefix. Failed requests are retried with back-off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from lic_dist.cache.storage import KEPT, Entry, Storage
from lic_dist.errors import LicError, UsageError
from lic_dist.remote import (
    PARALLEL_REQUESTS,
    REACHABLE,
    TRANSFER_TRIES,
    Options,
    broke_off,
    first_line,
    object_store,
    request,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Bucket(Storage):
    """The keys below a prefix of an object store, through obstore. Failed requests are retried with back-off."""

    url: str
    options: Options = ()

    def __post_init__(self) -> None:
        object_store(self.url, self.options)

    def __str__(self) -> str:
        return self.url

    def get(self, key: str) -> bytes:
        return self._request(lambda obstore, remote: bytes(obstore.get(remote, key).bytes()))

    def put(self, key: str, data: bytes) -> None:
        self._request(lambda obstore, remote: obstore.put(remote, key, data, use_multipart=False), writing=True)

    def put_new(self, key: str, data: bytes) -> bool:
        def put(obstore: Any, remote: Any) -> bool:
            try:
                obstore.put(remote, key, data, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return self.get(key) == data  # a retried request may find what its first try wrote
            return True

        return self._request(put, writing=True, once=True)

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            list(pool.map(lambda item: self.put(*item), objects.items()))

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):  # S3 accepts the deletion of a missing key, GCS does not
            self._request(lambda obstore, remote: obstore.delete(remote, key), once=True)

    def entry(self, key: str) -> Entry | None:
        try:
            return _entry(self._request(lambda obstore, remote: obstore.head(remote, key)))
        except FileNotFoundError:
            return None

    def listing(self, prefix: str = "") -> dict[str, Entry]:
        def listing(obstore: Any, remote: Any) -> dict[str, Entry]:
            return {one["path"]: _entry(one) for batch in obstore.list(remote, prefix or None) for one in batch}

        return self._request(listing)

    def names(self, prefix: str = "") -> list[str]:
        found = self._request(lambda obstore, remote: obstore.list_with_delimiter(remote, prefix or None))
        paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return sorted(PurePosixPath(path).name for path in paths)

    def clear(self) -> None:
        """Remove all keys, the root's `zarr.json` last: a store that is half removed is still recognised as a cache."""
        keys = [key for key in self.listing() if key != "zarr.json"]
        self._request(lambda obstore, remote: obstore.delete(remote, keys), writing=True, once=True)
        self.delete("zarr.json")

    def sibling(self, suffix: str) -> tuple[Storage, str]:
        around, _, name = self.url.rpartition("/")
        if around.endswith(":/") or not name:
            raise UsageError(
                f"{self.url} is a whole bucket", hint="give the store a prefix in it: s3://bucket/name.zarr"
            )
        return Bucket(around, self.options), f"{name.removesuffix('.zarr')}{suffix}"

    def absolute(self) -> Storage:
        return self

    def free_bytes(self) -> int | None:
        return None

    def zarr_store(self) -> Any:
        return _RetryingStore(object_store(self.url, self.options), read_only=True)

    def _request(self, call: Callable[[Any, Any], T], writing: bool = False, once: bool = False) -> T:
        """Return `call(obstore, store)` as `request` does. FileNotFoundError: no such key, when reading."""
        try:
            return request(self.url, self.options, call, KEPT if writing else REACHABLE, once)
        except FileNotFoundError as error:
            if not writing:
                raise
            raise LicError(f"{self}: {first_line(error)}", hint="does the bucket exist?") from error


def _entry(meta: Any) -> Entry:
    return Entry(meta["size"], meta["last_modified"].timestamp())


class _RetryingStore(ObjectStore[Any]):
    """Zarr's store over obstore, which requests an object again when its transfer broke off."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        from obstore.exceptions import GenericError

        for _ in range(TRANSFER_TRIES - 1):
            try:
                return await super().get(key, prototype, byte_range)
            except GenericError as error:
                if not broke_off(error):
                    raise
        return await super().get(key, prototype, byte_range)
