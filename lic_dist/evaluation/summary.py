"""Tables of points: a CSV with a row for each image; means over images as plain data and on the terminal."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lic_dist.building.base_summary import LEAST_PSNR
from lic_dist.errors import ToleranceError
from lic_dist.evaluation.metrics import METRICS
from lic_dist.evaluation.results import Point, column_of, flat_row, metrics_of, read_points, write_whole
from lic_dist.text import counted

RATES = ("bpp", "estimated_bpp", "likelihood_bpp", "container_bpp")
SECONDS = ("encode_seconds", "decode_seconds")
OF_POINT = ("checkpoint", "arm", "quantizer", "lmbda")
BESIDE = 4  # metrics of a table, which fit beside each other in 80 characters
OF_IMAGE = ("image", "height", "width", "bpp", "psnr", "ms_ssim", *RATES[1:], *SECONDS, "encode_bytes", "decode_bytes")


def write_csv(path: Path, points: Sequence[Point]) -> None:
    """Write a line for each image of each point below a header; a figure is blank where it is missing or not finite.

    Metrics beside PSNR and MS-SSIM are the last columns.

    Raises:
        LicError: the folder cannot be written.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    metrics = metrics_of(row for point in points for row in point.images)
    columns = (*OF_IMAGE, *map(column_of, metrics))
    table.writerow((*OF_POINT, *columns))
    for point in points:
        for row in map(flat_row, point.images):
            table.writerow((*(getattr(point, name) for name in OF_POINT), *(row.get(name) for name in columns)))
    write_whole(path, text.getvalue().encode())


def means(point: Point) -> dict[str, Any]:
    """Return the means of a point's figures over its images; None where one is missing or not finite."""
    figures = {name: fmean(getattr(row, name) for row in point.images) for name in (*RATES, "psnr", *SECONDS)}
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    of_point = {name: getattr(point, name) for name in (*OF_POINT, "record", "model", "pictures", "z_bpp")}
    counts = {"images": len(point.images), "set_aside": dict(point.set_aside)}
    return {**of_point, **finite, "ms_ssim": point.figures.ms_ssim, "metrics": dict(point.figures.metrics), **counts}


def summary(path: Path) -> dict[str, Any]:
    """Print a short table of a result file's points, and its path; return the points' means."""
    points = print_points(read_points(path))
    print(path)
    return {"out": str(path), "points": points}


def print_points(measured: Sequence[Point]) -> list[dict[str, Any]]:
    """Print a short table of points; return their means.

    The column `gap` is the excess of the written bits over the estimated ones; an anchor has its quality as lambda.
    Metrics beside PSNR and MS-SSIM have a table of their own.
    """
    points = [means(point) for point in measured]
    table = _table_of(("bpp", "PSNR dB", "MS-SSIM", "gap", "s encode", "s decode"))
    for one in points:
        gap = "" if one["estimated_bpp"] is None else f"{100 * (one['bpp'] / one['estimated_bpp'] - 1):+.2f} %"
        figures = (
            _place(one),
            f"{one['bpp']:.4f}",
            "" if one["psnr"] is None else f"{one['psnr']:.3f}",
            "" if one["ms_ssim"] is None else f"{one['ms_ssim']:.4f}",
            gap,
            *(f"{one[name]:.2f}" for name in SECONDS),
        )
        quantizer, arm = escape(one["quantizer"]), escape(one["arm"])
        table.add_row(f"{quantizer} *" if one["set_aside"] else quantizer, arm, *figures)
    Console().print(table)
    if metrics := [name for name in METRICS if any(name in one["metrics"] for one in points)]:
        for first in range(0, len(metrics), BESIDE):
            Console().print(_metrics_table(points, metrics[first : first + BESIDE]))
    if any(one["set_aside"] for one in points):
        print("* without images that could not be coded: not to be compared with the others")
    for one in points:
        if one["lmbda"] is not None and one["psnr"] is not None and one["psnr"] < LEAST_PSNR:
            bad = f"{one['checkpoint']}, {one['quantizer']}: {one['psnr']:.1f} dB"
            print(f"warning: {bad}: is this the checkpoint of a trained model?", file=sys.stderr)
    return points


def _place(one: dict[str, Any]) -> str:
    """Return the lambda of a point's means, or a classic codec's quality."""
    return escape(one["checkpoint"].replace("quality ", "q")) if one["lmbda"] is None else f"{one['lmbda']:g}"


def _table_of(figures: Sequence[str]) -> Table:
    """Return a table without rows, of points with these figures."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, head in enumerate(("quantizer", "arm", "lmbda", *figures)):
        numeric = number > 1
        table.add_column(head, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return table


def _metrics_table(points: Sequence[dict[str, Any]], metrics: Sequence[str]) -> Table:
    table = _table_of([METRICS[name].head for name in metrics])
    for one in points:
        values = (METRICS[name].text(one["metrics"].get(name)) for name in metrics)
        table.add_row(escape(one["quantizer"]), escape(one["arm"]), _place(one), *values)
    return table


def require_coded(summaries: Sequence[dict[str, Any]]) -> None:
    """Raise ToleranceError where images were set aside, after a warning for each; means are over the others."""
    by_file = {result["out"]: result for result in summaries}  # several experiments may write one file
    points = [point for result in by_file.values() for point in result["points"]]
    lacking = [point for point in points if point["set_aside"]]
    for point in lacking:
        for name, reason in point["set_aside"].items():
            print(f"warning: {name} with {point['checkpoint']}, {point['quantizer']}: {reason}", file=sys.stderr)
    if lacking:
        raise ToleranceError(
            f"images that could not be coded are missing from {len(lacking)} of {counted(len(points), 'point')}",
            hint="their means are over the others: do not compare them with points of all images",
        )
