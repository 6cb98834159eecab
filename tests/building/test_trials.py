"""A calibration that is stopped: its trials stay, the next run goes on with them, and `inspect` says how far it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lic_dist import config
from lic_dist.app.cli import app
from lic_dist.building import calibrate as calibration
from lic_dist.building.build import build, requantize
from lic_dist.building.latents import encode
from lic_dist.cache.folder import Folder
from lic_dist.cache.inspect import describe, inspect
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.trials import Trials
from lic_dist.models import checkpoint as checkpoints
from lic_dist.training.finetune import finetune
from tests.conftest import picture
from tests.stores import experiment, no_photos

SEARCHED = {"adapt_rounds": 1}
SHIFTED = {"step": 0.7, "lambda_scale": 0.1, "adapt_rounds": 1}  # the shift alone is searched
Dying = Callable[[int], list[int]]


@pytest.fixture()
def dying(monkeypatch: pytest.MonkeyPatch) -> Dying:
    """Makes calibration be interrupted at its trial of a number; the list that is returned counts the trials."""
    measure = calibration.measure

    def at(number: int) -> list[int]:
        made: list[int] = []

        def counting(*arguments: object) -> object:
            made.append(len(made) + 1)
            if len(made) == number:
                raise KeyboardInterrupt
            return measure(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(calibration, "measure", counting)
        return made

    return at


@pytest.mark.slow
def test_a_build_killed_in_calibration_goes_on_to_the_same_record(
    base: Path, photos: Path, tmp_path: Path, dying: Dying
) -> None:
    whole, cut = (experiment(base, photos, tmp_path / name, quantizer=SHIFTED) for name in ("a.zarr", "b.zarr"))
    trials = dying(0)
    build(whole)
    record, needed = LatentCache.open(tmp_path / "a.zarr").record_json("tcq8"), len(trials)
    assert not list(tmp_path.glob("*.trials"))
    made = 0
    for number in (3, 2):  # the first two, one more, and the rest
        trials = dying(number)
        with pytest.raises(KeyboardInterrupt):
            build(cut)
        made += len(trials) - 1
        assert (tmp_path / "b.tcq8.trials").exists()
    trials = dying(0)
    build(cut)
    assert made == 3 and made + len(trials) == needed
    assert LatentCache.open(tmp_path / "b.zarr").record_json("tcq8") == record
    assert not list(tmp_path.glob("*.trials"))


@pytest.mark.slow
def test_trials_of_parts_of_the_crops_are_kept_as_such(
    tmp_path: Path, dying: Dying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the parts, in the trials of all crops: each trial is made once, and the record is the same."""
    monkeypatch.setattr(calibration, "LEAST_PART", 2)
    loaded = checkpoints.load("base-small")
    pixels = np.stack([picture(seed, 64, 64).transpose(2, 0, 1) for seed in range(12)])
    samples = encode(loaded.model, pixels, 4)[0]
    section = config.Quantizer.model_validate({"name": "tcq", "step": 0.7, "lambda_scale": 0.2, "adapt_rounds": 1})
    trials_file = Trials(Folder(tmp_path), "one.trials")

    def record() -> str:
        halves = samples.part(slice(4)), samples.part(slice(4, 12))
        return calibration.calibrate(loaded, section, *halves, 4, trials_file=trials_file).to_json()

    made = dying(0)
    whole = record()
    rows = trials_file.storage.get_json(trials_file.key)["trials"]
    assert [row["crops"] for row in rows[:3]] == [2] * 3 and rows[-1]["crops"] == 8 and len(made) > len(rows) > 5
    trials_file.delete()
    dying(len(rows))
    with pytest.raises(KeyboardInterrupt):
        record()
    assert trials_file.storage.get_json(trials_file.key)["trials"] == rows[:-1]
    left = dying(0)
    assert record() == whole and len(left) == len(made) - len(rows) + 1


@pytest.mark.slow
def test_trials_of_other_settings_or_another_model_count_for_nothing(
    base: Path, photos: Path, mine: Path, tmp_path: Path, dying: Dying
) -> None:
    loaded = checkpoints.load(str(base))
    loaded.model.g_s[0].bias.data += 1e-3  # type: ignore[index,union-attr,operator]
    checkpoints.save(loaded, tmp_path / "moved.pth.tar")
    first = no_photos(base, mine, shift="auto", group="new")
    others = (
        no_photos(base, mine, shift="auto", group="new", lambda_scale=0.2),
        no_photos(tmp_path / "moved.pth.tar", mine, shift="auto", group="new", lambda_scale=0.2),
    )
    for job in (first, *others):
        trials = dying(3)
        with pytest.raises(KeyboardInterrupt):
            requantize(job)
        assert len(trials) == 3  # the first two were not taken from the job before
    trials = dying(1)
    with pytest.raises(KeyboardInterrupt):
        requantize(others[-1])
    assert inspect(mine)["calibrating"]["new"]["trial"] == 3


@pytest.mark.slow
def test_a_finetuning_killed_in_calibration_goes_on_to_the_same_checkpoint(
    base: Path, photos: Path, made: Path, tmp_path: Path, dying: Dying
) -> None:
    def job(out: str) -> config.Experiment:
        section = config.Finetune(recipe="decoder", steps=2, batch=4, evaluate_every=2, out=tmp_path / out)
        again = {"step": 0.7, "lambda_scale": 0.1, "adapt_rounds": 3, "shift": "auto"}
        return experiment(base, photos, made, quantizer=again).model_copy(update={"finetune": section})

    dying(0)
    whole = checkpoints.read(finetune(job("whole")))
    trials = dying(4)
    with pytest.raises(KeyboardInterrupt):
        finetune(job("cut"))
    assert (tmp_path / "cut" / "calibration.trials").exists()
    trials = dying(0)
    cut = checkpoints.read(finetune(job("cut")))
    assert cut["quantizers"] == whole["quantizers"] and trials
    assert not (tmp_path / "cut" / "calibration.trials").exists()


@pytest.mark.slow
def test_inspect_says_at_which_trial_a_build_is(
    base: Path, photos: Path, mine: Path, tmp_path: Path, dying: Dying
) -> None:
    fresh = tmp_path / "b.zarr"
    dying(5)
    with pytest.raises(KeyboardInterrupt):
        build(experiment(base, photos, fresh, quantizer=SEARCHED))
    told = inspect(fresh)["calibrating"]["tcq8"]
    assert (told["trial"], told["expected"]) == (5, 11) and told["L"] > 0 and told["idle_seconds"] < 60
    said = CliRunner().invoke(app, ["cache", "inspect", str(fresh)]).output
    assert "no store yet" in said and "group tcq8: calibrating, trial 5 of 11, L " in said
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / "b.tcq8.trials", (an_hour_ago, an_hour_ago))
    assert describe(inspect(fresh))[-1].endswith("nothing written for 1:00:00")

    assert inspect(mine)["calibrating"] == {}  # nor what its neighbour does
    dying(1)
    with pytest.raises(KeyboardInterrupt):
        requantize(no_photos(base, mine, step="auto", group="tcq.4", states=4))
    lines = describe(inspect(mine))
    assert "group tcq.4: calibrating, trial 1 of 7" in lines and any("group tcq8: 3 of 3" in line for line in lines)
