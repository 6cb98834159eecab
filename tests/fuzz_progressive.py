"""Hostile bytes against progressive files, as tests/fuzz_bitstream.py has them against those of format 2.

    NUMBA_BOUNDSCHECK=1 python -m tests.fuzz_progressive 1000000 [SEED]

An input is a byte and a file. The byte says which checks are mended before it is decoded: 1 the CRC-32 of the head and
the CRC-16 of each unit, 2 the identities, 4 the CRC-32 of the scale levels. Every input is a true file after some
mutations. What is neither what is known of the elements of an image of the size that its header claims nor a
BitstreamError is a finding. tests/codec/test_progressive.py runs some.
"""

from __future__ import annotations

import binascii
import random
import zlib
from collections import Counter
from functools import cache
from unittest.mock import patch

import numpy as np

from lic_dist.codec import progressive, rans
from lic_dist.codec.progressive import Known, decode_units, encode_units
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.units import Progressive
from lic_dist.quantization.rates import SCALES
from lic_dist.quantization.trellis import SCALAR
from tests.fuzz_bitstream import (
    CHECKS,
    EVERYTHING,
    FIELDS,
    IDENTITIES,
    MODEL,
    PLANES,
    RECORD,
    Z_TABLES,
    M,
    count_refusal,
    levels_of,
    mutate,
    run_mutated,
    z_rows,
)

GAIN = np.array([-40, 0, 33, 7], np.int16)
HEADER = 23  # bytes
OUTCOMES: Counter[str] = Counter()


def encode(seed: int, height: int, width: int) -> bytes:
    """A true file of that size, with escapes in it."""
    generator = np.random.default_rng(seed)
    rows = z_rows(height, width)
    z = np.rint(generator.laplace(0, 1, rows.shape)).astype(np.int16)
    level = levels_of(z)
    r = (generator.standard_normal(level.shape) * SCALES[level]).astype(np.float32)
    r[generator.random(r.shape) < 0.01] *= 100
    with patch.object(progressive, "SMALLEST_UNIT", 16):
        units, _ = encode_units(level, GAIN, np.clip(r, -30000, 30000), -300, 6)
    return Progressive(
        height, width, MODEL, RECORD, zlib.crc32(level.tobytes()), rans.encode(z, rows, Z_TABLES), tuple(units)
    ).pack()


def mended(file: bytearray) -> bytearray:
    """The file with the checks that fit, as far as its head can be read."""
    place, sizes = HEADER, []

    def number() -> int:
        nonlocal place
        found = shift = 0
        while place < len(file):
            byte = file[place]
            found, place, shift = found | (byte & 127) << shift, place + 1, shift + 7
            if byte < 128 or shift > 28:
                break
        return found

    for _ in range(int.from_bytes(file[21:23], "little")):
        number()
        size = 4 * number()
        sizes.append((place, size))
        place += 2
        if place > len(file):
            return file
    size = 4 * number()
    end = place + size + 4
    if end > len(file):
        return file
    begin = end
    for at, length in sizes:
        file[at : at + 2] = binascii.crc_hqx(bytes(file[begin : begin + length]), 0).to_bytes(2, "little")
        begin += length
    file[end - 4 : end] = zlib.crc32(file[: end - 4]).to_bytes(4, "little")
    return file


def decode(data: bytes, mend_levels: bool) -> Known:
    """What ProgressiveCodec.decode does around its networks. Raises BitstreamError."""
    held = Progressive.unpack(data)
    if (held.model, held.record) != (MODEL, RECORD):
        raise BitstreamError("this file was made with another model or quantizer")
    level = levels_of(rans.decode(held.z, z_rows(held.height, held.width), Z_TABLES, SCALAR))
    if not mend_levels and zlib.crc32(level.tobytes()) != held.levels:
        raise BitstreamError("this machine computes other scales than the encoder's")
    return decode_units(level, GAIN, held.units)


def one_input(data: bytes) -> Known | None:
    """Decode an input: what is known of the size that its header claims, or None where it is refused."""
    if not data:
        return None
    mends, file = data[0], bytearray(data[1:])
    if mends & IDENTITIES:
        file[9:17] = (MODEL + RECORD)[: len(file[9:17])]
    if mends & CHECKS:
        file = mended(file)
    try:
        known = decode(bytes(file), bool(mends & PLANES))
    except BitstreamError as error:
        count_refusal(error, OUTCOMES)
        return None
    OUTCOMES["decoded"] += 1
    height, width = (int.from_bytes(file[at : at + 2], "little") for at in (5, 7))
    values = known.values()
    assert values.shape == (M, 16 * -(-height // 64) * -(-width // 64)) and np.isfinite(values).all()
    return known


@cache
def seeds() -> tuple[bytes, ...]:
    """True files to start from."""
    return tuple(encode(number, *size) for number, size in enumerate(((1, 1), (64, 64), (65, 30), (130, 70))))


def mutated(generator: random.Random) -> bytes:
    """A true input after up to four mutations: bytes altered, cut out, repeated, inserted, a field replaced, a cut."""
    data = bytearray(bytes([generator.choice((0, CHECKS, EVERYTHING, EVERYTHING))]) + generator.choice(seeds()))
    for _ in range(generator.randint(0, 4)):
        mutate(data, generator, 1, (*FIELDS, 23, 24, 27, 30), cuts=True)
    return bytes(data)


if __name__ == "__main__":
    run_mutated(one_input, mutated, OUTCOMES)
