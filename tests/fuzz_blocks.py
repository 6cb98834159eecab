"""Hostile bytes against files in blocks, as tests/fuzz_bitstream.py has them against those of format 2.

    NUMBA_BOUNDSCHECK=1 python -m tests.fuzz_blocks 1000000 [SEED]

An input is a byte and a file. The byte says which checks are mended before it is decoded: 1 the CRC-32 of the head and
the CRC-16 of each block, 2 the identities, 4 the state that says the CRC-32 of what was decoded. Every input is a true
file after some mutations. What
is neither a BitstreamError nor the indices of all blocks of a region, as large as the head claims, is a finding.
tests/codec/test_blocks.py runs some.
"""

from __future__ import annotations

import random
import zlib
from binascii import crc_hqx
from collections import Counter
from functools import cache

import numpy as np

from lic_dist.codec.block_codec import of_bytes
from lic_dist.codec.blocks import Block, Blocks, Layout
from lic_dist.codec.edges import Part, needed
from lic_dist.codec.heads import read_varint
from lic_dist.codec.offsets import unpack
from lic_dist.codec.one_stream import OneStream, encode_stream
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.walk import Plane
from lic_dist.models.protocol import Elements
from tests import fuzz_bitstream as plain
from tests.fuzz_bitstream import (
    CHECKS,
    EVERYTHING,
    FIELDS,
    IDENTITIES,
    MODEL,
    PLANES,
    RECORD,
    Y_TABLES,
    Z_TABLES,
    M,
    count_refusal,
    levels_of,
    mutate,
    run_mutated,
    z_rows,
)

QUANTIZER, SIDE = 2, 64
OUTCOMES: Counter[str] = Counter()


def encode(seed: int, height: int, width: int, boundary: bytes) -> bytes:
    """A true file of that size, with escapes in it."""
    layout, made = Layout(height, width, SIDE), []
    for number in range(layout.count):
        rows, columns = layout.place(number)
        size = rows.stop - rows.start, columns.stop - columns.start
        z, level, k, rows_of_y = plain.latents(seed + number, QUANTIZER, *size)
        plane = Plane(Elements(slice(0, M)), k, level)
        made.append(Block(*size, encode_stream(z, [plane], [rows_of_y], Z_TABLES, Y_TABLES[QUANTIZER])).pack())
    head = Blocks(height, width, MODEL, RECORD, SIDE, tuple(map(len, made)), boundary=boundary)
    return b"".join([head.pack(), *made])


def mended(file: bytearray) -> bytearray:
    """The file with the checks that fit, as far as its head can be read."""
    if len(file) < 19:
        return file
    height, width, side = (int.from_bytes(file[at : at + 2], "little") for at in (5, 7, 17))
    if not 0 < height * width < 1 << 20 or side < SIDE:
        return file
    place, sizes = 19 + 4 * bool(file[4] & 4), []
    try:
        for _ in range(Layout(height, width, side).count):
            told, place = read_varint(file, place)
            sizes.append(told // 2)
    except BitstreamError:
        return file
    file[place : place + 4] = zlib.crc32(file[:place]).to_bytes(4, "little")
    place += 4
    for size in sizes:
        if 2 <= size <= len(file) - place:
            check = crc_hqx(file[place : place + size - 2], 0xFFFF)
            file[place + size - 2 : place + size] = check.to_bytes(2, "little")
        place += size
    return file


def decode(data: bytes, mend_levels: bool) -> list[tuple[Part, np.ndarray]]:
    """What BlockCodec.decode does around its networks, of a region in the middle. Raises BitstreamError."""
    read = of_bytes(data)
    head = Blocks.read(read)
    if (head.model, head.record) != (MODEL, RECORD):
        raise BitstreamError("this file was made with another model or quantizer")
    row, column = head.height // 2, head.width // 2
    wanted = Part(slice(row, min(row + 70, head.height)), slice(column, min(column + 9, head.width)))
    found = []
    for number in needed(head.layout, wanted, bool(head.boundary))[0]:
        block = head.block(read, number)
        if block.offsets:
            unpack(block.stream, M)
            raise BitstreamError("these indices have no scale offsets")
        reader = OneStream(block.stream, Z_TABLES, Y_TABLES[QUANTIZER], plain.MACHINES[QUANTIZER])
        k = reader.take(levels_of(reader.z(z_rows(block.height, block.width))), True)
        if mend_levels:
            reader._decoder.close(*reader._decoder._states)
        else:
            reader.close()
        found.append((Part(*head.layout.place(number)), k))
    return found


def one_input(data: bytes) -> list[tuple[Part, np.ndarray]] | None:
    """Decode an input: the blocks of a region of the picture that its head claims, or None where it is refused."""
    if not data:
        return None
    mends, file = data[0], bytearray(data[1:])
    if mends & IDENTITIES:
        file[9:17] = (MODEL + RECORD)[: len(file[9:17])]
    if mends & CHECKS:
        file = mended(file)
    try:
        found = decode(bytes(file), bool(mends & PLANES))
    except BitstreamError as error:
        count_refusal(error, OUTCOMES)
        return None
    OUTCOMES["decoded"] += 1
    for part, k in found:
        height, width = part.shape
        assert k.shape == (M, 16 * -(-height // 64) * -(-width // 64)) and k.dtype == np.int16
    return found


@cache
def seeds() -> tuple[bytes, ...]:
    """True files to start from."""
    sizes = ((1, 1, b""), (64, 64, b"edge"), (130, 70, b"edge"), (200, 150, b""))
    return tuple(encode(10 * number, *one) for number, one in enumerate(sizes))


def mutated(generator: random.Random) -> bytes:
    """A true input after up to four mutations: bytes altered, cut out, repeated, inserted, a field replaced, a cut."""
    data = bytearray(bytes([generator.choice((0, CHECKS, EVERYTHING, EVERYTHING))]) + generator.choice(seeds()))
    for _ in range(generator.randint(0, 4)):
        mutate(data, generator, 1, (*FIELDS, 19, 20, 23, 24, 27, 31), cuts=True)
    return bytes(data)


if __name__ == "__main__":
    run_mutated(one_input, mutated, OUTCOMES)
