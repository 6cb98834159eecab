"""Storage in an Icechunk repository that icechunk_export.py wrote: the snapshot of one commit, to be read.

    LatentCache.open("icechunk://runs/photos.icechunk", snapshot="release-1")
    LatentCache.open("icechunk://s3://bucket/prefix")

Opened at a snapshot it stays at that commit, whatever is exported later. Groups' records come from their attributes,
names of snapshots from the tags. A commit holds whole shards alone, so there are no markers.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from lic_dist.cache import chain, markers
from lic_dist.cache.storage import Entry, Storage
from lic_dist.errors import LicError, UsageError

if TYPE_CHECKING:
    import icechunk

T = TypeVar("T")

SCHEME, BRANCH = "icechunk://", "main"
NUMBERED = "snapshot-"  # tags of snapshots' numbers; all others are names
IN_A_REPOSITORY = re.compile(r"(.+/)?(zarr\.json|c/[0-9/]+)")  # Icechunk keeps keys of arrays and groups alone
RECORD = re.compile(r"(quantized/[^/]+)/record\.json")


@dataclass(frozen=True)
class Repository(Storage):
    """A commit of the repository at `path`, a folder or s3://bucket/prefix; without `commit` the newest."""

    path: str
    commit: str = ""

    sealed = True

    def __post_init__(self) -> None:
        _require_icechunk()

    def __str__(self) -> str:
        return SCHEME + self.path

    def get(self, key: str) -> bytes:
        if record := RECORD.fullmatch(key):
            attributes = json.loads(self.get(f"{record[1]}/zarr.json"))["attributes"]
            return json.dumps(attributes["record"], indent=1).encode()
        if key.startswith(f"{chain.NAMES}/"):
            return json.dumps(self._named(key.removeprefix(f"{chain.NAMES}/"))).encode()
        found = self._ask(self.zarr_store().get(key, default_buffer_prototype())) if self._may_have(key) else None
        if found is None:
            raise FileNotFoundError(f"{self}/{key}")
        return bytes(found.to_bytes())

    def entry(self, key: str) -> Entry | None:
        size = self._ask(_size(self.zarr_store(), key)) if self._may_have(key) else 0
        return Entry(size, 0.0) if size else None

    def listing(self, prefix: str = "") -> dict[str, Entry]:
        self._may_have(f"{prefix}/")

        async def sizes() -> dict[str, Entry]:
            keys = [key async for key in self.zarr_store().list_prefix(prefix)]
            found = await asyncio.gather(*(_size(self.zarr_store(), key) for key in keys))
            return {key: Entry(size, 0.0) for key, size in zip(keys, found, strict=True)}

        return self._ask(sizes())

    def names(self, prefix: str = "") -> list[str]:
        if prefix == chain.NAMES:
            return sorted(tag for tag in _repository(self.path).list_tags() if not tag.startswith(NUMBERED))
        self._may_have(f"{prefix}/")
        return sorted(self._ask(_each(self.zarr_store().list_dir(prefix))))

    def at(self, snapshot: int | str | None = None) -> Repository:
        repository = _repository(self.path)
        if snapshot is None:
            return replace(self, commit=repository.lookup_branch(BRANCH))
        tag = f"{NUMBERED}{snapshot}" if str(snapshot).isdigit() else str(snapshot)
        tags = repository.list_tags()
        if tag not in tags:
            known = sorted(one.removeprefix(NUMBERED) for one in tags)
            hint = f"it has {', '.join(known) or 'none'}; `lic-dist cache export --snapshot` adds one"
            raise LicError(f"{self} has no snapshot {snapshot}", hint=hint)
        return replace(self, commit=repository.lookup_tag(tag))

    def absolute(self) -> Repository:
        return self if "://" in self.path else replace(self, path=str(Path(self.path).resolve()))

    def free_bytes(self) -> int | None:
        return None

    def zarr_store(self) -> icechunk.IcechunkStore:
        return _session_store(self.path, self.commit)

    def sibling(self, suffix: str) -> tuple[Storage, str]:
        self._refuse()

    def put(self, key: str, data: bytes) -> None:
        self._refuse()

    def put_new(self, key: str, data: bytes) -> bool:
        self._refuse()

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        self._refuse()

    def delete(self, key: str) -> None:
        self._refuse()

    def clear(self) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        hint = "build, append, requantize, and look into, the store that it was exported from"
        raise LicError(f"{self} is an export, which is read and nothing else", hint=hint)

    def _may_have(self, key: str) -> bool:
        """Return whether a repository may have a key. LicError for a marker: who asks would take shards as missing."""
        if key.startswith(f"{markers.FOLDER}/"):
            self._refuse()
        return IN_A_REPOSITORY.fullmatch(key) is not None

    def _named(self, name: str) -> Any:
        repository = _repository(self.path)
        if name not in repository.list_tags():
            raise FileNotFoundError(f"{self}, tag {name}")
        return repository.lookup_snapshot(repository.lookup_tag(name)).metadata

    def _ask(self, asked: Coroutine[Any, Any, T]) -> T:
        from icechunk import IcechunkError

        try:
            return sync(asked)
        except IcechunkError as error:
            raise LicError(f"{self}: {first_line(error)}", hint="is the repository whole, and reachable?") from error


def open_repository(path: str, create: bool = False) -> icechunk.Repository:
    """Open the repository in a folder, or at s3://bucket/prefix, where AWS's variables say how (AWS_ENDPOINT_URL too).

    Raises:
        UsageError: icechunk is not installed.
        LicError: there is none, and it is not to be created, or cannot be; or something else is there.
    """
    _require_icechunk()
    import icechunk

    folder = None if path.startswith("s3://") else Path(path)
    try:
        if folder is None or folder.is_dir():  # Icechunk makes the folder that it looks into
            where = _in_a_bucket(path) if folder is None else icechunk.local_filesystem_storage(path)
            if icechunk.Repository.exists(where):
                return icechunk.Repository.open(where)
        if not create:
            raise LicError(f"no Icechunk repository at {path}", hint="`lic-dist cache export --icechunk` makes one")
        if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise LicError(f"{path} is there, and no Icechunk repository", hint="give a path of its own")
        return icechunk.Repository.create(
            _in_a_bucket(path) if folder is None else icechunk.local_filesystem_storage(path)
        )
    except icechunk.IcechunkError as error:
        raise LicError(f"no repository at {path}: {first_line(error)}", hint="is it reachable?") from error


def _in_a_bucket(url: str) -> icechunk.Storage:
    import icechunk

    bucket, _, prefix = url.removeprefix("s3://").rstrip("/").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    return icechunk.s3_storage(
        bucket=bucket,
        prefix=prefix,
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        endpoint_url=endpoint,
        allow_http=bool(endpoint and endpoint.startswith("http://")),
        force_path_style=endpoint is not None,
        from_env=True,
    )


@lru_cache(maxsize=16)
def _repository(path: str) -> icechunk.Repository:
    return open_repository(path)


@lru_cache(maxsize=16)
def _session_store(path: str, commit: str) -> icechunk.IcechunkStore:
    repository = _repository(path)
    return repository.readonly_session(snapshot_id=commit or repository.lookup_branch(BRANCH)).store


async def _size(store: icechunk.IcechunkStore, key: str) -> int:
    try:
        return int(await store.getsize(key))  # 0 of a key that is not there,
    except KeyError:  # or this, where its array is not
        return 0


async def _each(found: AsyncIterator[T]) -> list[T]:
    return [one async for one in found]


def _require_icechunk() -> None:
    """Raise UsageError where icechunk is not installed."""
    try:
        import icechunk
    except ModuleNotFoundError:
        raise UsageError("this needs the package icechunk", hint="pip install icechunk") from None
    if "ICECHUNK_LOG" not in os.environ:
        icechunk.set_logs_filter("error")  # it warns of folders whenever it opens one


def first_line(error: Exception) -> str:
    """Return what an error of Icechunk says, without the places in its source."""
    return str(error).strip().partition("\n")[0].removeprefix("x ").strip()[:200]
