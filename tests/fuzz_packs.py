"""Hostile bytes against packs, as tests/fuzz_bitstream.py has them against bitstreams.

    python -m tests.fuzz_packs 1000000 [SEED]

An input is a byte and a file: a true pack after some mutations, of the file, or of its header or numbers before
they are deflated. The byte says whether the checksum is mended. What is neither a pack that writes itself again, adds
finite numbers and takes the memory of its shapes, nor a LicError, is a finding. tests/models/test_packs.py runs some.
"""

from __future__ import annotations

import hashlib
import random
import re
import struct
import zlib
from collections import Counter
from functools import cache

import numpy as np
import torch

from lic_dist.errors import LicError
from lic_dist.models.packs import MOST_NUMBERS, Delta, Pack
from tests.fuzz_bitstream import mutate, run_mutated

OUTCOMES: Counter[str] = Counter()
NUMBERS = (b"-1", b"0", b"1e9", b"null", b"true", b"[]", b"{}", b'"x"', b"67108865", b"1" * 5000, b"NaN", b"2.0")


@cache
def seeds() -> tuple[bytes, ...]:
    """True files to start from."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(6, 2, generator=generator), torch.randn(2, 20, generator=generator)
    deltas = {
        "a.weight": Delta.of_factors((6, 5, 2, 2), *factors),
        "a.bias": Delta.free(torch.randn(6, generator=generator)),
        "b.weight": Delta.free(torch.randn(3, 1, 3, 3, generator=generator)),
    }
    whole = Pack("ab" * 32, "base", deltas, {"tcq8": "{}"}, {"what": "finetuning", "steps": 3})
    return whole.data, Pack("ab" * 32, "base", {}).data


def parts_of(file: bytes) -> tuple[bytes, bytes]:
    """The header and the numbers of a true file."""
    end = 44 + struct.unpack_from("<I", file, 40)[0]
    return zlib.decompress(file[44:end]), zlib.decompress(file[end:])


def joined(header: bytes, numbers: bytes) -> bytes:
    """A file of a header and numbers, without a checksum that fits."""
    told = zlib.compress(header, 1)
    return b"LICPACK\1" + bytes(32) + struct.pack("<I", len(told)) + told + zlib.compress(numbers, 1)


def one_input(data: bytes) -> Pack | None:
    """Parse an input: the pack, or None where it is refused."""
    if not data:
        return None
    file = data[1:]
    if data[0] & 1 and len(file) > 40:
        file = file[:8] + hashlib.sha256(file[40:]).digest() + file[40:]
    try:
        pack = Pack.parse(file)
    except LicError as error:
        OUTCOMES[re.sub(r"\d+", "..", error.message.partition(":")[0])] += 1
        return None
    OUTCOMES["parsed"] += 1
    assert Pack.parse(pack.data).data == pack.data
    assert sum(one.left.size + one.right.size for one in pack.deltas.values()) <= MOST_NUMBERS
    for one in pack.deltas.values():
        if np.prod(one.shape) <= 1 << 16:
            assert torch.isfinite(one.added_to(torch.zeros(one.shape))).all()
    return pack


def mutated(generator: random.Random) -> bytes:
    """A true input after up to four mutations of the file, its header's text or its numbers."""
    file, mended = generator.choice(seeds()), generator.choice((0, 1, 1, 1, 1))
    kind = generator.randrange(3)
    if kind == 0:
        data = bytearray(bytes([mended]) + file)
        for _ in range(generator.randint(0, 4)):
            mutate(data, generator, 1, (8, 41, 45), cuts=True)
        return bytes(data)
    header, numbers = map(bytearray, parts_of(file))
    for _ in range(generator.randint(0, 4)):
        if kind == 1 and generator.random() < 0.6:
            places = [place for place, byte in enumerate(header) if byte in b'0123456789[{"']
            place = generator.choice(places or [0])
            header[place : place + generator.randint(0, 3)] = generator.choice(NUMBERS)
        else:
            mutate(header if kind == 1 else numbers, generator, 0, (0, 1, 2), cuts=True)
    return bytes([mended]) + joined(bytes(header), bytes(numbers))


if __name__ == "__main__":
    run_mutated(one_input, mutated, OUTCOMES, slow=1)
