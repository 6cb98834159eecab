"""`lic-dist bench progressive`: a progressive file, cut, against files of dead-zone SQ at each rate.

Both code real bytes with one model and its own Gaussians: `progressive` is one file a picture, cut at the last unit
that lies within each of CUTS of its bytes; `dead zone` a file for each step of SEPARATE, whose xi and shift were chosen
for it on training photos. The bits are those of whole files, heads and checksums included. BD-rates are over the
qualities that both have: those of the cuts, whose rates span four to one. Pictures with z of a quarter are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from lic_dist.benchmarks.data import BASE, pictures
from lic_dist.benchmarks.tables import machine, table
from lic_dist.building.records import analytic_record
from lic_dist.building.threads import one_thread
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.progressive import ProgressiveCodec
from lic_dist.codec.records import local_record, preferred_quantizer
from lic_dist.data import images
from lic_dist.evaluation.metrics import ms_ssim8, psnr8
from lic_dist.evaluation.results import Figures, ImageResult, Point
from lic_dist.intervals import mean_interval
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.progress import Progress
from lic_dist.reporting.bd import bd_rate, image_bd_rates, rate_change
from lic_dist.reporting.curves import Curve

CUTS = tuple(0.25 ** (number / 5) for number in range(6))
FINE, COARSE = (0.4, 0.1), (0.35, 0.1)  # xi, shift
SEPARATE = {0.8: FINE, 1.0: FINE, 1.3: FINE, 1.7: COARSE, 2.2: COARSE, 2.9: COARSE, 3.8: COARSE, 5.0: COARSE}
QUALITIES = ("psnr", "ms-ssim")
Image = NDArray[np.uint8]
Coded = tuple[int, Image]  # bytes, and the picture that they decode to


def bench(
    names: Sequence[str], folder: Path | None, chart: Path | None, quick: bool, against: str | None = None
) -> dict[str, Any]:
    """Code every picture of a folder, by default scikit-image's, with each model, by default the shipped one; print
    BD-rates, and draw the change of rate over PSNR into a file.

    The dead zone is each model's own, or that of one, `against`. `quick` takes two pictures. Raises UsageError for an
    unknown model, LicError for a missing folder or a model that is no hyperprior.
    """
    taken = {path.name: images.read(path) for path in pictures(folder)[: 2 if quick else None]}
    figures: dict[str, Any] = {"machine": machine(), "quick": quick, "models": {}}
    drawn = []
    reference = separate(checkpoints.load(against), taken, f"{against}, dead zone") if against else None
    for name in names or (BASE,):
        loaded = checkpoints.load(name)
        zone = reference or separate(loaded, taken, f"{name}, dead zone")
        curve = cut(loaded, taken, name)
        kept = {row.image for row in curve.points[0].images}
        figures["models"][name] = compared(_only(zone, kept), curve)
        figures["pictures"] = len(kept)
        drawn += [{"model": name, **row} for row in figures["models"][name]["change"]]
    console = Console()
    console.print(_table(figures))
    if chart is not None:
        _draw(drawn, chart)
    return figures


@one_thread()
def separate(loaded: Checkpoint, taken: dict[str, Image], title: str) -> Curve:
    """Return the curve of dead-zone SQ over pictures."""
    record = local_record(loaded, preferred_quantizer(loaded, progressive=True))
    codecs = []
    for step, (rounding, shift) in SEPARATE.items():
        made = analytic_record(loaded, "deadzone", 1, step, rounding, record.weights)
        codecs.append(ImageCodec(loaded.model, replace(made, z_tables=record.z_tables, shift=shift)))
    rows: list[list[ImageResult]] = [[] for _ in SEPARATE]
    with Progress(title, len(taken), "picture") as bar:
        for name, picture in taken.items():
            for number, codec in enumerate(codecs):
                data = codec.encode(picture).data
                rows[number].append(row_of(name, picture, len(data), codec.decode(data)))
            bar.advance()
    return curve_of("dead zone", rows, tuple(SEPARATE))


@one_thread()
def cut(loaded: Checkpoint, taken: dict[str, Image], title: str) -> Curve:
    """Return the curve of cut progressive files over pictures, but for those with z of a quarter of the file."""
    codec = ProgressiveCodec(loaded.model, local_record(loaded, preferred_quantizer(loaded, progressive=True)))
    rows: list[list[ImageResult]] = [[] for _ in CUTS]
    with Progress(title, len(taken), "picture") as bar:
        for name, picture in taken.items():
            coded = codec.encode(picture)
            if coded.ends[1] <= CUTS[-1] * len(coded.data):
                for number, share in enumerate(CUTS):
                    size = max(end for end in coded.ends if end <= share * len(coded.data))
                    rows[number].append(row_of(name, picture, size, codec.decode(coded.data[:size])))
            bar.advance()
    return curve_of("progressive", rows, CUTS)


def _only(curve: Curve, kept: set[str]) -> Curve:
    """Return the curve over some of its images."""
    rows = [[row for row in point.images if row.image in kept] for point in curve.points]
    return curve_of(curve.name, rows, [point.lmbda or 0.0 for point in curve.points])


def row_of(name: str, picture: Image, size: int, decoded: Image) -> ImageResult:
    height, width = picture.shape[:2]
    bpp = 8 * size / (height * width)
    quality = psnr8(picture, decoded), ms_ssim8(picture, decoded)
    return ImageResult(name, height, width, bpp, *quality, bpp, float("nan"), 0.0, 0.0, 0.0)


def curve_of(name: str, rows: Sequence[list[ImageResult]], places: Sequence[float]) -> Curve:
    """Return the curve of the images at each place, which stands for a lambda."""
    points = [Point(name, name, place, tuple(images)) for place, images in zip(places, rows, strict=True)]
    points.sort(key=lambda point: point.figures.bpp)
    return Curve(name, tuple(point.figures for point in points), tuple(points))


def compared(separate: Curve, progressive: Curve) -> dict[str, Any]:
    """Return BD-rates of cut files against separate ones, in percent, and the curves."""
    found: dict[str, Any] = {}
    for quality in QUALITIES:
        by_image = image_bd_rates(separate, progressive, quality=quality)
        if by_image:
            interval = mean_interval(list(by_image.values()))
            found[quality] = {
                "bd_rate": bd_rate(separate, progressive, quality=quality),
                "images": interval.mean,
                "low": interval.low,
                "high": interval.high,
            }
    changes = [rate_change(*one)[1] for one in zip(_by_image(separate), _by_image(progressive), strict=True)]
    places = np.linspace(0, 1, len(changes[0]))
    found["change"] = [
        {"place": float(place), "change": float(one)}
        for place, one in zip(places, np.mean(changes, axis=0), strict=True)
    ]
    for curve in (separate, progressive):
        found[curve.name] = [{"bpp": one.bpp, "psnr": one.psnr, "ms_ssim": one.ms_ssim} for one in curve.figures]
    found["by_image"] = {quality: image_bd_rates(separate, progressive, quality=quality) for quality in QUALITIES}
    return found


def _by_image(curve: Curve) -> list[Curve]:
    return [
        Curve(row.image, tuple(Figures(one.bpp, one.psnr, one.ms_ssim) for one in rows))
        for row, rows in ((rows[0], rows) for rows in zip(*(point.images for point in curve.points), strict=True))
    ]


def _table(figures: dict[str, Any]) -> Any:
    rows = []
    for name, of_model in figures["models"].items():
        rates = [one["bpp"] for one in of_model["progressive"]]
        cells = [name, f"{rates[0]:.3f} to {rates[-1]:.3f}"]
        for quality in QUALITIES:
            one = of_model.get(quality)
            cells.append(f"{one['images']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]" if one else "")
        rows.append(cells)
    title = f"BD-rate in percent of cut progressive files against dead-zone SQ, {figures['pictures']} pictures"
    return table(title, ("model", "bpp of the cuts", "PSNR", "MS-SSIM"), rows)


def _draw(rows: list[dict[str, Any]], chart: Path) -> None:
    import altair as alt

    from lic_dist import drawing

    axes = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("place:Q", title="PSNR: from that of the file's first quarter (0) to the whole file's (1)"),
        y=alt.Y("change:Q", title="change of rate [%], mean over pictures"),
        color=alt.Color("model:N", title=None, scale=alt.Scale(range=list(drawing.COLOURS))),
    )
    drawing.write(drawing.panel(axes.mark_line(), "A cut progressive file against dead-zone SQ"), chart)
