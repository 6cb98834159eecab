"""Scale offsets: a picture's own corrections of the scales, packed, chosen, and in files."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lic_dist import config
from lic_dist.building.calibrate import calibrate
from lic_dist.building.latents import Latents
from lic_dist.building.records import named_record
from lic_dist.codec import open_codec, walk
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.container import Container
from lic_dist.codec.offsets import MOST, choose, pack, unpack
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.records import local_record
from lic_dist.errors import UsageError
from lic_dist.quantization.record import QuantizerRecord
from tests.codec.test_families import made, record
from tests.conftest import picture

WALKS = (  # of one stage, in raster order, in halves, in groups, in slices
    "bmshj2018-hyperprior",
    "mbt2018-mean-vbr",
    "mbt2018",
    "cheng2020-anchor-checkerboard",
    "elic2022-official",
    "minnen2020-charm",
)


@given(st.lists(st.integers(-MOST, MOST), min_size=1, max_size=400), st.binary(max_size=9))
def test_offsets_go_there_and_back(offsets: list[int], rest: bytes) -> None:
    packed = pack(np.array(offsets, np.int8))
    found, left = unpack(packed + rest, len(offsets))
    assert found.tolist() == offsets and left == rest and len(packed) % 4 == 0
    with pytest.raises(BitstreamError):
        unpack(packed[:-4], len(offsets))


def test_the_bits_of_offsets_are_those_of_the_text() -> None:
    # 3 channels: gaps 0, 1, 3 and offsets 1, -2, 7: gamma(3) 00100, 1 1 0, 010 010 1, 00100 00111 0
    word = int("00100" + "110" + "0100101" + "00100001110" + "000000", 2)
    assert pack(np.array([1, 0, -2, 0, 0, 0, 7, 0], np.int8)) == word.to_bytes(4, "big")
    assert pack(np.zeros(8, np.int8)) == b"\x80\0\0\0"


@given(st.binary(max_size=24), st.integers(1, 40))
def test_other_bytes_are_refused_or_what_the_packer_writes(data: bytes, channels: int) -> None:
    try:
        offsets, left = unpack(data, channels)
    except BitstreamError:
        return
    assert pack(offsets) + left == data and np.abs(offsets).max(initial=0) <= MOST


def test_the_chosen_offsets_are_the_cheapest() -> None:
    """Bits are convex in the offset, as for a family of distributions of one shape."""
    rng = np.random.default_rng(0)
    best, curve, floor = rng.uniform(-9, 9, 300), rng.uniform(0, 12, 300), rng.uniform(0, 900, 300)
    at = np.arange(-MOST, MOST + 1)
    bits = floor + curve * (at[:, None] - best) ** 2
    price = np.where(at, 6 + np.abs(at), 0)[:, None]
    expected = at[np.argmin(bits + price, axis=0)]
    assert choose(lambda one: bits[one + MOST]).tolist() == expected.tolist()
    assert not choose(lambda one: bits[one + MOST] * 1e-3).any()  # nothing saved is worth a word


@pytest.mark.parametrize("name", WALKS)
def test_a_file_with_offsets_is_smaller_and_any_decoder_of_its_quantizer_reads_it(name: str) -> None:
    loaded = made(name)  # untrained: what h_s says of the scales is far off
    plain = record(loaded, "tcq")
    without, having = (ImageCodec(loaded.model, one) for one in (plain, replace(plain, scale_offsets=True)))
    image = picture(7, 128, 192)
    before, after = without.encode(image), having.encode(image)
    assert after.offsets and after.coded_bits < before.coded_bits
    decoded = without.decode_latents(after.data)
    assert np.array_equal(decoded.k, after.k) and torch.equal(decoded.y_hat, after.y_hat)
    assert np.array_equal(without.decode(after.data), having.picture(after))
    assert after.coded_bits == pytest.approx(having.estimated_bits(after), rel=0.002, abs=160)


def test_offsets_add_to_the_levels_and_stop_at_their_ends() -> None:
    loaded = made("mbt2018-mean")
    codec = ImageCodec(loaded.model, replace(record(loaded, "tcq"), scale_offsets=True))
    encoded = codec.encode(picture(7, 128, 192))
    offsets, _ = unpack(Container.unpack(encoded.data).y, codec.record.weights.size)
    plain = ImageCodec(loaded.model, record(loaded, "tcq")).encode(picture(7, 128, 192))
    expected = np.clip(plain.level.astype(int) + offsets[:, None], 0, 63)  # the scales depend on z alone
    assert np.array_equal(encoded.level, expected) and np.ptp(offsets) > 0
    whole = torch.tensor([[0, 1, 62, 63]], dtype=torch.uint8)
    assert walk.moved(whole, 2).tolist() == [[2, 3, 63, 63]] and walk.moved(whole, -2).tolist() == [[0, 0, 60, 61]]


def test_offsets_work_with_the_entropy_model_in_integers() -> None:
    loaded = made("mbt2018-mean")
    codec = ImageCodec(loaded.model, replace(record(loaded, "tcq"), scale_offsets=True), integer=True)
    encoded = codec.encode(picture(7, 128, 192))
    assert encoded.offsets and np.array_equal(codec.decode(encoded.data), codec.picture(encoded))


def test_a_picture_that_offsets_do_not_serve_has_the_bytes_of_one_without_them() -> None:
    plain = open_codec("base-0.013", "tcq8")
    having = ImageCodec(plain.model, replace(plain.record, scale_offsets=True))
    image = picture(7, 24, 24)
    one, other = plain.encode(image), having.encode(image)
    assert not other.offsets and one.data == other.data


def test_altered_offsets_under_right_checksums_are_refused() -> None:
    loaded = made("mbt2018-mean")
    codec = ImageCodec(loaded.model, replace(record(loaded, "tcq"), scale_offsets=True))
    encoded = codec.encode(picture(7, 128, 192))
    container = Container.unpack(encoded.data)
    for y in (container.y[4:], b"\0" * 4 + container.y, pack(np.ones(24, np.int8)) + container.y, b""):
        with pytest.raises(BitstreamError):
            codec.decode(replace(container, y=y).pack())
    unflagged = replace(container, offsets=False).pack()
    with pytest.raises(BitstreamError):
        codec.decode(unflagged)
    flags = bytearray(encoded.data)
    flags[4] |= 16
    flags[-4:] = zlib.crc32(flags[:-4]).to_bytes(4, "little")
    with pytest.raises(BitstreamError, match="flags"):
        codec.decode(bytes(flags))


def test_a_record_says_so_and_older_ones_keep_their_digests() -> None:
    plain = record(made("mbt2018-mean"), "tcq")
    having = replace(plain, scale_offsets=True)
    assert QuantizerRecord.from_json(having.to_json()).scale_offsets
    assert having.digest != plain.digest and having.decoding_digest == plain.decoding_digest
    assert "scale_offsets" not in plain.to_json()


def test_the_name_of_a_quantizer_asks_for_offsets(tmp_path: Path) -> None:
    loaded = made("mbt2018-mean")
    record(loaded, "tcq").save(tmp_path / "mine.json")
    for find in (local_record, named_record):
        found = find(loaded, f"{tmp_path}/mine.json+offsets")
        assert found.scale_offsets and found.digest == replace(record(loaded, "tcq"), scale_offsets=True).digest
    assert local_record(loaded, "sq+offsets").scale_offsets
    with pytest.raises(UsageError, match="no scales"):
        local_record(made("bmshj2018-factorized"), "sq+offsets")
    with pytest.raises(UsageError, match="no quantizer 'other'"):
        local_record(loaded, "other+offsets")


def test_a_prior_for_each_channel_has_no_scales() -> None:
    loaded = made("bmshj2018-factorized")
    with pytest.raises(ValueError, match="by channel"):
        replace(record(loaded, "tcq"), scale_offsets=True)
    none = Latents(*(np.empty(0) for _ in range(3)))
    for asked in (config.Quantizer(scale_offsets=True), config.Quantizer(spread=0.1)):
        with pytest.raises(UsageError, match="no scales"):
            calibrate(loaded, asked, none, none)
