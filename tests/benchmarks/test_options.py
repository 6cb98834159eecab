"""`bench options`: what it makes of figures that are known, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lic_dist import config
from lic_dist.app.cli import app
from lic_dist.benchmarks.options import changes, cpu_seconds


def run(factor: float) -> dict[str, object]:
    return {"pictures": {"test": {name: {"L": factor * L} for name, L in (("a", 1.0), ("b", 3.0))}}}


def test_changes_are_by_the_same_seeds_of_the_first_arm() -> None:
    arms = {
        "plain": {0: run(1), 1: run(2)},
        "better": {0: run(0.9), 1: run(1.9)},
        "once": {1: run(3)},
        "other": {2: run(1)},
    }
    found = changes(arms)
    assert found["better"]["test"]["mean"] == pytest.approx(-7.5) and found["better"]["test"]["seeds"] == 2
    assert found["better"]["test"]["spread"] == pytest.approx(5 / 2**0.5)  # of -10 and -5
    assert found["once"]["test"]["mean"] == pytest.approx(50) and "other" not in found


def test_cpu_seconds_of_a_job_that_went_on_are_those_of_all_processes(tmp_path: Path) -> None:
    rows = [{"step": step, "cpu_seconds": seconds} for step, seconds in ((2, 5.0), (4, 9.0), (6, 3.0), (8, 7.0))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cpu_seconds(config.Train(out=tmp_path)) == 16


@pytest.mark.slow
def test_the_command_tells_arms_of_a_file(photos: Path, tmp_path: Path) -> None:
    small = {"N": 4, "M": 6, "lmbda": 0.05, "batch": 2, "crop": 64, "evaluate_every": 2, "steps": 2}
    phases = [{"recipe": "all", "steps": 2, "lr": 1e-3}, {"recipe": "all-but-encoder", "steps": 1, "lr": 1e-3}]
    plain = {"out": f"{tmp_path}/plain-{{train.seed}}"}
    document = {
        "train": small,
        "images": {"path": str(photos), "held_out": "valid"},
        "sweep": {
            "train.seed": [0, 1],
            "train": [plain, {"out": f"{tmp_path}/phases-{{train.seed}}", "phases": phases}],
        },
        "fast": {"train.steps": 1},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(document))
    command = [
        "bench",
        "options",
        str(tmp_path / "a.yaml"),
        "--images",
        str(photos / "valid"),
        "--json",
        str(tmp_path / "a"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "a").read_text())
    assert {arm: sorted(seeds) for arm, seeds in found["arms"].items()} == {"plain": ["0", "1"], "phases": ["0", "1"]}
    assert found["arms"]["phases"]["0"]["steps"] == 3 and found["arms"]["plain"]["1"]["cpu_seconds"] > 0
    (pictures,) = found["arms"]["plain"]["0"]["pictures"].values()
    assert len(pictures) == 2
    assert all(row["L"] == pytest.approx(0.05 * row["mse"] + row["bpp"]) for row in pictures.values())
    (change,) = found["changes"]["phases"].values()
    assert change["seeds"] == 2 and change["low"] <= change["mean"] <= change["high"]
