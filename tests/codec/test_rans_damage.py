"""Streams of our rANS coder that are cut, extended, altered, or noise: an error, and never an endless loop."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_dist.codec import rans
from lic_dist.codec.rans import BitstreamError
from lic_dist.errors import LicError
from lic_dist.quantization.rates import CdfTables
from lic_dist.quantization.trellis import ECM8, SCALAR
from tests.codec.test_rans import SHAPES, TABLES, compressais_stream, plane, walked_rows


def staged(interleaved: bool) -> tuple[bytes, list[np.ndarray], list[np.ndarray]]:
    """A stream of three planes without escapes: stream, indices and levels."""
    rng = np.random.default_rng(10)
    ks = [rng.integers(-1, 2, shape).astype(np.int16) for shape in ((6, 40), (3, 7), (6, 30))]
    level = [np.full(k.shape, 20, np.uint8) for k in ks]
    planes = [(k, walked_rows(k, one, ECM8)) for k, one in zip(ks, level, strict=True)]
    return rans.encode_planes(planes, TABLES["tcq8"], interleaved), ks, level


def read(stream: bytes, level: list[np.ndarray], interleaved: bool) -> list[np.ndarray]:
    decoder = rans.Decoder(stream, interleaved)
    found = [decoder.decode(one, TABLES["tcq8"], ECM8) for one in level]
    decoder.close()
    return found


@pytest.mark.parametrize("interleaved", [False, True])
def test_damage_to_a_stream_of_planes_is_an_error(interleaved: bool) -> None:
    stream, ks, level = staged(interleaved)
    assert all(np.array_equal(one, k) for one, k in zip(read(stream, level, interleaved), ks, strict=True))
    broken = [stream[:length] for length in range(len(stream))]
    broken += [stream + tail for tail in (b"\0", b"\0" * 4, b"\xff" * 4, stream)]
    broken += [altered_at(stream, at, flipped) for at in range(len(stream)) for flipped in (0x01, 0x80, 0x41)]
    for one in broken:
        with pytest.raises(BitstreamError):
            read(one, level, interleaved)
    for fewer in (level[:2], level[1:], [*level, level[1]]):  # planes of another model
        with pytest.raises(BitstreamError):
            read(stream, fewer, interleaved)
    decoder = rans.Decoder(stream[:-8], interleaved)
    with pytest.raises(BitstreamError, match="ends early"):
        for one in level:
            decoder.decode(one, TABLES["tcq8"], ECM8)
    with pytest.raises(BitstreamError, match="ends early"):  # and stays so
        decoder.decode(level[-1], TABLES["tcq8"], ECM8)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), SHAPES, st.booleans())
def test_noise_ends_in_an_error_or_planes(noise: bytes, shapes: list[tuple[int, int]], interleaved: bool) -> None:
    try:
        found = read(noise, [np.zeros(shape, np.uint8) for shape in shapes], interleaved)
        assert [one.shape for one in found] == shapes
    except BitstreamError as error:
        assert isinstance(error, LicError) and error.hint


def damaged(interleaved: bool = False) -> tuple[bytes, np.ndarray, np.ndarray, CdfTables]:
    """A stream to damage, with escapes in it: stream, k, level, tables."""
    tables = TABLES["tcq8"]
    k, level = plane(4, 6, 30)
    return rans.encode(k, walked_rows(k, level, ECM8), tables, interleaved), k, level, tables


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_cut_is_an_error(interleaved: bool) -> None:
    stream, _, level, tables = damaged(interleaved)
    for length in range(len(stream)):
        with pytest.raises(BitstreamError):
            rans.decode(stream[:length], level, tables, ECM8, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_extensions_are_errors(interleaved: bool) -> None:
    stream, _, level, tables = damaged(interleaved)
    for tail in (b"\0", b"\0" * 4, b"\xff" * 4, stream):
        with pytest.raises(BitstreamError):
            rans.decode(stream + tail, level, tables, ECM8, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_altered_byte_is_an_error(interleaved: bool) -> None:
    """In a plane without escapes. The value of an escape is raw bits: altered, it is another plane."""
    tables = TABLES["tcq8"]
    k = np.random.default_rng(5).integers(-1, 2, (6, 80)).astype(np.int16)
    level = np.full(k.shape, 20, np.uint8)
    stream = rans.encode(k, walked_rows(k, level, ECM8), tables, interleaved)
    for position in range(len(stream)):
        for flipped in (0x01, 0x80, 0x41):
            with pytest.raises(BitstreamError):
                rans.decode(altered_at(stream, position, flipped), level, tables, ECM8, interleaved)
    stream, k, level, tables = damaged(interleaved)
    silent = 0
    for position in range(len(stream)):
        try:
            decoded = rans.decode(altered_at(stream, position, 0x41), level, tables, ECM8, interleaved)
        except BitstreamError:
            continue
        silent += 1
        assert (decoded != k).any()
    assert silent < len(stream) / 4


def altered_at(stream: bytes, position: int, flipped: int) -> bytes:
    return stream[:position] + bytes([stream[position] ^ flipped]) + stream[position + 1 :]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_noise_ends_in_an_error_or_a_plane(noise: bytes, interleaved: bool) -> None:
    _, _, level, tables = damaged()
    try:
        assert rans.decode(noise, level, tables, ECM8, interleaved).shape == level.shape
    except BitstreamError as error:
        assert isinstance(error, LicError) and error.hint


def test_an_endless_escape_ends() -> None:
    """Nibbles of 15 ask CompressAI's decoder for 15 more, and more: ours stops at the first."""
    level = np.zeros((1, 3), np.uint8)
    tables = CdfTables(np.array([[0, 1, 2, 65536]]), np.array([4]), np.array([0]))
    tried = set()
    for high in range(1 << 46, (1 << 46) + 8):
        state = high << 16 | 0xFFFF  # the escape's interval is [2, 65536)
        nibbles = (65534 * high + 0xFFFF - 2) & 15
        stream = state.to_bytes(8, "little") + b"\xff" * 400
        with pytest.raises(BitstreamError, match="escape that no encoder writes" if nibbles > 5 else None):
            rans.decode(stream, level, tables, SCALAR)
        tried.add(nibbles)
    assert tried == {1, 3, 5, 7, 9, 11, 13, 15}


@pytest.mark.parametrize(("nibbles", "fits"), [((1, 0b0110), True), ((2, 0b0110, 0), False), ((2, 0b0110, 1), True)])
def test_an_escape_is_written_in_one_way(nibbles: tuple[int, ...], fits: bool) -> None:
    """The number of nibbles and the lowest one come first: a highest nibble of 0 says nothing."""
    x = rans.LOWEST_STATE
    for nibble in reversed(nibbles):
        x = x << 4 | nibble
    x = (x // 65534 << 16) + x % 65534 + 2  # the escape's interval is [2, 65536)
    tables = CdfTables(np.array([[0, 1, 2, 65536]]), np.array([4]), np.array([0]))
    with nullcontext() if fits else pytest.raises(BitstreamError, match="escape that no encoder writes"):
        rans.decode(x.to_bytes(8, "little"), np.zeros((1, 1), np.uint8), tables, SCALAR)


def test_values_beyond_int16_are_errors(ans: ModuleType) -> None:
    tables = CdfTables(np.array([[0, 1, 2, 65536]]), np.array([4]), np.array([0]))
    for value, fits in ((32767, True), (32768, False), (-32768, True), (-32769, False), (10**7, False)):
        encoder = ans.BufferedRansEncoder()
        encoder.encode_with_indexes(
            [0, 1, value], [0, 0, 0], tables.cdf.tolist(), tables.size.tolist(), tables.offset.tolist()
        )
        stream = encoder.flush()
        if fits:
            assert rans.decode(stream, np.zeros((1, 3), np.uint8), tables, SCALAR).tolist() == [[0, 1, value]]
        else:
            with pytest.raises(BitstreamError, match="escape"):
                rans.decode(stream, np.zeros((1, 3), np.uint8), tables, SCALAR)
    beyond = CdfTables(np.array([[0, 1, 65000, 65536]]), np.array([4]), np.array([32767]))  # a symbol that is 32768
    planes = [(np.array([[32767, value, 32767]]), np.zeros((1, 3), int)) for value in (32767, 32768)]
    streams = [compressais_stream(ans, [one], beyond) for one in planes]
    assert rans.decode(streams[0], planes[0][1], beyond, SCALAR).tolist() == [[32767] * 3]
    with pytest.raises(BitstreamError, match="escape"):
        rans.decode(streams[1], planes[1][1], beyond, SCALAR)
