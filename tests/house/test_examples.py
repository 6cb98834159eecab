"""The names that `import lic_dist` offers, and the examples that use them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import lic_dist
from lic_dist.evaluation.results import write_points
from tests.points import measured, of_arm

EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[..., list[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example's `main`; the lines that it prints."""

    def of(name: str, *arguments: object) -> list[str]:
        runpy.run_path(str(EXAMPLES / name))["main"](*map(str, arguments))
        return capsys.readouterr().out.splitlines()

    return of


def test_every_name_is_there_and_documented_and_no_other() -> None:
    for name in lic_dist.__all__:
        value = getattr(lic_dist, name)
        assert isinstance(value, str) or value.__doc__, name
    assert dir(lic_dist) == sorted(lic_dist.__all__)
    with pytest.raises(AttributeError, match="'lic_dist' has no attribute 'open_codecs'"):
        lic_dist.open_codecs  # noqa: B018


def test_names_are_loaded_when_they_are_used() -> None:
    code = "import sys, lic_dist; lic_dist.LicError; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 4 and max(lengths.values()) < 60, lengths


def test_a_picture_is_coded(run: Run, tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "a.png")
    (line,) = run("code_a_picture.py", tmp_path / "a.png")
    assert line.endswith(" dB") and " bytes, 0." in line


def test_latents_of_ones_own_cost_less_with_tcq(run: Run) -> None:
    (sq, sq_bits, sq_error), (tcq, tcq_bits, tcq_error) = (
        (line.split(":")[0], float(line.split()[1]), float(line.split()[-1])) for line in run("quantize_latents.py")
    )
    assert (sq, tcq) == ("sq", "tcq") and tcq_bits < sq_bits and tcq_error < 1.2 * sq_error


def test_a_cache_is_read_in_a_training_loop(run: Run, made: Path, base: Path) -> None:
    lines = run("train_from_cache.py", made, "tcq8", base, 3)
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1", "step 2"]
    assert all(float(line.split()[2]) > 10 for line in lines)


def test_curves_are_compared(run: Run, tmp_path: Path) -> None:
    write_points(tmp_path / "a.json", "a", of_arm([*measured("sq"), *measured("tcq8", 0.9)], "base"))
    (line,) = run("compare.py", "base sq", tmp_path / "a.json")
    assert line.startswith("base tcq8: BD-rate -21.55 % against base sq; 0.157 bpp") and line.count(" dB") == 5
    write_points(tmp_path / "b.json", "b", of_arm([*measured("sq", 1, 2), *measured("tcq8", 0.9, 2)], "base"))
    (line,) = run("compare.py", "base sq", tmp_path / "b.json")
    assert line.startswith("base tcq8: no BD-rate (")
