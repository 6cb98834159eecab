"""Storage in a folder: objects are written to a temporary file, synced to disk and renamed; locks are flocks."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from lic_dist.cache.storage import KEPT, Entry, Storage
from lic_dist.errors import LicError

TRANSIENT = (".part", ".lock")  # temporary and lock files, left out of listings
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # errors of a file system without locks
ABANDONED = 3600.0  # seconds after which another host's unfinished file counts as abandoned


@dataclass(frozen=True)
class Folder(Storage):
    """The files below a folder of a local or shared file system."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def get(self, key: str) -> bytes:
        with _reading(self):
            return (self.root / key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        path = self.root / key
        with _writing(self):
            self.root.stat()  # fails where the store was removed: writers do not create it again
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{token_hex(4)}.part")
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def put_new(self, key: str, data: bytes) -> bool:
        path = self.root / key
        if path.exists():
            return False
        with self.lock(f"{key}.lock"):
            if path.exists():
                return False
            self.put(key, data)
            return True

    def make(self) -> None:
        with _writing(self):
            self.root.mkdir(parents=True, exist_ok=True)

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        for key, data in objects.items():
            self.put(key, data)

    def delete(self, key: str) -> None:
        with _writing(self):
            (self.root / key).unlink(missing_ok=True)

    def entry(self, key: str) -> Entry | None:
        try:
            with _reading(self):
                stat = (self.root / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(stat.st_size, stat.st_mtime)

    def listing(self, prefix: str = "") -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        waiting = [prefix]  # keys, not paths: a store of a million photos has a million objects
        while waiting:
            folder = waiting.pop()
            below = f"{folder}/" if folder else ""
            try:
                with _reading(self), os.scandir(os.path.join(self.root, folder)) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(below + entry.name)
                        elif not entry.name.endswith(TRANSIENT):
                            with suppress(FileNotFoundError):  # removed meanwhile, or a dangling link
                                stat = entry.stat()
                                found[below + entry.name] = Entry(stat.st_size, stat.st_mtime)
            except (FileNotFoundError, NotADirectoryError):  # the folder does not exist, or was removed meanwhile
                continue
        return found

    def names(self, prefix: str = "") -> list[str]:
        try:
            with _reading(self):
                return sorted(os.listdir(self.root / prefix))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def clear(self) -> None:
        """Remove the folder; it is renamed first, so that a kill leaves no half of a store under its name."""
        root = self.root.resolve()
        aside = root.with_name(f".{root.name}.removed.{os.getpid()}.{token_hex(4)}")
        with _writing(self):
            root.rename(aside)
            if self.root.is_symlink():
                root.mkdir()  # recreates the link's target
            shutil.rmtree(aside)

    def require_folder(self) -> None:
        if self.root.is_symlink() and not self.root.exists():
            raise LicError(f"{self.root} is a link to nothing", hint="give another cache.path")
        if self.root.exists() and not self.root.is_dir():
            raise LicError(f"{self.root} is a file", hint="give another cache.path")

    def sweep(self, since: int = 0) -> None:
        waiting = [str(self.root)]
        while waiting:
            folder = waiting.pop()
            try:
                found = os.scandir(folder)
            except OSError:  # removed meanwhile, or closed to us
                continue
            passed_over = since if folder.endswith("/c") else 0  # the folder of an array's shards
            with found as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if not (passed_over and entry.name.isdigit() and int(entry.name) < passed_over):
                            waiting.append(entry.path)
                    elif entry.name.endswith(".part"):
                        _remove_if_stale(Path(entry.path))
                    elif entry.name.endswith(".lock"):
                        _remove_if_free(Path(entry.path))

    def sibling(self, suffix: str) -> tuple[Storage, str]:
        root = self.root.resolve()
        return Folder(root.parent), f"{root.name.removesuffix('.zarr')}{suffix}"

    def absolute(self) -> Storage:
        return Folder(self.root.resolve())

    def free_bytes(self) -> int | None:
        parent = next(folder for folder in (self.root.resolve(), *self.root.resolve().parents) if folder.is_dir())
        return shutil.disk_usage(parent).free

    def zarr_store(self) -> Any:
        from zarr.storage import LocalStore

        return LocalStore(self.root, read_only=True)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold an flock, which the kernel releases when its holder dies. A file system without locks gives none."""
        path = self.root / key
        with _writing(self):
            self.root.stat()  # fails where the store was removed: writers do not create it again
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = _locked(path)
        try:
            yield
            with _writing(self):
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)


@contextmanager
def _reading(storage: Folder) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise LicError(f"cannot read {error.filename or storage}: {error.strerror}") from error


@contextmanager
def _writing(storage: Folder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LicError(f"cannot write to {storage}: {error.strerror or error}", hint=KEPT) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_if_stale(part: Path) -> None:
    """Remove a killed writer's temporary file: its process is gone or, on another host, it is older than an hour."""
    parsed = re.fullmatch(r"\..+\.(\d+)\.[0-9a-f]{8}\.part", part.name)
    if parsed is None:
        return
    if f".{socket.gethostname()}.{parsed[1]}." in part.name:
        stale = not _alive(int(parsed[1]))
    else:
        try:
            stale = time.time() - part.stat().st_mtime > ABANDONED
        except FileNotFoundError:
            return
    if stale:
        part.unlink(missing_ok=True)


def _remove_if_free(lock: Path) -> None:
    """Remove the file of a lock that nobody holds: its owner was killed after the work, before it could remove it."""
    try:
        handle = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, *NO_LOCKS):
            raise
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _locked(path: Path) -> int:
    """Return a handle of the locked file; retries where the former owner has unlinked the file meanwhile."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
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
