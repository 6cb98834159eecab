"""The main job on a model in a public repository's style, by the example's adapter: windows of 256 pixels, LRP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from lic_dist import LatentCache, load_checkpoint, open_codec
from lic_dist.app.cli import app
from lic_dist.errors import UsageError
from lic_dist.evaluation.results import read_points
from tests.codec.test_slices import FOLDERS, FOREIGN
from tests.conftest import picture
from tests.forked import run
from tests.stores import FIXED


def lic_dist_run(*arguments: object) -> None:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, (done.output, done.exception)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the experiment with changes to its sections, and returns its path; its photos lie beside it."""
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)
    for part, seeds in (("train", range(3)), ("valid", range(3, 5))):
        (tmp_path / "photos" / part).mkdir(parents=True)
        for seed in seeds:
            Image.fromarray(picture(seed, 256, 256)).save(tmp_path / "photos" / part / f"{seed}.png")

    def write(**changes: dict[str, Any]) -> Path:
        named = {"architecture": FOREIGN, "options": {"num_slices": 4}}
        sizes = {"N": 8, "M": 16, "lmbda": 0.05, "steps": 3, "batch": 2, "crop": 256}
        document: dict[str, Any] = {
            "train": {**named, **sizes, "relaxation": "mixed", "out": str(tmp_path / "base")},
            "model": {"checkpoint": str(tmp_path / "base"), **named},
            "images": {"path": str(tmp_path / "photos"), "crop": 256, "held_out": "valid"},
            "quantizer": {"name": "tcq", "states": 8, "pilot": 3, "calibration": 2, **FIXED},
            "cache": {"path": str(tmp_path / "a.zarr"), "shard": 4, "batch": 2},
            "engine": {"name": "local"},
            "finetune": {
                "recipe": "decoder+hyper",
                "rounds": 2,
                "steps": 2,
                "batch": 2,
                "out": str(tmp_path / "tuned"),
            },
            "evaluate": {
                "images": str(tmp_path / "photos" / "valid"),
                "checkpoints": {str(tmp_path / "base"): ["sq"], str(tmp_path / "tuned"): ["carried"]},
                "out": str(tmp_path / "e.json"),
            },
        }
        for section, values in changes.items():
            document[section] |= values
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(document))
        return tmp_path / "e.yaml"

    return write


def test_crops_that_windows_do_not_fit_are_refused(written: Any) -> None:
    done = CliRunner().invoke(app, ["train", str(written(train={"crop": 128}))])
    assert isinstance(done.exception, UsageError)
    assert "train.crop 128 is no multiple of 256, which window-slices needs" in str(done.exception)


@pytest.mark.slow
def test_a_foreign_model_goes_through_the_whole_job(written: Any, tmp_path: Path) -> None:
    lic_dist_run("train", written())
    lic_dist_run("cache", "build", written())
    lic_dist_run("finetune", written())
    lic_dist_run("evaluate", written())
    rdoq = written(
        quantizer={"name": "rdoq", "group": "rdoq"},
        finetune={"recipe": "decoder", "rounds": 1, "out": str(tmp_path / "d")},
    )
    lic_dist_run("cache", "requantize", rdoq)
    lic_dist_run("finetune", rdoq)
    groups = LatentCache.open(str(tmp_path / "a.zarr")).groups
    assert groups[:2] == ("rdoq", "tcq8") and [one.rpartition("-")[0] for one in groups[2:]] == ["tcq8-round2"]
    points = read_points(tmp_path / "e.json")
    assert {(one.arm, one.quantizer) for one in points} == {("base", "sq"), ("decoder+hyper round 2", "tcq8")}
    assert all(row.bpp < 1.02 * row.estimated_bpp + 0.1 for one in points for row in one.images)
    Image.fromarray(picture(9, 75, 130)).save(tmp_path / "a.png")
    for tuned, quantizer in (("tuned", "tcq8"), ("d", "rdoq")):
        model = ("--model", str(tmp_path / tuned), "--architecture", FOREIGN)
        lic_dist_run("encode", tmp_path / "a.png", tmp_path / "a.lic", *model, "--quantizer", quantizer)
        here = open_codec(str(tmp_path / tuned), quantizer, FOREIGN)
        decoded = run("decode", tmp_path / "a.lic", tmp_path / "b.png", *model)  # in a process that has seen no model
        assert decoded.returncode == 0, decoded.stderr
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / "b.png")), here.decode((tmp_path / "a.lic").read_bytes())
        )
    first, last = (load_checkpoint(str(tmp_path / one), FOREIGN).model.state_dict() for one in ("base", "d"))
    moved = {name.split(".")[0] for name, value in first.items() if not value.equal(last[name])}
    assert moved == {"g_s"}
