"""The picture of trainings: which folders it takes, what it says, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from lic_dist.errors import LicError, UsageError
from lic_dist.training.log import Log
from lic_dist.training.picture import learning_curves


def logged(folder: Path, *values: float) -> Path:
    log = Log(folder, 0)
    for step, L in enumerate(values, 1):
        log.write(100 * step, lr=0.1, loss=L, held_out_L=L, held_out_bpp=L / 4, held_out_psnr=40 - L)
    return folder


@pytest.mark.slow
def test_each_training_is_a_curve_of_its_folders_name(tmp_path: Path) -> None:
    one, two = logged(tmp_path / "a" / "slow", 9.0, 3.0), logged(tmp_path / "b" / "fast", 8.0, 2.0, 1.0)
    lines = learning_curves([one, two], tmp_path / "new" / "curves.svg")
    assert lines == [
        "slow: step 200, held-out L 3.0000, 0.7500 bpp, 37.00 dB",
        "fast: step 300, held-out L 1.0000, 0.2500 bpp, 39.00 dB",
    ]
    drawn = (tmp_path / "new" / "curves.svg").read_text()
    assert all(text in drawn for text in ("slow", "fast", "L of held-out crops", "PSNR [dB]", "bit per pixel"))
    same = learning_curves([one, logged(tmp_path / "b" / "slow", 5.0)], tmp_path / "curves.png")
    assert [line.split(":")[0] for line in same] == [str(one), str(tmp_path / "b" / "slow")]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_folders_without_judged_steps_and_other_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(LicError, match=r"log\.jsonl is missing or empty"):
        learning_curves([tmp_path], tmp_path / "curves.png")
    Log(tmp_path / "unjudged", 0).write(10, loss=1.0)
    with pytest.raises(LicError, match="no judged steps yet"):
        learning_curves([tmp_path / "unjudged"], tmp_path / "curves.png")
    (tmp_path / "log.jsonl").write_text("{no json}\n")
    with pytest.raises(LicError, match="is no log of a training"):
        learning_curves([tmp_path], tmp_path / "curves.png")
    with pytest.raises(UsageError, match=r"a picture is a \.png or a \.svg"):
        learning_curves([logged(tmp_path / "a", 1.0)], tmp_path / "curves.pdf")
