"""SQ with CompressAI's tables measures what CompressAI's own eval_model does, by its own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.records import compressai_record
from lic_dist.data import images
from lic_dist.evaluation.run import measure_image
from lic_dist.models import checkpoint
from lic_dist.models.compat import import_compressai, import_torchvision


def theirs(path: Path, image: Path) -> dict[str, Any]:
    """`python -m compressai.utils.eval_model checkpoint` on one image: its loader, its coder, its metrics."""
    import_torchvision()
    import_compressai()
    from compressai.utils.eval_model import __main__ as eval_model

    model = eval_model.load_checkpoint("mbt2018-mean", False, str(path))
    measured: dict[str, Any] = eval_model.inference(model, eval_model.read_image(image))
    return measured


def assert_equal(path: Path, image: Path) -> None:
    loaded = checkpoint.load(str(path))
    ours = measure_image(ImageCodec(loaded.model, compressai_record(loaded)), images.read(image), image.name).result
    other = theirs(path, image)
    # y is rounded to float16 before it is quantized, as caches hold it: a few indices at ties differ
    assert ours.bpp == pytest.approx(other["bpp"], rel=5e-4)
    assert ours.psnr == pytest.approx(other["psnr-rgb"], abs=5e-3)
    if ours.ms_ssim is not None:
        assert ours.ms_ssim == pytest.approx(other["ms-ssim-rgb"], abs=1e-4)


def test_a_tiny_model(base: Path, photos: Path) -> None:
    assert_equal(base, photos / "train" / "3.png")


@pytest.mark.parametrize("picture", ["kodim04.png", pytest.param("kodim23.png", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_trained_model_on_kodak(shared: Path, picture: str) -> None:
    (path,) = (shared / "checkpoints").glob("*lmbda0.013.pth.tar")
    assert_equal(path, shared / "data" / "kodak" / picture)
