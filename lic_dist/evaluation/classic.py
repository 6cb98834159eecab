"""Classic codecs, most of them as Pillow and its plugins have them: pictures to whole files and back, at a quality.

Files hold no metadata. Each codec has a ladder of qualities, 1 to 2 dB of PSNR apart on photographs, from some 0.1 to 3
bits per pixel. What is fixed besides: JPEG has optimised Huffman tables; WebP its slowest method (6); AVIF is libaom's
at speed 6 on one thread, tuned for PSNR or, `avif iq`, as libaom tunes still pictures for viewers; JPEG XL has effort
7; JPEG 2000 is a bare codestream of the irreversible transform, its quality a rate in bits per pixel. BPG is made by
programs of its own, in 4:2:0 or 4:4:4, and its quality is a QP, of which less is better.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, features

from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation import bpg

PERCENT = (0, 100)
BITS = 24  # of a pixel


@dataclass(frozen=True)
class Format:
    """What codecs of one format have in common; `library` names it with its version, once `present`. One that is not
    Pillow's is a `program`.
    """

    name: str
    present: Callable[[], bool]
    library: Callable[[], str]
    install: str = "pip install -U 'pillow>=11.3': its wheels have it"
    program: bool = False


def _has(feature: str) -> Callable[[], bool]:
    return lambda: bool(features.check(feature))


def _avif_library() -> str:
    from PIL import _avif

    aom = next((one for one in _avif.codec_versions().split(", ") if one.startswith("aom")), "aom")
    return f"libavif {features.version('avif')}, {aom.replace(' [enc]:', ' ').replace(' [enc/dec]:', ' ')}"


def _jpeg_library() -> str:
    turbo = features.version("libjpeg_turbo")
    return f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"


JPEG = Format("JPEG", _has("jpg"), _jpeg_library)
WEBP = Format("WEBP", _has("webp"), lambda: f"libwebp {features.version('webp')}")
AVIF = Format("AVIF", _has("avif"), _avif_library)
JPEG2000 = Format("JPEG2000", _has("jpg_2000"), lambda: f"OpenJPEG {features.version('jpg_2000')}")
JXL = Format(
    "JXL",
    lambda: find_spec("pillow_jxl") is not None,
    lambda: f"pillow-jxl-plugin {version('pillow-jxl-plugin')}",
    "pip install pillow-jxl-plugin",
)
BPG = Format("BPG", bpg.present, bpg.library, "bpgenc and bpgdec on the PATH: https://bellard.org/bpg", program=True)


@dataclass(frozen=True)
class Classic:
    """A codec: its format, the qualities to choose from, from worst to best, what is given besides the quality."""

    format: Format
    ladder: tuple[float, ...]
    options: Mapping[str, Any]
    limits: tuple[float, float] = PERCENT
    knob: str = "quality"

    def settings(self, quality: float) -> dict[str, Any]:
        """Return what Pillow's `save`, or the program, is given."""
        if self.format is JPEG2000:
            return {**self.options, "quality_mode": "rates", "quality_layers": [BITS / quality]}
        return {"q" if self.format.program else "quality": int(quality), **self.options}

    @property
    def versions(self) -> str:
        """Pillow's version and the library's, or the program's."""
        return f"{'' if self.format.program else f'Pillow {PIL.__version__}, '}{self.format.library()}"

    def require_quality(self, quality: float) -> None:
        """Raise ValueError, which says what there is, for a quality that the codec does not have."""
        low, high = self.limits
        whole = self.format is not JPEG2000
        if not low <= quality <= high or (whole and quality != int(quality)):
            raise ValueError(f"{low:g} to {high:g}{', whole numbers' if whole else ''}")


_QUALITIES = (2, 5, 8, 12, 18, 26, 36, 50, 64, 76, 84, 90, 94, 97)
_AVIF = {"speed": 6, "codec": "aom", "max_threads": 1, "autotiling": False}
_AVIF_LADDER = tuple(range(5, 96, 5))
_QPS = tuple(range(49, 9, -3))

CODECS = {
    "jpeg": Classic(JPEG, _QUALITIES, {"subsampling": "4:2:0", "optimize": True}),
    "jpeg 4:4:4": Classic(JPEG, _QUALITIES, {"subsampling": "4:4:4", "optimize": True}),
    "webp": Classic(WEBP, (0, 3, 8, 15, 25, 35, 47, 60, 74, 82, 88, 92, 96), {"method": 6}),
    "avif": Classic(AVIF, _AVIF_LADDER, {"subsampling": "4:2:0", **_AVIF, "advanced": {"tune": "psnr"}}),
    "avif 4:4:4": Classic(AVIF, _AVIF_LADDER, {"subsampling": "4:4:4", **_AVIF, "advanced": {"tune": "psnr"}}),
    "avif iq": Classic(AVIF, _AVIF_LADDER, {"subsampling": "4:2:0", **_AVIF, "advanced": {"tune": "iq"}}),
    "jxl": Classic(JXL, (5, 12, 20, 30, 42, 54, 64, 72, 80, 85, 90, 93, 95, 97), {"effort": 7, "num_threads": 1}),
    "jpeg2000": Classic(
        JPEG2000,
        (0.06, 0.08, 0.1, 0.13, 0.17, 0.22, 0.29, 0.38, 0.5, 0.65, 0.85, 1.1, 1.4, 1.8, 2.4, 3.1),
        {"irreversible": True, "mct": 1, "no_jp2": True},
        (0.01, BITS),
        "bpp",
    ),
    "bpg": Classic(BPG, _QPS, {"f": "420"}, (0, 51), "QP"),
    "bpg 4:4:4": Classic(BPG, _QPS, {"f": "444"}, (0, 51), "QP"),
}
"""By the name that `evaluate.anchors` has them by; `jpeg`, `avif` and `bpg` are 4:2:0, as `webp` always is."""


def require_present(name: str) -> None:
    """Load what a codec needs, for one thread. Raises UsageError, with what brings it, where it is absent."""
    form = CODECS[name].format
    if not form.present():
        where = "this machine" if form.program else "this Pillow"
        raise UsageError(f"evaluate.anchors: {where} has no {form.name}", hint=form.install)
    if form is AVIF:
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # of the decoder
    if form is JXL:
        from pillow_jxl import JpegXLImagePlugin  # registers itself

        JpegXLImagePlugin.DECODE_THREADS = 0  # none besides this one


class ClassicCodec:
    """A classic codec at one quality."""

    def __init__(self, name: str, quality: float) -> None:
        """Raises UsageError where this Pillow lacks it."""
        require_present(name)
        self.name, self.quality = name, quality
        self.classic = CODECS[name]

    def require_settings(self) -> None:
        """Raise UsageError where the library is too old for its settings: by a small picture."""
        try:
            self.encode(np.zeros((16, 16, 3), np.uint8))
        except LicError as error:
            raise UsageError(f"evaluate.anchors: {error}", hint=f"{self.classic.versions} is here") from None

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Return the file of a picture, uint8 [H, W, 3]. Raises LicError where the codec does not take it."""
        file, settings = io.BytesIO(), self.classic.settings(self.quality)
        try:
            if self.classic.format.program:
                return bpg.encode(
                    image, [word for name, value in settings.items() for word in (f"-{name}", str(value))]
                )
            Image.fromarray(image).save(file, self.classic.format.name, **settings)
        except Exception as error:  # what Pillow raises differs by format: OSError, ValueError, RuntimeError ...
            raise self._refused("cannot be coded", error) from None
        return file.getvalue()

    def decode(self, data: bytes, shape: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Return the picture of a file, uint8 [H, W, 3].

        Raises LicError where the file cannot be read, or has another height and width than `shape`.
        """
        try:
            if self.classic.format.program:
                picture = bpg.decode(data)
                self._require(picture.shape[:2], shape)
                return picture
            with Image.open(io.BytesIO(data), formats=[self.classic.format.name]) as image:
                self._require(image.size[::-1], shape)  # before its pixels are read
                return np.array(image.convert("RGB"))
        except Exception as error:  # as above
            raise self._refused("cannot be decoded", error) from None

    @staticmethod
    def _require(size: tuple[int, ...], shape: tuple[int, int] | None) -> None:
        if shape not in (None, size):
            raise ValueError(f"it has {size[1]}x{size[0]} pixels")

    def _refused(self, what: str, error: Exception) -> LicError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return LicError(f"{what} as {self.name}: {reason}")
