"""The picture of trainings: how the held-out loss, its rate and its PSNR went over the steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from lic_dist import drawing
from lic_dist.errors import LicError, UsageError
from lic_dist.training.log import read_log

HELD_OUT = {"held_out_L": "L of held-out crops", "held_out_bpp": "bit per pixel", "held_out_psnr": "PSNR [dB]"}


def learning_curves(folders: Sequence[Path], path: Path) -> list[str]:
    """Draw the held-out L, on a logarithmic axis, bpp and PSNR of trainings over their steps into a PNG or SVG file.

    A folder is the `out` of a training or finetuning, or one of its rounds. A curve has its folder's name, or its path
    where two have the same name. Return a line for each: its last step and figures.

    Raises:
        LicError: a folder without a log, or one whose training held nothing out or has not been judged yet.
        UsageError: a file to write that is neither PNG nor SVG.
    """
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"{path}: a picture is a .png or a .svg")
    names = [folder.resolve().name for folder in folders]
    curves = {
        str(folder) if names.count(name) > 1 else name: _judged(folder)
        for folder, name in zip(folders, names, strict=True)
    }
    table = pd.DataFrame([{"curve": name, **row} for name, rows in curves.items() for row in rows])
    base = (
        alt.Chart(table)
        .mark_line(point=True)
        .encode(
            x=alt.X("step:Q"),
            color=alt.Color("curve:N", title=None, sort=None, scale=alt.Scale(range=list(drawing.COLOURS))),
        )
    )
    low, high = table["held_out_L"].min(), table["held_out_L"].max()
    margin = (high / low) ** 0.05
    scales = dict.fromkeys(HELD_OUT, alt.Scale(zero=False))
    scales["held_out_L"] = alt.Scale(type="log", domain=[low / margin, high * margin], nice=False)
    panels = [
        drawing.panel(base.encode(y=alt.Y(f"{name}:Q", title=None, scale=scales[name])), title)
        for name, title in HELD_OUT.items()
    ]
    drawing.write(drawing.beside(*panels, columns=len(panels)), path)
    return [_line(name, rows[-1]) for name, rows in curves.items()]


def _judged(folder: Path) -> list[dict[str, Any]]:
    log = folder / "log.jsonl"
    try:
        rows = read_log(log)
    except json.JSONDecodeError:
        raise LicError(f"{log} is no log of a training") from None
    judged = [row for row in rows if "held_out_L" in row]
    if not judged:
        why = "has no judged steps yet, or its training held nothing out" if rows else "is missing or empty"
        raise LicError(f"{log} {why}", hint="give the folder that `train.out` or `finetune.out` names")
    return judged


def _line(name: str, row: dict[str, Any]) -> str:
    L, bpp, psnr = (row[key] for key in HELD_OUT)
    return f"{name}: step {row['step']:,}, held-out L {L:.4f}, {bpp:.4f} bpp, {psnr:.2f} dB"
