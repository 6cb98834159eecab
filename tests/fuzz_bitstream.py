"""Hostile bytes against the container and the coder, without the networks; every checksum can be made right.

    pip install atheris
    NUMBA_BOUNDSCHECK=1 python -m tests.fuzz_bitstream CORPUS -runs=1000000 -timeout=10 -rss_limit_mb=2048
    NUMBA_DISABLE_JIT=1 python -m tests.fuzz_bitstream CORPUS -runs=100000  # the coder in Python, led by its branches

An input is two bytes and a file. The first says which checks are mended before it is decoded (1 the file's CRC-32,
2 the identities, 4 the CRC-32 of the level planes), so that mutations reach what lies behind them; the second chooses
the quantizer. What is neither an image's indices nor a BitstreamError is a finding. tests/test_hostile.py runs it too.
"""

from __future__ import annotations

import random
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numba
import numpy as np

from lic_dist.codec import rans
from lic_dist.codec.container import Container
from lic_dist.codec.rans import BitstreamError
from lic_dist.quantization.distributions import analytic_pmf
from lic_dist.quantization.quantize import table_rows
from lic_dist.quantization.rates import LEVELS, CdfTables, tables_from_pmf
from lic_dist.quantization.trellis import SCALAR, trellis

M, N = 4, 3  # channels of y and z
MACHINES = tuple(trellis(name) for name in ("sq", "tcq4", "tcq8", "tcq16", "tcq32", "tcq64"))
Y_TABLES = tuple(tables_from_pmf(analytic_pmf(0.6, machine)) for machine in MACHINES)
Z_TABLES = CdfTables(
    np.array([[0, 9, 65000, 65536], [0, 30000, 65535, 65536], [0, 1, 65536, 0]]),
    np.array([4, 4, 3]),
    np.array([-1, 0, 7]),
)
MODEL, RECORD = b"mode", b"reco"
CHECKS, IDENTITIES, PLANES = 1, 2, 4
EVERYTHING = CHECKS | IDENTITIES | PLANES
FIELDS = (0, 3, 4, 5, 7, 9, 13, 17, 21)  # places in a file
OUTCOMES: Counter[str] = Counter()
Indices = tuple[np.ndarray, np.ndarray]


def levels_of(z: np.ndarray) -> np.ndarray:
    """What stands for h_s: the levels of y, uint8 [M, 16 steps], from z, int16 [N, steps]."""
    mixed = z.astype(np.int64).sum(axis=0) + 17 * np.arange(M)[:, None]
    return np.repeat(mixed % LEVELS, 16, axis=1).astype(np.uint8)


def z_rows(height: int, width: int) -> np.ndarray:
    """The rows of z's tables for an image of that size, int32 [N, steps]."""
    steps = -(-height // 64) * -(-width // 64)
    return np.ascontiguousarray(np.broadcast_to(np.arange(N, dtype=np.int32)[:, None], (N, steps)))


def latents(seed: int, quantizer: int, height: int, width: int) -> tuple[np.ndarray, ...]:
    """z, levels, k and their rows, with escapes among them, of a picture of that size."""
    generator = np.random.default_rng(seed)
    z = np.rint(generator.laplace(0, 1, z_rows(height, width).shape)).astype(np.int16)
    level = levels_of(z)
    k = np.rint(generator.laplace(0, 0.2 + level / 16)).astype(np.int16)
    k[generator.random(k.shape) < 0.01] = generator.integers(-32768, 32768)
    return z, level, k, table_rows(k, level, MACHINES[quantizer], LEVELS)


def encode(seed: int, quantizer: int, height: int, width: int) -> bytes:
    """A true file of that size, with escapes in it, interleaved where the seed is odd."""
    z, level, k, rows = latents(seed, quantizer, height, width)
    interleaved = bool(seed & 1)
    y = rans.encode(k, rows, Y_TABLES[quantizer], interleaved)
    coded = zlib.crc32(level.tobytes()), rans.encode(z, z_rows(height, width), Z_TABLES), y
    return Container(height, width, MODEL, RECORD, *coded, interleaved=interleaved).pack()


def decode(data: bytes, quantizer: int, mend_planes: bool) -> Indices:
    """What ImageCodec.decode does around its networks. Raises BitstreamError."""
    held = Container.unpack(data)
    if (held.model, held.record) != (MODEL, RECORD):
        raise BitstreamError("this file was made with another model or quantizer")
    z = rans.decode(held.z, z_rows(held.height, held.width), Z_TABLES, SCALAR)
    level = levels_of(z)
    if not mend_planes and zlib.crc32(level.tobytes()) != held.planes:
        raise BitstreamError("this machine computes other scales than the encoder's")
    k = rans.decode(held.y, level, Y_TABLES[quantizer], MACHINES[quantizer], held.interleaved)
    return z, k


def one_input(data: bytes) -> Indices | None:
    """Decode an input: indices of the size that its header claims, or None where it is refused."""
    if len(data) < 2:
        return None
    mends, quantizer, file = data[0], data[1] % len(MACHINES), bytearray(data[2:])
    if mends & IDENTITIES:
        file[9:17] = (MODEL + RECORD)[: len(file[9:17])]
    if mends & CHECKS:
        file = file[:-4] + zlib.crc32(file[:-4]).to_bytes(4, "little")
    try:
        z, k = decode(bytes(file), quantizer, bool(mends & PLANES))
    except BitstreamError as error:
        count_refusal(error, OUTCOMES)
        return None
    OUTCOMES["decoded"] += 1
    height, width = (int.from_bytes(file[at : at + 2], "little") for at in (5, 7))
    steps = -(-height // 64) * -(-width // 64)
    assert (z.shape, k.shape, z.dtype, k.dtype) == ((N, steps), (M, 16 * steps), np.int16, np.int16)
    return z, k


@cache
def seeds() -> tuple[bytes, ...]:
    """True inputs to start from: every quantizer, small sizes, no check mended and all."""
    sizes = ((1, 1), (64, 64), (65, 30), (200, 70))
    return tuple(
        bytes([mends, quantizer]) + encode(number, quantizer, *size)
        for number, size in enumerate(sizes)
        for quantizer in range(len(MACHINES))
        for mends in (0, CHECKS | IDENTITIES, EVERYTHING)
    )


def mutated(generator: random.Random) -> bytes:
    """A true input after one to six mutations: bytes altered, cut out, repeated, inserted, a field replaced."""
    data = bytearray(generator.choice(seeds()))
    data[0] = generator.choice((0, CHECKS, EVERYTHING, EVERYTHING))
    for _ in range(generator.randint(1, 6)):
        mutate(data, generator, 2, FIELDS)
    return bytes(data)


def mutate(data: bytearray, generator: random.Random, first: int, places: Sequence[int], cuts: bool = False) -> None:
    """Mutate an input once, behind its first bytes; `places` are those of fields in the file, `cuts` may cut it."""
    at, some = generator.randint(first, len(data)), generator.randbytes(generator.choice((1, 2, 4, 4, 40)))
    kind = generator.randrange(7 if cuts else 6)
    if kind == 0:
        data[at : at + len(some)] = some
    elif kind == 1:
        del data[at : at + len(some)]
    elif kind == 2:
        data[at:at] = data[at : at + len(some)]
    elif kind == 3:
        data[at:at] = some
    elif kind == 4 and at < len(data):
        data[at] ^= 1 << generator.randrange(8)
    elif kind == 6:
        del data[at:]
    else:
        at = first + generator.choice(places)
        data[at : at + 2] = bytes(generator.choice((0, 1, 2, 64, 127, 128, 255)) for _ in range(2))


def count_refusal(error: BitstreamError, outcomes: Counter[str]) -> None:
    """Count a refusal by its message without its numbers; it must be one line with a hint."""
    assert error.message and "\n" not in error.message and error.hint
    outcomes[re.sub(r"\d+", "n", error.message)] += 1


def run_mutated(
    one_input: Callable[[bytes], object],
    mutated: Callable[[random.Random], bytes],
    outcomes: Counter[str],
    slow: float = 10,
) -> None:
    """Run so many mutated inputs as the command line says, from a seed, 0 by default; say what became of them, the
    longest that one took, and which took more than `slow` seconds.
    """
    generator = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    longest = 0.0
    for number in range(1, int(sys.argv[1]) + 1):
        begun = time.process_time()
        one_input(data := mutated(generator))
        if (took := time.process_time() - begun) > max(longest, slow):
            print(f"{took:.1f} s: {data.hex()}", flush=True)
        longest = max(longest, took)
        if number % 50_000 == 0:
            print(number, f"longest {longest:.2f} s", flush=True)
            print(*(f"{count:9}  {outcome}" for outcome, count in outcomes.most_common()), sep="\n", flush=True)


def main() -> None:
    """Fuzz: half of the inputs are true ones mutated here, half libFuzzer's own. Says what became of them."""
    import atheris

    def mutate_some(data: bytes, most: int, seed: int) -> bytes:
        generator = random.Random(seed)
        return mutated(generator)[:most] if generator.random() < 0.5 else atheris.Mutate(data, most)

    def counted(data: bytes) -> None:
        one_input(data)
        if (total := OUTCOMES.total()) % 100_000 == 0:
            print(total, *(f"{count:9}  {outcome}" for outcome, count in OUTCOMES.most_common()), sep="\n")

    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(one)
    atheris.instrument_func(Container.unpack.__func__)
    if numba.config.DISABLE_JIT:
        atheris.instrument_func(rans.decode_plane)
    atheris.Setup(sys.argv, counted, custom_mutator=mutate_some)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
