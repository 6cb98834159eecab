"""Open a storage by its path or URL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lic_dist.cache.bucket import Bucket
from lic_dist.cache.folder import Folder
from lic_dist.cache.repository import SCHEME, Repository
from lic_dist.cache.storage import Storage
from lic_dist.errors import UsageError


def open_storage(path: str | Path | Storage, options: Mapping[str, str] | None = None) -> Storage:
    """Return the storage of a folder's path, or of an object store's URL (s3://bucket/prefix, gs://..., az://...);
    or, to be read, of what `cache export --icechunk` wrote: icechunk:// and then that folder or URL.

    `options` are obstore's, by its names (endpoint, region, skip_signature ...). Credentials come from the environment
    or the machine's role, as for every tool of that object store.

    Raises:
        UsageError: a URL that no object store answers to, or icechunk is not installed.
    """
    if isinstance(path, Storage):
        return path
    if str(path).startswith(SCHEME):
        if options:
            raise UsageError(f"{path}: options are of object stores", hint="AWS's variables tell Icechunk")
        return Repository(str(path).removeprefix(SCHEME))
    if str(path).startswith("file://"):
        raise UsageError(f"{path}: a folder is given as a plain path", hint=str(path).removeprefix("file://"))
    if "://" not in str(path):
        return Folder(Path(path))
    return Bucket(str(path).rstrip("/"), tuple(sorted((options or {}).items())))
