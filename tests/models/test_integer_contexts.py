"""Context networks in integers: every stage of every family, as its definition says, the same whatever computes it."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist.codec import tiles
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.container import Container
from lic_dist.codec.rans import BitstreamError
from lic_dist.models.architectures import adapt, family
from lic_dist.models.families.raster import Taps
from lic_dist.models.integer import LARGEST, IntegerNet, exact_z_hat
from lic_dist.models.protocol import Stage
from lic_dist.models.stages import only_side
from lic_dist.quantization.rates import SCALES
from tests.codec.test_families import SEVERAL, made, record
from tests.conftest import picture
from tests.models.test_integer import by_the_book, disturb, invented, some_z, threads, walked, z_by_the_book

__all__ = ["threads"]  # a fixture
SMALL: dict[str, dict[str, Any]] = {
    "mbt2018": {"N": 4, "M": 3},
    "cheng2020-anchor": {"N": 4, "M": 4},
    "cheng2020-attn": {"N": 4, "M": 4},
    "cheng2020-anchor-checkerboard": {"N": 4, "M": 4},
    "elic2022-official": {"N": 2, "M": 4, "groups": [1, 2, 1]},
    "elic2022-chandelier": {"N": 2, "M": 4, "groups": [1, 2, 1]},
    "minnen2020-charm": {"N": 3, "M": 4, "num_slices": 2},
}
EXACT = [name for name in SEVERAL if "deterministic" in family(name).supports]
Call = tuple[str, Tensor, Tensor]


class Walk:
    """A walk in integers of z int32 [B, N, hz, wz], whose y_hat are means and an arithmetic pattern of levels; the
    calls of networks, all means and scales, y_hat whole.
    """

    def __init__(self, model: nn.Module, z: Tensor) -> None:
        codec = adapt(model)
        nets = {name: IntegerNet(codec.nets[name]) for name in walked(codec)}
        height, width = (value * 4 for value in z.shape[2:])
        count = torch.arange(codec.channels * height * width, dtype=torch.float64)
        level = ((count * 7919 % 997 - 498) / 61).float().reshape(1, -1, height, width).expand(len(z), -1, -1, -1)
        self.calls: list[Call] = []

        def run(name: str, values: Tensor) -> Tensor:
            self.calls.append((name, values, nets[name](values)))
            return self.calls[-1][2]

        def sent(stage: Stage) -> Tensor:
            return stage.means + stage.elements.take(level).to(stage.means.device)

        given = codec.follow((exact_z_hat(only_side(codec), z),), sent, run)
        self.means, self.scales, self.y_hat = (one.detach().cpu() for one in given)


def in_units(values: Tensor) -> NDArray[np.object_]:
    """What a network reads, or gives, of the first image: Python's integers, [C, h, w]."""
    clamped = np.clip(np.rint(np.ldexp(values[0].numpy().astype(np.float64), 12)), -LARGEST, LARGEST)
    return clamped.astype(np.int64).astype(object)


def narrowed(model: Any) -> Any:
    """The model with channel contexts of a few channels instead of 224 and 128, so that Python counts them quickly."""
    contexts = getattr(model.latent_codec["y"], "channel_context", {}) if hasattr(model, "latent_codec") else {}
    for chain in contexts.values():
        for number, (fewer_in, fewer_out) in ((0, (None, 3)), (2, (3, 2)), (4, (2, None))):
            layer = chain[number]
            layer.weight.data = layer.weight.data[slice(fewer_out), slice(fewer_in)].clone()
            layer.bias.data = layer.bias.data[slice(fewer_out)].clone()
            layer.in_channels, layer.out_channels = layer.weight.shape[1], len(layer.weight)
    return model


@pytest.mark.parametrize("name", SMALL)
def test_it_is_the_definition(name: str) -> None:
    model, z = narrowed(invented(name, **SMALL[name])), some_z(1, 1, SMALL[name]["N"], 1, 1)
    codec, walk = adapt(model), Walk(model, z)
    assert np.array_equal(in_units(walk.calls[0][1]), z_by_the_book(model, z[0])) and walk.calls[0][0] in (
        "h_s",
        "h_mean_s",
    )
    contexts = []
    for called, values, out in walk.calls:
        if isinstance(codec.nets[called], Taps):
            contexts.append(in_units(out)[:, 0])
        else:
            assert np.array_equal(in_units(out), by_the_book(codec.nets[called], in_units(values))), called
    assert {called for called, _, _ in walk.calls} == set(walked(codec))
    assert len(np.unique(in_units(walk.means))) > 30 and len(np.unique(in_units(walk.scales))) > 30
    if contexts:  # of waves of positions: the masked convolution over all of y_hat
        whole = by_the_book(model.context_prediction, in_units(walk.y_hat)).reshape(2 * codec.channels, -1)
        order = np.concatenate([stage.positions for stage in codec.layout(4, 4)])
        assert np.array_equal(np.concatenate(contexts, 1), whole[:, order])


GOLDEN = {
    "mbt2018": "d9f8d306273e4862",
    "cheng2020-anchor": "84c4727eaba1250c",
    "cheng2020-attn": "84c4727eaba1250c",
    "cheng2020-anchor-checkerboard": "1fb65867530fab59",
    "elic2022-official": "c3665da665f0369c",
    "elic2022-chandelier": "4c1297ffec6be289",
    "minnen2020-charm": "aa318c605a540345",
}


@pytest.mark.parametrize("name", SMALL)
def test_the_definition_does_not_drift(name: str) -> None:
    walk = Walk(invented(name, **SMALL[name]), some_z(2, 2, SMALL[name]["N"], 2, 3))
    units = torch.cat([walk.scales, walk.means], 1).double() * 4096
    assert bool((units == units.round()).all())
    assert hashlib.sha256(units.long().numpy().astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", EXACT)
def test_threads_and_batch_change_nothing(name: str, threads: None) -> None:
    model, z = made(name).model, some_z(3, 2, 16, 2, 3)
    one = Walk(model, z)
    for count in (1, 2):
        torch.set_num_threads(count)
        again, single = Walk(model, z), [Walk(model, z[[i]]) for i in range(2)]
        for what in ("means", "scales", "y_hat"):
            expected = getattr(one, what)
            assert torch.equal(getattr(again, what), expected)
            assert torch.equal(torch.cat([getattr(each, what) for each in single]), expected)
    assert one.scales.unique().numel() > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", EXACT)
def test_a_gpu_computes_the_same(name: str) -> None:
    model, z = made(name).model, some_z(3, 2, 16, 2, 3)
    here = Walk(model, z)
    there = Walk(model.cuda(), z.cuda())
    model.cpu()
    for what in ("means", "scales", "y_hat"):
        assert torch.equal(getattr(there, what), getattr(here, what))


@pytest.mark.parametrize("name", EXACT)
def test_a_file_decodes_under_other_threads_and_tiles(
    name: str, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, image = made(name), np.random.default_rng(6).integers(0, 256, (150, 200, 3)).astype(np.uint8)
    exact, plain = (ImageCodec(loaded.model, record(loaded, "tcq"), integer) for integer in (True, False))
    encoded, rough = exact.encode(image), plain.encode(image)
    assert Container.unpack(encoded.data).integer and np.abs(encoded.k).max() > 0
    assert abs(encoded.coded_bits / rough.coded_bits - 1) < 0.01  # no worse than the model's own networks
    torch.set_num_threads(2)
    decoded = plain.decode_latents(encoded.data)
    monkeypatch.setattr(tiles, "TILE", 128)
    tiled = exact.decode_latents(encoded.data)
    for found in (decoded, tiled):
        assert np.array_equal(found.k, encoded.k) and torch.equal(found.y_hat, encoded.y_hat)


@pytest.mark.parametrize("name", ["mbt2018", "cheng2020-anchor-checkerboard", "elic2022-official"])
def test_a_machine_that_computes_otherwise_decodes_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, image = copy.deepcopy(made(name)), picture(12, 64, 128)
    *_, network = (net for called, net in loaded.codec.nets.items() if "parameters" in called)
    *_, last = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    with torch.no_grad():  # a scale on the threshold between two levels, where the least noise moves it
        last.weight[0], last.bias[0] = 0, float(SCALES[20])
    plain, exact = (ImageCodec(loaded.model, record(loaded, "sq"), integer) for integer in (False, True))
    fragile, encoded = plain.encode(image).data, exact.encode(image)
    disturb(monkeypatch, "conv2d", "conv_transpose2d", "linear")
    with pytest.raises(BitstreamError, match="other scales.*--deterministic"):
        plain.decode_latents(fragile)
    assert np.array_equal(plain.decode_latents(encoded.data).k, encoded.k)
