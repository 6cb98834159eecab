"""numba's compiler with its cache on disk, in whatever folder can be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.runtime.nrt import rtsys
from numba.extending import intrinsic
from numpy.typing import NDArray

from lic_dist.temporary import own_folder

_lock = Lock()
_config: Any = numba.config
pointer_to: Any = types.CPointer
_NO_NARROW, _NO_WIDE = np.empty((0, 0), np.uint8), np.empty((0, 0), np.uint16)


class _Cache(FunctionCache):
    """numba's cache of a function. Loading from it skips what only the compiler needs, scipy's BLAS among it: a
    third of a second.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)  # type: ignore[no-untyped-call]


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call, without the GIL, and keep the machine code on disk.

    numba keeps it in NUMBA_CACHE_DIR, beside the source, or in the user's cache folder. If none of these can be written
    (a read-only installation, a user without a home) it is kept in the folder for temporary files; if that fails too,
    each process compiles again.
    """
    return _kept(njit(nogil=True)(function), function)


def pointer_kernel(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Compile a function of C types (numba's) that returns nothing, and keep it as `kernel` does; return numba's CFunc,
    whose `address` a kernel may be given, to call it by `call_pointer`.

    A kernel does not hold what it calls so, and is not compiled again for another function.
    """
    compiled: Any = _kept(CFunc(function, (tuple(arguments), types.void), {}, {"nopython": True}), function)
    compiled.compile()
    return compiled


def _call_pointer(typing: Any, address: Any, arguments: Any) -> Any:
    """Call a `pointer_kernel` by its address with a tuple of int64: numbers, and addresses as `x.ctypes.data`."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        word = ir.IntType(64)
        callee = ir.FunctionType(ir.VoidType(), [word] * len(arguments)).as_pointer()
        words = [builder.extract_value(given[1], one) for one in range(len(arguments))]
        builder.call(builder.inttoptr(given[0], callee), words)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), generate


call_pointer: Any = intrinsic(_call_pointer)


def _kept(compiled: Any, function: Callable[..., Any]) -> Any:
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


def search_inputs(r: NDArray[Any], level: NDArray[Any], weight: NDArray[Any]) -> tuple[Any, ...]:
    """Return what a search reads in one set of types, since numba takes seconds to compile for each: read-only arrays.

    These are r; the levels as uint8 and as uint16, one of them empty; the weights [n], and whether they are by step.
    """
    levels = (level, _NO_WIDE) if level.dtype == np.uint8 else (_NO_NARROW, level)
    views = [array.view() for array in (r, *levels, weight.ravel())]
    for view in views:
        view.setflags(write=False)
    return *views, weight.ndim == 2


def float_of_bits(bits: Any) -> float:
    """Return the float32 of these bits, an int32, as a kernel returns its largest magnitude."""
    return float(np.array(bits, np.int32).view(np.float32))
