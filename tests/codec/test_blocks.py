"""Files in blocks: regions are parts of the whole, threads change nothing; cuts, damage and other networks."""

from __future__ import annotations

import hashlib
import random
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.building.records import analytic_record
from lic_dist.codec import blocks, open_decoder
from lic_dist.codec.block_codec import BlockCodec, of_bytes, open_block_codec, open_block_decoder, reading
from lic_dist.codec.blocks import Block, Blocks, Layout
from lic_dist.codec.codec import FoundLatents, ImageCodec
from lic_dist.codec.container import OVERHEAD
from lic_dist.codec.edges import Part, needed
from lic_dist.codec.rans import BitstreamError
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.boundary import CORRECTS, SEES, Boundary, boundary_id, exact_corrections, loaded, mended
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.record import QuantizerRecord
from tests import fuzz_blocks as fuzz
from tests.conftest import picture
from tests.data.remote import web

BLOCKS = (b"first block.", b"2nd.", b"the third...", b"4")
HEAD = Blocks(130, 140, b"mode", b"reco", 64, tuple(map(len, BLOCKS)), boundary=b"edge", offsets=frozenset([1]))
HEIGHT, WIDTH = 170, 230


@pytest.fixture(scope="module")
def loud(base: Path) -> Checkpoint:
    """The tiny model with its latents made loud, and a boundary network that changes every pixel it can."""
    made = checkpoint.load(str(base))
    network = Boundary()
    with torch.no_grad():
        made.model.g_a[6].weight *= 25
        torch.manual_seed(0)
        for values in network.parameters():
            values.normal_(0, 0.1)
    made.boundary = network.carried()
    return made


@pytest.fixture(scope="module")
def record(loud: Checkpoint) -> QuantizerRecord:
    return analytic_record(loud, "tcq", 8, 0.6, 0.2, np.full(12, 30.0))


@pytest.fixture(scope="module")
def codec(loud: Checkpoint, record: QuantizerRecord) -> BlockCodec:
    return BlockCodec(loud.model, record, loud.boundary, threads=1)


@pytest.fixture(scope="module", params=["colours", "grey"])
def image(request: pytest.FixtureRequest) -> np.ndarray:
    found = picture(3, HEIGHT, WIDTH)
    return found if request.param == "colours" else found[..., 0]


def part(x: int, y: int, width: int, height: int) -> Part:
    return Part(slice(y, y + height), slice(x, x + width))


def test_golden_bytes() -> None:
    head = "4c494304" + "04" + "8200" + "8c00" + b"modereco".hex() + "4000" + b"edge".hex() + "18091802"
    assert HEAD.pack().hex() == head + "f86fe521"
    assert Block(64, 64, b"123456789").pack() == b"123456789" + bytes.fromhex("b129")  # the check value of this CRC-16
    assert hashlib.sha256(fuzz.encode(1, 130, 70, b"edge")).hexdigest()[:16] == "8a389dc05bfefab7"


def test_the_page_has_the_modules_table() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "bitstream.md").read_text()
    table = str(blocks.__doc__).split("but the last.")[1]
    assert textwrap.dedent(table).strip() in page


@settings(deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 8))
def test_blocks_cover_a_picture_once(height: int, width: int, units: int) -> None:
    layout = Layout(height, width, 64 * units)
    covered = np.zeros((height, width), np.int8)
    for number in range(layout.count):
        place = layout.place(number)
        covered[place] += 1
        assert number in layout.meeting(*place) and len(layout.meeting(*place)) == 1
    assert (covered == 1).all()
    for edges in (layout.rows, layout.columns):
        assert len(edges) == 2 or min(np.diff(edges)) >= 32 * units > SEES


def test_every_cut_and_altered_byte_of_a_head_is_refused() -> None:
    data = HEAD.pack()
    assert Blocks.read(of_bytes(data + b"".join(BLOCKS))) == HEAD
    for size in range(len(data)):
        with pytest.raises(BitstreamError):
            Blocks.read(of_bytes(data[:size]))
    for place in range(len(data)):
        for bits in (1, 128, 255):
            altered = bytearray(data)
            altered[place] ^= bits
            with pytest.raises(BitstreamError):
                Blocks.read(of_bytes(bytes(altered)))


def test_a_region_is_a_part_of_the_whole_picture(codec: BlockCodec, image: np.ndarray) -> None:
    read = of_bytes(codec.encode(image, 64).data)
    whole, plain = codec.decode(read), codec.decode(read, mended=False)
    assert whole.shape == image.shape and 0.02 < (whole != plain).reshape(HEIGHT, WIDTH, -1).any(2).mean() < 0.4
    generator = np.random.default_rng(0)
    parts = [part(64, 64, 64, 64), part(0, 0, WIDTH, HEIGHT), part(60, 60, 1, 1), part(192, 100, 38, 70)]
    for _ in range(12):
        x, y = (int(generator.integers(length - 1)) for length in (WIDTH, HEIGHT))
        parts.append(part(x, y, int(generator.integers(1, WIDTH - x + 1)), int(generator.integers(1, HEIGHT - y + 1))))
    for one in parts:
        assert np.array_equal(codec.decode(read, one), whole[one.rows, one.columns]), one
    assert np.array_equal(codec.decode(read, parts[0], mended=False), plain[64:128, 64:128])


def test_threads_change_no_byte_and_no_pixel(codec: BlockCodec, loud: Checkpoint, image: np.ndarray) -> None:
    several = BlockCodec(loud.model, codec.alone.record, loud.boundary, threads=3)
    data = codec.encode(image, 64).data
    assert several.encode(image, 64).data == data
    assert np.array_equal(several.decode(of_bytes(data)), codec.decode(of_bytes(data)))


def test_a_block_is_a_picture_for_itself(codec: BlockCodec, loud: Checkpoint, record: QuantizerRecord) -> None:
    image, alone = picture(4, 128, 150), ImageCodec(loud.model, record, threads=1)
    found: list[FoundLatents] = []
    encoded = codec.encode(image, 64, found.append)
    plain = codec.decode(of_bytes(encoded.data), mended=False)
    for number in range(encoded.head.layout.count):
        place = encoded.head.layout.place(number)
        expected = alone.encode(np.ascontiguousarray(image[place]))
        assert np.array_equal(plain[place], alone.decode(expected.data))
        assert np.array_equal(found[number].z, expected.z) and np.array_equal(found[number].k, expected.k)
        saved = (len(expected.data) - OVERHEAD) - (encoded.head.sizes[number] - 2)
        assert 4 <= saved <= 8 + 3  # a state but for a word, as it may be, and zero bytes of the other


def test_scale_offsets_are_of_single_blocks(loud: Checkpoint, record: QuantizerRecord) -> None:
    corrected = BlockCodec(loud.model, replace(record, scale_offsets=True), loud.boundary, threads=1)
    image, told = picture(3, HEIGHT, WIDTH), list[FoundLatents]()
    encoded = corrected.encode(image, 64, told.append)
    assert encoded.head.offsets == {number for number, one in enumerate(told) if one.offsets} and encoded.head.offsets
    assert Blocks.read(of_bytes(encoded.data)) == encoded.head
    place = encoded.head.layout.place(min(encoded.head.offsets))
    expected = corrected.alone.decode(corrected.alone.encode(np.ascontiguousarray(image[place])).data)
    assert np.array_equal(corrected.decode(of_bytes(encoded.data), Part(*place), mended=False), expected)


def test_another_quantizer_is_refused(codec: BlockCodec, loud: Checkpoint) -> None:
    other = BlockCodec(loud.model, analytic_record(loud, "tcq", 8, 0.7, 0.2, np.full(12, 30.0)), loud.boundary)
    with pytest.raises(BitstreamError, match="another quantizer"):
        other.decode(of_bytes(codec.encode(picture(1, 30, 30), 64).data))


def test_a_region_reads_what_it_needs(codec: BlockCodec) -> None:
    encoded = codec.encode(picture(3, HEIGHT, WIDTH), 64)
    head, asked = encoded.head, []

    def read(first: int, size: int) -> bytes:
        asked.append((first, size))
        return encoded.data[first : first + size]

    for one, numbers in ((part(70, 70, 50, 50), [5]), (part(58, 10, 2, 2), [0]), (part(60, 10, 2, 2), [0, 1])):
        assert needed(head.layout, one, True)[0] == numbers
        asked.clear()
        codec.decode(read, one)
        assert sorted(asked[2:]) == [(head.begins[number], head.sizes[number]) for number in numbers]
        assert sum(size for _, size in asked[:2]) < head.begins[0] + 5 * head.layout.count + 24
        assert codec.count(head, one) == (len(numbers), head.begins[0] + sum(head.sizes[n] for n in numbers))
    middle = needed(head.layout, part(64, 64, 64, 64), True)[0]
    assert len(middle) == 9 and needed(head.layout, part(64, 64, 64, 64), False)[0] == [5]


def test_cut_and_damaged_blocks(codec: BlockCodec) -> None:
    encoded = codec.encode(picture(3, HEIGHT, WIDTH), 64)
    data, head = encoded.data, encoded.head
    corner = part(0, 0, 20, 20)
    intact = codec.decode(of_bytes(data), corner)
    assert np.array_equal(codec.decode(of_bytes(data[: head.begins[1]]), corner), intact)
    with pytest.raises(BitstreamError, match=f"block {head.layout.count} of this bitstream is cut"):
        codec.decode(of_bytes(data[:-1]))
    with pytest.raises(BitstreamError, match="left over"):
        codec.decode(of_bytes(data + b"\0"))
    altered = bytearray(data)
    altered[head.begins[2] + 7] ^= 4
    assert np.array_equal(codec.decode(of_bytes(bytes(altered)), corner), intact)
    with pytest.raises(BitstreamError, match="block 3 of this bitstream is altered"):
        codec.decode(of_bytes(bytes(altered)))
    with pytest.raises(BitstreamError, match="is in blocks"):
        open_decoder(data, "base-small")
    for one in (part(0, 0, WIDTH + 1, 5), part(0, HEIGHT, 1, 1), part(3, 3, 0, 4), part(-1, 0, 4, 4)):
        with pytest.raises(UsageError, match="not in the picture"):
            codec.decode(of_bytes(data), one)


def test_blocks_that_do_not_fit_are_refused(codec: BlockCodec) -> None:
    for side, hint in ((100, "128"), (0, "64"), (65536, "multiple of 64"), (-64, "64")):
        with pytest.raises(UsageError, match="do not fit") as caught:
            codec.encode(picture(1, 70, 70), side)
        assert hint in str(caught.value.hint)


def test_another_network_for_edges_is_refused(codec: BlockCodec, loud: Checkpoint, record: QuantizerRecord) -> None:
    read = of_bytes(codec.encode(picture(3, 64, 128), 64).data)
    assert Blocks.read(read).boundary == boundary_id(loud.boundary)
    for carried in ({}, Boundary().carried()):
        other = BlockCodec(loud.model, record, carried)
        with pytest.raises(BitstreamError, match="boundary network") as caught:
            other.decode(read)
        assert "--no-boundary" in str(caught.value.hint)
        assert np.array_equal(other.decode(read, mended=False), codec.decode(read, mended=False))
    without = BlockCodec(loud.model, record).encode(picture(3, 64, 128), 64)
    assert not without.head.boundary and np.array_equal(
        codec.decode(of_bytes(without.data)), codec.decode(read, mended=False)
    )
    with pytest.raises(LicError, match="another version"):
        loaded({"layers.0.weight": torch.zeros(3)})


def test_integers_say_what_floats_say(loud: Checkpoint) -> None:
    """What a training sees is what a decoder does, but for roundings; strips of any length give the same rows."""
    network = loaded(loud.boundary)
    squares = torch.from_numpy(picture(5, 96, 96)).permute(2, 0, 1)[None].float()
    strip = torch.nn.functional.pad(squares[..., 48 - SEES : 48 + SEES], (0, 0, 2, 2), mode="replicate")
    exact = exact_corrections(network.exact(), strip)
    with torch.no_grad():
        assert torch.allclose(exact, network(strip), atol=0.05) and exact.abs().max() > 1
        both = mended(network, squares) - squares
    assert torch.equal(exact_corrections(network.exact(), strip[:, :, 30:41]), exact[:, :, 30:37])
    assert torch.allclose(both[:, :, :40, 48 - CORRECTS : 48 + CORRECTS], exact[:, :, :40], atol=0.05)
    assert not both[:, :, :40, :40].any()


@pytest.mark.slow
def test_hostile_files_are_refused_or_decode_to_what_the_head_claims() -> None:
    generator = random.Random(0)
    assert all(fuzz.one_input(bytes([mends]) + seed) is not None for mends in (0, 7) for seed in fuzz.seeds())
    decoded = sum(fuzz.one_input(fuzz.mutated(generator)) is not None for _ in range(1000))
    assert 100 < decoded < 700  # both ends are reached


@pytest.mark.slow
def test_commands(loud: Checkpoint, record: QuantizerRecord, tmp_path: Path) -> None:
    source, file, out, model = (tmp_path / name for name in ("a.png", "a.lic", "b.png", "loud.pth.tar"))
    Image.fromarray(picture(3, HEIGHT, WIDTH)).save(source)
    loud.quantizers["tcq8"] = record.to_json()
    checkpoint.save(loud, model)

    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.output

    told = run("encode", source, file, "--model", model, "--quantizer", "tcq8", "--blocks", 64)
    assert "in blocks of 64, mended edges" in told
    codec = open_block_codec(str(model), "tcq8")
    assert codec.encode(picture(3, HEIGHT, WIDTH), 64).data == file.read_bytes()
    whole = codec.decode(of_bytes(file.read_bytes()))
    run("decode", file, out, "--model", model)
    assert np.array_equal(np.asarray(Image.open(out)), whole)
    told = run("decode", file, out, "--model", model, "--region", "70,70,30,40")
    assert np.array_equal(np.asarray(Image.open(out)), whole[70:110, 70:100])
    assert "1 of 12 blocks" in told and f"of {file.stat().st_size} bytes" in told
    run("decode", file, out, "--model", model, "--no-boundary")
    assert np.array_equal(np.asarray(Image.open(out)), codec.decode(of_bytes(file.read_bytes()), mended=False))
    with web(tmp_path) as url, reading(f"{url}/a.lic") as read:
        assert np.array_equal(open_block_decoder(read, str(model)).decode(read, part(5, 5, 90, 90)), whole[5:95, 5:95])
        with pytest.raises(LicError, match="no such file"), reading(f"{url}/b.lic"):
            pass
    for wrong in ("1,2,3", "1,2,3,x", "0,0,900,900"):
        with pytest.raises(UsageError, match="region"):
            run("decode", file, out, "--model", model, "--region", wrong)
    with pytest.raises(UsageError, match="two kinds"):
        run("encode", source, file, "--model", model, "--blocks", 64, "--progressive")
    with pytest.raises(UsageError, match="no progressive file"):
        run("decode", file, out, "--model", model, "--preview")
    run("encode", source, file, "--model", model, "--blocks", 64, "--no-boundary")
    assert not Blocks.read(of_bytes(file.read_bytes())).boundary
    run("encode", source, file, "--model", model)
    with pytest.raises(UsageError, match="not in blocks"):
        run("decode", file, out, "--model", model, "--region", "0,0,9,9")
