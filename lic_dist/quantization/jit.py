"""numba's compiler with its cache on disk, wherever there is a place for one."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numba
from numba import njit

_lock = Lock()
_config: Any = numba.config


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call, without the GIL, and keep the machine code on disk.

    numba keeps it in NUMBA_CACHE_DIR, beside the source, or in the user's cache folder. Where none of them can be
    written (a read-only installation, a user without a home) it is kept in the folder for temporary files; where that
    too is refused, the code is compiled anew in each process.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
    folder = temporary_cache()
    if folder is None:
        return njit(nogil=True)(function)
    with _lock:
        before, _config.CACHE_DIR = _config.CACHE_DIR, str(folder)
        try:
            return njit(cache=True, nogil=True)(function)
        except RuntimeError:  # the disk is full, say
            return njit(nogil=True)(function)
        finally:
            _config.CACHE_DIR = before


def temporary_cache() -> Path | None:
    """A folder of this user's own among the temporary files, the same in every process; None where there is none.

    What lies in it is executed: a folder of that name that another user made, or could write to, is not taken.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"lic-dist-numba-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if own else None
