"""Metrics by name: the quality of one decoded 8-bit picture against its original.

Each is an adapter of a few lines over the package that has it, in one table, METRICS: what it is called, which way is
better, how BD-rates read it, the least picture, the package. Packages are imported when they are asked for. Only
`psnr`, `ms-ssim`, `psnr-yuv` and `swd` need none that an installation lacks.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lic_dist.errors import UsageError

SMALLEST_SIDE = 161  # pixels: MS-SSIM halves the picture four times and has a window of 11
LUMA = (0.2126, 0.7152, 0.0722)  # of R, G and B, BT.709
Picture = NDArray[np.uint8]  # [H, W, 3]

Scale = Literal["as it is", "of what is lacking", "of the error"]
_SCALES: dict[Scale, tuple[Callable[[float], float], str]] = {
    "as it is": (lambda value: value, ""),
    "of what is lacking": (lambda value: _decibels(1 - value), "-10 log10(1 - {})"),
    "of the error": (lambda value: _decibels(value), "-10 log10({})"),
}


def _decibels(error: float) -> float:
    return -10 * math.log10(error) if error > 0 else math.inf


@dataclass(frozen=True)
class Metric:
    """A metric: of an original and a decoded picture, uint8 [H, W, 3] both.

    `better` says which values are, `unit` is that of a value. BD-rates interpolate (PCHIP) over the value as it is, or
    over decibels of what it lacks to 1, or of the error that it is: what comes of `rising` grows with quality.
    Pictures with a side below `least` pixels have none. `package` is what pip installs for it, `module` what that is
    imported as; "" where nothing is lacking.
    """

    title: str
    measure: Callable[[Picture, Picture], float]
    scale: Scale
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    digits: int = 4
    least: int = 1
    package: str = ""
    module: str = ""

    def rising(self, value: float) -> float:
        """Return the value on the scale of BD-rates and charts."""
        return _SCALES[self.scale][0](value)

    @property
    def formula(self) -> str:
        """What `rising` computes of the value, "" for nothing."""
        return _SCALES[self.scale][1].format(self.title)

    @property
    def axis(self) -> str:
        """The title of an axis of what `rising` gives."""
        if self.formula:
            return f"{self.title} [dB] = {self.formula}"
        return f"{self.title} [{self.unit}]" if self.unit else self.title

    @property
    def head(self) -> str:
        """The heading of a column of values."""
        return f"{self.title} {self.unit}".strip()

    def text(self, value: float | None) -> str:
        """Return a value as a table has it, "" for none."""
        return "" if value is None or not math.isfinite(value) else f"{value:.{self.digits}f}"


def psnr8(a: Picture, b: Picture) -> float:
    """Return the PSNR in dB of two uint8 pictures [H, W, 3], over all pixels and colours; inf where they are equal."""
    _check(a, b)
    squared = np.square(a.astype(np.int32) - b.astype(np.int32)).mean(dtype=np.float64)
    return float(10 * np.log10(255**2 / squared)) if squared > 0 else float("inf")


def ms_ssim8(a: Picture, b: Picture) -> float | None:
    """Return the MS-SSIM (Wang et al. 2003; mean of the colours) of two uint8 pictures [H, W, 3].

    It is None where a side is below SMALLEST_SIDE pixels, because the measure has five scales.
    """
    _check(a, b)
    return METRICS["ms-ssim"].measure(a, b) if min(a.shape[:2]) >= SMALLEST_SIDE else None


def distortion(names: Iterable[str], original: Picture, decoded: Picture) -> dict[str, Any]:
    """Return the figures of a decoded picture by their names in `ImageResult`: PSNR always, and these metrics."""
    found = measure([name for name in names if name != "psnr"], original, decoded)
    return {"psnr": psnr8(original, decoded), "ms_ssim": found.pop("ms-ssim", None), "metrics": found}


def measure(names: Iterable[str], original: Picture, decoded: Picture) -> dict[str, float | None]:
    """Return the metrics of these names; None where the picture is too small, or the value not finite.

    Raises:
        ValueError: pictures of different shapes, or not uint8 [H, W, 3].
    """
    _check(original, decoded)
    found = {}
    for name in names:
        metric = METRICS[name]
        value = metric.measure(original, decoded) if min(original.shape[:2]) >= metric.least else math.nan
        found[name] = value if math.isfinite(value) else None
    return found


def require(names: Iterable[str]) -> None:
    """Raise UsageError, with pip's command, where the package of a metric is not installed."""
    for name in names:
        metric = METRICS[name]
        if metric.module and find_spec(metric.module) is None:
            raise UsageError(
                f"the metric {name} needs the package {metric.package}", hint=f"pip install {metric.package}"
            )


def _check(a: Picture, b: Picture) -> None:
    if a.shape != b.shape or a.ndim != 3 or a.shape[2] != 3:
        raise ValueError(f"pictures of shapes {a.shape} and {b.shape}: not one [H, W, 3]")
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"pictures of {a.dtype} and {b.dtype}: not uint8")


def _ms_ssim(a: Picture, b: Picture) -> float:
    import pytorch_msssim
    import torch

    from lic_dist.evaluation.separable import Separably

    with torch.inference_mode(), Separably():
        return float(pytorch_msssim.ms_ssim(_tensor(a), _tensor(b), data_range=255))


def _psnr_yuv(a: Picture, b: Picture) -> float:
    """Return (6 PSNR of Y + PSNR of Cb + PSNR of Cr) / 8, of BT.709 in full range, 4:4:4 and unrounded."""
    red, green, blue = np.moveaxis(a.astype(np.float32) - b.astype(np.float32), 2, 0)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    parts = luma, (blue - luma) / (2 - 2 * LUMA[2]), (red - luma) / (2 - 2 * LUMA[0])
    errors = [float(np.square(part).mean(dtype=np.float64)) for part in parts]
    return sum(weight * _decibels(error / 255**2) for weight, error in zip((6, 1, 1), errors, strict=True)) / 8


def _of_piq(name: str) -> Callable[[Picture, Picture], float]:
    """Return a function of piq, which takes the decoded picture first."""

    def measured(a: Picture, b: Picture) -> float:
        import torch

        from lic_dist.evaluation.separable import Separably
        from lic_dist.models.compat import import_piq

        with torch.inference_mode(), Separably():
            return float(getattr(import_piq(), name)(_tensor(b), _tensor(a), data_range=255))

    return measured


def _ssimulacra2(a: Picture, b: Picture) -> float:
    from PIL import Image
    from ssimulacra2 import compute_ssimulacra2

    files = io.BytesIO(), io.BytesIO()  # the package reads files only
    for picture, file in zip((a, b), files, strict=True):
        Image.fromarray(picture).save(file, "PPM")
        file.seek(0)
    return float(compute_ssimulacra2(*files))


def _vmaf(a: Picture, b: Picture) -> float:
    """Return VMAF v0.6.1 without motion, of BT.709's luma in video range, not rounded and not clipped."""
    import torch

    model = _vmaf_model()
    with torch.inference_mode():
        weights = torch.tensor(LUMA).view(1, 3, 1, 1) * 219 / 255
        luma = (16 + (_tensor(picture) * weights).sum(1, keepdim=True) for picture in (a, b))
        return float(model(*luma))


@cache
def _vmaf_model() -> Any:
    import vmaf_torch

    return vmaf_torch.VMAF(enable_motion=False)


def _flip(a: Picture, b: Picture) -> float:
    """Return the mean of LDR-FLIP's map at 67 pixels a degree, its default."""
    import flip_evaluator

    pictures = (picture.astype(np.float32) / 255 for picture in (a, b))
    return float(flip_evaluator.evaluate(*pictures, "LDR", applyMagma=False)[1])


def _cvvdp(a: Picture, b: Picture) -> float:
    """Return ColorVideoVDP's JOD of a still on its `standard_fhd`: 24 inches of 1920x1080 at 0.6 m, 200 cd/m2."""
    import torch

    model = _cvvdp_model()
    with torch.inference_mode():
        return float(model.predict(b, a, dim_order="HWC")[0])


@cache
def _cvvdp_model() -> Any:
    import torch

    from lic_dist.models.compat import import_torchvision

    import_torchvision()
    import pycvvdp

    return pycvvdp.cvvdp(display_name="standard_fhd", device=torch.device("cpu"))


def _swd(a: Picture, b: Picture) -> float:
    from lic_dist.evaluation.sliced_wasserstein import swd  # imports torch

    return swd(a, b)


def _tensor(picture: Picture) -> Any:
    """Return a picture as float32 [1, 3, H, W] in 0..255."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))[None]).float()


_PIQ: dict[str, Any] = {"package": "piq", "module": "piq"}
METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR", psnr8, "as it is", unit="dB", digits=3),
    "ms-ssim": Metric("MS-SSIM", _ms_ssim, "of what is lacking", least=SMALLEST_SIDE),
    "psnr-yuv": Metric("PSNR-YUV", _psnr_yuv, "as it is", unit="dB", digits=3),
    "ssim": Metric("SSIM", _of_piq("ssim"), "of what is lacking", least=11, **_PIQ),
    "iw-ssim": Metric("IW-SSIM", _of_piq("information_weighted_ssim"), "of what is lacking", least=161, **_PIQ),
    "vif": Metric("VIF", _of_piq("vif_p"), "as it is", least=41, **_PIQ),
    "fsim": Metric("FSIM", _of_piq("fsim"), "of what is lacking", least=32, **_PIQ),
    "gmsd": Metric("GMSD", _of_piq("gmsd"), "of the error", "lower", least=8, **_PIQ),
    "ssimulacra2": Metric(
        "SSIMULACRA2", _ssimulacra2, "as it is", digits=2, least=8, package="ssimulacra2", module="ssimulacra2"
    ),
    "vmaf": Metric("VMAF", _vmaf, "as it is", digits=2, least=64, package="vmaf-torch", module="vmaf_torch"),
    "cvvdp": Metric("CVVDP", _cvvdp, "as it is", unit="JOD", digits=3, least=8, package="cvvdp", module="pycvvdp"),
    "swd": Metric("SWD", _swd, "of the error", "lower", least=16),
    "flip": Metric("FLIP", _flip, "of the error", "lower", package="flip-evaluator", module="flip_evaluator"),
}
