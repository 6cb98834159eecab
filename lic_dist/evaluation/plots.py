"""Pictures of results: crops side by side, a training's course, drift. PNG, through Agg."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lic_dist.text import counted

# Okabe and Ito's colours: apart for the colour-blind too. The anchor is black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#6A4C93")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ANCHOR_COLOUR, FRAME_COLOUR, GRID_COLOUR = "#111111", "#FFC400", "#E4E4E4"
DOTS_PER_INCH = 160
# A name in a script that the font lacks is drawn as boxes: beside the picture, tables and pages have it as text.
warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)


@dataclass(frozen=True)
class Picture:
    """One column of a comparison sheet: a name, a line of figures, pixels uint8 [H, W, 3]."""

    name: str
    figures: str
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Drift:
    """A line of a drift plot: bpp and PSNR against the original, a number a generation of successive coding."""

    name: str
    bpp: Sequence[float]
    psnr: Sequence[float]


def comparison_sheet(pictures: Sequence[Picture], path: Path, zoom: int = 0) -> None:
    """Pictures side by side, the original first; under each the same window, enlarged.

    The window, `zoom` pixels wide and high (0: a fifth of the shorter side, at least 64), is where the others
    differ most from the original. Raises ValueError where the shapes differ.
    """
    shape = pictures[0].pixels.shape
    if any(picture.pixels.shape != shape for picture in pictures):
        raise ValueError("the pictures of a sheet have one shape")
    side = min(zoom or max(64, min(shape[:2]) // 5), *shape[:2])
    top, left = busiest_window([picture.pixels for picture in pictures], side, side)
    column = 3.4  # inches
    tall = column * shape[0] / shape[1]
    figure = new_figure(column * len(pictures), tall + column + 0.8)
    grid = figure.subplots(2, len(pictures), squeeze=False, height_ratios=[tall, column])
    for index, picture in enumerate(pictures):
        whole, enlarged = grid[0][index], grid[1][index]
        whole.imshow(picture.pixels, interpolation="lanczos")
        whole.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, ec=FRAME_COLOUR, lw=1.6))
        whole.set_title(plain(picture.name), fontsize=12, fontweight="bold", loc="left", pad=20)
        whole.text(0, 1.015, picture.figures, transform=whole.transAxes, fontsize=10, color="#444444", va="bottom")
        enlarged.imshow(picture.pixels[top : top + side, left : left + side], interpolation="nearest")
        for axes, colour in ((whole, "#BBBBBB"), (enlarged, FRAME_COLOUR)):
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, color=colour, linewidth=0.8 if axes is whole else 1.8)
    save(figure, path)


def training_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out L and PSNR over the steps of a training's log; the step of least L is marked."""
    measured = [row for row in rows if "held_out_L" in row]
    steps = [row["step"] for row in measured]
    figure = new_figure(9.0, 3.6)
    panels = figure.subplots(1, 2)
    labels = (("held_out_L", "L", COLOURS[0]), ("held_out_psnr", "PSNR [dB]", COLOURS[1]))
    for axes, (key, label, colour) in zip(panels, labels, strict=True):
        values = [row[key] for row in measured]
        axes.plot(steps, values, color=colour, marker="o", markersize=3.5, linewidth=1.6)
        axes.set_title(f"{label} on held-out samples", fontsize=10, loc="left")
        axes.set_xlabel("step")
        clean(axes)
        if key == "held_out_L" and values:
            least = int(np.argmin(values))
            axes.plot(steps[least], values[least], "o", markersize=9, mfc="none", mec=ANCHOR_COLOUR)
            axes.set_title(f"least {values[least]:.4f} at step {steps[least]}", fontsize=9, loc="right")
    save(figure, path)


def drift_plot(lines: Sequence[Drift], path: Path) -> None:
    """PSNR against the original, and bpp, over the generations of successive coding."""
    figure = new_figure(11.0, 4.2)
    panels = figure.subplots(1, 2)
    titles = ("PSNR against the original [dB]", "rate [bit per pixel]")
    for axes, title, figures in zip(panels, titles, ("psnr", "bpp"), strict=True):
        for number, line in enumerate(lines):
            values = getattr(line, figures)
            axes.plot(
                range(1, len(values) + 1),
                values,
                color=COLOURS[number % len(COLOURS)],
                linestyle="-" if number < len(COLOURS) else "--",
                marker=MARKERS[number % len(MARKERS)],
                markersize=4.5,
                linewidth=1.5,
                label=plain(line.name),
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("generation")
        clean(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].legend(fontsize=9 if len(lines) <= 10 else 8, frameon=False)
    save(figure, path)


def calibration_plot(notes: dict[str, Any], path: Path, name: str) -> None:
    """A calibration's trials: L over the step, a line for each strength; predicted against real change of the MSE.

    Of the trials of one strength and step, which differ in their shift, the best.
    """
    falling = sorted(notes["calibration"], key=lambda trial: -trial["L"])
    trials = list({(trial["strength"], trial["step"]): trial for trial in falling}.values())
    base = notes["mse_unquantized"]
    figure = new_figure(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    best = min(trials, key=lambda trial: trial["L"])
    for number, strength in enumerate(sorted({trial["strength"] for trial in trials})):
        line = sorted((trial for trial in trials if trial["strength"] == strength), key=lambda trial: trial["step"])
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        left.plot([one["step"] for one in line], [one["L"] for one in line], label=f"{strength:.3g}", **style)
        right.plot(
            [1e4 * one["predicted"] for one in line], [1e4 * (one["mse"] - base) for one in line], linestyle="", **style
        )
    left.plot(best["step"], best["L"], "o", markersize=11, mfc="none", mec=ANCHOR_COLOUR)
    left.set_title(f"{name}: L on {notes['calibration_samples']} held-out crops", fontsize=10, loc="left")
    left.set_title(f"least {best['L']:.4f} at {best['strength']:.3g}, {best['step']:.3g}", fontsize=9, loc="right")
    left.set_xlabel("step")
    left.legend(title="strength", fontsize=8, frameon=False)
    limit = 1.05e4 * max(max(trial["predicted"], trial["mse"] - base) for trial in trials)
    right.plot([0, limit], [0, limit], color="#999999", linewidth=1, linestyle=":")
    right.set_title("change of the MSE by quantization, 1e-4: real over predicted", fontsize=10, loc="left")
    right.set_xlabel("predicted from the sensitivities")
    for axes in (left, right):
        clean(axes)
    save(figure, path)


def cache_plot(report: dict[str, Any], path: Path) -> None:
    """What `inspect` found, drawn: rates and distortions of every group's samples, and bytes of each array."""
    groups = {name: group for name, group in report["groups"].items() if group["bits_per_pixel"] is not None}
    figure = new_figure(15.0, 4.4)
    rates, distortions, sizes = figure.subplots(1, 3)
    for axes, key, label in (
        (rates, "bits_per_pixel_histogram", "bits per pixel"),
        (distortions, "distortion_histogram", "predicted squared error of a sample"),
    ):
        for number, (name, group) in enumerate(groups.items()):
            histogram, colour = group[key], COLOURS[number % len(COLOURS)]
            axes.stairs(histogram["counts"], histogram["edges"], color=colour, linewidth=1.6, label=name)
            axes.axvline(histogram["quantiles"][1], color=colour, linewidth=1, linestyle=":")
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_ylabel("samples")
        clean(axes)
        if groups:
            axes.legend(fontsize=8, frameon=False)
    arrays = {name: one for name, one in report["arrays"].items() if not name.startswith("samples/") and one["bytes"]}
    names = list(arrays)[::-1]
    sizes.barh(names, [arrays[name]["bytes"] / 1e6 for name in names], color=COLOURS[5])
    for row, name in enumerate(names):
        share = arrays[name]["bytes"] / arrays[name]["raw_bytes"]
        sizes.text(0, row, f" {100 * share:.0f} % of its raw bytes", va="center", fontsize=8)
    sizes.set_title("MB on disk", fontsize=10, loc="left")
    sizes.spines[["top", "right"]].set_visible(False)
    written = f"{report['shards_written']} of {counted(report['num_shards'], 'shard')}"
    figure.suptitle(f"{report['path']}: {counted(report['num_samples'], 'sample')}, {written}", fontsize=10)
    save(figure, path)


def busiest_window(pixels: Sequence[NDArray[np.uint8]], high: int, wide: int) -> tuple[int, int]:
    """Top and left of the window with most squared error against the first picture (its centre if alone)."""
    height, width = pixels[0].shape[:2]
    if len(pixels) == 1:
        return (height - high) // 2, (width - wide) // 2
    original = pixels[0].astype(np.int32)
    error = sum(np.square(other - original).sum(axis=2) for other in pixels[1:])
    sums = np.pad(np.cumsum(np.cumsum(error, axis=0), axis=1), ((1, 0), (1, 0)))
    windows = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    top, left = np.unravel_index(int(np.argmax(windows)), windows.shape)
    return int(top), int(left)


def clean(axes: Axes) -> None:
    axes.grid(color=GRID_COLOUR, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.ticklabel_format(useOffset=False)


def plain(text: str) -> str:
    """As matplotlib shows it: no mathematics, nothing hidden by a leading underscore."""
    return re.sub(r"^_", " _", text.replace("$", r"\$"))


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png", bbox_inches="tight", pad_inches=0.12)
