"""The names that `import lic_dist` offers, and the examples that use them."""

from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import lic_dist
from lic_dist.app.cli import app
from lic_dist.errors import LicError
from lic_dist.evaluation.results import read_points, write_points
from tests import forked
from tests.conftest import picture
from tests.points import measured, of_arm
from tests.stores import FIXED

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
    assert len(lengths) == 9 and max(lengths.values()) < 60, lengths


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


@pytest.fixture
def own(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the example's codec, trained for some steps, and its experiment beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    named = {"architecture": "own_architecture:Linear", "options": {"slope": 0.1}}
    sizes = {"N": 4, "M": 16, "lmbda": 0.05, "steps": 80, "batch": 4, "crop": 64, "lr": 2e-2}
    document = {
        "train": {**named, **sizes, "out": str(tmp_path / "base")},
        "model": {"checkpoint": str(tmp_path / "base"), **named},
        "images": {"path": str(photos), "crop": 64, "variations": 3, "held_out": "valid"},
        "quantizer": {"name": "tcq", "states": 8, "pilot": 8, "calibration": 4, **FIXED},
        "cache": {"path": str(tmp_path / "a.zarr"), "shard": 8, "batch": 4},
        "engine": {"name": "local"},
        "finetune": {"recipe": "decoder+hyper", "steps": 4, "batch": 4, "out": str(tmp_path / "tuned")},
        "evaluate": {
            "images": str(photos / "valid"),
            "checkpoints": [str(tmp_path / "base"), str(tmp_path / "tuned")],
            "quantizers": ["sq", "tcq8"],
            "out": str(tmp_path / "e.json"),
        },
    }
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(document))
    lic_dist_run("train", tmp_path / "e.yaml")
    return tmp_path / "e.yaml"


def lic_dist_run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.slow
def test_an_architecture_of_ones_own_goes_through_the_whole_job(own: Path, tmp_path: Path) -> None:
    lic_dist_run("cache", "build", own)
    store = lic_dist.LatentCache.open(str(tmp_path / "a.zarr"))
    assert store.array("latents/y").shape[1:] == (16, 8, 8) and store.array("latents/z").shape[1:] == (4, 2, 2)
    assert store.identity["model"]["options"] == {"slope": 0.1}
    lic_dist_run("finetune", own)
    lic_dist_run("evaluate", own)
    points = read_points(tmp_path / "e.json")
    assert len(points) == 4 and all(len(point.images) == 2 for point in points)
    named = ("--architecture", "own_architecture:Linear")
    for options in ((), ("--quantizer", "sq", "--deterministic")):
        Image.fromarray(picture(9, 75, 130)).save(tmp_path / "a.png")
        tuned = ("--model", str(tmp_path / "tuned"), *named)
        lic_dist_run("encode", tmp_path / "a.png", tmp_path / "a.lic", *tuned, *options)
        here = lic_dist.open_codec(str(tmp_path / "tuned"), "sq" if options else "tcq8", named[1])
        done = forked.run("decode", tmp_path / "a.lic", tmp_path / "b.png", *tuned, folder=EXAMPLES)
        assert done.returncode == 0, done.stderr  # of a process that knows no more
        decoded = np.asarray(Image.open(tmp_path / "b.png"))
        apart = decoded.astype(int) - here.decode((tmp_path / "a.lic").read_bytes())
        assert np.abs(apart).max() <= 1 and (apart != 0).mean() < 1e-3  # a fork may get other kernels: the last bits
    said = lic_dist_run("models", "describe", tmp_path / "tuned", *named)
    assert "own_architecture:Linear, told by the file" in said and "N 4, M 16, slope 0.1, lambda 0.05" in said
    assert "y 8, z 32" in said and "decoder: 3,264 parameters" in said and "quantizers: sq, tcq8" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["shrinkage_activation:Shrinkage", "coupling_transform:Coupling", "local_attention:Attentive"]
)
def test_an_option_as_an_example_is_cached_retrained_and_decoded_to_the_same_k(
    name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sizes = {"N": 4, "M": 16, "lmbda": 0.05, "steps": 4, "batch": 2, "crop": 64, "initial_crops": 16}
    document = {
        "train": {"architecture": name, **sizes, "relaxation": "mixed", "out": str(tmp_path / "base")},
        "model": {"checkpoint": str(tmp_path / "base"), "architecture": name},
        "images": {"path": str(photos), "crop": 64, "variations": 1, "held_out": "valid"},
        "quantizer": {"name": "tcq", "states": 8, "pilot": 4, "calibration": 2, **FIXED},
        "cache": {"path": str(tmp_path / "a.zarr"), "shard": 4, "batch": 4},
        "engine": {"name": "local"},
        "finetune": {"recipe": "decoder", "steps": 2, "batch": 2, "out": str(tmp_path / "tuned")},
    }
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(document))
    lic_dist_run("run", tmp_path / "e.yaml")
    store = lic_dist.LatentCache.open(str(tmp_path / "a.zarr"))
    assert store.array("latents/y").shape == (8, 16, 4, 4)
    codec = lic_dist.open_codec(str(tmp_path / "tuned"), "tcq8", name)
    encoded = codec.encode(picture(9, 75, 130))
    decoded = codec.decode_latents(encoded.data)
    assert np.array_equal(decoded.k, encoded.k) and encoded.k.any()
    assert np.array_equal(codec.picture(decoded), codec.picture(encoded))


def test_shrinkage_takes_its_threshold_off(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink = runpy.run_path(str(EXAMPLES / "shrinkage_activation.py"))["SoftThreshold"](2, 0.5)
    shrink.threshold.data[1] = -2  # its size counts
    x = torch.tensor([[-3.0, -0.25, 0, 0.5, 1.5], [-3, -0.25, 0, 0.5, 1.5]]).reshape(1, 2, 1, 5)
    assert shrink(x).flatten().tolist() == [-2.5, 0, 0, 0, 1, -1, 0, 0, 0, 0]


@torch.no_grad()
def test_couplings_are_taken_back_by_the_same_networks() -> None:
    found = runpy.run_path(str(EXAMPLES / "coupling_transform.py"))
    torch.manual_seed(0)
    model, x = found["CouplingCodec"](4, 768), torch.rand(16, 3, 64, 64)  # as many channels as pixels
    found["Coupling"](model).start(x, 0.013)
    straight = model.g_a(x)
    copied = copy.deepcopy(model)
    for layer in (one for one in model.modules() if type(one) is found["Couple"]):
        for net in (layer.first, layer.second):
            torch.nn.init.normal_(net[3].weight, std=0.1)
    assert float((model.g_a(x) - straight).std()) > 0.1 * float(straight.std())
    assert float((model.g_s(model.g_a(x)) - x).abs().max()) < 1e-4
    assert float((copied.g_s(straight) - x).abs().max()) < 1e-4  # by networks of its own
    assert not [name for name, _ in model.g_s.named_parameters() if "first" in name or "second" in name]


def test_attention_stays_within_its_window() -> None:
    found = runpy.run_path(str(EXAMPLES / "local_attention.py"))
    torch.manual_seed(0)
    attention, x = found["WindowAttention"](8, 4, batch_first=True), torch.rand(1, 8, 8, 12)
    other = x.clone()
    other[..., 5, 6] += 1
    changed = (attention(x) != attention(other)).any(1)[0]
    assert changed[4:, 4:8].all() and int(changed.sum()) == 16


@pytest.mark.slow
def test_a_file_that_names_a_class_does_not_import_it(own: Path, tmp_path: Path) -> None:
    with pytest.raises(LicError, match="own_architecture:Linear, which is not imported because a file names it"):
        lic_dist.load_checkpoint(str(tmp_path / "base"))
    assert lic_dist.load_checkpoint(str(tmp_path / "base"), "own_architecture:Linear").codec.name == "linear"


def test_curves_are_compared(run: Run, tmp_path: Path) -> None:
    write_points(tmp_path / "a.json", "a", of_arm([*measured("sq"), *measured("tcq8", 0.9)], "base"))
    (line,) = run("compare.py", "base sq", tmp_path / "a.json")
    assert line.startswith("base tcq8: BD-rate -21.55 % against base sq; 0.157 bpp") and line.count(" dB") == 5
    write_points(tmp_path / "b.json", "b", of_arm([*measured("sq", 1, 2), *measured("tcq8", 0.9, 2)], "base"))
    (line,) = run("compare.py", "base sq", tmp_path / "b.json")
    assert line.startswith("base tcq8: no BD-rate (")
