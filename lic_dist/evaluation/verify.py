"""Check an archive: decode every bitstream with the checkpoint that it names, and compare with the figures it states.

Bytes, rates and sizes are compared exactly. A decoded picture is the stored one by the digest of its pixels; since g_s
computes in floats, another machine may give a pixel its next level, so that with the originals at hand the figures
decide: PSNR within 0.01 dB, another metric within ten units of the last digit that tables show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lic_dist.codec.block_codec import BlockCodec, of_bytes
from lic_dist.codec.blocks import Blocks, is_in_blocks
from lic_dist.codec.container import OVERHEAD, Container
from lic_dist.data import images
from lic_dist.data.photo_files import printable
from lic_dist.data.source import PhotoSource
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError
from lic_dist.evaluation.archive import Archive, Model, Stream, Streams
from lic_dist.evaluation.classic import CODECS, ClassicCodec
from lic_dist.evaluation.in_blocks import rates
from lic_dist.evaluation.metrics import METRICS, distortion, require
from lic_dist.evaluation.results import ImageResult, Point
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.names import label, split_gain, with_gain
from lic_dist.models.parts import decoder_digest, entropy_digest
from lic_dist.progress import Progress
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.text import counted

SHOWN = 20  # differences in a table
SAME = 1e-9  # dB: PSNR of equal pictures
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Difference:
    """A figure of a picture that is not the stored one."""

    point: str
    image: str
    figure: str
    stored: str
    found: str


@dataclass
class Verified:
    """What was found: differences, points with the figures of now, how many pictures have pixels of another level."""

    path: Path
    streams: int = 0
    differences: list[Difference] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    near: int = 0

    def require_equal(self) -> None:
        """Raise LicError where anything differs."""
        if self.differences:
            wrong = len({(one.point, one.image) for one in self.differences})
            raise LicError(f"{self.path}: {wrong} of {counted(self.streams, 'bitstream')} differ from what is stated")

    @property
    def line(self) -> str:
        """What is said where nothing differs."""
        near = f", {self.near} with pixels of another last level" if self.near else ""
        figures = "figures" if self.points else "bytes, sizes and pixels"
        return f"{self.path}: {counted(self.streams, 'bitstream')} give the stated {figures}{near}"

    def print_differences(self) -> None:
        """Print a table of the first differences."""
        if not self.differences:
            return
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in ("point", "image", "figure", "stated", "found"):
            table.add_column(head, overflow="fold")
        for one in self.differences[:SHOWN]:
            cells = one.point, one.image, one.figure, one.stored, one.found
            table.add_row(*(escape(printable(cell)) for cell in cells))
        Console().print(table)
        if len(self.differences) > SHOWN:
            print(f"and {len(self.differences) - SHOWN} more")


def tolerance(metric: str) -> float:
    """Return how far a metric may be from the stored figure where pixels differ by a level."""
    return float(10.0 ** (1 - METRICS[metric].digits))


def verify(path: Path, folder: str | None = None, given: Sequence[str] = ()) -> Verified:
    """Decode all bitstreams of an archive and compare; `folder` has the originals, `given` names checkpoints.

    Without originals, a decoded picture has to have the stored pixels.

    Raises:
        LicError: no archive, an altered one, a checkpoint that is missing or another, or an original that is.
        UsageError: a metric's package that is missing.
    """
    with Archive.open(path) as archive, TemporaryDirectory() as temporary:
        source = open_source(folder).absolute() if folder is not None else None
        if source is not None:
            _require_known(archive)
        found = Verified(path, streams=sum(len(point.images) for point in archive.points))
        models = _Models(archive, Path(temporary), given)
        with Progress("decoding", found.streams, "image") as bar:
            for point, streams in zip(archive.points, archive.manifest.points, strict=True):
                decoder = _Decoder.of(point, streams, archive, models)
                rows = []
                for row, stream in zip(point.images, streams.streams, strict=True):
                    rows.append(_checked(found, decoder, row, stream, archive, source))
                    bar.advance()
                if source is not None:
                    found.points.append(replace(point, images=tuple(rows)))
    return found


def _require_known(archive: Archive) -> None:
    """Raise an error where a metric of the stored figures is unknown here, or its package is missing."""
    names = {name for point in archive.points for row in point.images for name in row.metrics}
    if unknown := names - set(METRICS):
        raise LicError(f"{archive.path} has figures of '{printable(min(unknown))}', which is no metric here")
    require(names)


class _Models:
    """The checkpoints of an archive, the last one loaded: of those that are given, packed in it, or of the name."""

    def __init__(self, archive: Archive, folder: Path, given: Sequence[str]) -> None:
        self.archive, self.folder, self.given = archive, folder, given
        self.loaded: tuple[Model, Checkpoint] | None = None

    def load(self, model: Model) -> Checkpoint:
        """Return a checkpoint of the model's digests. Raises LicError where none of these has them."""
        if self.loaded is None or self.loaded[0] != model:
            self.loaded = None  # free it first
            self.loaded = model, self._find(model)
        return self.loaded[1]

    def _find(self, model: Model) -> Checkpoint:
        if model.architecture and ":" in model.architecture:
            raise LicError(
                f"{self.archive.path} has bitstreams of {printable(model.architecture)}, a class that is not imported "
                "because a file names it"
            )
        for name in self.given:
            loaded = _load(name, model)
            if _digests(loaded) == model.digests:
                return loaded
        if model.member:
            at = self.folder / "checkpoint.pth.tar"
            at.write_bytes(self.archive.read(model.member))
            name = with_gain(str(at), split_gain(model.checkpoint)[1])
        else:
            name = model.checkpoint
        loaded = _load(name, model)
        if _digests(loaded) != model.digests:
            said = f"{self.archive.path} was made with another model than {printable(model.checkpoint)} is"
            raise LicError(said, hint="name the checkpoint it was made with: --checkpoint PATH")
        return loaded


def _load(name: str, model: Model) -> Checkpoint:
    try:
        return checkpoints.load(name, model.architecture, model.lmbda, model.options)
    except LicError as error:
        raise LicError(printable(error.message), hint="name the checkpoint with --checkpoint PATH") from None


def _digests(loaded: Checkpoint) -> tuple[str, str]:
    return entropy_digest(loaded.model), decoder_digest(loaded.model)


class _Decoder:
    """Decodes the bitstreams of one point."""

    def __init__(self, name: str, codec: BlockCodec | ClassicCodec) -> None:
        self.name, self.codec = name, codec

    @classmethod
    def of(cls, point: Point, streams: Streams, archive: Archive, models: _Models) -> _Decoder:
        """Return that of a point. Raises LicError for a codec that there is not, or another record or checkpoint."""
        name = f"{label(point.checkpoint)}, {point.quantizer}"
        if point.lmbda is None:
            if point.quantizer not in CODECS:
                raise LicError(f"{archive.path} has a point of '{printable(point.quantizer)}', which is no codec here")
            return cls(name, ClassicCodec(point.quantizer, CODECS[point.quantizer].ladder[0]))
        if streams.model is None or not streams.record:
            raise LicError(f"{archive.path} says no model or record of {printable(name)}")
        record = QuantizerRecord.from_json(archive.read(streams.record).decode("utf-8", "replace"))
        if record.digest != point.record:
            raise LicError(f"{archive.path} is altered: {printable(name)} has another record")
        loaded = models.load(streams.model)
        return cls(name, BlockCodec(loaded.model, record, loaded.boundary))

    def decode(self, data: bytes, row: ImageResult) -> tuple[Pixels, dict[str, float]]:
        """Return the picture, and the rates that bytes of this length have. Raises LicError: cannot be decoded."""
        pixels = row.height * row.width
        if isinstance(self.codec, ClassicCodec):
            picture = self.codec.decode(data, (row.height, row.width))
            return picture, {"bpp": 8 * len(data) / pixels, "container_bpp": 0.0}
        head = Blocks.read(of_bytes(data)) if is_in_blocks(data) else Container.unpack(data)
        if (head.height, head.width) != (row.height, row.width):  # before memory for it is taken
            raise LicError(f"it has {head.width}x{head.height} pixels")
        if isinstance(head, Blocks):
            return self.codec.decode(of_bytes(data)), rates(head, len(data))
        found = {"bpp": 8 * (len(data) - OVERHEAD) / pixels, "container_bpp": 8 * OVERHEAD / pixels}
        return self.codec.alone.decode(data), found


def _checked(
    found: Verified, decoder: _Decoder, row: ImageResult, stream: Stream, archive: Archive, source: PhotoSource | None
) -> ImageResult:
    """Decode and compare one picture, note what differs; return its row with the figures of now."""

    def differs(figure: str, stored: object, now: object) -> None:
        found.differences.append(Difference(decoder.name, row.image, figure, str(stored), str(now)))

    data = archive.read(stream.member, stream.sha256)
    try:
        picture, figures = decoder.decode(data, row)
    except LicError as error:
        differs("picture", f"{row.width}x{row.height}", error.message)
        return row
    if picture.shape != (row.height, row.width, 3):
        differs("picture", f"{row.width}x{row.height}", f"{picture.shape[1]}x{picture.shape[0]}")
        return row
    for name, value in figures.items():
        if value != getattr(row, name):
            differs(name, getattr(row, name), value)
    same = images.pixel_digest(picture) == stream.decoded
    if source is None:
        if not same:
            differs("pixels", stream.decoded[:12], f"{images.pixel_digest(picture)[:12]}; --images compares PSNR")
        return row
    stated = {name: value for name, value in row.quality.items() if value is not None}
    measured = distortion(stated, _original(source, stream), picture)
    now = replace(row, bpp=figures["bpp"], container_bpp=figures["container_bpp"], **measured)
    for name, value in stated.items():
        if not _near(name, value, now.quality[name], same):
            differs(name, value, now.quality[name])
    found.near += not same
    return now


def _near(metric: str, stored: float, now: float | None, same: bool) -> bool:
    if now is None or math.isinf(stored) or math.isinf(now):
        return stored == now
    return abs(stored - now) <= (SAME if same and metric == "psnr" else tolerance(metric))


def _original(source: PhotoSource, stream: Stream) -> Pixels:
    """Return the original of a bitstream. Raises LicError where it is missing or another picture."""
    picture = images.picture(source, stream.image)
    if images.pixel_digest(picture) != stream.original:
        raise LicError(f"{printable(stream.image)} in {source.where} is another picture than the one that was coded")
    return picture
