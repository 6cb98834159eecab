"""The plot of successive coding: how quality and rate drift over the generations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import altair as alt
import pandas as pd

from lic_dist import drawing

Means = Mapping[str, Sequence[float | None]]  # "bpp" and "psnr", one number for each generation


def drift_plot(curves: Iterable[tuple[str, Means]], path: Path) -> None:
    """Draw PSNR against the original, and bpp, over the generations of each named curve into a file."""
    rows = [
        {"curve": name, "generation": number, "bpp": bpp, "psnr": psnr}
        for name, means in curves
        for number, (bpp, psnr) in enumerate(zip(means["bpp"], means["psnr"], strict=True), 1)
    ]
    base = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("generation:Q", axis=alt.Axis(tickMinStep=1)),
            color=alt.Color("curve:N", title=None, sort=None, scale=alt.Scale(range=list(drawing.COLOURS))),
        )
    )
    panels = [
        drawing.panel(base.encode(y=alt.Y(f"{name}:Q", title=None).scale(zero=False)), title)
        for name, title in (("psnr", "PSNR against the original [dB]"), ("bpp", "rate [bit per pixel]"))
    ]
    drawing.write(drawing.beside(*panels), path)
