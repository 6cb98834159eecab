"""A picture of a calibration: what was tried, and how well its prediction held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from lic_dist import drawing


def calibration_plot(notes: dict[str, Any], path: Path, name: str) -> None:
    """A calibration's trials: L over the step, a line for each strength; predicted against real change of the MSE.

    Of the trials of one strength and step, which differ in their shift, the best.
    """
    falling = sorted(notes["calibration"], key=lambda trial: -trial["L"])
    trials = list({(trial["strength"], trial["step"]): trial for trial in falling}.values())
    base = notes["mse_unquantized"]
    rows = [
        {
            "strength": f"{one['strength']:.3g}",
            "step": one["step"],
            "L": one["L"],
            "predicted": 1e4 * one["predicted"],
            "real": 1e4 * (one["mse"] - base),
        }
        for one in trials
    ]
    best = min(trials, key=lambda trial: (-trial.get("crops", 0), trial["L"]))  # of all crops
    found = alt.Chart(pd.DataFrame(rows)).encode(
        color=alt.Color("strength:N", scale=alt.Scale(range=list(drawing.COLOURS))),
        shape=alt.Shape("strength:N", scale=alt.Scale(range=list(drawing.SHAPES))),
    )
    tried = found.encode(x=alt.X("step:Q").scale(zero=False), y=alt.Y("L:Q", title=None).scale(zero=False))
    least = alt.Chart(pd.DataFrame([{"step": best["step"], "L": best["L"]}])).encode(x="step:Q", y="L:Q")
    ring = least.mark_point(size=160, color=drawing.INK)
    title = f"{name}: L on {notes['calibration_samples']} held-out crops, least {best['L']:.4f} at strength "
    title += f"{best['strength']:.3g}, step {best['step']:.3g}"
    limit = max(max(row["predicted"], row["real"]) for row in rows)
    ends = pd.DataFrame({"predicted": [0, limit], "real": [0, limit]})
    equal = alt.Chart(ends).mark_line(strokeDash=[2, 2], color="#999999").encode(x="predicted:Q", y="real:Q")
    points = found.mark_point(filled=True, size=50).encode(
        x=alt.X("predicted:Q", title="predicted from the sensitivities"), y=alt.Y("real:Q", title=None)
    )
    lines = alt.layer(tried.mark_line(), tried.mark_point(filled=True, size=50), ring)
    change = "change of the MSE by quantization, 1e-4: real over predicted"
    drawing.write(drawing.beside(drawing.panel(lines, title), drawing.panel(alt.layer(equal, points), change)), path)
