"""What a report writes for other programs: images as tables, curves as CompressAI's JSON, and more by its siblings."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from lic_dist.errors import UsageError
from lic_dist.evaluation.jobs import distinct_file_names
from lic_dist.evaluation.results import metrics_of, write_whole
from lic_dist.reporting.codec_compare import BATCHES, write_codec_compare
from lic_dist.reporting.curves import Curve
from lic_dist.reporting.frames import rows_of
from lic_dist.reporting.latex import ALL, write_latex
from lic_dist.reporting.tables import Section

ROWS = "rows"  # the name of a table of images


def require_known(names: Sequence[str]) -> None:
    """Raise UsageError where EXPORTS lacks one of these names."""
    if unknown := set(names) - set(EXPORTS):
        raise UsageError(f"no export is named '{min(unknown)}'", hint=f"there are {', '.join(EXPORTS)}")


def write_exports(names: Sequence[str], curves: Sequence[Curve], parts: Sequence[Section], out: Path) -> list[Path]:
    """Write the exports of these names (EXPORTS) into `out`; return what is to be opened of each.

    Raises:
        LicError: the folder cannot be written.
    """
    return [EXPORTS[name](curves, parts, out) for name in dict.fromkeys(names)]


def compressai_content(curve: Curve) -> Mapping[str, Any]:
    """A curve as CompressAI's files are: lists of a number for each point of finite PSNR.

    A figure that a point lacks has no list, since CompressAI's tools compute with all of them.
    """
    kept = [number for number, figures in enumerate(curve.figures) if math.isfinite(figures.psnr)]
    means = [curve.figures[number] for number in kept]
    points = [curve.points[number] for number in kept] if curve.points else []
    lists: dict[str, list[float | None]] = {
        "bpp": [one.bpp for one in means],
        "psnr-rgb": [one.psnr for one in means],
        "ms-ssim-rgb": [one.ms_ssim for one in means],
        **{name: [one.metrics.get(name) for one in means] for name in metrics_of(means)},
    }
    if points:
        lists["encoding_time"] = [fmean(row.encode_seconds for row in point.images) for point in points]
        lists["decoding_time"] = [fmean(row.decode_seconds for row in point.images) for point in points]
        lists["lmbda"] = [point.lmbda for point in points]
    results = {name: values for name, values in lists.items() if None not in values}
    return {"name": curve.name, "description": curve.description, "results": results}


def _compressai(curves: Sequence[Curve], _: Sequence[Section], out: Path) -> Path:
    folder = out / "compressai"
    for curve, name in zip(curves, distinct_file_names([curve.name for curve in curves]), strict=True):
        text = json.dumps(compressai_content(curve), indent=1, allow_nan=False) + "\n"
        write_whole(folder / f"{name}.json", text.encode())
    return folder


def _table(curves: Sequence[Curve]) -> pd.DataFrame:
    rows = rows_of(curves)
    return rows.astype({"seed": "Int64", "lmbda": "float64"}) if len(rows) else rows


def _csv(curves: Sequence[Curve], _: Sequence[Section], out: Path) -> Path:
    path = out / f"{ROWS}.csv"
    write_whole(path, _table(curves).to_csv(index=False, lineterminator="\n").encode())
    return path


def _parquet(curves: Sequence[Curve], _: Sequence[Section], out: Path) -> Path:
    path, data = out / f"{ROWS}.parquet", io.BytesIO()
    _table(curves).to_parquet(data, engine="pyarrow", index=False)
    write_whole(path, data.getvalue())
    return path


def _latex(_: Sequence[Curve], parts: Sequence[Section], out: Path) -> Path:
    write_latex(parts, out / "latex")
    return out / "latex" / f"{ALL}.tex"


def _codec_compare(curves: Sequence[Curve], _: Sequence[Section], out: Path) -> Path:
    write_codec_compare(curves, out / "codec-compare")
    return out / "codec-compare" / f"{BATCHES}.json"


EXPORTS: Mapping[str, Callable[[Sequence[Curve], Sequence[Section], Path], Path]] = {
    "compressai": _compressai,
    "csv": _csv,
    "parquet": _parquet,
    "latex": _latex,
    "codec-compare": _codec_compare,
}
"""By the name that `lic-dist report --export` has them by."""
