"""Results as a data frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lic_dist.evaluation.results import flat_row
from lic_dist.reporting.curves import LABEL, Curve, read_curves

OF_POINT = ("checkpoint", "arm", "quantizer", "seed", "lmbda", "pictures")


def read_results(files: Sequence[Path], label: str = LABEL) -> pd.DataFrame:
    """The rows of our result files as a pandas data frame: one an image and point.

    Columns: the name of its `curve`, the point's checkpoint, arm, quantizer, seed, lmbda and pictures, and those of
    `ImageResult`, bpp in bits a pixel, psnr in dB, and one for each other metric (`iw_ssim`). Figures that are not
    finite are missing. Published files have no rows.

    Raises:
        LicError: a file that is no result file.
    """
    return rows_of(read_curves(files, label))


def rows_of(curves: Sequence[Curve]) -> pd.DataFrame:
    """The rows of curves, as `read_results` has them."""
    return pd.DataFrame.from_records(
        [
            {"curve": curve.name, **{name: getattr(point, name) for name in OF_POINT}, **flat_row(row)}
            for curve in curves
            for point in curve.points
            for row in point.images
        ]
    )
