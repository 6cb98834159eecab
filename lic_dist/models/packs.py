"""Packs: what a domain changes in a model, in a file of some per cent of its bytes, merged into the weights at load.

    offset  bytes
         0      7  "LICPACK"
         7      1  format: 1
         8     32  SHA-256 of every byte after it
        40      4  length a of the header, unsigned, little-endian
        44      a  header: JSON in UTF-8, deflated (zlib)
    44 + a         int8 numbers of the deltas, one delta after another, deflated

The header has `base`, the digest of the weights that the deltas are of, `of`, that model's name where it was made,
`deltas`, [name, shape, rank] each, `quantizers` {name: record as JSON} and `entry`, what was done, for the history. A
weight of shape [rows, ...] is a matrix [rows, columns]; a vector is one row. Of a delta of rank 0 there are rows
exponents e and rows x columns numbers n, of one of rank r there are r exponents, rows x r numbers l and r x columns
numbers m:

    rank 0      W' = float32(W + 2^e n)                     each row with its e
    rank r      W' = float32(W + sum over r of 2^e (l m))   summed in turn, in float64

Products of integers and powers of two are exact, IEEE 754 defines the sums, and W' is rounded once: the merged weights
are the same on every machine, to the bit. So are their digests, by which files, stores and identities tell the merged
model from its base.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lic_dist.errors import LicError

MAGIC, FORMAT = b"LICPACK", 1
_START = struct.Struct("<7sB32sI")
LARGEST = 127  # of the numbers
EXPONENTS = -100, 20
MOST_HEADER, MOST_NUMBERS = 1 << 24, 1 << 26  # bytes that a broken file may claim


@dataclass(frozen=True, eq=False)
class Delta:
    """What is added to one weight: the integers of the module's text, all int8.

    Of rank 0 `exponents` [rows], `left` [rows, columns], `right` [0, columns]; else [rank], [rows, rank], [rank,
    columns].
    """

    shape: tuple[int, ...]
    rank: int
    exponents: NDArray[np.int8]
    left: NDArray[np.int8]
    right: NDArray[np.int8]

    @staticmethod
    def free(values: Tensor) -> Delta:
        """Return the nearest delta of rank 0 to values of any shape."""
        matrix = values.detach().double().cpu().numpy().reshape(_sides(tuple(values.shape)))
        exponents = _exponents(matrix)
        numbers = np.rint(np.ldexp(matrix, -exponents[:, None])).astype(np.int8)
        return Delta(
            tuple(values.shape), 0, exponents.astype(np.int8), numbers, np.empty((0, matrix.shape[1]), np.int8)
        )

    @staticmethod
    def of_factors(shape: tuple[int, ...], left: Tensor, right: Tensor) -> Delta:
        """Return a near delta to the product of left [rows, rank] and right [rank, columns].

        The product is first split into its singular vectors, so that no two components cancel.
        """
        rank = left.shape[1]
        q, triangle = np.linalg.qr(left.detach().double().cpu().numpy())
        u, sizes, vectors = np.linalg.svd(triangle @ right.detach().double().cpu().numpy(), full_matrices=False)
        u = q @ u
        highest = np.maximum(np.abs(u).max(0), 1e-30)
        matrix, others = u / highest * LARGEST, (highest * sizes / LARGEST)[:, None] * vectors
        exponents = _exponents(others)
        return Delta(
            shape,
            rank,
            exponents.astype(np.int8),
            np.rint(matrix).astype(np.int8),
            np.rint(np.ldexp(others, -exponents[:, None])).astype(np.int8),
        )

    @property
    def is_zero(self) -> bool:
        """Whether it adds nothing."""
        return not (self.right if self.rank else self.left).any()

    def added_to(self, weight: Tensor) -> Tensor:
        """Return the merged weight, float32, of one of this shape."""
        total = weight.detach().cpu().double().numpy().reshape(_sides(self.shape))
        if self.rank == 0:
            total = total + np.ldexp(self.left.astype(np.float64), self.exponents.astype(np.int32)[:, None])
        for number in range(self.rank):
            unit = math.ldexp(1.0, int(self.exponents[number]))
            total = total + np.multiply.outer(self.left[:, number] * unit, self.right[number].astype(np.float64))
        return torch.from_numpy(total.astype(np.float32).reshape(self.shape)).to(weight.device)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a weight as a matrix."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def _exponents(matrix: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return for each row the least e of EXPONENTS with max |row| <= LARGEST 2^e."""
    with np.errstate(divide="ignore"):
        found = np.ceil(np.log2(np.abs(matrix).max(1) / LARGEST))
    exponents: NDArray[np.int64] = np.clip(found, *EXPONENTS).astype(np.int64)
    return exponents


@dataclass(frozen=True)
class Pack:
    """A pack: the digest of its base's weights, deltas by the names of weights, quantizers that were calibrated for
    the merged model, and the entry of its history.
    """

    base: str
    of: str
    deltas: Mapping[str, Delta]
    quantizers: Mapping[str, str] = field(default_factory=dict)
    entry: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def data(self) -> bytes:
        """The file's bytes."""
        header = {
            "base": self.base,
            "of": self.of,
            "deltas": [[name, list(one.shape), one.rank] for name, one in self.deltas.items()],
            "quantizers": dict(self.quantizers),
            "entry": dict(self.entry),
        }
        parts = (part for one in self.deltas.values() for part in (one.exponents, one.left, one.right))
        numbers = b"".join(part.tobytes() for part in parts)
        told = zlib.compress(json.dumps(header, allow_nan=False).encode(), 9)
        rest = struct.pack("<I", len(told)) + told + zlib.compress(numbers, 9)
        return MAGIC + bytes([FORMAT]) + hashlib.sha256(rest).digest() + rest

    @property
    def digest(self) -> str:
        """The SHA-256 of the file."""
        return hashlib.sha256(self.data).hexdigest()

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state_dict with the deltas added. Raises LicError where they are of no weights of it."""
        found = dict(state)
        for name, delta in self.deltas.items():
            weight = state.get(name)
            if weight is None or tuple(weight.shape) != delta.shape or weight.dtype != torch.float32:
                raise LicError(f"this pack changes '{name}', which the model does not have in that shape")
            found[name] = delta.added_to(weight)
        return found

    @classmethod
    def parse(cls, data: bytes) -> Pack:
        """Return the pack of a file's bytes. Raises LicError for other bytes; takes no more memory than it states."""
        if data[: len(MAGIC)] != MAGIC:
            raise LicError("this is no pack", hint="`lic-dist finetune` with recipe: adapters writes one")
        if len(data) < _START.size:
            raise LicError("this pack is cut", hint="copy it again")
        _, version, stated, size = _START.unpack_from(data)
        if version != FORMAT:
            raise LicError(f"this pack has format {version}; this program reads format {FORMAT}")
        if hashlib.sha256(memoryview(data)[40:]).digest() != stated:
            raise LicError("this pack is cut or altered: its checksum does not fit", hint="copy it again")
        try:
            end = _START.size + size
            if end > len(data):
                raise ValueError("a header that is longer than the file")
            told = _inflated(data[_START.size : end], MOST_HEADER).decode()
            header = json.loads(told, parse_constant=_refuse, parse_float=_finite)
            return cls._of(header, data[end:])
        except (ValueError, RecursionError, zlib.error) as error:
            raise LicError(f"this pack contradicts itself: {error}", hint="no program of ours wrote it") from None

    @classmethod
    def _of(cls, header: Any, packed: bytes) -> Pack:
        kinds = {"base": str, "of": str, "deltas": list, "quantizers": dict, "entry": dict}
        if type(header) is not dict or {key: type(value) for key, value in header.items()} != kinds:
            raise ValueError("its header has other fields")
        if any(type(text) is not str for text in header["quantizers"].values()):
            raise ValueError("quantizers are texts")
        layout = [_layout(one) for one in header["deltas"]]
        if len({name for name, _, _ in layout}) < len(layout):
            raise ValueError("two deltas of one weight")
        total = sum(sum(_counts(shape, rank)) for _, shape, rank in layout)
        if total > MOST_NUMBERS:
            raise ValueError(f"{total} numbers are too many")
        numbers = np.frombuffer(_inflated(packed, total), np.int8)
        if len(numbers) != total:
            raise ValueError(f"{len(numbers)} numbers in the place of {total}")
        deltas, start = {}, 0
        for name, shape, rank in layout:
            (rows, columns), counts = _sides(shape), _counts(shape, rank)
            exponents, left, right = np.split(numbers[start : start + sum(counts)], np.cumsum(counts)[:-1])
            if len(exponents) and not (EXPONENTS[0] <= exponents.min() and exponents.max() <= EXPONENTS[1]):
                raise ValueError(f"an exponent of '{name}' outside of {EXPONENTS[0]} to {EXPONENTS[1]}")
            start += sum(counts)
            deltas[name] = Delta(shape, rank, exponents, left.reshape(rows, -1), right.reshape(-1, columns))
        return cls(header["base"], header["of"], deltas, header["quantizers"], header["entry"])


def _layout(told: Any) -> tuple[str, tuple[int, ...], int]:
    """Return name, shape and rank of a delta. ValueError for anything else."""
    if type(told) is not list or [type(one) for one in told] != [str, list, int]:
        raise ValueError("a delta is a name, a shape and a rank")
    name, shape, rank = told
    if not 1 <= len(shape) <= 4 or any(type(side) is not int or not 1 <= side <= MOST_NUMBERS for side in shape):
        raise ValueError(f"no weight has the shape of '{name}'")
    if not 0 <= rank <= min(_sides(tuple(shape))):
        raise ValueError(f"'{name}' has no rank {rank}")
    return name, tuple(shape), rank


def _counts(shape: tuple[int, ...], rank: int) -> tuple[int, int, int]:
    """Return how many exponents, left and right numbers a delta has."""
    rows, columns = _sides(shape)
    return (rank, rows * rank, rank * columns) if rank else (rows, rows * columns, 0)


def _inflated(packed: bytes, most: int) -> bytes:
    """Return what is deflated in bytes, and nothing behind it. ValueError where it is more than `most` bytes, cut or
    followed by others.
    """
    inflating = zlib.decompressobj()
    found = inflating.decompress(packed, most + 1)
    if len(found) > most or not inflating.eof or inflating.unused_data:
        raise ValueError("a stream that is cut or too long")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    """Return a number that is not too large for one. ValueError otherwise: 1e999 would be infinite."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no number")
    return number


def save(pack: Pack, path: Path) -> None:
    """Write a pack whole or not at all. Raises LicError where the disk refuses it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(pack.data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LicError(f"cannot write {path}: {error.strerror or error}") from None


def read(path: Path) -> Pack:
    """Read a pack's file. Raises LicError, which names it."""
    try:
        return Pack.parse(path.read_bytes())
    except OSError as error:
        raise LicError(f"cannot read the pack {path}: {error.strerror or error}") from None
    except LicError as error:
        raise LicError(f"{path}: {error.message}", hint=error.hint) from None
