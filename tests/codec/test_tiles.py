"""The networks in strips and tiles against the networks whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lic_dist.building.records import analytic_record
from lic_dist.codec import strips, tiles
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.fields import receptive_field, scale
from lic_dist.codec.strips import Pool
from lic_dist.codec.tiles import Grid, analyse, run_in_tiles, spans, strip_edges, synthesise
from lic_dist.errors import LicError
from lic_dist.models import stages
from lic_dist.models.architectures import ModelSpec, build
from lic_dist.models.checkpoint import Checkpoint, update_tables
from lic_dist.models.protocol import CodecModel, Stage
from tests.conftest import HYPERPRIORS, picture

GRID = Grid(5, 7)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=HYPERPRIORS)
def made(request: pytest.FixtureRequest) -> Checkpoint:
    """A tiny untrained model whose latents are some levels large."""
    torch.manual_seed(2)
    model = build(request.param, 8, 12).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("body.3.weight"):  # a residual adds nothing at its start
                parameter.normal_(std=0.3)
        *_, last = (layer for layer in model.g_a if isinstance(layer, nn.Conv2d))
        last.weight *= 20 if request.param == "block-transform" else 200
        *_, last = (layer for layer in model.h_a if isinstance(layer, nn.Conv2d))
        last.weight *= 3
        model.h_s[4].bias += 1
    update_tables(model)
    return Checkpoint(model, ModelSpec(request.param, 8, 12, 0.05))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "TILE", 128)
    monkeypatch.setattr(tiles, "STRIP", 1)
    yield


def in_tiles(codec: CodecModel, z_hat: Tensor) -> Stage:
    return stages.only_stage(codec, (z_hat,), run_in_tiles(codec, GRID, codec.nets.__getitem__))


def through(codec: CodecModel, x: Tensor) -> tuple[Tensor, Tensor, Stage, Tensor]:
    """y, z, means and scales, x_hat of a padded image; h_s and g_s get what does not depend on tiles."""
    with torch.no_grad():
        y, z = analyse(codec, GRID, lambda rows, columns: x[..., rows, columns])
        generator = torch.Generator().manual_seed(0)
        z_hat = torch.randint(-5, 6, (1, 8, GRID.high, GRID.wide), generator=generator).float()
        stage = in_tiles(codec, z_hat)
        y_hat = torch.randn((1, 12, 4 * GRID.high, 4 * GRID.wide), generator=generator) * 3
        x_hat = torch.full(x.shape, torch.nan)
        for rows, part in synthesise(codec, GRID, y_hat):
            x_hat[:, :, rows] = part
    return y, z, stage, x_hat


def pixels() -> Tensor:
    image = picture(1, 64 * GRID.high, 64 * GRID.wide)
    return stages.to_input(torch.from_numpy(image.transpose(2, 0, 1).copy())[None], torch.device("cpu"))


def test_parts_give_what_the_whole_image_gives(made: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    x = pixels()
    y, z, stage, x_hat = through(made.codec, x)
    monkeypatch.setattr(tiles, "TILE", 128)
    monkeypatch.setattr(tiles, "STRIP", 1)
    assert len(list(GRID.tiles(made.codec, "h_s", 1, 4))) == 12
    assert strip_edges(made.codec, GRID, "g_s", 4)[-3:] == [3, 4, 5]
    y2, z2, stage2, x_hat2 = through(made.codec, x)
    assert float(y.abs().max()) > 3 and int(z.abs().max()) > 1
    assert torch.allclose(y2.float(), y.float(), rtol=2e-3, atol=1e-4)  # float16: a last bit may differ
    assert float((z2 != z).float().mean()) < 0.01
    for name in ("means", "scales"):
        assert torch.allclose(getattr(stage2, name), getattr(stage, name), rtol=1e-4, atol=1e-4)
    assert float((x_hat2 - x_hat).abs().max()) < 1e-4 * float(x_hat.abs().max())  # at the seams as elsewhere


def test_the_margins_are_needed(made: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them there are seams: what the test above would see."""
    x = pixels()
    y, _, stage, x_hat = through(made.codec, x)
    monkeypatch.setattr(tiles, "TILE", 128)
    monkeypatch.setattr(tiles, "STRIP", 1)

    def of_layer(layer: nn.Module, first: int, last: int) -> tuple[int, int]:
        each, makes = scale(layer)
        return first // makes * each, -(-last // makes) * each

    monkeypatch.setattr(strips, "receptive_field", of_layer)
    monkeypatch.setattr(tiles, "receptive_field", lambda network, first, last: (first // 4, last // 4))
    y2, _, stage2, x_hat2 = through(made.codec, x)
    assert float((y2 - y).float().abs().max()) > 0.1
    assert float((stage2.scales - stage.scales).abs().max()) > 1e-3
    assert float((x_hat2 - x_hat).abs().max()) > 1e-2 * float(x_hat.abs().max())


@pytest.mark.parametrize("height", [1, 3, 8])
@pytest.mark.parametrize("threads", [1, 3])
def test_no_layer_makes_a_row_twice(
    made: Checkpoint, height: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever strips it is given, a network makes every row of its output once, in order, and holds few of them."""
    monkeypatch.setattr(strips, "LEAST", 1)
    for name, channels, unit in (("g_a", 3, 64), ("h_a", 12, 4), ("g_s", 12, 4)):
        network = getattr(made.model, name)
        values = torch.rand(1, channels, 12 * unit, 2 * unit)
        first = -(-strips.first_rows(network) // unit)
        with torch.no_grad(), Pool(threads) as pool:
            expected = network(values)
            run = strips.Strips(network, 12 * unit, pool)
            parts = [run(values[:, :, : first * unit])]
            assert parts[0].shape[2] > 0
            for begin in range(first, 12, height):
                parts.append(run(values[:, :, begin * unit : (begin + height) * unit]))
                kept = [layer._kept for layer in run._layers if layer._kept is not None]
                assert all(one.shape[2] <= 10 for one in kept)
        found = torch.cat(parts, 2)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "size", "channels"), [("g_a", 512, 3), ("h_a", 96, 12), ("h_s", 24, 8), ("g_s", 24, 12)]
)
def test_needed_inputs_are_those_that_gradients_reach(made: Checkpoint, name: str, size: int, channels: int) -> None:
    network = nn.Sequential(*getattr(made.model, name))
    inputs = torch.randn(1, channels, size, size, requires_grad=True)
    outputs = network(inputs)
    middle = outputs.shape[2] // 2
    outputs[:, :, middle : middle + 3].abs().sum().backward()
    assert inputs.grad is not None
    reached = inputs.grad.abs().sum((0, 1, 3)).nonzero()
    assert receptive_field(network, middle, middle + 3) == (int(reached.min()), int(reached.max()) + 1)


def test_shares_are_even_and_cover_every_position_once(made: Checkpoint) -> None:
    for length in (1, 16, 17, 33, 100):
        shares = spans(made.model.g_a, length, 64, 4, 64)
        covered = [position for span in shares for position in range(span.target.start, span.target.stop)]
        assert covered == list(range(4 * length))
        sizes = [(span.target.stop - span.target.start) // 4 for span in shares]
        assert max(sizes) <= 16 and len(sizes) == -(-length // 16) and all(size == sizes[0] for size in sizes[:-1])
        assert all(span.source.start % 16 == 0 and span.source.stop % 16 == 0 for span in shares)


def test_one_tile_is_the_whole_image_to_the_last_bit(made: Checkpoint) -> None:
    x = pixels()
    with torch.no_grad():
        for ours, theirs in zip(
            analyse(made.codec, GRID, lambda rows, columns: x[..., rows, columns]),
            stages.analyse(made.model, x),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
        z_hat = torch.randn(1, 8, GRID.high, GRID.wide)
        whole = stages.only_stage(made.codec, (z_hat,))
        tiled = in_tiles(made.codec, z_hat)
    assert torch.equal(whole.means, tiled.means) and torch.equal(whole.scales, tiled.scales)


def test_what_a_family_does_not_support_is_one_line(
    made: Checkpoint, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(made.codec), "supports", frozenset())
    record = analytic_record(made, "sq", 1, 1.0, 1.0, np.ones(12))
    codec, image = ImageCodec(made.model, record), picture(3, 130, 64)
    assert codec.decode(codec.encode(image[:128]).data).shape == (128, 64, 3)  # one tile
    with pytest.raises(LicError, match="does not support tiles"):
        codec.encode(image)
    with pytest.raises(LicError, match="does not support deterministic"):
        ImageCodec(made.model, record, integer=True)
    with pytest.raises(LicError, match="does not support refinement"):
        ImageCodec(made.model, replace(record, refine=1)).encode(image[:64])


@pytest.mark.parametrize("shape", [(300, 420, 3), (129, 64), (1, 700, 3)])
def test_an_image_of_many_tiles_goes_there_and_back(
    made: Checkpoint, small: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    codec = ImageCodec(made.model, analytic_record(made, "tcq", 8, 0.6, 0.2, np.full(12, 30.0)), threads=1)
    image = picture(2, *shape[:2])
    image = image if len(shape) == 3 else image[..., 0]
    parts: list[None] = []
    codec.advance = lambda: parts.append(None)
    encoded = codec.encode(image)
    assert len(parts) == codec.part_count(*shape[:2], encoding=True)
    decoded, k = codec.decode(encoded.data), codec.decode_latents(encoded.data).k
    assert len(parts) == sum(codec.part_count(*shape[:2], encoding) for encoding in (True, False))
    threaded = ImageCodec(made.model, codec.record, threads=3)
    assert threaded.encode(image).data == encoded.data and np.array_equal(threaded.decode(encoded.data), decoded)
    assert np.array_equal(k, encoded.k) and np.abs(k).max() > 3
    assert decoded.shape == shape and np.array_equal(decoded, codec.picture(encoded))
    monkeypatch.setattr(tiles, "TILE", 1024)
    difference = np.abs(codec.picture(encoded).astype(int) - decoded)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


THREADS = """
import os
import numpy as np
from lic_dist.building.records import analytic_record
from lic_dist.codec.codec import ImageCodec
from lic_dist.models import checkpoint
from tests.conftest import picture

made = checkpoint.load(os.environ["BASE"])
codec = ImageCodec(made.model, analytic_record(made, "tcq", 8, 0.5, 0.1, np.ones(made.spec.M)), threads=1)
image = picture(5, 931, 1396)
encoded = codec.encode(image).data
decoded = codec.decode(encoded)
for codec.threads in (2, 3):
    assert np.array_equal(codec.decode(encoded), decoded) and codec.encode(image).data == encoded
print("the same")
"""


@pytest.mark.slow
def test_threads_of_a_machine_of_several_cores_decode_what_one_encoded(base: Path) -> None:
    """Where OpenMP has a number of threads of its own, which each new thread begins with."""
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "BASE": str(base)}  # read when torch is loaded
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert done.stdout.strip() == "the same", done.stderr[-2000:]
