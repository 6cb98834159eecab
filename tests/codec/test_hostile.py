"""Hostile bytes: cut, altered, lengthened, of another model, of absurd sizes. Refused with one line, nothing else."""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_dist.codec.heads import LARGEST_AREA
from lic_dist.codec.rans import BitstreamError
from tests import fuzz_bitstream as fuzz

EVERYTHING = fuzz.EVERYTHING


def test_seeds_decode() -> None:
    assert all(fuzz.one_input(seed) is not None for seed in fuzz.seeds())


@pytest.mark.slow
def test_mutations_are_refused_or_decode_to_what_the_header_claims() -> None:
    generator = random.Random(0)
    decoded = sum(fuzz.one_input(fuzz.mutated(generator)) is not None for _ in range(20_000))
    assert 100 < decoded < 15_000  # both ends are reached


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([0, fuzz.CHECKS, EVERYTHING]), st.integers(0, 4))
def test_noise_is_refused_or_decodes(noise: bytes, mends: int, quantizer: int) -> None:
    fuzz.one_input(bytes([mends, quantizer]) + b"LIC\2" + noise)


@pytest.mark.parametrize("side", [(16384, 16384), (65535, 4096), (1, 65535)])
def test_absurd_sizes_take_no_more_memory_than_they_claim(side: tuple[int, int]) -> None:
    """A hundred bytes that claim the largest picture: the integer planes of one, and no second try."""
    data = bytearray(fuzz.encode(0, 2, 64, 64))
    data[5:9] = side[0].to_bytes(2, "little") + side[1].to_bytes(2, "little")
    steps = -(-side[0] // 64) * -(-side[1] // 64)
    assert side[0] * side[1] <= LARGEST_AREA
    tracemalloc.start()
    try:
        assert fuzz.one_input(bytes([EVERYTHING, 2]) + bytes(data)) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * (fuzz.N * steps + fuzz.M * 16 * steps) + (1 << 20)


def test_sizes_beyond_the_format_are_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(fuzz.encode(0, 2, 64, 64))
    data[5:9] = b"\xff" * 4
    monkeypatch.setattr(fuzz.rans, "decode", lambda *_: pytest.fail("decoded"))
    assert fuzz.one_input(bytes([EVERYTHING, 2]) + bytes(data)) is None


def test_another_model_is_refused() -> None:
    data = bytearray(fuzz.encode(0, 2, 64, 64))
    data[9] ^= 1
    with pytest.raises(BitstreamError):
        fuzz.decode(bytes(data), 2, False)
    assert fuzz.one_input(bytes([fuzz.CHECKS, 2]) + bytes(data)) is None
    assert fuzz.one_input(bytes([fuzz.CHECKS | fuzz.IDENTITIES, 2]) + bytes(data)) is not None


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed")
def test_the_fuzzer_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz_bitstream", str(tmp_path / "corpus"), "-runs=5000", "-timeout=10"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True)
