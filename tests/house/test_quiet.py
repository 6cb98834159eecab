"""No warning of a library reaches the user, whatever the photos are called and hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import picture
from tests.stores import FIXED

COMMANDS = """
train E
cache plan E
cache adapt E
cache build E
cache requantize E --set quantizer.name=rdoq --set quantizer.group=rdoq
cache inspect E --plot cache.png
cache verify E
finetune E
finetune E --set finetune.out=streamed --set finetune.streams=2 --set finetune.latents=noise
evaluate E
evaluate E --generations 2 --set evaluate.out=generations.json
report evaluation.json --out report
encode photos/valid/a_$b^c$.png a.lic --model tuned
decode a.lic a.png --model tuned
encode photos/valid/a_$b^c$.png b.lic --model tuned --quantizer sq --deterministic
decode b.lic b.png --model tuned
"""
PROBE = """
import sys
from lic_dist.app.cli import app
for line in sys.argv[1].split("\\n"):
    print(f"ran: {line}", file=sys.stderr)
    try:
        app(line.split(" "))
    except SystemExit as stop:
        assert not stop.code, line
"""


def odd_photos(folder: Path) -> None:
    """Photos of which libraries have something to say: their metadata, their palettes, their names."""
    for part in ("train", "valid"):
        (folder / part).mkdir(parents=True)
    pictures = [Image.fromarray(picture(seed, 140, 200)) for seed in range(4)]
    transparency = bytes([0, 128] + [255] * 254)
    pictures[0].convert("P").save(folder / "train" / "palette.png", transparency=transparency)
    exif = Image.Exif()
    exif[0x010E] = "described at length " * 5
    pictures[1].save(folder / "train" / "exif.jpg", exif=exif.tobytes()[:60])
    pictures[2].save(folder / "train" / "图片.png")
    pictures[3].save(folder / "valid" / "图片.png")
    pictures[3].save(folder / "valid" / "a_$b^c$.png")
    Image.fromarray(np.full((140, 200, 3), 128, np.uint8)).save(folder / "valid" / "flat.png")


@pytest.mark.slow
def test_no_command_shows_a_librarys_warning(tmp_path: Path) -> None:
    odd_photos(tmp_path / "photos")
    steps = {"batch": 4, "warmup": 1, "evaluate_every": 2}
    document = {
        "train": {
            **steps,
            "N": 8,
            "M": 12,
            "lmbda": 0.05,
            "steps": 20,
            "crop": 64,
            "lr": 2e-3,
            "quantile_steps": 200,
            "out": "base",
        },
        "model": {"checkpoint": "base"},
        "images": {"path": "photos", "crop": 64, "variations": 4, "held_out": "valid", "tolerate": 1},
        "quantizer": {**FIXED, "states": 4, "pilot": 8, "calibration": 4, "shift": "auto", "group": "tcq4"},
        "cache": {"path": "a.zarr", "shard": 8, "batch": 4},
        "engine": {"name": "local"},
        "finetune": {**steps, "recipe": "all-but-encoder", "steps": 4, "lr": 1e-5, "out": "tuned"},
        "evaluate": {
            "images": "photos/valid",
            "checkpoints": {"base": ["sq"], "tuned": ["sq", "tcq4"]},
            "show": ["图片.png", "a_$b^c$.png"],
            "out": "evaluation.json",
        },
    }
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    environment = {**os.environ, "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    commands = COMMANDS.strip().replace(" E", " e.yaml")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, commands], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "report" / "report.html").is_file() and (tmp_path / "b.png").is_file()
    told = [line for line in done.stderr.splitlines() if "Warning" in line or "findfont" in line]
    assert not told, told
