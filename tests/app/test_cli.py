"""The commands as a user types them: one clear line and the right exit code for each mistake."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lic_dist import __version__
from lic_dist.building.records import analytic_record
from lic_dist.models import checkpoint
from lic_dist.quantization.record import QuantizerRecord
from tests.conftest import picture
from tests.forked import python

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "zarr", "numpy", "compressai", "numba", "pydantic", "altair", "pandas", "pyarrow")


def lic_dist(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one command in this process, as the console script would."""
    from lic_dist.app.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    command = ["lic-dist", *map(str, arguments)]
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def write(path: Path, **sections: object) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert done.returncode == code, done.stderr
    assert lines[0].startswith("error:") and len(lines) <= 2 and "Traceback" not in done.stderr
    assert all(word in " ".join(lines) for word in words), lines


def test_help_and_version_import_nothing_heavy() -> None:
    probe = (
        "import sys, atexit; sys.argv = ['lic-dist', '--help']\n"
        f"atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules]))\n"
        "from lic_dist.app.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert lic_dist("--version").stdout == f"lic-dist {__version__}\n"


def test_config_show_prints_a_file_that_reads_back(tmp_path: Path) -> None:
    train = {"N": 16, "out": "runs/{name}-{train.lmbda}"}
    file = write(tmp_path / "a.yaml", name="x", train=train, sweep={"train.lmbda": [0.01, 0.02]})
    shown = lic_dist("config", "show", file, "--set", "train.lr=1e-3")
    documents = list(yaml.safe_load_all(shown.stdout))
    assert [one["train"]["out"] for one in documents] == ["runs/x-0.01", "runs/x-0.02"]
    assert documents[0]["train"]["lr"] == 1e-3
    refused(lic_dist("config", "show", file, "--set", "train.out=runs/{train.lambda}"), 2, "{train.lambda}")
    refused(lic_dist("config", "show", file, "--set", "train.out=runs/x"), 2, "runs/x for both", "{train.lmbda}")


def test_an_unknown_key_a_missing_file_and_a_missing_section(tmp_path: Path) -> None:
    refused(lic_dist("config", "show", write(tmp_path / "a.yaml", trian={})), 2, "trian", "train")
    refused(lic_dist("train", tmp_path / "none.yaml"), 2, "none.yaml")
    refused(lic_dist("finetune", write(tmp_path / "b.yaml", name="x")), 2, "finetune")


def test_an_unknown_architecture_a_missing_and_an_empty_folder(base: Path, photos: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", train={"architecture": "vgg", "out": str(tmp_path)}, images={"path": str(photos)})
    refused(lic_dist("train", file), 2, "vgg", "mbt2018-mean")
    sections = {
        "model": {"checkpoint": str(base)},
        "quantizer": {},
        "cache": {"path": str(tmp_path / "x.zarr")},
        "engine": {"name": "local"},
    }
    (tmp_path / "empty").mkdir()
    for folder, words in (("none", "no such folder"), ("empty", "no photos in")):
        file = write(tmp_path / f"{folder}.yaml", images={"path": str(tmp_path / folder)}, **sections)
        refused(lic_dist("cache", "build", file), 1, words)


def test_what_no_room_foresaw_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lic_dist.models.checkpoint.zoo", lambda: 1 / 0)
    refused(lic_dist("models"), 1, "ZeroDivisionError")
    refused(lic_dist("config", "show", write(tmp_path / "a.yaml", name="x"), "--set", "images.path=[a"), 2, "YAML")


@pytest.mark.slow
def test_a_cache_of_another_encoder_is_refused_with_the_field(base: Path, photos: Path, tmp_path: Path) -> None:
    sections = {
        "images": {"path": str(photos), "crop": 64, "held_out": "valid"},
        "quantizer": {"step": 0.5, "lambda_scale": 0.1, "group": "a"},
        "cache": {"path": str(tmp_path / "x.zarr"), "shard": 4},
        "engine": {"name": "local"},
        "finetune": {"out": str(tmp_path / "out")},
    }
    other = checkpoint.load(str(base))
    with torch.no_grad():
        other.model.g_a[0].bias += 0.1
    checkpoint.save(other, tmp_path / "other.pth.tar")
    first = write(tmp_path / "a.yaml", model={"checkpoint": str(base)}, **sections)
    second = write(tmp_path / "b.yaml", model={"checkpoint": str(tmp_path / "other.pth.tar")}, **sections)
    built = lic_dist("cache", "build", first)
    assert built.returncode == 0 and "8 samples, 2 of 2 shards built now" in built.stdout, built.stderr
    assert "whole" in lic_dist("cache", "verify", tmp_path / "x.zarr").stdout
    refused(lic_dist("finetune", second), 1, "model.encoder_sha256")
    refused(lic_dist("cache", "build", second), 1, "model.encoder_sha256")
    damaged = tmp_path / "x.zarr" / "latents" / "z" / "c" / "0" / "0" / "0" / "0"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    torn = lic_dist("cache", "verify", tmp_path / "x.zarr")
    assert "shard 0: latents/z: torn" in torn.stdout
    refused(torn, 1, "1 fault in")
    bits = next((tmp_path / "x.zarr" / "quantized" / "a" / "bits" / "c").iterdir())
    bits.write_bytes(bits.read_bytes()[:-1] + b"?")  # of the right length: only its checksum tells
    refused(lic_dist("cache", "verify", tmp_path / "x.zarr", "--repair"), 2, "--repair needs")
    repaired = lic_dist("cache", "verify", first, "--repair")
    assert repaired.returncode == 0 and "2 shards written again" in repaired.stdout, repaired
    assert "whole" in lic_dist("cache", "verify", tmp_path / "x.zarr").stdout


def test_a_picture_goes_there_and_back(base: Path, photos: Path, tmp_path: Path) -> None:
    file, shown = tmp_path / "a.lic", tmp_path / "a.png"
    assert lic_dist("encode", photos / "train" / "0.png", file, "--model", base).returncode == 0
    assert lic_dist("decode", file, shown, "--model", base).returncode == 0 and shown.is_file()
    refused(lic_dist("decode", file, shown, "--model", base, "--quantizer", "none"), 2, "none", "sq")


def test_a_grey_picture_stays_grey(base: Path, tmp_path: Path) -> None:
    eight = picture(1, 40, 50)[..., 0]
    Image.fromarray(eight).save(tmp_path / "8.png")
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "16.png")
    for name in ("8", "16"):
        encoded = lic_dist("encode", tmp_path / f"{name}.png", tmp_path / f"{name}.lic", "--model", base)
        assert encoded.returncode == 0 and "bpp" in encoded.stdout, encoded.stderr
    assert (tmp_path / "8.lic").read_bytes() == (tmp_path / "16.lic").read_bytes()
    for suffix, kind in (("png", "PNG"), ("TIFF", "TIFF"), ("bmp", "BMP")):
        shown = tmp_path / f"a.{suffix}"
        assert lic_dist("decode", tmp_path / "8.lic", shown, "--model", base).returncode == 0
        with Image.open(shown) as image:
            assert (image.mode, image.size, image.format) == ("L", (50, 40), kind)


@pytest.mark.slow
def test_outputs_are_refused_before_the_work_and_written_whole(base: Path, photos: Path, tmp_path: Path) -> None:
    photo, file, shown = photos / "train" / "0.png", tmp_path / "a.lic", tmp_path / "a.png"
    assert lic_dist("encode", photo, file, "--model", base).returncode == 0
    work = mock.patch("lic_dist.models.checkpoint.load", side_effect=AssertionError("the work has begun"))
    with work:
        for name in ("a.jpg", "a.webp", "a"):
            refused(lic_dist("decode", file, tmp_path / name, "--model", base), 2, "lossless", "a.png")
        (tmp_path / "folder.png").mkdir()
        refused(lic_dist("decode", file, tmp_path / "folder.png", "--model", base), 1, "not a plain file")
        refused(lic_dist("decode", file, tmp_path / "no" / "a.png", "--model", base), 1, "cannot write", "No such file")
        refused(
            lic_dist("encode", photo, tmp_path / "no" / "a.lic", "--model", base), 1, "cannot write", "No such file"
        )
        refused(lic_dist("encode", photo, "/dev/null", "--model", base), 1, "not a plain file")
        refused(lic_dist("encode", photo, photo / "a.lic", "--model", base), 1, "cannot write", "Not a directory")
        refused(lic_dist("encode", photo, photo, "--model", base), 2, "would overwrite")
        refused(lic_dist("decode", "/dev/zero", shown, "--model", base), 1, "not a plain file")
        refused(lic_dist("decode", file, ".", "--model", base), 2, "picture.png")
        refused(lic_dist("decode", tmp_path / "none.lic", shown, "--model", base), 1, "cannot read", "none.lic")
    (tmp_path / "link.lic").symlink_to(file)
    assert lic_dist("encode", photo, tmp_path / "link.lic", "--model", base).returncode == 0
    assert (tmp_path / "link.lic").is_symlink()
    (tmp_path / "link.lic").unlink()
    shown.write_bytes(b"kept")
    file.write_bytes(file.read_bytes()[:-4])
    refused(lic_dist("decode", file, shown, "--model", base), 1, "cut or altered")
    assert shown.read_bytes() == b"kept"
    with mock.patch("PIL.Image.Image.save", side_effect=OSError(28, "No space left on device")):
        assert lic_dist("encode", photo, file, "--model", base).returncode == 0
        refused(lic_dist("decode", file, shown, "--model", base), 1, "cannot write", "No space left")
    assert shown.read_bytes() == b"kept"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.lic", "a.png", "folder.png"]


def test_ci_runs_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(?:git clone \S+ lic_dist && cd lic_dist && )?(python3\.11 .*)$", readme, re.MULTILINE)
    assert len(commands) == 2 and commands[1] in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["build_cache", "evaluate", "finetune"])
def test_job_scripts_run_their_command(script: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", name="x")
    code = f"import runpy; runpy.run_path({str(ROOT / 'jobs' / f'{script}.py')!r}, run_name='__main__')"
    refused(python(code, file), 2, "no section")


def test_every_failure_mode_names_a_test_that_is_there() -> None:
    rows = [row for row in (ROOT / "docs/failure-modes.md").read_text().splitlines() if row.startswith("| ")]
    named = 0
    for row in rows:
        for file, words in re.findall(r"`(test_\w+\.py)`([^`|]*)", row):
            (path,) = (ROOT / "tests").rglob(file)
            text = path.read_text()
            for word in filter(None, (word.strip() for word in words.split(","))):
                assert re.search(rf"(?m)def test_\w*{word}|^{word} =", text), (file, word)
            named += 1
    assert named > 30


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lic_dist.models.checkpoint.zoo", interrupt)
    done = lic_dist("models")
    assert done.returncode == 130 and done.stderr == "stopped; the same command goes on where it is\n"


@pytest.mark.slow
def test_a_checkpoint_is_exported_with_its_quantizers_in_half_the_size(base: Path, tmp_path: Path) -> None:
    half, whole, record = tmp_path / "half.pth.tar", tmp_path / "whole.pth.tar", tmp_path / "r.json"
    assert lic_dist("export", base, half, "--half").returncode == 0
    loaded = checkpoint.load(str(half))
    analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.ones(12)).save(record)
    shown = lic_dist("export", half, whole, "--half", "--quantizer", f"tcq8={record}")
    assert shown.returncode == 0 and "sq, tcq8" in shown.stdout
    made = checkpoint.load(str(whole))
    assert checkpoint.digest(made.model.state_dict()) == checkpoint.digest(loaded.model.state_dict())
    assert QuantizerRecord.from_json(made.quantizers["tcq8"]).digest == QuantizerRecord.load(record).digest
    assert half.stat().st_size < base.stat().st_size  # most of a tiny model are its tables
    for source, wrong in ((base, f"a={record}"), (half, str(record)), (half, f"sq={record}"), (half, "a=nowhere")):
        assert lic_dist("export", source, whole, "--half", "--quantizer", wrong).returncode == 2
