"""One stream of z and y: its bytes by the description alone, and what is refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from lic_dist.codec import rans
from lic_dist.codec.codec import channel_rows
from lic_dist.codec.one_stream import OneStream, encode_stream
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.walk import Plane
from lic_dist.models.protocol import Elements
from lic_dist.quantization.rates import CdfTables
from lic_dist.quantization.trellis import SCALAR
from tests.codec.test_rans import drawn_tables, written_down

TABLES = drawn_tables(np.random.default_rng(3), 5)


def drawn(seed: int, shape: tuple[int, int], rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Indices, escapes among them, and their rows."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 5, shape).astype(np.int32) if rows is None else rows
    k = TABLES.offset[rows] + generator.integers(-9, TABLES.size[rows] + 9)
    return np.clip(k, -32768, 32767).astype(np.int16), rows


def stream_of(seed: int, count: int = 2) -> tuple[bytes, np.ndarray, list[Plane]]:
    """A stream, its z and its planes, in which a level is the row."""
    z, _ = drawn(seed, (5, 3), channel_rows((5, 3)))
    planes = [
        Plane(Elements(), k, rows.astype(np.uint8)) for k, rows in (drawn(seed + n, (4, 6 + n)) for n in range(count))
    ]
    rows = [plane.level.astype(np.int32) for plane in planes]
    return encode_stream(z, planes, rows, TABLES, TABLES), z, planes


def read(stream: bytes, planes: list[Plane], z_tables: CdfTables = TABLES) -> tuple[np.ndarray, list[np.ndarray]]:
    reader = OneStream(stream, z_tables, TABLES, SCALAR)
    z = reader.z(channel_rows((5, 3)))
    found = [reader.take(plane.level, plane is planes[-1]) for plane in planes]
    reader.close()
    return z, found


def test_a_stream_is_as_the_format_is_described() -> None:
    lengths = set()
    for seed in range(40):
        stream, z, planes = stream_of(seed)
        check = zlib.crc32(z.tobytes())
        for plane in planes:
            check = zlib.crc32(plane.k.tobytes(), zlib.crc32(plane.level.tobytes(), check))
        k = [one for part in (z, *(plane.k for plane in planes)) for one in part.T.ravel().tolist()]
        rows = [one for part in (channel_rows((5, 3)), *(p.level for p in planes)) for one in part.T.ravel().tolist()]
        whole = written_down(k, rows, TABLES, (1 << 31) + check % (1 << 31))
        state = int.from_bytes(whole[:8], "little")
        kept = max(5, -(-state.bit_length() // 8))
        assert stream == whole[:kept] + whole[8:] and rans.restored(stream) == whole
        lengths.add(kept)
        found_z, found = read(stream, planes)
        assert np.array_equal(found_z, z) and all(np.array_equal(a, b.k) for a, b in zip(found, planes, strict=True))
    assert lengths == {5, 6, 7, 8}


def test_y_costs_no_state_of_its_own() -> None:
    apart = together = 0
    for seed in range(40):
        stream, z, planes = stream_of(seed, count=1)
        rows = planes[0].level.astype(np.int32)
        apart += len(rans.encode(z, channel_rows(z.shape), TABLES)) + len(rans.encode(planes[0].k, rows, TABLES))
        together += len(stream)
    assert 6.5 < (apart - together) / 40 < 8.5  # a state is 6 bytes more than what it tells, a short one 4.4


def test_damage_and_other_scales_are_refused() -> None:
    stream, _, planes = stream_of(7)
    for at in range(len(stream)):
        for bit in range(8):
            altered = bytearray(stream)
            altered[at] ^= 1 << bit
            with pytest.raises(BitstreamError):
                read(bytes(altered), planes)
    for size in range(len(stream)):
        with pytest.raises(BitstreamError):
            read(stream[:size], planes)
    for more in (bytes(1), bytes(4), b"four"):
        with pytest.raises(BitstreamError):
            read(stream + more, planes)
    level = planes[1].level.copy()
    level[-1, -1] = (level[-1, -1] + 1) % 5
    with pytest.raises(BitstreamError, match="other scales"):
        read(stream, [planes[0], planes[1]._replace(level=level)])


def test_zero_bytes_that_no_encoder_writes_are_refused() -> None:
    stream = next(made for made in (stream_of(seed)[0] for seed in range(40)) if len(made) % 4 == 1)  # 5 bytes of state
    with pytest.raises(BitstreamError, match="longer"):
        rans.restored(stream[:5] + b"\0" + stream[5:])
    with pytest.raises(BitstreamError, match="cut"):
        rans.restored(bytes(4))
