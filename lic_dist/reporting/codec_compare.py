"""Curves as data of Codec-Compare, Google's page that matches pictures of two codecs and compares their ratios.

The format is that of its version 0.6.6 (github.com/webmproject/codec-compare, README, "Plug data at serve time", and
src/entry.ts for the names that it knows): a batch for each curve, descriptions and values in the same order, and a list
of the batches, for `index.html?load=codec-compare/batches.json`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lic_dist.errors import LicError
from lic_dist.evaluation.jobs import distinct_file_names
from lic_dist.evaluation.metrics import METRICS
from lic_dist.evaluation.results import ImageResult, Point, column_of, write_whole
from lic_dist.models.names import label
from lic_dist.reporting.curves import Curve, plain

BATCHES = "batches"
NO_ERROR = 99.0  # dB: the PSNR of equal pictures, as their own tool writes it
_KNOWN = {"ms-ssim": "msssim"}  # what the page calls metrics that have another name here
Field = tuple[str, str, Callable[[Point, ImageResult], Any]]  # name, description, value
_FIELDS: tuple[Field, ...] = (
    ("original_name", "Original image file name", lambda _, row: row.image),
    ("width", "Pixel columns of the image", lambda _, row: row.width),
    ("height", "Pixel rows of the image", lambda _, row: row.height),
    ("quality", "Lambda of the model, or quality of a classic codec", lambda point, _: quality_of(point)),
    ("encoded_size", "Size of the encoded image file in bytes", lambda _, row: row.file_size),
    ("encoding_time", "Encoding duration in seconds, on one thread", lambda _, row: row.encode_seconds),
    ("decoding_time", "Decoding duration in seconds, on one thread", lambda _, row: row.decode_seconds),
)


def write_codec_compare(curves: Sequence[Curve], folder: Path) -> None:
    """Write batches.json and a batch for each curve with points; published curves have no images.

    Raises:
        LicError: the folder cannot be written.
    """
    measured = [curve for curve in curves if curve.points]
    names = distinct_file_names([BATCHES, *(curve.name for curve in measured)])[1:]
    for curve, name in zip(measured, names, strict=True):
        write_whole(folder / f"{name}.json", (json.dumps(batch(curve), indent=1, allow_nan=False) + "\n").encode())
    listed = json.dumps([[f"{name}.json"] for name in names], indent=1) + "\n"
    write_whole(folder / f"{BATCHES}.json", listed.encode())


def batch(curve: Curve) -> Mapping[str, Any]:
    """The batch of a curve: a row for each image and point. A metric that an image lacks is left out."""
    rows = [(point, row) for point in curve.points for row in point.images]
    known = [name for name in METRICS if all(row.quality.get(name) is not None for _, row in rows)]
    fields = [*_FIELDS, *map(_metric, known)]
    constants = {
        "name": ("Name of this batch", curve.name),
        "codec": ("Name of the codec used to generate this data", curve.name),
        "version": ("Version of the codec used to generate this data", _version(curve)),
        "run": ("Name of the experiment", curve.run),
    }
    return {
        "constant_descriptions": [{name: said} for name, (said, _) in constants.items()],
        "constant_values": [value for _, value in constants.values()],
        "field_descriptions": [{name: said} for name, said, _ in fields],
        "field_values": [[value(point, row) for _, _, value in fields] for point, row in rows],
    }


def quality_of(point: Point) -> float:
    """The lambda of a point, or the quality of a classic codec. Raises LicError where its name does not end in one."""
    if point.lmbda is not None:
        return point.lmbda
    if not (found := re.search(r"\d+(\.\d+)?$", point.checkpoint)):
        raise LicError(f"{point.quantizer} has a point without a quality: '{point.checkpoint}'")
    return float(found[0])


def _metric(name: str) -> Field:
    metric = METRICS[name]
    said = f"Distortion metric {metric.head}, {metric.better} is better"

    def value(_: Point, row: ImageResult) -> float | None:
        found = row.quality[name]
        return NO_ERROR if found == math.inf else found

    return _KNOWN.get(name, column_of(name)), said, value


def _version(curve: Curve) -> str:
    """Of a classic codec its library's, of a learned one its checkpoints: batches of one codec and version merge."""
    said = (point.versions if point.lmbda is None else label(point.checkpoint) for point in curve.points)
    return plain(", ".join(dict.fromkeys(said)))
