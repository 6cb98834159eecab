"""Run a network over a picture in strips of rows, none of which any layer computes twice.

    rows of the input, strip by strip --layer--> rows --layer--> ... --> rows of the output

Every layer is given the rows that the one before it has made, keeps those that its next outputs still need, and makes
as many outputs as their receptive fields (fields.py) allow; the last strip brings the rest. So a strip of inputs gives
the outputs that lie a margin behind it, and what is held are strips alone. Threads share out the rows of each layer.
Values are those of the network on the whole picture, except for the last bits at most.
"""

from __future__ import annotations

import copy
import ctypes
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from lic_dist.codec.fields import is_pointwise, receptive_field, scale
from lic_dist.models.layers import Residual
from lic_dist.models.protocol import CodecModel

KEEP_BELOW, KEEP = 32 << 20, 64 << 20  # bytes: of one array, and in all
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
Given = TypeVar("Given")
Found = TypeVar("Found")
LEAST = 1 << 16  # values of a layer's input, below which a thread of its own does not pay


class Pool:
    """Threads that compute side by side, each with one thread of torch: `with Pool(n) as pool`.

    So no result depends on how many there are: convolutions that torch itself shares out to several threads sum in
    another order. One thread computes in the calling one.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._executor: ThreadPoolExecutor | None = None

    def __enter__(self) -> Pool:
        _keep_freed_memory()
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        if self.threads > 1:  # a new thread has OpenMP's own number: a convolution that comes first would take it
            self._executor = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = None
        torch.set_num_threads(self._before)

    def map(self, work: Callable[[Given], Found], over: Iterable[Given]) -> Iterator[Found]:
        """Return what `work`, which takes no gradients, makes of each, in order."""
        if self._executor is None:
            return map(work, over)

        def without_gradients(one: Given) -> Found:
            with torch.no_grad():  # which is each thread's own
                return work(one)

        return self._executor.map(without_gradients, over)


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep what arrays leave for the next ones: the system would clear every page anew, a tenth of the time
    of a picture. Settings of the environment hold.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_M_MMAP_THRESHOLD, KEEP_BELOW)
        mallopt(_M_TRIM_THRESHOLD, KEEP)


def in_strips(codec: CodecModel, name: str, rows: int, pool: Pool) -> CodecModel:
    """Return a model whose network of a name takes strips of its input of so many rows, in order; for one picture."""
    strips = Strips(codec.nets[name], rows, pool)
    made = copy.copy(codec)

    def run(name: str, values: Tensor) -> Tensor:
        return strips(values)

    made.run = run  # type: ignore[method-assign]
    return made


class Strips:
    """A network that is given its input [1, C, rows, W] in strips from top to bottom, of `rows` in all, and returns the
    rows of its output that they complete. The first strip completes one at least (`first_rows`).
    """

    def __init__(self, network: nn.Module, rows: int, pool: Pool) -> None:
        self._layers = []
        for layer in _chain(network):
            self._layers.append(_Layer(layer, rows, pool))
            rows = self._layers[-1].writes

    def __call__(self, rows: Tensor) -> Tensor:
        for layer in self._layers:
            rows = layer(rows)
        return rows


def first_rows(network: nn.Module) -> int:
    """Return how many rows of its input a network needs for its first row of output."""
    rows = 1
    for layer in reversed(list(_chain(network))):
        rows = receptive_field(layer, 0, rows)[1]
        rows = -(-rows // scale(layer)[0]) * scale(layer)[0]
    return rows


class _Layer:
    def __init__(self, layer: nn.Module, rows: int, pool: Pool) -> None:
        self._layer, self._pool = layer, pool
        self._looks = None if is_pointwise(layer) else layer.body[0] if isinstance(layer, Residual) else layer
        self._each, self._makes = scale(layer)  # rows in for rows out
        self.reads, self.writes = rows, rows // self._each * self._makes
        self._first = self._done = 0  # numbers of the first row that is kept, and of the next one to make
        self._kept: Tensor | None = None

    def __call__(self, new: Tensor) -> Tensor:
        rows = new
        if self._kept is not None:
            rows = torch.cat((self._kept, new), 2)
        received = self._first + rows.shape[2]
        ready = self.writes if received == self.reads else bisect_right(range(self.writes), received, key=self._end) - 1
        whole = self._made(rows, self._done, ready)
        self._done = ready
        begin = self._begin(ready) if ready < self.writes else received
        self._kept = rows[:, :, begin - self._first :].clone() if begin < received else None
        self._first = begin
        return whole

    def _begin(self, first: int) -> int:
        """Return the first row that the output rows from `first` on are made from, a multiple of the stride."""
        if self._looks is not None:
            first = receptive_field(self._looks, first, first + 1)[0]
        return max(0, first // self._each * self._each)

    def _end(self, last: int) -> int:
        """Return the end of the rows that the output rows before `last` are made from."""
        if last and self._looks is not None:
            last = receptive_field(self._looks, last - 1, last)[1]
        return min(self.reads, -(-last // self._each) * self._each)

    def _made(self, rows: Tensor, first: int, last: int) -> Tensor:
        """Return output rows first..last-1 of rows from `self._first` on."""

        def part(share: tuple[int, int]) -> Tensor:
            begin, end = self._begin(share[0]), self._end(share[1])
            origin = begin // self._each * self._makes
            source = rows[:, :, begin - self._first : end - self._first]
            return _output(self._layer, source, slice(share[0] - origin, share[1] - origin))

        count = min(self._pool.threads, (last - first) // self._makes, rows.numel() // LEAST)
        if count < 2:
            return part((first, last))
        edges = [first + (last - first) * at // (count * self._makes) * self._makes for at in range(count)] + [last]
        shares = list(zip(edges, edges[1:], strict=False))
        parts = list(self._pool.map(part, shares))
        _, channels, _, width = parts[0].shape
        size = 1, channels, last - first, width
        whole = torch.empty(size, dtype=rows.dtype, device=rows.device, memory_format=_layout(parts[0]))

        def put(at: int) -> None:
            whole[:, :, shares[at][0] - first : shares[at][1] - first] = parts[at]

        list(self._pool.map(put, range(count)))
        return whole


def _output(layer: nn.Module, source: Tensor, kept: slice) -> Tensor:
    """Return some rows of a layer's output; of a residual block only its first convolution sees more than these."""
    source = source.contiguous(memory_format=_layout(source))
    if not isinstance(layer, Residual):
        return _rows(layer(source), kept)
    convolution, *pointwise = layer.body
    inner = _rows(convolution(source), kept)
    for one in pointwise:
        inner = one(inner)
    return inner.add_(source[:, :, kept])


def _rows(values: Tensor, kept: slice) -> Tensor:
    return values[:, :, kept].contiguous(memory_format=_layout(values))


def _layout(values: Tensor) -> torch.memory_format:
    return torch.channels_last if values.stride(1) == 1 and values.shape[1] > 1 else torch.contiguous_format


def _chain(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a network in turn, those of a chain within it too."""
    if isinstance(network, nn.Sequential) and not is_pointwise(network):
        for layer in network:
            yield from _chain(layer)
    else:
        yield network
