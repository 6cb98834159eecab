"""Markers: a shard is done when its marker says so and its objects have the recorded sizes.

The order makes it safe to stop at any point: the old marker is removed, the objects are written whole,
brought to disk and hashed, and the new marker is renamed into place last. Whatever is killed in between
leaves a shard without a marker, which the next job writes again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "_progress"


@dataclass(frozen=True)
class Marker:
    """What is known of a finished shard.

    `objects` maps the path of each object in the store to {"bytes", "sha256"}. `samples` counts without
    padding, `faulty` those of them with a status other than 0. `bits` and `distortion` are sums over the
    good samples, None for the base arrays. `seconds` is what the builder measured and, alone here, may
    differ between equal stores.
    """

    fingerprint: str
    shard: int
    samples: int
    faulty: int
    objects: dict[str, dict[str, Any]]
    bits: float | None = None
    distortion: float | None = None
    seconds: Any = 0.0


def marker_path(store: Path, fingerprint: str, shard: int) -> Path:
    """_progress/<first 8 digits of the fingerprint>/<shard>.json"""
    return store / FOLDER / fingerprint[:8] / f"{shard}.json"


def read_marker(store: Path, fingerprint: str, shard: int) -> Marker | None:
    """The marker of a shard; None where none is there that parses and names this fingerprint and shard."""
    try:
        marker = Marker(**json.loads(marker_path(store, fingerprint, shard).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    named = (marker.fingerprint, marker.shard) == (fingerprint, shard)
    return marker if named and isinstance(marker.objects, dict) else None


def is_done(store: Path, fingerprint: str, shard: int) -> bool:
    """Whether the shard has a marker and every object that it names has the recorded size."""
    marker = read_marker(store, fingerprint, shard)
    return marker is not None and all(_size(store / path) == entry["bytes"] for path, entry in marker.objects.items())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def write_marker(store: Path, marker: Marker) -> None:
    """Publish a marker: whole, on disk, or not at all."""
    text = json.dumps(asdict(marker), sort_keys=True, indent=1)
    write_atomically(marker_path(store, marker.fingerprint, marker.shard), text.encode())


def remove_marker(store: Path, fingerprint: str, shard: int) -> None:
    """Declare a shard not done."""
    marker_path(store, fingerprint, shard).unlink(missing_ok=True)


def hash_object(path: Path) -> dict[str, Any]:
    """Bring a written object to disk and describe it: {"bytes", "sha256"}."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is seen whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def owner(store: Path, fingerprint: str, shard: int) -> Iterator[None]:
    """Be the only writer of a shard: waits for another process that writes it.

    By flock, which the kernel frees when the holder dies. An engine gives each shard to one worker; this
    guards against two jobs on one store, and against a worker that was given up but still writes. On a file
    system without locks the engine's rule stands alone.
    """
    path = marker_path(store, fingerprint, shard).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(path)
    try:
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _locked(path: Path) -> int:
    """A handle of the locked file; once more where the former owner has unlinked it meanwhile."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                os.close(handle)
                raise
            return handle
        if _inode(path) == os.fstat(handle).st_ino:
            return handle
        os.close(handle)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
