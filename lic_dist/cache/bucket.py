"""Storage in an object store, through obstore: the keys below a prefix. Failed requests are retried with back-off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from lic_dist.cache.storage import KEPT, Entry, Storage
from lic_dist.errors import LicError, UsageError

PARALLEL_REQUESTS = 16  # requests in flight from one worker
TRANSFER_TRIES = 5  # tries of a transfer whose body breaks off
RETRY = {"max_retries": 10, "retry_timeout": timedelta(minutes=5)}  # of one request, with back-off
TIMEOUT = timedelta(seconds=60)  # of one try


T = TypeVar("T")


@dataclass(frozen=True)
class Bucket(Storage):
    """The keys below a prefix of an object store, through obstore. Failed requests are retried with back-off."""

    url: str
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _object_store(self.url, self.options)

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

        return self._request(put, writing=True)

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            list(pool.map(lambda item: self.put(*item), objects.items()))

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):  # S3 accepts the deletion of a missing key, GCS does not
            self._request(lambda obstore, remote: obstore.delete(remote, key))

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
        self._request(lambda obstore, remote: obstore.delete(remote, keys), writing=True)
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
        return _RetryingStore(_object_store(self.url, self.options), read_only=True)

    def _request(self, call: Callable[[Any, Any], T], writing: bool = False) -> T:
        """Return `call(obstore, store)`; repeat it where a transfer broke off, and turn other errors into one line.

        Raises:
            FileNotFoundError: no such key, when reading.
        """
        import obstore

        remote = _object_store(self.url, self.options)
        for tries_left in reversed(range(TRANSFER_TRIES)):
            try:
                return call(obstore, remote)
            except obstore.exceptions.BaseError as error:
                if tries_left and _broke_off(error):
                    continue
                hint = KEPT if writing else "does the bucket exist, is it reachable, do the credentials allow it?"
                raise LicError(f"{self}: {_first_line(error)}", hint=hint) from error
            except FileNotFoundError as error:
                if not writing:
                    raise
                raise LicError(f"{self}: {_first_line(error)}", hint="does the bucket exist?") from error
        raise AssertionError("unreachable")


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
                if not _broke_off(error):
                    raise
        return await super().get(key, prototype, byte_range)


def _broke_off(error: Exception) -> bool:
    """Return whether a transfer broke off in its body. obstore neither retries that nor has an error class for it."""
    return "body error" in str(error)


@lru_cache(maxsize=16)
def _object_store(url: str, options: tuple[tuple[str, str], ...]) -> Any:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise UsageError(f"{url} needs the package obstore", hint="pip install obstore") from None
    try:
        config: Any = dict(options)
        client: Any = {"timeout": TIMEOUT, "allow_http": True}
        retry: Any = RETRY
        return from_url(url, config=config or None, client_options=client, retry_config=retry)
    except BaseError as error:
        raise UsageError(f"no object store answers to {url}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].partition(": <?xml")[0][:300]
