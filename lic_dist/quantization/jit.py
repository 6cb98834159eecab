"""numba's compiler with its cache on disk, wherever there is a place for one."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import numba
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.runtime.nrt import rtsys

from lic_dist.temporary import own_folder

_lock = Lock()
_config: Any = numba.config


class _Cache(FunctionCache):
    """numba's cache of a function; what is found there runs without all that only the compiler needs: a third of a
    second, with scipy's BLAS."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)  # type: ignore[no-untyped-call]


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call, without the GIL, and keep the machine code on disk.

    numba keeps it in NUMBA_CACHE_DIR, beside the source, or in the user's cache folder. Where none of them can be
    written (a read-only installation, a user without a home) it is kept in the folder for temporary files; where that
    too is refused, the code is compiled anew in each process.
    """
    compiled: Any = njit(nogil=True)(function)
    try:
        compiled._cache = _Cache(function)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        _cache_in_temporary_folder(compiled, function)
    return compiled


def _cache_in_temporary_folder(compiled: Any, function: Callable[..., Any]) -> None:
    folder = own_folder("numba")
    if folder is None:
        return
    with _lock:
        before, _config.CACHE_DIR = _config.CACHE_DIR, str(folder)
        try:
            compiled._cache = _Cache(function)  # type: ignore[no-untyped-call]
        except RuntimeError:  # the disk is full, say
            return
        finally:
            _config.CACHE_DIR = before
