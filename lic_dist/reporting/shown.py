"""The pictures of a report's page: kept originals and decoded pictures, whole or the window where they differ most."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median_low
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lic_dist.data import images
from lic_dist.errors import LicError
from lic_dist.evaluation.jobs import file_safe
from lic_dist.evaluation.results import ImageResult, Point
from lic_dist.reporting.comparison import detailed_lambda
from lic_dist.reporting.curves import Collection, Curve, plain
from lic_dist.reporting.gains import lambdas
from lic_dist.reporting.sheets import Picture, busiest_window, comparison_sheet

WHOLE_PIXELS = 24_000_000  # up to so many in all, large pictures stay whole
PAGE_PIXELS = 40_000_000  # of all pictures in a page; somewhat more bytes
LONG_SIDE, SHORT_SIDE = 768, 512  # of a window
START_SIDE = 96  # of the window that the viewer starts at

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ShownPictures:
    """What the viewer's script reads, and what the page and the terminal say of it ("" where nothing is left out)."""

    data: dict[str, Any]
    note: str


@dataclass(frozen=True)
class Decoded:
    """One decoded picture by a point of a curve, and its figures."""

    curve: str
    point: Point
    row: ImageResult
    folder: Path  # of the result file
    path: Path


def collect_pictures(collection: Collection, names: Sequence[str], first: Sequence[str]) -> ShownPictures | None:
    """All pictures of these curves that the result files name; None where there is none.

    `first` names the curves to begin with, beside the original. Only files under the folder of their result file are
    read. A picture that is absent, or of another size, is left out.
    """
    kept = decoded_by_image([collection.named(name) for name in names])
    by_image = {key: _used(found) for key, found in kept.items()}
    if not by_image:
        return None
    arms = list(dict.fromkeys(one.curve for found in by_image.values() for one in found))
    middle = detailed_lambda(collection.curves, "shown")
    pixels = {key: (len(f) + 1) * f[0].row.height * f[0].row.width for key, f in by_image.items()}
    cut = sum(pixels.values()) > WHOLE_PIXELS
    entries: list[dict[str, Any]] = []
    missing = spent = 0
    for (name, pictures), found in by_image.items():
        whole = pixels[name, pictures]
        cost = min(whole, (len(found) + 1) * LONG_SIDE * SHORT_SIDE) if cut else whole
        if entries and spent + cost > PAGE_PIXELS:
            break
        entry, lost = _entry(name, found, original_of(name, found, collection), arms, middle, cut)
        missing += lost
        if entry:
            entries.append(entry)
            spent += cost
    if not entries:
        return None
    data = {
        "arms": [{"name": "original"}, *({"name": arm} for arm in arms)],
        "start": [0, *(1 + arms.index(arm) for arm in dict.fromkeys(first) if arm in arms)],
        "images": entries,
    }
    return ShownPictures(data, _note(len(entries), len(by_image), missing, entries))


def write_sheets(collection: Collection, names: Sequence[str], out: Path) -> None:
    """pictures-<image>.png in `out` for each image with kept pictures: the original, and these curves at one lambda."""
    middle = detailed_lambda(collection.curves, "shown")
    for (image, _), kept in decoded_by_image([collection.named(name) for name in dict.fromkeys(names)]).items():
        found = _together(kept, middle)
        original = original_of(image, found, collection)
        read = [(one, read_kept(one.path)) for one in found]
        sheet = [Picture(one.curve, _figures(one), pixels) for one, pixels in read if pixels is not None]
        if sheet and original is not None and all(one.pixels.shape == original.shape for one in sheet):
            first = Picture("original", plain(image), original)
            comparison_sheet([first, *sheet], out / f"pictures-{file_safe(Path(image).stem)}.png")


def _note(shown: int, images_: int, missing: int, entries: Sequence[dict[str, Any]]) -> str:
    said = []
    if shown < images_:
        said.append(f"{shown} of {images_} pictures are shown")
    if any(entry["cut"] for entry in entries):
        said.append("large pictures are cut to where they differ most")
    if missing:
        said.append(f"{missing} kept pictures are absent or of another size")
    return "; ".join(said)


def decoded_by_image(curves: Sequence[Curve]) -> dict[tuple[str, str], list[Decoded]]:
    """Decoded pictures by image and set of pictures: pictures of one name may be of several sets."""
    found: dict[tuple[str, str], list[Decoded]] = {}
    for curve in curves:
        for point, folder in zip(curve.points, curve.folders, strict=True):
            rows = {row.image: row for row in point.images}
            for name, relative in point.shown.items():
                path = _under(folder, relative)
                if name in rows and path is not None:
                    decoded = Decoded(curve.name, point, rows[name], folder, path)
                    found.setdefault((name, point.pictures), []).append(decoded)
    return found


def original_of(name: str, found: Sequence[Decoded], collection: Collection) -> Pixels | None:
    for folder in dict.fromkeys(one.folder for one in found):
        path = _under(folder, collection.originals.get((folder, name), ""))
        pixels = read_kept(path) if path is not None else None
        if pixels is not None:
            return pixels
    return None


def _under(folder: Path, relative: str) -> Path | None:
    """A path of a result file, if it is one under the file's folder."""
    if not relative or "\0" in relative:
        return None
    path = (folder / relative).resolve()
    return path if path.is_relative_to(folder.resolve()) else None


def read_kept(path: Path) -> Pixels | None:
    try:
        return images.read(path)
    except LicError:  # absent or no picture: counted by the caller
        return None


def _entry(
    name: str, found: Sequence[Decoded], original: Pixels | None, arms: Sequence[str], middle: float | None, cut: bool
) -> tuple[dict[str, Any] | None, int]:
    """One image as the viewer's script has it, and how many of its pictures are left out."""
    read = [(one, read_kept(one.path)) for one in found]
    shape = next((p.shape for p in (original, *(p for _, p in read)) if p is not None), None)
    kept = [(one, pixels) for one, pixels in read if pixels is not None and pixels.shape == shape]
    if not kept or shape is None:
        return None, len(read)
    high, wide = shape[:2]
    sides = (SHORT_SIDE, LONG_SIDE) if wide >= high else (LONG_SIDE, SHORT_SIDE)
    height, width = (min(high, sides[0]), min(wide, sides[1])) if cut else (high, wide)
    top, left = busiest_window([kept[0][1], *(pixels for _, pixels in kept[1:])], height, width)
    window = (slice(top, top + height), slice(left, left + width))
    everything = {id(one): pixels for one, pixels in kept}
    shown = [one for one, _ in kept]
    steps: list[float | None] = [*lambdas([one.point for one in shown])] or [None]
    sets = []
    for lmbda in steps:
        here = {one.curve: (one, everything[id(one)][window]) for one in _together(shown, lmbda)}
        pictures = {
            1 + arms.index(curve): {"src": data_uri(pixels), "figures": _figures(one)}
            for curve, (one, pixels) in here.items()
        }
        compared = [pixels for _, pixels in here.values()]
        if len(compared) == 1 and original is not None:
            compared = [original[window], *compared]
        side = min(START_SIDE, height, width)
        y, x = busiest_window(compared, side, side)
        sets.append({"lambda": "" if lmbda is None else f"{lmbda:g}", "pictures": pictures, "window": [x, y, side]})
    entry = {
        "name": plain(name) + (f" ({width}x{height} at {left}, {top})" if (height, width) != (high, wide) else ""),
        "width": width,
        "height": height,
        "cut": (height, width) != (high, wide),
        "first": steps.index(middle) if middle in steps else 0,
        "original": {"src": data_uri(original[window]), "figures": ""} if original is not None else None,
        "sets": sets,
    }
    return entry, len(read) - len(kept)


def _used(kept: Sequence[Decoded]) -> list[Decoded]:
    """The pictures without those of classic codecs that are beside none of a learned codec."""
    steps: list[float | None] = [*lambdas([one.point for one in kept])] or [None]
    used = {id(one) for lmbda in steps for one in _together(kept, lmbda)}
    return [one for one in kept if id(one) in used]


def _together(kept: Sequence[Decoded], lmbda: float | None) -> list[Decoded]:
    """The pictures of one lambda, and of each classic codec that of the nearest rate; without any, its middle one."""
    found = [one for one in kept if one.point.lmbda == lmbda and lmbda is not None]
    rates = [one.row.bpp for one in found] or [median_low(one.row.bpp for one in kept)]
    by_curve: dict[str, list[Decoded]] = {}
    for one in kept:
        if one.point.lmbda is None:
            by_curve.setdefault(one.curve, []).append(one)
    return found + [min(own, key=lambda one: abs(one.row.bpp - fmean(rates))) for own in by_curve.values()]


def _figures(one: Decoded) -> str:
    return f"{one.row.bpp:.3f} bpp, {one.row.psnr:.2f} dB"


def data_uri(pixels: Pixels) -> str:
    """The picture without loss, as the address of itself."""
    written = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(written, "WEBP", lossless=True, quality=25, method=1)
    return f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}"
