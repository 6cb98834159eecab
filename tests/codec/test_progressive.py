"""Progressive files: every prefix decodes to what a plain reference says of it; cuts, damage and other models."""

from __future__ import annotations

import hashlib
import random
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.building.records import analytic_record
from lic_dist.codec import open_codec, open_decoder, progressive, units
from lic_dist.codec.progressive import (
    ProgressiveCodec,
    decode_units,
    encode_units,
    gains,
    identity,
    planes,
    preview_size,
)
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.units import FORMAT, Progressive, Unit
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import ModelSpec, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.planes import NEVER, TOP
from lic_dist.quantization.rates import LEVELS, SCALES
from tests import fuzz_progressive as fuzz
from tests.conftest import picture

SMALL = Progressive(64, 96, b"mode", b"reco", 0xDEADBEEF, b"zzzz", (Unit(300, b"12345678"), Unit(5, b"abcdefghijkl")))


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures get several units too."""
    monkeypatch.setattr(progressive, "SMALLEST_UNIT", 24)


@pytest.fixture(scope="module")
def loud(base: Path) -> Checkpoint:
    """The tiny model with its latents made loud."""
    made = checkpoint.load(str(base))
    with torch.no_grad():
        made.model.g_a[6].weight *= 25
    return made


@pytest.fixture(scope="module")
def codec(loud: Checkpoint) -> ProgressiveCodec:
    weights = np.geomspace(0.01, 0.2, 12).astype(np.float32)
    return ProgressiveCodec(loud.model, analytic_record(loud, "deadzone", 1, 1.0, 0.4, weights))


def test_golden_bytes() -> None:
    head = "4c494303" + "00" + "4000" + "6000" + b"modereco".hex() + "efbeadde" + "0200"
    table = "ac02" + "02" + "1590" + "05" + "03" + "ffb7" + "01" + b"zzzz".hex()
    assert SMALL.pack().hex() == head + table + "e598e0d7" + b"12345678abcdefghijkl".hex()


def test_the_page_has_the_modules_table() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "progressive.md").read_text()
    table = str(units.__doc__).split("last.")[1].split("The first unit's")[0]
    assert textwrap.dedent(table).strip() in page


def test_every_cut_of_a_container_has_its_whole_units() -> None:
    data = SMALL.pack()
    ends = Progressive.unpack(data).ends
    assert len(ends) == 3 and ends[-1] == len(data)
    for size in range(len(data) + 1):
        if size < ends[0]:
            with pytest.raises(BitstreamError):
                Progressive.unpack(data[:size])
        else:
            found = Progressive.unpack(data[:size])
            assert found.units == SMALL.units[: sum(size >= end for end in ends[1:])] and found.ends == ends


def test_every_altered_byte_is_refused() -> None:
    data = SMALL.pack()
    for place in range(len(data)):
        for bits in (1, 128, 255):
            altered = bytearray(data)
            altered[place] ^= bits
            with pytest.raises(BitstreamError):
                Progressive.unpack(bytes(altered))
    with pytest.raises(BitstreamError, match="left over"):
        Progressive.unpack(data + b"\0")


def told(level: int, gain: int, k: int, negative: bool, least: int) -> tuple[int, int, int]:
    """Plane, sign and magnitude of an element when all slopes down to one are told: the rule, in plain Python."""
    bits, plane, m, sign = planes(), TOP + 1, 0, 0
    while True:
        slope = int(bits.slopes[bits.base[level, plane] + min(m, bits.last[level, plane])])
        if slope == NEVER or slope + gain < least:
            return plane, sign, m
        plane = int(bits.first[level]) if plane > TOP else plane - 1
        m = k >> plane
        sign = 0 if not m else -1 if negative else 1


@pytest.mark.slow
def test_every_prefix_tells_what_the_rule_says() -> None:
    generator = np.random.default_rng(0)
    level = generator.integers(0, LEVELS - 8, (6, 40)).astype(np.uint8)
    r = (generator.standard_normal(level.shape) * SCALES[level]).astype(np.float32)
    r[0, :3] = 3000, -3000, 700  # beyond every row: escapes, and halves of the tail
    gain = gains(np.geomspace(0.001, 3, 6).astype(np.float32))
    coded, known = encode_units(level, gain, r, -400, 12)
    assert 4 <= len(coded) <= 13 and all(unit.fall > 0 for unit in coded)
    k, first = planes().magnitudes(r), decode_units(level, gain, []).highest + 1
    for count in range(len(coded) + 1):
        found = decode_units(level, gain, coded[:count])
        least = first - sum(unit.fall for unit in coded[:count])
        for place in np.ndindex(*level.shape):
            one = told(level[place], int(gain[place[0]]), int(k[place]), bool(r[place] < 0), least)
            flat = np.ravel_multi_index(place, level.shape)
            nodes = found._nodes
            assert (nodes.plane[flat], nodes.sign[flat], nodes.magnitude[flat]) == one
    assert (found.values() == known.values()).all() and found.highest < -400


def test_golden_units() -> None:
    """The streams of latents that no library rounds: the format's promise, tables, order and coder together."""
    number = np.arange(6 * 200).reshape(6, 200)
    level = (number * 31 % 44).astype(np.uint8)
    r = ((number * 7919 % 2001 - 1000) / 512 * SCALES[level]).astype(np.float32)
    coded, _ = encode_units(level, np.array([-9, 0, 4, 32, 65, -70], np.int16), r, -200, 5)
    assert [unit.fall for unit in coded] == [196, 81, 63, 44, 166]
    assert hashlib.sha256(b"".join(unit.stream for unit in coded)).hexdigest()[:16] == "c08407b22a0e7b0e"


@pytest.mark.parametrize("count", [1, 3, 40])
def test_about_as_many_units_as_asked_for(count: int) -> None:
    generator = np.random.default_rng(1)
    level = generator.integers(8, 30, (64, 400)).astype(np.uint8)
    r = (generator.standard_normal(level.shape) * SCALES[level]).astype(np.float32)
    coded, _ = encode_units(level, np.zeros(64, np.int16), r, -200, count)
    sizes = [len(unit.stream) for unit in coded]
    assert 0.6 * count <= len(coded) <= count + 1
    assert max(sizes) < 4 * sum(sizes) / len(sizes)


def test_latents_that_do_not_fit_are_refused() -> None:
    level, gain = np.full((1, 4), 3, np.uint8), np.zeros(1, np.int16)
    for value in (np.nan, np.inf, 4e6, 4e5):
        with pytest.raises(LicError, match="16-bit"):
            encode_units(level, gain, np.full((1, 4), value, np.float32), -3000)


@pytest.mark.slow
def test_files_decode_at_every_unit_and_between(codec: ProgressiveCodec) -> None:
    image = picture(3, 100, 150)
    coded = codec.encode(image)
    assert len(coded.ends) > 5 and coded.ends[-1] == len(coded.data)
    whole = codec.decode_latents(coded.data)
    assert (whole.y_hat == coded.y_hat).all() and (whole.k == coded.k).all()
    before = None
    errors = []
    for end in coded.ends:
        found = codec.decode_latents(coded.data[:end])
        if before is not None:
            cut = codec.decode_latents(coded.data[: end - 1])
            assert (cut.y_hat == before.y_hat).all()
        before = found
        errors.append(float((found.y_hat - coded.y_hat).square().sum()))
    assert codec.picture(whole).shape == image.shape
    assert errors[-1] == 0 and errors[-1] < errors[len(errors) // 2] < errors[0]


@pytest.mark.parametrize(("shape", "integer"), [((1, 1), False), ((70, 65), True)])
def test_grey_small_and_deterministic(loud: Checkpoint, shape: tuple[int, int], integer: bool) -> None:
    codec = ProgressiveCodec(loud.model, analytic_record(loud, "sq", 1, 1.0, 1.0, np.ones(12, np.float32)), integer)
    image = picture(5, *shape)[..., 0]
    coded = codec.encode(image)
    assert Progressive.unpack(coded.data).integer is integer
    assert (codec.decode(coded.data) == codec.picture(coded)).all() and codec.decode(coded.data).shape == shape


def test_another_model_or_another_sensitivity_is_refused(codec: ProgressiveCodec, loud: Checkpoint, base: Path) -> None:
    data = codec.encode(picture(3, 64, 64)).data
    record = codec.record
    with pytest.raises(BitstreamError, match="another model"):
        ProgressiveCodec(build("mbt2018-mean", 8, 12).eval(), record).decode(data)
    other = analytic_record(loud, "deadzone", 1, 1.0, 0.4, record.weights * 2)
    assert identity(other) != identity(record)
    with pytest.raises(BitstreamError, match="S_c"):
        ProgressiveCodec(loud.model, other).decode(data)


@pytest.mark.parametrize("name", ["bmshj2018-factorized", "mbt2018"])
def test_families_of_other_kinds_are_refused(name: str) -> None:
    made = Checkpoint(build(name, 8, 12).eval(), ModelSpec(name, 8, 12, 0.05))
    made.model.update(force=True)
    with pytest.raises(LicError, match="one stage"):
        ProgressiveCodec(made.model, analytic_record(made, "sq", 1, 1.0, 1.0, np.ones(12, np.float32)))


def test_a_stream_that_no_encoder_writes_is_refused(codec: ProgressiveCodec) -> None:
    container = Progressive.unpack(codec.encode(picture(3, 64, 64)).data)
    assert container.units[1].stream != container.units[2].stream
    swapped = [container.units[0], Unit(container.units[1].fall, container.units[2].stream)]
    made = Progressive(64, 64, container.model, container.record, container.levels, container.z, tuple(swapped))
    with pytest.raises(BitstreamError, match="entropy-coded"):
        codec.decode(made.pack())


@pytest.mark.slow
def test_hostile_files_are_refused_or_decode_to_what_the_header_claims() -> None:
    generator = random.Random(0)
    assert all(fuzz.one_input(bytes([mends]) + seed) is not None for mends in (0, 7) for seed in fuzz.seeds())
    decoded = sum(fuzz.one_input(fuzz.mutated(generator)) is not None for _ in range(1000))
    assert 100 < decoded < 600  # both ends are reached


@pytest.mark.slow
def test_commands(base: Path, tmp_path: Path) -> None:
    source, file, out = tmp_path / "a.png", tmp_path / "a.lic", tmp_path / "b.png"
    image = picture(3, 90, 120)
    Image.fromarray(image).save(source)

    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    assert "progressive" in run("encode", source, file, "--model", base, "--progressive")
    data = file.read_bytes()
    assert data[3] == FORMAT
    codec = open_codec(str(base), "sq", progressive=True)
    ends = Progressive.unpack(data).ends
    for words, size in (((), len(data)), (("--preview",), preview_size(data)), (("--bytes", ends[1] + 3), ends[1])):
        told_ = run("decode", file, out, "--model", base, *words)
        assert f"of {len(ends) - 1} units" in told_
        assert (np.asarray(Image.open(out)) == codec.decode(data[:size])).all()
    assert (open_decoder(data[: ends[2]], str(base)).decode(data[: ends[2]]) == codec.decode(data[: ends[2]])).all()
    with pytest.raises(UsageError, match="two ways"):
        run("decode", file, out, "--model", base, "--preview", "--bytes", 900)
    with pytest.raises(BitstreamError, match="cut in its head"):
        run("decode", file, out, "--model", base, "--bytes", 20)
    run("encode", source, file, "--model", base)
    with pytest.raises(UsageError, match="no progressive file"):
        run("decode", file, out, "--model", base, "--preview")
