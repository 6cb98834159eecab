"""Result files: JSON as CompressAI writes it, so that published curves plot beside ours, plus a row for each image.

    {"name": .., "description": .., "results": {"bpp": [..], "psnr-rgb": [..], "ms-ssim-rgb": [..], ..},
     "points": [{"checkpoint": .., "quantizer": .., "lmbda": .., "images": [{"image": .., "bpp": ..}, ..]}, ..],
     "originals": {image: path of a PNG}}

`results` holds the means over the images of each point, in the order of `points`, which only our files have. A file
with several arms or quantizers holds several curves. Paths are relative to the file's folder. A number that is not
finite is null: the PSNR of equal pictures, a likelihood that the quantizer does not have. So is the MS-SSIM of a
picture that is too small, and any other metric's value, by its name in `evaluation.metrics`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from lic_dist.errors import LicError
from lic_dist.evaluation.metrics import METRICS
from lic_dist.models.complexity import NetCost

LARGEST_COUNTED = 8  # largest |k| in `k_counts`; larger ones are counted as this one
_TUPLES = ("channel_bits", "k_counts")  # fields of a point that are lists in JSON
_HINT = "give a result file, ours or CompressAI's"


def _check_rate(value: float) -> float:
    if not (0 <= value <= 1e4 or math.isnan(value)):
        raise ValueError("no rate")
    return value


def _check_decibels(value: float) -> float:
    if not (-1000 <= value <= 1000 or value == math.inf):
        raise ValueError("no PSNR")
    return value


Rate = Annotated[float, Field(ge=0, le=1e4)]  # bits per pixel
Estimate = Annotated[float, AfterValidator(_check_rate)]  # bits per pixel; nan for none
Decibels = Annotated[float, AfterValidator(_check_decibels)]  # inf for equal pictures
Similarity = Annotated[float, Field(ge=-1, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Bytes = Annotated[int | float, Field(ge=0, le=1e15)]  # a float where it is a mean
Metrics = Mapping[str, Annotated[float, Field(ge=-1e4, le=1e4)] | None]  # of a name; None where there is no value


@dataclass(frozen=True)
class ImageResult:
    """One image coded and decoded: rates in bits per pixel, PSNR in dB on 8-bit RGB, times in seconds.

    `bpp` counts the entropy-coded streams and `container_bpp` what is around them; of a classic codec `bpp` counts the
    whole file. `estimated_bpp` is the estimate of the integer tables (nan for a classic codec), `likelihood_bpp` that
    of the continuous model (nan where the quantizer has none). `encode_bytes` and `decode_bytes` say by how much memory
    the process grew at most; None where the system does not tell. `metrics` has what was measured beside PSNR and
    MS-SSIM.
    """

    image: str
    height: int
    width: int
    bpp: Rate
    psnr: Decibels
    ms_ssim: Similarity | None
    estimated_bpp: Estimate
    likelihood_bpp: float
    container_bpp: Rate
    encode_seconds: Seconds
    decode_seconds: Seconds
    encode_bytes: Bytes | None = None
    decode_bytes: Bytes | None = None
    metrics: Metrics = field(default_factory=dict)

    @property
    def quality(self) -> dict[str, float | None]:
        """Every metric by name."""
        return {"psnr": self.psnr, "ms-ssim": self.ms_ssim, **self.metrics}

    @property
    def file_size(self) -> int:
        """Of the whole file, in bytes."""
        return round((self.bpp + self.container_bpp) * self.height * self.width / 8)


@dataclass(frozen=True)
class Figures:
    """A point of a curve: means over images at one lambda, in bits per pixel and dB; `metrics` as of an image."""

    bpp: Rate
    psnr: Decibels
    ms_ssim: Similarity | None
    metrics: Metrics = field(default_factory=dict)

    @property
    def quality(self) -> dict[str, float | None]:
        """Every metric by name."""
        return {"psnr": self.psnr, "ms-ssim": self.ms_ssim, **self.metrics}


@dataclass(frozen=True)
class Point:
    """One checkpoint with one quantizer over a set of images.

    `arm` says how the checkpoint was made ("base", "decoder", "decoder noise"); points of one arm and quantizer at
    several lambdas are a curve. Three digests tell whether a measured point is still valid: `record` of the quantizer's
    record, `model` of the checkpoint's tensors, `pictures` of the images' files. Raises ValueError without images.

    Files of earlier versions lack the following. `seed` is that of the retraining, None for a base model; `snapshot`
    and `cache` are number and digest of the snapshot of the cache that it read.
    `channel_bits` are the estimated bits per pixel of each of the M channels of y, and `z_bpp` those of z, means over
    images. `k_counts` says how often the index k was <= -8, -7, .., 7, >= 8 in all images. `complexity` is what each
    network of the model costs. `shown` maps images to decoded pictures that are kept, `set_aside` maps images that
    could not be coded to the reason.

    The point of a classic codec at one quality has no lambda, no arm and nothing of latents: `quantizer` names the
    codec, `checkpoint` says the quality, `settings` what the library was given, `versions` which library it was. Its
    `record` is the digest of the settings, its `model` that of versions and settings but the quality.
    """

    checkpoint: str
    quantizer: str
    lmbda: Annotated[float, Field(gt=0, le=1e6)] | None
    images: tuple[ImageResult, ...]
    record: str = ""
    model: str = ""
    arm: str = ""
    pictures: str = ""
    channel_bits: tuple[float, ...] = ()
    k_counts: tuple[int, ...] = ()
    z_bpp: float | None = None
    seed: int | None = None
    snapshot: int | None = None
    cache: str = ""
    shown: Mapping[str, str] = field(default_factory=dict)
    set_aside: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    versions: str = ""
    complexity: Mapping[str, NetCost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("a point needs an image")

    @property
    def place(self) -> float | str:
        """What tells it from the other points of its curve: its lambda, or the quality of a classic codec."""
        return self.checkpoint if self.lmbda is None else self.lmbda

    @property
    def figures(self) -> Figures:
        """The means over the images; but for PSNR only of what every image has."""
        return Figures(
            bpp=fmean(row.bpp for row in self.images),
            psnr=fmean(row.psnr for row in self.images),
            ms_ssim=_mean(row.ms_ssim for row in self.images),
            metrics={name: _mean(row.metrics.get(name) for row in self.images) for name in self.images[0].metrics},
        )


def counts_of(k: NDArray[np.int16]) -> NDArray[np.int64]:
    """Return how often indices k are <= -8, -7, .., 7, >= 8, int64 [17]."""
    positions = np.clip(k, -LARGEST_COUNTED, LARGEST_COUNTED).ravel() + LARGEST_COUNTED
    return np.bincount(positions, minlength=2 * LARGEST_COUNTED + 1)


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if len(known) == len(found) else None


_ALWAYS = ConfigDict(revalidate_instances="always")
_POINTS = TypeAdapter(tuple[Point, ...], config=_ALWAYS)
_FIGURES = TypeAdapter(tuple[Figures, ...])
_ORIGINALS = TypeAdapter(dict[str, str])


def write_points(
    path: Path, name: str, points: Sequence[Point], description: str = "", originals: Mapping[str, str] | None = None
) -> None:
    """Write a result file whole or not at all; `originals` maps the images of the points' `shown` to their originals.

    Raises:
        LicError: the folder cannot be written.
    """
    means = [point.figures for point in points]
    results: dict[str, list[Any]] = {
        "bpp": [mean.bpp for mean in means],
        "psnr-rgb": [_plain(mean.psnr) for mean in means],
        "ms-ssim-rgb": [mean.ms_ssim for mean in means],
        "encoding_time": [fmean(row.encode_seconds for row in point.images) for point in points],
        "decoding_time": [fmean(row.decode_seconds for row in point.images) for point in points],
        "lmbda": [point.lmbda for point in points],
        "quantizer": [point.quantizer for point in points],
    }
    results |= {name: [mean.metrics.get(name) for mean in means] for name in metrics_of(means)}
    rows = [asdict(point) | {"images": [plain_row(row) for row in point.images]} for point in points]
    content = {"name": name, "description": description, "results": results, "points": rows}
    written = content | {"originals": dict(originals or {})}
    write_whole(path, (json.dumps(written, indent=1, allow_nan=False) + "\n").encode())


def metrics_of(figures: Iterable[Figures | ImageResult]) -> list[str]:
    """Return the names of what is known beside PSNR and MS-SSIM."""
    return list(dict.fromkeys(name for one in figures for name in one.metrics))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, by renaming a temporary file beside it; make its folder.

    Raises:
        LicError: the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LicError(f"cannot write {path}: {error.strerror}") from None


def plain_row(row: ImageResult) -> dict[str, Any]:
    """Return a row for JSON, with None for a figure that is not finite, and `metrics` where there are any."""
    return {name: _plain(value) for name, value in asdict(row).items() if name != "metrics" or value}


def flat_row(row: ImageResult) -> dict[str, Any]:
    """Return `plain_row` with a column for each metric, named as in Python: iw_ssim."""
    plain = plain_row(row)
    return plain | {column_of(name): value for name, value in plain.pop("metrics", {}).items()}


def column_of(metric: str) -> str:
    """Return the name of a metric's column."""
    return metric.replace("-", "_")


def image_row(row: Mapping[str, Any]) -> ImageResult:
    """Return the row of `plain_row`'s dictionary. Raises TypeError or KeyError for another dictionary."""
    psnr = math.inf if row["psnr"] is None else row["psnr"]
    estimates = {name: math.nan if row[name] is None else row[name] for name in ("estimated_bpp", "likelihood_bpp")}
    return ImageResult(**{**row, "psnr": psnr, **estimates})


def read_points(path: Path) -> tuple[Point, ...]:
    """Return the points of a result file of ours, in its order; none where there is no file yet.

    Raises:
        LicError: it is not a result file of ours.
    """
    if not path.exists():
        return ()
    content = _content(path)
    if "points" not in content:
        raise LicError(f"{path} is a published curve, not an evaluation of ours", hint="give evaluate another 'out'")
    return _points(path, content)


def read_originals(path: Path) -> dict[str, str]:
    """Return the relative path of each kept original of a result file, by image; none where there is no file yet.

    Raises:
        LicError: not a result file.
    """
    return dict(_content(path).get("originals", {})) if path.exists() else {}


@dataclass(frozen=True)
class ResultFile:
    """The content of a result file: `points` with their `originals` if it is ours, `figures` if it is published."""

    name: str
    description: str
    points: tuple[Point, ...]
    figures: tuple[Figures, ...]
    originals: Mapping[str, str]


def read_file(path: Path) -> ResultFile:
    """Read a result file, ours or published.

    Raises:
        LicError: it is not a result file, or has figures out of range.
    """
    content = _content(path)
    points = _checked(path, _POINTS, _points(path, content))
    figures = () if points else _published_figures(path, content)
    originals = _checked(path, _ORIGINALS, content.get("originals", {}))
    name, description = str(content.get("name", path.stem)), str(content.get("description", ""))
    return ResultFile(name, description, points, figures, originals)


def _content(path: Path) -> dict[str, Any]:
    """Read the JSON of a file. Raises LicError where it is not that of a result file."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise LicError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise LicError(f"{path} is not JSON", hint=_HINT) from None
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise LicError(f"{path} has no 'results'", hint=_HINT)
    return content


def _points(path: Path, content: dict[str, Any]) -> tuple[Point, ...]:
    try:
        return tuple(
            Point(
                **{**point, **{name: tuple(point.get(name, ())) for name in _TUPLES}, "images": _images(point)}
                | {"complexity": {name: NetCost(**cost) for name, cost in point.get("complexity", {}).items()}}
            )
            for point in content.get("points", ())
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise LicError(f"{path} has broken points: {error}", hint="evaluate again into another file") from None


def _images(point: dict[str, Any]) -> tuple[ImageResult, ...]:
    return tuple(image_row(row) for row in point["images"])


def _published_figures(path: Path, content: dict[str, Any]) -> tuple[Figures, ...]:
    """Return the figures of a published file by rising bpp. Raises LicError where they are missing or wrong."""
    results = content["results"]
    bpp, psnr = results.get("bpp"), results.get("psnr-rgb", results.get("psnr"))
    if not isinstance(bpp, list) or not isinstance(psnr, list) or len(bpp) != len(psnr) or not bpp:
        raise LicError(f"{path} has no 'bpp' and 'psnr-rgb' of one length", hint=_HINT)
    ms_ssim = results.get("ms-ssim-rgb", results.get("ms-ssim", [None] * len(bpp)))
    if not isinstance(ms_ssim, list) or len(ms_ssim) != len(bpp):
        raise LicError(f"{path} has {len(bpp)} rates and not as many MS-SSIM figures")
    others = [
        name for name in METRICS if name not in ("psnr", "ms-ssim") and len(_listed(results.get(name))) == len(bpp)
    ]
    rows = [
        {"bpp": a, "psnr": b, "ms_ssim": c, "metrics": {name: results[name][number] for name in others}}
        for number, (a, b, c) in enumerate(zip(bpp, psnr, ms_ssim, strict=True))
    ]
    figures = _checked(path, _FIGURES, rows)
    if not all(math.isfinite(figure.psnr) for figure in figures):
        raise LicError(f"{path} has PSNR that is not finite")
    return tuple(sorted(figures, key=lambda figure: figure.bpp))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _checked(path: Path, kind: TypeAdapter[Any], content: Any) -> Any:
    """Return the content, with its types and ranges checked. Raises LicError where they are wrong."""
    try:
        return kind.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"][:4])
        raise LicError(f"{path} has broken figures at {where[:80]}: {first['msg']}", hint=_HINT) from None


def _plain(value: Any) -> Any:
    """Return a value for JSON: None for a float that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
