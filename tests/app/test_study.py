"""A study: its units, each done once, in this process or in several, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lic_dist.app import study as studies
from lic_dist.app.study import study, units_of
from lic_dist.config.sweeps import documents
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.results import read_points
from tests.forked import run

TRANSFORM = Path(__file__).parents[2] / "configs/transform.yaml"
QUANTIZERS = [
    {"name": "sq", "group": "sq-adapted"},
    {"name": "tcq", "states": 4, "step": 0.7, "lambda_scale": 0.1, "group": "tcq4"},
]
RECIPES = [{"recipe": "decoder"}, {"recipe": "decoder+hyper", "rounds": 2}]


def write(folder: Path, base: Path, photos: Path, reported: bool = True, **first: Any) -> Path:
    """Two quantizers with two recipes on one model, and a document that evaluates and reports."""
    making: dict[str, Any] = {
        "name": "small",
        "model": {"checkpoint": str(base)},
        "images": {"path": str(photos), "crop": 64, "held_out": "valid"},
        "quantizer": {"pilot": 8, "calibration": 4},
        "cache": {"path": "runs/small.zarr", "shard": 4, "batch": 4},
        "engine": {"name": "local"},
        "finetune": {
            "steps": 4,
            "batch": 2,
            "evaluate_every": 2,
            "out": "runs/model-{finetune.recipe}-{quantizer.group}",
        },
        "sweep": {"finetune": RECIPES, "quantizer": QUANTIZERS},
    }
    measuring = {
        "name": "test",
        "engine": {"name": "local"},
        "evaluate": {
            "images": str(photos / "valid"),
            "checkpoints": {
                str(base): ["sq"],
                "runs/model-*/round-*": ["carried"],
                "runs/model-decoder-*": ["carried"],
            },
            "out": "runs/test.json",
        },
        **({"report": {"anchors": ["base sq"], "out": "runs/report"}} if reported else {}),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump_all([{**making, **first}, measuring], sort_keys=False))
    return path


def kept(folder: Path) -> dict[str, int]:
    """The files of the work itself, with their times."""
    places = [*folder.glob("small.zarr/**/*"), *folder.glob("model-*/**/*"), folder / "test.json"]
    return {str(one): one.stat().st_mtime_ns for one in places if one.is_file()}


def test_units_are_places_and_a_document_has_the_stages_of_its_sections(
    tmp_path: Path, base: Path, photos: Path
) -> None:
    one, two = documents(write(tmp_path, base, photos))
    assert [len(units_of(stage, one)) for stage in studies.STAGES] == [0, 1, 4, 0, 0]
    assert [len(units_of(stage, two)) for stage in studies.STAGES] == [0, 0, 0, 1, 1]
    assert [unit.output for unit in units_of("finetune", one)][:2] == [
        "runs/model-decoder-sq-adapted",
        "runs/model-decoder-tcq4",
    ]
    assert len(units_of("cache", one)[0].experiments) == 4


@pytest.mark.slow
def test_a_study_is_the_same_from_one_process_and_from_two_and_goes_on(
    tmp_path: Path, base: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, forked_workers: None
) -> None:
    found = {}
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        folder.mkdir()
        monkeypatch.chdir(folder)
        path = write(folder, base, photos, jobs == 2, sweep={"finetune": RECIPES, "quantizer": QUANTIZERS[1:]})
        if jobs == 2:
            done = run("run", path, "--jobs", 2, folder=folder)
            assert done.returncode == 0, done.stderr
            page = (folder / "runs/report/report.html").resolve()
            assert done.stdout.splitlines()[-1] == f"the report, to open in a browser: {page}"
            logs = sorted(one.name for one in (folder / "runs/logs").iterdir())
            assert "finetune-runs-model-decoder-tcq4.log" in logs and len(logs) == 2  # the one store is built here
        else:
            study(documents(path), 1, Path("runs/logs"))
        points = read_points(Path("runs/test.json"))
        found[jobs] = [(one.arm, one.quantizer, one.model, one.record, one.figures) for one in points]
        assert (folder / "runs/report/report.html").exists() == (jobs == 2)
        before = kept(folder / "runs")
        study(documents(path), jobs, Path("runs/logs"))
        after = kept(folder / "runs")
        changed = {Path(name).name for name in after if after[name] != before.get(name)}
        assert changed <= {"test.json", "rounds.json", "checkpoint.pth.tar"}, changed  # written again, as they were
    assert found[1] == found[2]
    assert {(arm, quantizer) for arm, quantizer, *_ in found[1]} == {
        ("base", "sq"),
        *((arm, "tcq4") for arm in ("decoder", "decoder+hyper", "decoder+hyper round 2")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_unit_that_fails_does_not_stop_its_stage_but_the_next(
    jobs: int,
    tmp_path: Path,
    base: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    forked_workers: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = {"finetune": [{"recipe": ["g_s.none"]}, RECIPES[0]], "quantizer": QUANTIZERS[1:]}
    path = write(tmp_path, base, photos, sweep=sweep)
    with pytest.raises(LicError, match="1 of 2 models failed, such as runs/model-g_s.none-tcq4"):
        study(documents(path), jobs, Path("runs/logs"))
    assert Path("runs/model-decoder-tcq4/checkpoint.pth.tar").exists()
    assert not Path("runs/test.json").exists()
    assert "failed: finetune runs/model-g_s.none-tcq4" in capfd.readouterr().err


def test_what_cannot_run_is_one_line(tmp_path: Path, base: Path, photos: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: x\n")
    with pytest.raises(UsageError, match="nothing to run"):
        study(documents(tmp_path / "a.yaml"), 1, tmp_path)
    path = write(tmp_path, base, photos)
    with pytest.raises(UsageError, match="processes of this machine"):
        study(documents(path, ["engine.name=ray"]), 2, tmp_path)


@pytest.mark.slow
def test_the_block_transforms_of_the_zoo_train_from_one_file(photos: Path, tmp_path: Path) -> None:
    """Every stage of the short form of configs/transform.yaml, on a slim model and small photos."""
    small = {"train.N": 4, "train.M": 16, "train.crop": 64, "images.path": photos, "images.held_out": "valid"}
    overrides = [f"{key}={value}" for key, value in {**small, "evaluate.images": photos / "valid"}.items()]
    options = [part for override in overrides for part in ("--set", override)]
    done = run("run", TRANSFORM, "--fast", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    points = read_points(tmp_path / "runs/transform/kodak.json")
    bpp = [point.figures.bpp for point in sorted(points, key=lambda point: point.lmbda)]
    assert len(bpp) == 2 and bpp[1] > 1.3 * bpp[0]  # each at the step of its own lambda
