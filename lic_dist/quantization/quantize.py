"""Apply quantizers: search, walk the state machine, reconstruct levels, count bits.

    r = y - means --quantize--> k --dequantize--> level, y_hat = means + level
                                 \\--rows--> table rows --> bits, or the entropy coder

The layout is always [lanes, steps]. A lane is one channel of one image (image-major) and its steps are the positions in
raster order, or a part of them; or a lane is a position and its steps are the channels. Every lane starts in state 0.

Arrays and tensors are both accepted, and the same kind is returned. Arrays and CPU tensors go through the compiled
kernels; tensors of a GPU stay there (Triton where it is installed, else torch). All give the same integers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lic_dist.errors import LicError
from lic_dist.quantization import kernels, scalar, tensors, viterbi
from lic_dist.quantization.embedded import Embedded
from lic_dist.quantization.rates import CdfTables, SearchRates, search_rates, signed_rates
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.reference import inverse
from lic_dist.quantization.trellis import Trellis, levels

_LARGEST_INDEX = 32767  # indices are int16
PIECES = 2  # pieces of the lanes for each thread


def search(
    r: Any, level: Any, weight: Any, step: float, tables: CdfTables | SearchRates, trellis: Trellis, threads: int = 1
) -> tuple[Any, Any]:
    """Find the path of least cost through a trellis: indices int16 [lanes, steps], costs int64 [lanes] in 1/256 bit.

    r float32 [lanes, steps]; level, unsigned, [lanes, steps], the scale level; weight float32 [lanes], or [1, steps]
    where lanes run along channels, the cost in 1/256 bit of a squared error of one step D
    (`QuantizerRecord.lane_weights`); step D; tables of rows Q * levels + level, symmetric ones, or the `signed_rates`
    of others. The lanes are divided among `threads` of the CPU. The result equals that of `reference.search` bit for
    bit.
    LicError where r is not finite or an index would not fit; ValueError for a machine without a trellis, or arguments
    that do not fit.
    """
    if trellis.quantizers != 2:
        raise ValueError(f"{trellis.name} has no trellis to search: it has one quantizer")
    rates = tables if isinstance(tables, SearchRates) else search_rates(tables)

    largest = 2 * _LARGEST_INDEX - 2  # of |r|/D

    def on_cpu(r: NDArray[Any], level: NDArray[Any], weight: NDArray[Any], k: NDArray[Any], cost: NDArray[Any]) -> None:
        arrays = (rates.quads, rates.zero_pairs, rates.reach, rates.flag)
        if not viterbi.search_lanes(r, level, weight, inverse(step), *arrays, trellis, k, cost) <= largest:
            _check_range(r, step, largest)

    def on_device(r: torch.Tensor, level: torch.Tensor, weight: torch.Tensor) -> tuple[Any, Any]:
        _check_range(r, step, largest)
        held = tensors.DeviceRates.of(rates, r.device, trellis=True)
        if r.is_cuda and find_spec("triton"):
            from lic_dist.quantization import triton_search

            return triton_search.search(r, level, weight, float(inverse(step)), held, trellis)
        return tensors.search(r, level, weight, float(inverse(step)), held, trellis)

    return _run_search(r, level, weight, rates, 2, threads, on_cpu, on_device)


def rdoq(
    r: Any, level: Any, weight: Any, step: float, tables: CdfTables | SearchRates, threads: int = 1
) -> tuple[Any, Any]:
    """Quantize by rate-distortion optimized scalar quantization; arguments, results and errors as `search`, rows =
    levels.
    """
    rates = tables if isinstance(tables, SearchRates) else search_rates(tables)

    def on_cpu(r: NDArray[Any], level: NDArray[Any], weight: NDArray[Any], k: NDArray[Any], cost: NDArray[Any]) -> None:
        arrays = (rates.triples, rates.reach, rates.flag)
        if not scalar.rdoq(r, level, weight, inverse(step), *arrays, k, cost) <= _LARGEST_INDEX:
            _check_range(r, step, _LARGEST_INDEX)

    def on_device(r: torch.Tensor, level: torch.Tensor, weight: torch.Tensor) -> tuple[Any, Any]:
        _check_range(r, step, _LARGEST_INDEX)
        held = tensors.DeviceRates.of(rates, r.device, trellis=False)
        return tensors.rdoq(r, level, weight, float(inverse(step)), held)

    return _run_search(r, level, weight, rates, 1, threads, on_cpu, on_device)


def _run_search(
    r: Any,
    level: Any,
    weight: Any,
    rates: SearchRates,
    quantizers: int,
    threads: int,
    on_cpu: Callable[..., None],
    on_device: Callable[..., tuple[Any, Any]],
) -> tuple[Any, Any]:
    """Check the arguments of a search and run it on the device of r."""
    if not _on_cpu(r):
        r, weight = r.float(), torch.as_tensor(weight, dtype=torch.float32, device=r.device).contiguous()
    else:
        kind = type(r)
        r, weight = _contiguous(r, np.float32), _contiguous(weight, np.float32)
    level = _checked_levels(level, r.shape, len(rates.costs) // (quantizers * (1 + rates.signed)))
    if len(rates.costs) % quantizers or tuple(weight.shape) not in ((r.shape[0],), (1, r.shape[1])):
        raise ValueError(f"{len(rates.costs)} rows of tables and weights {tuple(weight.shape)} do not fit {r.shape}")
    level = rates.search_levels(r, level)
    if threads < 1:
        raise ValueError(f"{threads} threads")
    if 0 not in weight.shape and not (bool((weight >= 0).all()) and float(weight.max()) < np.inf):
        raise ValueError("weights are finite numbers >= 0")
    if not isinstance(r, np.ndarray):
        found: tuple[Any, Any] = on_device(r, level, weight)
        return found
    k, cost = np.empty(r.shape, np.int16), np.zeros(len(r), np.int64)

    def work(piece: slice) -> None:
        weights = weight[piece] if weight.ndim == 1 else weight
        on_cpu(r[piece], level[piece], weights, k[piece], cost[piece])

    if threads == 1:
        work(slice(None))
    else:
        share = max(viterbi.SIMD, -(-len(r) // (threads * PIECES * viterbi.SIMD)) * viterbi.SIMD)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, [slice(first, first + share) for first in range(0, len(r), share)]))
    return (torch.from_numpy(k), torch.from_numpy(cost)) if issubclass(kind, torch.Tensor) else (k, cost)


def _contiguous(values: Any, dtype: Any) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = (values.detach().float() if values.is_floating_point() else values.detach()).numpy()
    return np.ascontiguousarray(values, dtype)


def _checked_levels(level: Any, shape: Any, count: int) -> Any:
    """Return levels of this shape, unsigned and below `count`, contiguous on the CPU; ValueError for others."""
    if _on_cpu(level):
        level = _contiguous(level, None)
    if str(level.dtype).removeprefix("torch.") not in ("uint8", "uint16"):
        raise ValueError(f"levels are uint8 or uint16, not {level.dtype}")
    if tuple(level.shape) != tuple(shape) or len(shape) != 2:
        raise ValueError(f"level has shape {tuple(level.shape)}, not the [lanes, steps] {tuple(shape)}")
    if 0 not in shape and int((level if isinstance(level, np.ndarray) else level.int()).max()) >= count:
        raise ValueError(f"scale levels are below {count}")
    return level


def _check_range(r: Any, step: float, limit: int) -> None:
    """Raise LicError unless |r| / step is finite and at most `limit`."""
    if 0 in r.shape:
        return
    peak = kernels.largest_magnitude(_contiguous(r, np.float32).ravel()) if _on_cpu(r) else float(r.abs().max())
    if not np.isfinite(peak):
        raise LicError("a latent is not finite", hint="check the checkpoint of the encoder")
    if not peak * float(inverse(step)) <= limit:
        raise LicError(
            f"a latent of {peak:.6g} does not fit 16-bit indices at step {step:.6g}",
            hint="take a larger step, or check the encoder",
        )


class Quantizer:
    """A quantizer record, ready for use: stateless, safe to share between threads.

    Every method takes arrays or tensors [lanes, steps] and returns the same kind.
    """

    def __init__(self, record: QuantizerRecord) -> None:
        self.record = record
        self.trellis = record.trellis

    @cached_property
    def _rates(self) -> SearchRates:
        return (signed_rates if self.record.by_channel else search_rates)(self.record.y_tables)

    @cached_property
    def _embedded(self) -> Embedded:
        return Embedded(self.record)

    def quantize(self, r: Any, level: Any, threads: int = 1, channels: Any = None) -> Any:
        """Return indices int16 of residuals r = y - means, float32 [lanes, steps]; level uint8 or uint16, the same
        shape: the level of the scale, or the channel where y has a factorized prior.

        SQ and the dead zone round; RDOQ and TCQ search (on `threads` of the CPU); bit planes are cut. `channels` names
        the channel of each lane, integers [lanes], or of each step, [1, steps]; without it the lanes are whole images
        of the record's M channels. LicError where r is not finite or an index does not fit 16 bits; or for bit planes
        of a model that codes y in several stages.
        """
        record = self.record
        if not record.kind.searched:
            r = r.float() if isinstance(r, torch.Tensor) else _contiguous(r, np.float32)
            _checked_levels(level, r.shape, record.levels)
            _check_range(r, record.step, _LARGEST_INDEX)
            if record.kind.embedded:
                if channels is not None:
                    raise LicError("bit planes are of models that code y in one stage", hint="take another quantizer")
                return self._of_planes("quantize", r, level)
            if record.kind.strength:
                return scalar.dead_zone(r, record.step, record.rounding)
            return scalar.uniform(r, record.step)
        weight = self._weights(len(r), channels)
        if not record.kind.trellis:
            return rdoq(r, level, weight, record.step, self._rates, threads)[0]
        return search(r, level, weight, record.step, self._rates, self.trellis, threads)[0]

    def _weights(self, lanes: int, channels: Any) -> NDArray[Any]:
        """Return the weights that a search takes, [lanes] or [1, steps]: those of `channels`, or of whole images."""
        count = len(self.record.weights)
        if channels is None:
            if lanes % count:
                raise ValueError(f"{lanes} lanes are not whole images of {count} channels")
            return self.record.lane_weights(lanes // count)
        channels = np.asarray(_to_numpy(channels))
        if channels.size and not 0 <= channels.min() <= channels.max() < count:
            raise ValueError(f"channels are 0 to {count - 1}")
        weights: NDArray[Any] = self.record.channel_weights[channels]
        return weights

    def _of_planes(self, what: str, values: Any, level: Any) -> Any:
        """Return what a method of Embedded makes of arrays or tensors, as the same kind."""
        device = values.device if isinstance(values, torch.Tensor) else torch.device("cpu")
        arguments = (torch.as_tensor(one, device=device) for one in (values, level))
        found = getattr(self._embedded.to(device), what)(*arguments)
        return found if isinstance(values, torch.Tensor) else found.numpy()

    def active(self, k: Any) -> Any:
        """Return the active quantizer of each index, uint8 [lanes, steps]."""
        return active(k, self.trellis)

    def rows(self, k: Any, level: Any) -> Any:
        """Return the table row of each index, int32 [lanes, steps]: Q * levels + level."""
        return table_rows(k, level, self.trellis, self.record.levels)

    def dequantize(self, k: Any, level: Any = None) -> Any:
        """Return reconstruction levels, float32 [lanes, steps]: y_hat = means + level.

        `level` is that of the scales, as `quantize` takes it. ValueError without it where the record
        `follows_scales`.
        """
        if not self.record.follows_scales:
            return self.unspread(k)
        if level is None:
            raise ValueError("levels of reconstruction that follow sigma need the levels of the scales")
        if self.record.kind.embedded:
            return self._of_planes("values", k, level)
        if _on_cpu(k):
            return self._reconstruct(k, _contiguous(_to_numpy(level), np.uint8), self.record.shifts)
        shifts = torch.from_numpy(self.record.shifts).to(k.device)
        shift = shifts[torch.as_tensor(level, device=k.device).long()]
        return levels(k, self.active(k), self.record.step, self.trellis, shift)

    def unspread(self, k: Any) -> Any:
        """Return `dequantize` less what `spread` and `level_shifts` of the record add, which depends on sigma."""
        if _on_cpu(k):
            return self._reconstruct(k, None, np.full(2, self.record.shift, np.float32))
        return levels(k, self.active(k), self.record.step, self.trellis, self.record.shift)

    def lattice(self, k: Any) -> Any:
        """Return the points that a search has indices stand for, float32 [lanes, steps]: levels without any shift."""
        if _on_cpu(k):
            return self._reconstruct(k, None, np.zeros(2, np.float32))
        return levels(k, self.active(k), self.record.step, self.trellis)

    def _reconstruct(self, k: Any, level: NDArray[np.uint8] | None, shifts: NDArray[np.float32]) -> Any:
        """Return levels as `trellis.levels` does, shifted by those of `level`; without it all shifts are alike."""
        indices = _contiguous(k, np.int16)
        q = active(indices, self.trellis)
        of_shift = q if level is None else level
        flat = kernels.reconstruct(
            indices.ravel(), q.ravel(), of_shift.ravel(), shifts, np.float32(self.record.step), self.trellis.quantizers
        )
        value = flat.reshape(indices.shape)
        return torch.from_numpy(value) if isinstance(k, torch.Tensor) else value

    def bits(self, k: Any, level: Any) -> Any:
        """Return the estimated bits of each lane, float64 [lanes], escapes included."""
        if self.record.kind.embedded:
            return self._of_planes("bits", k, level).sum(axis=1)
        lanes: Any = self.record.y_tables.bits(_to_numpy(k), _to_numpy(self.rows(k, level))).sum(axis=1)
        return torch.from_numpy(lanes).to(k.device) if isinstance(k, torch.Tensor) else lanes


def _on_cpu(values: Any) -> bool:
    return not isinstance(values, torch.Tensor) or values.device.type == "cpu"


def _to_numpy(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values


def active(k: Any, trellis: Trellis) -> Any:
    """Return the active quantizer of each index k int16 [lanes, steps]: uint8, same shape and kind."""
    if not _on_cpu(k):
        return tensors.active(k, trellis)
    if trellis.states == 1:
        found = np.zeros(tuple(k.shape), np.uint8)
    else:
        quantizer = np.array(trellis.quantizer, np.uint8)
        next_state = np.array(trellis.next_state, np.uint8).ravel()
        found = kernels.active_quantizers(_contiguous(k, np.int16), quantizer, next_state)
    return torch.from_numpy(found) if isinstance(k, torch.Tensor) else found


def table_rows(k: Any, level: Any, trellis: Trellis, count: int) -> Any:
    """Return the table row of each index with `count` levels, int32 [lanes, steps]: Q * count + level; array or
    tensor.
    """
    level = _checked_levels(level, k.shape, count)
    q = active(k, trellis)
    if not _on_cpu(k):
        return q.int() * count + torch.as_tensor(level, device=k.device).int()
    rows = _to_numpy(q).astype(np.int32) * count + level
    return torch.from_numpy(rows) if isinstance(k, torch.Tensor) else rows
