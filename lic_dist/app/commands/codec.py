"""`lic-dist encode` and `decode`: code one picture and decode it, without the cache, the engines or training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from lic_dist.app.commands.options import Architecture, Lmbda, PackFile, packed
from lic_dist.errors import LicError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lic_dist.codec.block_codec import BlockCodec
    from lic_dist.codec.blocks import Read
    from lic_dist.codec.codec import ImageCodec
    from lic_dist.codec.edges import Part

Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Of the CPU; the file and the picture do not depend on them. Default: one a core."),
]
LARGE = 4 << 20  # pixels; coding shows its progress for larger pictures
_LONGEST = 1 << 62  # bytes, of any file
LOSSLESS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}  # Pillow's format by suffix


def encode(
    image: Annotated[Path, typer.Argument(help="The picture; a grey one stays grey.")],
    file: Annotated[Path, typer.Argument(help="The bitstream to write.")],
    model: Annotated[str, typer.Option(help="A checkpoint, or a name of `lic-dist models`.")],
    quantizer: Annotated[
        str | None,
        typer.Option(
            help="sq, a name that the checkpoint carries, or a record; default: its TCQ of most states, else sq."
        ),
    ] = None,
    pack: PackFile = None,
    architecture: Architecture = None,
    lmbda: Lmbda = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Entropy parameters in integers: decodes on any machine.")
    ] = False,
    progressive: Annotated[
        bool, typer.Option("--progressive", help="A file of which every beginning decodes; of a quantizer takes S_c.")
    ] = False,
    blocks: Annotated[
        int | None,
        typer.Option(help="Side in pixels of blocks that decode alone: regions, and blocks side by side. 256, say."),
    ] = None,
    boundary: Annotated[
        bool, typer.Option("--boundary/--no-boundary", help="Of --blocks: whether their edges are to be mended.")
    ] = True,
    threads: Threads = None,
) -> None:
    """Code one picture."""
    from lic_dist.codec.block_codec import BlockCodec
    from lic_dist.codec.blocks import Layout
    from lic_dist.codec.codec import ImageCodec
    from lic_dist.codec.progressive import ProgressiveCodec
    from lic_dist.codec.records import local_record, preferred_quantizer
    from lic_dist.data import images
    from lic_dist.models import checkpoint

    if file.exists() and image.exists() and file.samefile(image):
        raise UsageError(f"encode would overwrite {image}", hint="give the bitstream another name")
    if blocks is not None and progressive:
        raise UsageError("--blocks and --progressive are two kinds of files", hint="give one of them")
    with whole_file(file) as out:
        pixels = images.read(image, keep_grey=True)
        loaded = checkpoint.load(packed(model, pack), architecture, lmbda)
        checkpoint.check_agrees(loaded.spec, architecture=architecture, lmbda=lmbda)
        name = quantizer or preferred_quantizer(loaded, progressive)
        record = local_record(loaded, name)
        if blocks is not None:
            in_blocks = BlockCodec(loaded.model, record, loaded.boundary if boundary else None, deterministic, threads)
            height, width = pixels.shape[:2]
            count = Layout(height, width, max(1, blocks)).count
            with _block_progress(in_blocks, "encoding", (height, width), count):
                data = in_blocks.encode(pixels, blocks).data
        else:
            kind = ProgressiveCodec if progressive else ImageCodec
            codec = kind(loaded.model, record, deterministic, threads)
            with _tile_progress(codec, "encoding", *pixels.shape[:2]):
                data = codec.encode(pixels).data
        out.write(data)
    bpp = 8 * len(data) / (pixels.shape[0] * pixels.shape[1])
    note = "" if quantizer or name != "sq" else ": the checkpoint carries no TCQ"
    how = f"progressive, with the S_c of {name}" if progressive else f"with {name}{note}"
    if blocks is not None:
        mended = "mended edges" if in_blocks.boundary_id else "edges as they are"
        how += f", in blocks of {blocks}, {mended}"
    typer.echo(f"{file}: {len(data)} bytes, {bpp:.4f} bpp, {how}")


def decode(
    file: Annotated[str, typer.Argument(help="The bitstream; one in blocks may be a URL, of which parts are read.")],
    image: Annotated[Path, typer.Argument(help=f"The picture to write: {' '.join(LOSSLESS)}.")],
    model: Annotated[str, typer.Option(help="The checkpoint it was made with.")],
    quantizer: Annotated[
        str | None, typer.Option(help="A record that the checkpoint does not carry; default: what the file states.")
    ] = None,
    pack: PackFile = None,
    architecture: Architecture = None,
    lmbda: Lmbda = None,
    size: Annotated[
        int | None,
        typer.Option("--bytes", min=1, help="Of a progressive file: decode its first so many alone."),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Of a progressive file: decode its first quarter alone.")
    ] = False,
    region: Annotated[
        str | None,
        typer.Option(metavar="X,Y,W,H", help="Of a file in blocks: these pixels alone, from what they need of it."),
    ] = None,
    boundary: Annotated[
        bool, typer.Option("--boundary/--no-boundary", help="Of a file in blocks: whether their edges are mended.")
    ] = True,
    threads: Threads = None,
) -> None:
    """Decode one picture; of a progressive file that was cut, what is there."""
    from lic_dist.codec import open_codec, open_decoder
    from lic_dist.codec.block_codec import reading
    from lic_dist.codec.blocks import is_in_blocks
    from lic_dist.codec.container import Container
    from lic_dist.codec.progressive import preview_size
    from lic_dist.codec.units import Progressive, is_progressive

    suffix = image.suffix.lower()
    if suffix not in LOSSLESS:
        raise UsageError(
            f"decode does not write {suffix or 'files without a suffix'}: what it writes is lossless",
            hint=f"name it {image.stem or 'picture'}.png; also {' '.join(list(LOSSLESS)[1:])}",
        )
    model = packed(model, pack)
    with whole_file(image) as out, reading(file) as read:
        if is_in_blocks(read(0, 4)):
            if size or preview:
                raise UsageError(f"{file} is no progressive file", hint="of a file in blocks: --region")
            chosen = None if region is None else _region(region)
            pixels, told = _decode_blocks(read, chosen, boundary, (model, quantizer, architecture, lmbda), threads)
            _write(pixels, out, suffix)
            typer.echo(f"{image}: {told}")
            return
        if region is not None:
            raise UsageError(f"{file} is not in blocks: it decodes whole", hint="make one that is: encode --blocks 256")
        data = read(0, _LONGEST)
        progressive = is_progressive(data)
        if (size or preview) and not progressive:
            raise UsageError(f"{file} is no progressive file: it decodes whole", hint="make one: encode --progressive")
        if size and preview:
            raise UsageError("--bytes and --preview are two ways to cut a file", hint="give one of them")
        data = data[: preview_size(data) if preview else size]
        if quantizer is None:
            codec = open_decoder(data, model, architecture, lmbda)
        else:
            codec = open_codec(model, quantizer, architecture, lmbda, progressive=progressive)
        codec.threads = threads or codec.threads
        container = Progressive.unpack(data) if progressive else Container.unpack(data)
        with _tile_progress(codec, "decoding", container.height, container.width):
            pixels = codec.decode(data)
        _write(pixels, out, suffix)
    units = ""
    if isinstance(container, Progressive):
        units = (
            f": {len(container.units)} of {len(container.ends) - 1} units, {len(data)} of {container.ends[-1]} bytes"
        )
    typer.echo(f"{image}{units}")


def _decode_blocks(
    read: Read,
    region: Part | None,
    mended: bool,
    opened: tuple[str, str | None, str | None, float | None],
    threads: int | None,
) -> tuple[NDArray[np.uint8], str]:
    """Return a picture in blocks, or a region of it, and what was read for it; `opened` are a decoder's arguments."""
    from lic_dist.codec.block_codec import open_block_decoder
    from lic_dist.codec.blocks import Blocks

    codec, head = open_block_decoder(read, *opened), Blocks.read(read)
    codec.threads = threads or codec.threads
    count, size = codec.count(head, region, mended)
    with _block_progress(codec, "decoding", region.shape if region else head.shape[:2], count):
        pixels = codec.decode(read, region, mended)
    return pixels, f"{count} of {head.layout.count} blocks, {size} of {head.begins[-1]} bytes"


def _region(text: str) -> Part:
    """Return the region that "x,y,w,h" stands for. Raises UsageError where it stands for none."""
    from lic_dist.codec.edges import Part

    numbers = [int(one) for one in text.split(",") if one.strip().isdecimal()]
    if len(numbers) != 4 or text.count(",") != 3:
        raise UsageError(f"--region {text} is no region", hint="x,y,w,h in pixels, such as 0,0,640,480")
    x, y, width, height = numbers
    return Part(slice(y, y + height), slice(x, x + width))


def _write(pixels: NDArray[np.uint8], out: BinaryIO, suffix: str) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(out, LOSSLESS[suffix])


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that appears under its name only when it is whole and the block ends without an error.

    Raises:
        LicError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays; its target is written
    partial = path.with_name(f".lic-dist.{os.getpid()}.partial")
    try:
        if path.exists() and not path.is_file():
            raise LicError(f"cannot write {path}: it is not a plain file", hint="give another name")
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except BaseException as error:  # raised again: no half of a file stays
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(path), str(partial)):
            hint = "is its folder there, is there room?"
            raise LicError(f"cannot write {path}: {error.strerror}", hint) from None
        raise


@contextmanager
def _block_progress(codec: BlockCodec, title: str, shape: tuple[int, ...], count: int) -> Iterator[None]:
    """Show the progress of coding so many blocks, if the picture has more than LARGE pixels."""
    if shape[0] * shape[1] <= LARGE:
        yield
        return
    from lic_dist.progress import Progress

    with Progress(title, count, "block") as bar:
        codec.advance = bar.advance
        yield


@contextmanager
def _tile_progress(codec: ImageCodec, title: str, height: int, width: int) -> Iterator[None]:
    """Show the progress of coding a picture in tiles, if it has more than LARGE pixels."""
    if height * width <= LARGE:
        yield
        return
    from lic_dist.progress import Progress

    with Progress(title, codec.part_count(height, width, title == "encoding"), "part") as bar:
        codec.advance = bar.advance
        yield
