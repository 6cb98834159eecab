"""`evaluate.blocks`: points of files in blocks beside those of whole pictures, with real bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building.records import analytic_record
from lic_dist.codec.block_codec import of_bytes, open_block_codec
from lic_dist.codec.blocks import Blocks
from lic_dist.codec.one_stream import OneStream
from lic_dist.data import images
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation import run as running
from lic_dist.evaluation.archive import Archive
from lic_dist.evaluation.generations import evaluate_generations
from lic_dist.evaluation.metrics import psnr8
from lic_dist.evaluation.results import Point, read_points
from lic_dist.evaluation.run import evaluate
from lic_dist.evaluation.verify import verify
from lic_dist.models import checkpoint
from lic_dist.models.boundary import Boundary
from lic_dist.reporting.curves import read_curves


def with_boundary(base: Path, at: Path, seed: int) -> Path:
    """The tiny model with a quantizer and a boundary network that changes pixels."""
    made = checkpoint.load(str(base))
    made.quantizers["tcq8"] = analytic_record(made, "tcq", 8, 0.6, 0.2, np.full(12, 30.0)).to_json()
    network = Boundary()
    torch.manual_seed(seed)
    with torch.no_grad():
        for values in network.parameters():
            values.normal_(0, 0.1)
    made.boundary = network.carried()
    checkpoint.save(made, at)
    return at


@pytest.fixture()
def mended(base: Path, photos: Path, tmp_path: Path) -> Path:
    shutil.copytree(photos / "valid", tmp_path / "pictures")
    return with_boundary(base, tmp_path / "mended.pth.tar", 0)


def run(model: Path, out: Path, **keys: object) -> list[Point]:
    section = {"images": str(model.parent / "pictures"), "checkpoints": [str(model)], "quantizers": ["tcq8"]}
    section |= {"blocks": [64, 128], "out": str(out), "bitstreams": True, **keys}
    asked = {"name": "e", "engine": {"name": "local"}, "evaluate": section}
    return list(read_points(evaluate(config.Experiment.model_validate(asked))))


@pytest.mark.slow
def test_blocks_are_points_of_their_own_with_real_bytes(mended: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    points = run(mended, out)
    assert [point.quantizer for point in points] == ["tcq8", "tcq8 blocks 64", "tcq8 blocks 128"]
    assert [curve.name for curve in read_curves([out])] == [f"base {point.quantizer}" for point in points]
    codec = open_block_codec(str(mended), "tcq8")
    with Archive.open(tmp_path / "r.bitstreams.zip") as archive:
        for point, side in ((points[1], 64), (points[2], 128)):
            (streams,) = (s for p, s in zip(archive.points, archive.manifest.points, strict=True) if p == point)
            for row, stream in zip(point.images, streams.streams, strict=True):
                image = images.read(tmp_path / "pictures" / row.image)
                data = codec.encode(image, side).data
                assert archive.read(stream.member) == data and row.file_size == len(data)
                assert row.container_bpp * row.height * row.width == pytest.approx(8 * 27)
                assert row.psnr == psnr8(image, codec.decode(of_bytes(data)))
                count = Blocks.read(of_bytes(data)).layout.count
                price = (row.bpp - row.estimated_bpp) * row.height * row.width / 8 / count
                assert 4 < price < 12  # two for its size, two for its checksum, 4 to 5 of a state
            assert sum(point.k_counts) == sum(points[0].k_counts)
            assert sum(point.channel_bits) + (point.z_bpp or 0) == pytest.approx(
                np.mean([row.estimated_bpp for row in point.images])
            )
    found = verify(tmp_path / "r.bitstreams.zip", str(tmp_path / "pictures"))
    assert not found.differences and found.streams == 6


@pytest.mark.slow
def test_another_boundary_network_is_measured_anew_and_whole_pictures_are_not(
    base: Path, mended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(mended, tmp_path / "r.json", blocks=[64], bitstreams=False)
    with_boundary(base, mended, 1)
    monkeypatch.setattr(running, "measure_image", lambda *_: pytest.fail("measured again"))
    after = run(mended, tmp_path / "r.json", blocks=[64], bitstreams=False)
    assert before[0].figures == after[0].figures and before[1].figures.psnr != after[1].figures.psnr


def test_sides_that_do_not_fit_and_generations_are_refused(mended: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        run(mended, tmp_path / "r.json", blocks=[100])
    section = {"images": str(tmp_path / "pictures"), "checkpoints": [str(mended)], "blocks": [64]}
    asked = config.Experiment.model_validate({"name": "e", "engine": {"name": "local"}, "evaluate": section})
    with pytest.raises(UsageError, match="whole pictures"):
        evaluate_generations(asked, 2)


@pytest.mark.slow
def test_a_decoder_that_computes_other_scales_is_an_error(
    mended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = OneStream.take
    monkeypatch.setattr(OneStream, "take", lambda self, level, last: true(self, level ^ 1, last))
    with pytest.raises(LicError, match="other scales"):
        run(mended, tmp_path / "r.json", blocks=[64], bitstreams=False)
