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
    from lic_dist.codec.codec import ImageCodec

Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Of the CPU; the file and the picture do not depend on them. Default: one a core."),
]
LARGE = 4 << 20  # pixels; coding shows its progress for larger pictures
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
    threads: Threads = None,
) -> None:
    """Code one picture."""
    from lic_dist.codec.codec import ImageCodec
    from lic_dist.codec.progressive import ProgressiveCodec
    from lic_dist.codec.records import local_record, preferred_quantizer
    from lic_dist.data import images
    from lic_dist.models import checkpoint

    if file.exists() and image.exists() and file.samefile(image):
        raise UsageError(f"encode would overwrite {image}", hint="give the bitstream another name")
    with whole_file(file) as out:
        pixels = images.read(image, keep_grey=True)
        loaded = checkpoint.load(packed(model, pack), architecture, lmbda)
        checkpoint.check_agrees(loaded.spec, architecture=architecture, lmbda=lmbda)
        name = quantizer or preferred_quantizer(loaded)
        kind = ProgressiveCodec if progressive else ImageCodec
        codec = kind(loaded.model, local_record(loaded, name), deterministic, threads)
        with _tile_progress(codec, "encoding", *pixels.shape[:2]):
            data = codec.encode(pixels).data
        out.write(data)
    bpp = 8 * len(data) / (pixels.shape[0] * pixels.shape[1])
    note = "" if quantizer or name != "sq" else ": the checkpoint carries no TCQ"
    how = f"progressive, with the S_c of {name}" if progressive else f"with {name}{note}"
    typer.echo(f"{file}: {len(data)} bytes, {bpp:.4f} bpp, {how}")


def decode(
    file: Annotated[Path, typer.Argument(help="The bitstream.")],
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
    threads: Threads = None,
) -> None:
    """Decode one picture; of a progressive file that was cut, what is there."""
    from lic_dist.codec import open_codec, open_decoder
    from lic_dist.codec.container import Container
    from lic_dist.codec.progressive import preview_size
    from lic_dist.codec.units import Progressive, is_progressive

    suffix = image.suffix.lower()
    if suffix not in LOSSLESS:
        raise UsageError(
            f"decode does not write {suffix or 'files without a suffix'}: what it writes is lossless",
            hint=f"name it {image.stem or 'picture'}.png; also {' '.join(list(LOSSLESS)[1:])}",
        )
    with whole_file(image) as out:
        if file.exists() and not file.is_file():
            raise LicError(f"cannot read {file}: it is not a plain file")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise LicError(f"cannot read {file}: {error.strerror}") from None
        progressive, model = is_progressive(data), packed(model, pack)
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
        from PIL import Image

        Image.fromarray(pixels).save(out, LOSSLESS[suffix])
    units = ""
    if isinstance(container, Progressive):
        units = (
            f": {len(container.units)} of {len(container.ends) - 1} units, {len(data)} of {container.ends[-1]} bytes"
        )
    typer.echo(f"{image}{units}")


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
def _tile_progress(codec: ImageCodec, title: str, height: int, width: int) -> Iterator[None]:
    """Show the progress of coding a picture in tiles, if it has more than LARGE pixels."""
    if height * width <= LARGE:
        yield
        return
    from lic_dist.progress import Progress

    with Progress(title, codec.part_count(height, width, title == "encoding"), "part") as bar:
        codec.advance = bar.advance
        yield
