"""Our rANS coder against CompressAI's, and against streams that no encoder wrote."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_dist.codec import rans
from lic_dist.codec.kernels import _divided, encoder_tables
from lic_dist.codec.rans import BitstreamError
from lic_dist.quantization.distributions import analytic_pmf
from lic_dist.quantization.quantize import table_rows
from lic_dist.quantization.rates import LEVELS, CdfTables, tables_from_pmf
from lic_dist.quantization.trellis import CODE16, ECM8, SCALAR, VVC4, Trellis, trellis

ASYMMETRIC = CdfTables(  # the shapes that a factorized prior may take: skewed, narrow, far from zero
    cdf=np.array(
        [
            [0, 1, 2, 65536, 0, 0],
            [0, 60000, 65000, 65535, 65536, 0],
            [0, 65534, 65535, 65536, 0, 0],
            [0, 100, 256, 512, 30000, 65536],
        ]
    ),
    size=np.array([4, 5, 4, 6]),
    offset=np.array([0, -2, 30000, -30001]),
)

ASYMMETRIC_THREE = CdfTables(ASYMMETRIC.cdf[:3], ASYMMETRIC.size[:3], ASYMMETRIC.offset[:3])


def trellis_tables(machine: Trellis) -> CdfTables:
    return tables_from_pmf(analytic_pmf(0.6, machine))


def walked_rows(k: np.ndarray, level: np.ndarray, machine: Trellis) -> np.ndarray:
    """The row of each index by a plain walk of the state machine."""
    rows = np.empty(k.shape, np.int32)
    for lane in range(k.shape[0]):
        state = 0
        for step in range(k.shape[1]):
            rows[lane, step] = machine.quantizer[state] * LEVELS + level[lane, step]
            state = machine.next_state[state][int(k[lane, step]) & 1]
    return rows


def oracle(ans: ModuleType, stream: bytes, rows: np.ndarray, tables: CdfTables) -> np.ndarray:
    decoder = ans.RansDecoder()
    decoder.set_stream(stream)
    flat = decoder.decode_stream(
        rows.T.ravel().tolist(), tables.cdf.tolist(), tables.size.tolist(), tables.offset.tolist()
    )
    return np.array(flat).reshape(rows.shape[::-1]).T


def plane(seed: int, lanes: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of Laplacian size, a few of them anything that int16 holds, and levels."""
    generator = np.random.default_rng(seed)
    level = generator.integers(0, LEVELS, (lanes, steps)).astype(np.uint8)
    k = np.rint(generator.laplace(0, 1 + level / 4)).astype(np.int16)
    wild = generator.random(k.shape) < 0.05
    k[wild] = generator.integers(-32768, 32768, wild.sum())
    return k, level


def test_golden_streams() -> None:
    """CompressAI 1.2.8's bytes, written down: the format does not drift."""
    k = np.array([[0, 1, -3], [-1, 0, 12]], np.int16)
    stream = rans.encode(k, np.ones(k.shape, np.int32), ASYMMETRIC)
    assert stream.hex() == GOLDEN
    assert (rans.decode(stream, np.ones(k.shape, np.uint8), ASYMMETRIC, SCALAR) == k).all()


@pytest.mark.parametrize("name", ["sq", "tcq4", "tcq8", "tcq16", "tcq32"])
def test_decoder_equals_compressai(ans: ModuleType, name: str) -> None:
    machine = trellis(name)
    tables = trellis_tables(machine)
    k, level = plane(1, 7, 50)
    k[:, -1] = [-32768, 32767, 0, 1, -1, 5000, -5000]
    rows = walked_rows(k, level, machine)
    stream = rans.encode(k, rows, tables)
    decoded = rans.decode(stream, level, tables, machine)
    assert decoded.dtype == np.int16
    assert np.array_equal(decoded, k)
    assert np.array_equal(oracle(ans, stream, rows, tables), k)


def compressais_stream(ans: ModuleType, planes: list[tuple[np.ndarray, np.ndarray]], tables: CdfTables) -> bytes:
    """CompressAI's bytes of planes (k, rows), which it writes out of bounds with fewer than three indices."""
    k, rows = (np.concatenate([plane[which].T.ravel() for plane in planes]).tolist() for which in (0, 1))
    assert len(k) >= 3
    encoder = ans.BufferedRansEncoder()
    encoder.encode_with_indexes(k, rows, tables.cdf.tolist(), tables.size.tolist(), tables.offset.tolist())
    stream: bytes = encoder.flush()
    return stream


def drawn_tables(generator: np.random.Generator, rows: int) -> CdfTables:
    """Rows of one to forty symbols and an escape, of any frequencies from 1 on, and any offsets."""
    size = generator.integers(3, 43, rows)
    cdf = np.zeros((rows, 42), np.int32)
    for row, length in zip(cdf, size, strict=True):
        most = generator.choice((length, 1000, 65535))  # edges crowd at the beginning, or lie anywhere
        row[1 : length - 1] = np.sort(generator.choice(np.arange(1, most + 1), length - 2, replace=False))
        row[length - 1] = 65536
    return CdfTables(cdf, size, generator.choice((0, -1, -20, 300, -32768, 32767, -65536, 65536), rows))


SHAPES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), SHAPES)
def test_encoder_equals_compressai(ans: ModuleType, seed: int, shapes: list[tuple[int, int]]) -> None:
    generator = np.random.default_rng(seed)
    tables = drawn_tables(generator, 5)
    planes = []
    for shape in [*shapes, (1, 3), (2, 70)]:
        rows = generator.integers(0, 5, shape).astype(np.int32)
        symbol = tables.offset[rows] + generator.integers(-2, tables.size[rows])
        wild = generator.random(shape) < 0.2
        symbol[wild] = generator.choice((-32768, 32767, 0), int(wild.sum()))
        planes.append((np.clip(symbol, -32768, 32767).astype(np.int16), rows))
    stream = rans.encode_planes(planes, tables)
    assert stream == compressais_stream(ans, planes, tables)
    decoder = rans.Decoder(stream)
    for k, rows in planes:
        assert np.array_equal(decoder.decode(rows, tables, SCALAR), k)
    decoder.close()


def test_division_by_every_frequency_is_exact() -> None:
    """States at multiples of the frequency and before them, up to 2^63: the coder divides by multiplying."""
    frequency = np.arange(1, 65535)
    cdf = np.stack((0 * frequency, 0 * frequency + 1, 65536 - frequency, 0 * frequency + 65536), axis=1)
    _, reciprocal, form = encoder_tables(CdfTables(cdf, 0 * frequency + 4, 0 * frequency))
    of_escape, f = slice(2, None, 3), frequency.astype(np.uint64)
    assert np.array_equal(form[of_escape] & np.uint64(65535), f)
    shift = form[of_escape] >> np.uint64(32) & np.uint64(31)
    generator = np.random.default_rng(0)
    multiples = [f, (np.uint64(1 << 63) // f) * f, generator.integers(1 << 47, size=len(f)).astype(np.uint64) * f]
    for x in (one - np.uint64(less) for one in multiples for less in (0, 1)):
        x = np.minimum(x, np.uint64((1 << 63) - 1))
        assert np.array_equal(_divided.py_func(x.copy(), reciprocal[of_escape], shift), x // f)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_costliest_indices_fit_and_few_are_a_stream(ans: ModuleType, count: int) -> None:
    """Escapes of frequency 1 with five nibbles: 40 bits each. CompressAI's encoder takes three indices or more."""
    tables = CdfTables(np.array([[0, 65535, 65536]]), np.array([3]), np.array([32767]))
    k, rows = np.full((1, count), -32768, np.int16), np.zeros((1, count), np.int32)
    stream = rans.encode(k, rows, tables)
    assert 8 * len(stream) <= 64 + 40 * count
    assert np.array_equal(rans.decode(stream, rows, tables, SCALAR), k)
    if count > 2:
        assert stream == compressais_stream(ans, [(k, rows)], tables)


def test_state_machine_is_used() -> None:
    """The same stream under another machine ends in an error."""
    tables = trellis_tables(ECM8)
    k, level = plane(2, 4, 40)
    stream = rans.encode(k, walked_rows(k, level, ECM8), tables)
    with pytest.raises(BitstreamError):
        rans.decode(stream, level, tables, VVC4)


def test_estimated_bits_are_the_stream() -> None:
    tables = trellis_tables(ECM8)
    k, level = plane(3, 16, 200)
    rows = walked_rows(k, level, ECM8)
    estimated = float(tables.bits(k, rows).sum())
    assert 0 <= 8 * len(rans.encode(k, rows, tables)) - estimated < 0.001 * estimated + 64


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.integers(1, 40),
    st.sampled_from((SCALAR, VVC4, ECM8)),
    st.booleans(),
)
def test_round_trip(seed: int, lanes: int, steps: int, machine: Trellis, interleaved: bool) -> None:
    k, level = plane(seed, lanes, steps)
    tables = TABLES[machine.name]
    stream = rans.encode(k, walked_rows(k, level, machine), tables, interleaved)
    assert np.array_equal(rans.decode(stream, level, tables, machine, interleaved), k)


@pytest.mark.parametrize("machine", [SCALAR, ECM8, CODE16, Trellis("swapped", (1, 1, 0, 0), VVC4.next_state)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_lanes_and_steps_beyond_whole_squares(machine: Trellis, interleaved: bool) -> None:
    """Tiles are transposed as squares of 16 with what is left over; of more than eight states moves are looked up."""
    k, level = plane(3, 37, 51)
    tables = TABLES.get(machine.name, TABLES["tcq8"])
    stream = rans.encode(k, walked_rows(k, level, machine), tables, interleaved)
    for wide in (level, level.astype(np.int32)):
        assert np.array_equal(rans.decode(stream, wide, tables, machine, interleaved), k)


def written_down(k: list[int], rows: list[int], tables: CdfTables, *first: int) -> bytes:
    """A stream by the description of the format, in whole numbers, from these states on."""
    x, words = list(first), list[int]()
    for number in reversed(range(len(k))):
        row, turn = rows[number], number % len(x)
        escape = int(tables.size[row]) - 2
        value = k[number] - int(tables.offset[row])
        symbol = value if 0 <= value < escape else escape
        start, end = tables.cdf[row, symbol : symbol + 2].tolist()
        steps = [(end - start, start, 16)]
        if symbol == escape:
            coded = 2 * (value - escape) if value >= escape else -2 * value - 1
            nibbles = [int(one, 16) for one in reversed(f"{coded:x}")] if coded else []
            steps += [(1, one, 4) for one in (len(nibbles), *nibbles)]
        for frequency, begin, bits in reversed(steps):
            if x[turn] >= frequency << 63 - bits:
                words.append(x[turn] & 0xFFFFFFFF)
                x[turn] >>= 32
            x[turn] = (x[turn] // frequency << bits) + x[turn] % frequency + begin
    return b"".join([one.to_bytes(8, "little") for one in x] + [one.to_bytes(4, "little") for one in reversed(words)])


@pytest.mark.parametrize("states", [1, rans.STATES])
def test_streams_are_as_the_format_is_described(states: int) -> None:
    generator = np.random.default_rng(11)
    tables = drawn_tables(generator, 5)
    planes = []
    for shape in ((3, 37), (0, 4), (1, 1), (5, 2), (2, 81)):
        rows = generator.integers(0, 5, shape).astype(np.int32)
        k = tables.offset[rows] + generator.integers(-40, tables.size[rows] + 40)
        planes.append((np.clip(k, -32768, 32767).astype(np.int16), rows))
    k, rows = (np.concatenate([one[which].T.ravel() for one in planes]).tolist() for which in (0, 1))
    stream = rans.encode_planes(planes, tables, interleaved=states > 1)
    assert stream == written_down(k, rows, tables, *[1 << 31] * states)
    decoder = rans.Decoder(stream, interleaved=states > 1)
    assert all(np.array_equal(decoder.decode(rows, tables, SCALAR), k) for k, rows in planes)
    decoder.close()


def test_interleaving_costs_24_bytes_at_most() -> None:
    k, level = plane(12, 16, 2000)
    rows = walked_rows(k, level, ECM8)
    single, four = (rans.encode(k, rows, TABLES["tcq8"], interleaved) for interleaved in (False, True))
    assert 0 < len(four) - len(single) <= 24 and 24 / rans.INTERLEAVED_FROM < 1e-4
    for stream, interleaved in ((single, True), (four, False)):
        with pytest.raises(BitstreamError):
            rans.decode(stream, level, TABLES["tcq8"], ECM8, interleaved)


@pytest.mark.parametrize("guess", [None, 0.0, 1e9])
def test_the_layout_follows_from_the_size_whatever_is_guessed(
    guess: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    k, level = plane(12, 16, 2000)
    rows = walked_rows(k, level, ECM8)
    planes = [(k[:, :800], rows[:, :800]), (k[:, :0], rows[:, :0]), (k[:, 800:], rows[:, 800:])]
    single, four = (rans.encode_planes(planes, TABLES["tcq8"], interleaved) for interleaved in (False, True))
    assert rans._estimated_bytes(planes, TABLES["tcq8"]) == pytest.approx(len(single), rel=0.1)
    if guess is not None:
        monkeypatch.setattr(rans, "_estimated_bytes", lambda *_: guess)
    for close in (0, 1 << 12):
        monkeypatch.setattr(rans, "CLOSE", max(32, close))
        for bound, expected in ((0, True), (-1, True), (1, False), (10_000, False), (-10_000, True)):
            monkeypatch.setattr(rans, "INTERLEAVED_FROM", len(single) + bound)
            found = rans.encode_by_size(planes, TABLES["tcq8"])
            assert found == ((four, True) if expected else (single, False))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-32768, 32767)), min_size=3, max_size=40))
def test_round_trip_of_channel_tables(symbols: list[tuple[int, int]]) -> None:
    """Skewed rows with offsets near the ends of int16, one lane: every value is coded."""
    rows = np.array([[row for row, _ in symbols]], np.int32)
    k = np.array([[value for _, value in symbols]], np.int16)
    stream = rans.encode(k, rows, ASYMMETRIC)
    assert np.array_equal(rans.decode(stream, rows, ASYMMETRIC, SCALAR), k)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), SHAPES, st.sampled_from((SCALAR, VVC4, ECM8)))
def test_planes_are_decoded_one_by_one(seed: int, shapes: list[tuple[int, int]], machine: Trellis) -> None:
    """Each plane's levels follow from the indices before it, as with a context model; every lane starts in state 0."""
    tables = TABLES[machine.name]

    def next_level(base: np.ndarray, before: np.ndarray) -> np.ndarray:
        return ((base + abs(int(before.astype(np.int64).sum()))) % LEVELS).astype(np.uint8)

    drawn, planes, before = [], [], np.zeros((0, 0), np.int16)
    for number, shape in enumerate([*shapes, (1, 3)]):
        k, base = plane(seed + number, *shape)
        planes.append((k, walked_rows(k, next_level(base, before), machine)))
        drawn.append((k, base))
        before = k
    decoder, before = rans.Decoder(rans.encode_planes(planes, tables)), np.zeros((0, 0), np.int16)
    for k, base in drawn:
        with pytest.raises(BitstreamError, match="has bytes left over|does not end"):
            decoder.close()
        before = decoder.decode(next_level(base, before), tables, machine)
        assert before.dtype == np.int16 and np.array_equal(before, k)
    decoder.close()


def test_one_plane_or_two_are_the_same_stream() -> None:
    """Steps follow one another, so planes of the same lanes continue them: with one state the stream is the same."""
    tables = TABLES["sq"]
    k, level = plane(8, 4, 30)
    rows = level.astype(np.int32)
    cut = [(k[:, part], rows[:, part]) for part in (slice(0, 11), slice(11, 11), slice(11, 30))]
    stream = rans.encode_planes(cut, tables)
    assert stream == rans.encode(k, rows, tables)
    decoder = rans.Decoder(stream)
    parts = [decoder.decode(level[:, part], tables, SCALAR) for part in (slice(0, 11), slice(11, 30))]
    assert np.array_equal(np.hstack(parts), k)
    decoder.close()


def test_lanes_along_channels_have_a_row_for_each_step() -> None:
    """Lanes are positions, steps channels: a table for each channel and quantizer, asymmetric, more than 64 levels."""
    channels, positions = 70, 5
    rng = np.random.default_rng(9)
    row = np.array([0, 100, 2000, 30000, 60000, 65000, 65500, 65536])
    tables = CdfTables(np.tile(row, (2 * channels, 1)), np.full(2 * channels, 8), rng.integers(-5, 1, 2 * channels))
    k = rng.integers(-7, 8, (positions, channels)).astype(np.int16)
    level = np.broadcast_to(np.arange(channels, dtype=np.uint16), k.shape)
    rows = table_rows(k, level, ECM8, channels)
    assert rows.max() > 2 * LEVELS
    stream = rans.encode_planes([(k[:2], rows[:2]), (k[2:], rows[2:])], tables)
    decoder = rans.Decoder(stream)
    assert np.array_equal(decoder.decode(level[:2], tables, ECM8), k[:2])
    assert np.array_equal(decoder.decode(level[2:], tables, ECM8), k[2:])
    decoder.close()


def test_impossible_requests_are_refused() -> None:
    tables = trellis_tables(SCALAR)
    with pytest.raises(ValueError, match="outside"):
        rans.decode(b"\0" * 8, np.full((1, 3), LEVELS, np.uint8), tables, SCALAR)
    with pytest.raises(ValueError, match="outside"):  # 64 rows serve 32 levels of two quantizers
        rans.decode(b"\0" * 8, np.full((1, 3), 32, np.uint8), tables, ECM8)
    with pytest.raises(ValueError, match="outside"):
        rans.decode(b"\0" * 8, np.zeros((1, 3), np.uint8), ASYMMETRIC_THREE, ECM8)
    with pytest.raises(ValueError, match=r"not \[lanes, steps\]"):
        rans.decode(b"\0" * 8, np.zeros(3, np.uint8), tables, SCALAR)
    for row in (-1, tables.rows):
        with pytest.raises(ValueError, match="outside"):
            rans.encode(np.zeros((1, 3), np.int16), np.full((1, 3), row, np.int32), tables)
    for types in ((np.int32, np.int32), (np.int16, np.int64)):
        with pytest.raises(ValueError, match="int16, int32"):
            rans.encode(*(np.zeros((1, 3), one) for one in types), tables)
    with pytest.raises(ValueError, match="lanes, steps"):
        rans.encode(np.zeros((1, 3), np.int16), np.zeros((3, 1), np.int32), tables)


TABLES = {machine.name: trellis_tables(machine) for machine in (SCALAR, VVC4, ECM8)}
GOLDEN = "92ff5b5b7524800180fc9f13ffff6201"
