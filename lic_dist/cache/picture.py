"""A picture of a store: rates and distortions of its samples, and where its bytes are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from lic_dist import drawing
from lic_dist.text import counted


def cache_plot(report: dict[str, Any], path: Path) -> None:
    """What `inspect` found, drawn: rates and distortions of every group's samples, and bytes of each array."""
    groups = {name: group for name, group in report["groups"].items() if group["bits_per_pixel"] is not None}
    panels = [
        drawing.panel(_histograms({name: group[key] for name, group in groups.items()}), title)
        for key, title in (
            ("bits_per_pixel_histogram", "samples by their bits per pixel"),
            ("distortion_histogram", "samples by their predicted squared error"),
        )
        if groups
    ]
    arrays = {name: one for name, one in report["arrays"].items() if not name.startswith("samples/") and one["bytes"]}
    rows = [
        {"array": name, "MB": one["bytes"] / 1e6, "share": f"{100 * one['bytes'] / one['raw_bytes']:.0f} % of raw"}
        for name, one in arrays.items()
    ]
    bars = alt.Chart(pd.DataFrame(rows, columns=["array", "MB", "share"])).encode(
        x="MB:Q", y=alt.Y("array:N", sort=None, title=None), text="share:N"
    )
    sizes = alt.layer(bars.mark_bar(color=drawing.COLOURS[5]), bars.mark_text(align="left", dx=4))
    written = f"{report['shards_written']} of {counted(report['num_shards'], 'shard')}"
    title = f"{report['path']}: {counted(report['num_samples'], 'sample')}, {written}"
    whole = drawing.beside(*panels, drawing.panel(sizes, "MB on disk"), columns=3).properties(title=title)
    drawing.write(whole, path)


def _histograms(groups: dict[str, dict[str, Any]]) -> drawing.Plot:
    """Steps of each group's counts, a line at its median."""
    rows = [
        {"group": name, "from": low, "to": high, "samples": count}
        for name, one in groups.items()
        for low, high, count in zip(one["edges"][:-1], one["edges"][1:], one["counts"], strict=True)
    ]
    medians = [{"group": name, "median": one["quantiles"][1]} for name, one in groups.items()]
    colour = alt.Color("group:N", title=None, scale=alt.Scale(range=list(drawing.COLOURS)))
    bars = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(opacity=0.5)
        .encode(x=alt.X("from:Q", title=None), x2="to:Q", y="samples:Q", color=colour)
    )
    rules = alt.Chart(pd.DataFrame(medians)).mark_rule(strokeDash=[2, 2]).encode(x="median:Q", color=colour)
    return alt.layer(bars, rules)
