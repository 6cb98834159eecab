"""The container: its bytes, and everything that is not one."""

from __future__ import annotations

import textwrap
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lic_dist.codec import container as module
from lic_dist.codec.container import OVERHEAD, Container
from lic_dist.codec.rans import BitstreamError
from lic_dist.errors import LicError

SMALL = Container(512, 768, b"mode", b"reco", 0xDEADBEEF, b"zzzz", b"yyyyyyyy")


def with_check(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "little")


def test_golden_bytes() -> None:
    header = "4c49430200" + "0002" + "0003" + b"modereco".hex() + "efbeadde" + "04000000"
    assert SMALL.pack() == with_check(bytes.fromhex(header) + b"zzzzyyyyyyyy")
    assert SMALL.pack()[-4:].hex() == "900d87e8"


def test_the_page_has_the_modules_table() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "bitstream.md").read_text()
    table = str(module.__doc__).split("not streams.")[1].split("A CRC-32")[0]
    assert textwrap.dedent(table).strip() in page


def test_overhead() -> None:
    assert OVERHEAD == 29 <= 32
    assert len(SMALL.pack()) == OVERHEAD + 12


@given(
    st.integers(1, 65535),
    st.integers(1, 4096),
    st.binary(min_size=4, max_size=4),
    st.binary(min_size=4, max_size=4),
    st.integers(0, 2**32 - 1),
    st.integers(0, 9),
    st.integers(0, 9),
    st.tuples(*[st.booleans()] * 4),
)
def test_round_trip(
    height: int,
    width: int,
    model: bytes,
    record: bytes,
    planes: int,
    z_words: int,
    y_words: int,
    flags: tuple[bool, bool, bool, bool],
) -> None:
    container = Container(height, width, model, record, planes, b"z123" * z_words, b"y456" * y_words, *flags)
    data = container.pack()
    assert Container.unpack(data) == container
    assert data[4] == sum(1 << bit for bit, flag in enumerate(flags) if flag)


def test_every_cut_is_an_error() -> None:
    data = SMALL.pack()
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            Container.unpack(data[:length])


def test_every_altered_bit_is_an_error() -> None:
    data = SMALL.pack()
    for bit in range(8 * len(data)):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            Container.unpack(bytes(altered))


@given(st.binary(min_size=1, max_size=64))
def test_extensions_are_errors(tail: bytes) -> None:
    with pytest.raises(BitstreamError):
        Container.unpack(SMALL.pack() + tail)


@given(st.binary(max_size=200))
def test_noise_is_an_error(noise: bytes) -> None:
    with pytest.raises(BitstreamError):
        Container.unpack(noise)


def test_contradictions_under_a_right_checksum_are_errors() -> None:
    content = SMALL.pack()[:-4]
    for position, field in (
        (3, b"\x03"),  # a later format
        (4, b"\x10"),  # an unknown flag
        (5, b"\0\0"),  # no rows
        (7, b"\0\0"),  # no columns
        (5, b"\xff" * 4),  # four thousand million pixels
        (21, b"\xff\xff\xff\xff"),  # a z stream longer than the file
        (21, b"\x02\0\0\0"),  # half words
        (37, b"y"),  # a byte too many
    ):
        altered = content[:position] + field + content[position + len(field) :]
        with pytest.raises(BitstreamError):
            Container.unpack(with_check(altered))


def test_sides_beyond_the_format_are_a_users_error() -> None:
    with pytest.raises(LicError, match="too large"):
        Container(65536, 1, b"mode", b"reco", 0, b"", b"")
    with pytest.raises(LicError, match="too large"):
        Container(20000, 20000, b"mode", b"reco", 0, b"", b"")
    with pytest.raises(ValueError):
        Container(1, 1, b"model", b"reco", 0, b"", b"")
    with pytest.raises(ValueError):
        Container(1, 1, b"mode", b"reco", 0, b"odd", b"")
