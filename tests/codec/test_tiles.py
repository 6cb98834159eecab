"""The networks in tiles against the networks whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lic_dist.building.records import analytic_record
from lic_dist.codec import tiles
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.fields import receptive_field
from lic_dist.codec.tiles import Grid, analyse, run_in_tiles, spans, synthesise
from lic_dist.errors import LicError
from lic_dist.models import stages
from lic_dist.models.architectures import ModelSpec, build
from lic_dist.models.checkpoint import Checkpoint, update_tables
from lic_dist.models.protocol import CodecModel, Stage
from tests.conftest import HYPERPRIORS, picture

GRID = Grid(5, 7)


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
        for rows, columns, part in synthesise(codec, GRID, y_hat):
            x_hat[..., rows, columns] = part
    return y, z, stage, x_hat


def pixels() -> Tensor:
    image = picture(1, 64 * GRID.high, 64 * GRID.wide)
    return stages.to_input(torch.from_numpy(image.transpose(2, 0, 1).copy())[None], torch.device("cpu"))


def test_tiles_give_what_the_whole_image_gives(made: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    x = pixels()
    y, z, stage, x_hat = through(made.codec, x)
    monkeypatch.setattr(tiles, "TILE", 128)
    assert len(list(GRID.tiles(made.codec, "g_a", 64, 4))) == 12
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
    ratios = {id(getattr(made.model, name)): ratio for name, ratio in (("g_a", 16), ("h_a", 4), ("h_s", 0), ("g_s", 0))}

    def bare(network: nn.Module, first: int, last: int) -> tuple[int, int]:
        ratio = ratios[id(network)]
        if ratio:
            return first * ratio, last * ratio
        shrink = 4 if network is made.model.h_s else 16
        return first // shrink, last // shrink

    monkeypatch.setattr(tiles, "receptive_field", bare)
    y2, _, stage2, x_hat2 = through(made.codec, x)
    assert float((y2 - y).float().abs().max()) > 0.1
    assert float((stage2.scales - stage.scales).abs().max()) > 1e-3
    assert float((x_hat2 - x_hat).abs().max()) > 1e-2 * float(x_hat.abs().max())


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
    codec = ImageCodec(made.model, analytic_record(made, "tcq", 8, 0.6, 0.2, np.full(12, 30.0)))
    image = picture(2, *shape[:2])
    image = image if len(shape) == 3 else image[..., 0]
    encoded = codec.encode(image)
    decoded, k = codec.decode(encoded.data), codec.decode_latents(encoded.data).k
    assert np.array_equal(k, encoded.k) and np.abs(k).max() > 3
    assert decoded.shape == shape and np.array_equal(decoded, codec.picture(encoded))
    monkeypatch.setattr(tiles, "TILE", 1024)
    difference = np.abs(codec.picture(encoded).astype(int) - decoded)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
