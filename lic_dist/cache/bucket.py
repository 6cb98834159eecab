"""A place that is a prefix in an object store, through obstore: requests that fail are repeated with back-off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from lic_dist.cache.place import KEPT, Entry, Place
from lic_dist.errors import LicError, UsageError

PARALLEL = 16  # requests in flight from one worker
RETRY = {"max_retries": 10, "retry_timeout": timedelta(minutes=5)}  # of one request, with back-off
TIMEOUT = timedelta(seconds=60)  # of one try


@dataclass(frozen=True)
class Bucket(Place):
    """A prefix in an object store, through obstore: requests that fail are repeated with back-off."""

    url: str
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _object_store(self.url, self.options)

    def __str__(self) -> str:
        return self.url

    @property
    def _store(self) -> Any:
        return _object_store(self.url, self.options)

    def get(self, key: str) -> bytes:
        import obstore

        with _requesting(self):
            return bytes(obstore.get(self._store, key).bytes())

    def put(self, key: str, data: bytes) -> None:
        import obstore

        with _requesting(self, writing=True):
            obstore.put(self._store, key, data, use_multipart=False)

    def put_new(self, key: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with _requesting(self, writing=True):
            try:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return self.get(key) == data  # a repeated request meets its own first try
        return True

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda item: self.put(*item), objects.items()))

    def delete(self, key: str) -> None:
        import obstore

        with _requesting(self, writing=True):
            obstore.delete(self._store, key)

    def entry(self, key: str) -> Entry | None:
        import obstore

        try:
            with _requesting(self):
                meta = obstore.head(self._store, key)
        except FileNotFoundError:
            return None
        return Entry(meta["size"], meta["last_modified"].timestamp())

    def listing(self, prefix: str = "") -> dict[str, Entry]:
        import obstore

        with _requesting(self):
            batches = obstore.list(self._store, prefix or None)
            return {
                one["path"]: Entry(one["size"], one["last_modified"].timestamp()) for batch in batches for one in batch
            }

    def names(self, prefix: str = "") -> list[str]:
        import obstore

        with _requesting(self):
            found = obstore.list_with_delimiter(self._store, prefix or None)
        paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return sorted(PurePosixPath(path).name for path in paths)

    def clear(self) -> None:
        import obstore

        with _requesting(self, writing=True):
            for batch in obstore.list(self._store):
                obstore.delete(self._store, [one["path"] for one in batch])

    def beside(self, suffix: str) -> tuple[Place, str]:
        around, _, name = self.url.rpartition("/")
        if around.endswith(":/") or not name:
            raise UsageError(
                f"{self.url} is a whole bucket", hint="give the store a prefix in it: s3://bucket/name.zarr"
            )
        return Bucket(around, self.options), f"{PurePosixPath(name).stem}{suffix}"

    def absolute(self) -> Place:
        return self

    def free(self) -> int | None:
        return None

    def zarr_store(self) -> Any:
        from zarr.storage import ObjectStore

        return ObjectStore(self._store, read_only=True)


@lru_cache(maxsize=16)
def _object_store(url: str, options: tuple[tuple[str, str], ...]) -> Any:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise UsageError(f"{url} needs the package obstore", hint="pip install 'lic-dist[remote]'") from None
    try:
        config: Any = dict(options)
        client: Any = {"timeout": TIMEOUT, "allow_http": True}
        retry: Any = RETRY
        return from_url(url, config=config or None, client_options=client, retry_config=retry)
    except BaseError as error:
        raise UsageError(f"no object store answers to {url}: {_first_line(error)}") from None


@contextmanager
def _requesting(place: Bucket, writing: bool = False) -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        hint = KEPT if writing else "is it reachable, and do the credentials allow it?"
        raise LicError(f"{place}: {_first_line(error)}", hint=hint) from error
    except FileNotFoundError as error:
        if writing:  # of the bucket itself
            raise LicError(f"{place}: {_first_line(error)}", hint="does the bucket exist?") from error
        raise


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]
