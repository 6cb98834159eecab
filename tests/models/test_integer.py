"""The hyper-decoder in integers: exact, the same whatever computes it, close to the float one, and in files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typer.testing import CliRunner

from lic_dist.building.records import analytic_record
from lic_dist.codec import tiles
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.container import Container
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.records import compressai_record
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import adapt, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.integer import LARGEST, IntegerNet, exact_z_hat
from lic_dist.models.layers import DenormalizeGaussians, HalfTanh, one_by_one
from lic_dist.models.protocol import TRANSFORMS, CodecModel, Stage, mask_weights
from lic_dist.models.stages import dequantize_z, only_side, only_stage
from lic_dist.quantization.rates import SCALES, level_index
from tests.conftest import HYPERPRIORS, picture


def layers_of(net: nn.Module) -> list[nn.Module]:
    """The layers of a network, in turn."""
    return [layer for layer in net.modules() if not list(layer.children())]


def invented(architecture: str, N: int = 4, M: int = 3, size: float = 1.0, **options: Any) -> nn.Module:
    """A model whose parameters are an arithmetic pattern, so that no generator of random numbers can change them."""
    model = build(architecture, N, M, **options).eval()
    codec = adapt(model)
    with torch.no_grad():
        for index, layer in chain(*(enumerate(layers_of(codec.nets[name])) for name in walked(codec))):
            for number, values in enumerate(layer.parameters()):
                count = torch.arange(values.numel(), dtype=torch.float64)
                pattern = (count * (7919 + 2 * index) + 31 * number) % 997 / 498.5 - 1
                values.copy_((size * pattern / (3 if number == 0 else 1)).view_as(values))
            if isinstance(layer, DenormalizeGaussians):
                layer.deviation.copy_(torch.arange(M) + 0.5)
        middle = only_side(codec).prior.quantiles
        middle[:, 0, 1] = (torch.arange(N) * 5 % 7).float() / 7 - 0.4
    mask_weights(model)
    return model


def walked(codec: CodecModel) -> list[str]:
    """The names of the networks that a walk runs."""
    return [name for name in codec.nets if name not in TRANSFORMS]


def some_z(seed: int, *shape: int, largest: int = 12) -> Tensor:
    values = np.random.default_rng(seed).integers(-largest, largest + 1, shape)
    return torch.from_numpy(values.astype(np.int32))


def whole(value: float, power: int) -> int:
    return round(math.ldexp(value, power))  # Python rounds halves to the even one


def clamp(value: int) -> int:
    return min(max(value, -(2**24)), 2**24)


def z_by_the_book(model: Any, z: Tensor) -> NDArray[np.object_]:
    """What h_s reads of one z, in units."""
    medians = adapt(model).sides[0].prior.quantiles[:, 0, 1].tolist()
    return np.array(
        [[[clamp(4096 * int(v) + whole(m, 12)) for v in row] for row in c] for c, m in zip(z, medians, strict=True)],
        object,
    )


def by_the_book(net: nn.Module, x: NDArray[np.object_]) -> NDArray[np.object_]:
    """A network of one input as the module's text defines it, in Python's integers, every product by itself."""

    def deviated(x: NDArray[np.object_], layer: DenormalizeGaussians, log: bool) -> NDArray[np.object_]:
        out = np.zeros_like(x)
        for place, value in np.ndenumerate(x):
            d = layer.deviation[place[0]].item()
            if log:
                i, j = divmod(min(max(value, -9 * 4096), 5 * 4096), 64)
                power = float((Decimal(i) / 64).exp()) * float((Decimal(j) / 4096).exp())
                out[place] = clamp(math.floor(4096 * d * power + 0.5))
            else:
                out[place] = clamp(math.floor(d * min(max(value, -6 * 4096), 6 * 4096) + 0.5))
        return out

    for layer in layers_of(net):
        if isinstance(layer, nn.ReLU):
            x = np.vectorize(lambda v: max(v, 0), otypes=[object])(x)
            continue
        if isinstance(layer, nn.LeakyReLU):
            x = np.vectorize(lambda v: v if v > 0 else (5243 * v + 2**18) // 2**19, otypes=[object])(x)
            continue
        if isinstance(layer, HalfTanh):
            powers = np.vectorize(lambda v: (Decimal(int(v)) / 2048).exp(), otypes=[object])(x)  # e^(2 x)
            x = np.vectorize(lambda e: round(2048 * (e - 1) / (e + 1)), otypes=[object])(powers)
            continue
        if isinstance(layer, DenormalizeGaussians):
            M = len(x) // 2
            x = np.concatenate([deviated(x[:M], layer, True), deviated(x[M:], layer, False)])
            continue
        if isinstance(layer, nn.PixelShuffle):
            r, (channels, high, wide) = layer.upscale_factor, x.shape
            out = np.zeros((channels // r**2, r * high, r * wide), object)
            for c, a, b in np.ndindex(channels // r**2, r, r):
                out[c, a::r, b::r] = x[r**2 * c + r * a + b]
            x = out
            continue
        layer = one_by_one(layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer
        transposed, stride, p = isinstance(layer, nn.ConvTranspose2d), layer.stride[0], layer.padding[0]
        weight = layer.weight.transpose(0, 1) if transposed else layer.weight
        channels, (_, high, wide) = len(weight), x.shape
        out = np.zeros((channels, high * stride, wide * stride), object)
        products = list(product(*map(range, (*weight.shape[2:], high, wide))))
        for c, kernel in enumerate(weight.tolist()):
            largest = max(abs(v) for plane in kernel for row in plane for v in row)
            f = min(max(14 - math.frexp(largest)[1], 1), 24)
            total = np.full((high * stride, wide * stride), whole(layer.bias[c].item(), 12 + f) + 2 ** (f - 1), object)
            for i, plane in enumerate(kernel):
                W = [[whole(v, f) for v in row] for row in plane]
                for ky, kx, row, column in products:
                    down, right = (row * stride + ky - p, column * stride + kx - p)
                    if not transposed:
                        down, right = row - ky + p, column - kx + p
                    if 0 <= down < high * stride and 0 <= right < wide * stride:
                        total[down, right] += W[ky][kx] * x[i, row, column]
            out[c] = np.vectorize(lambda v, f=f: clamp(v // 2**f), otypes=[object])(total)
        x = out
    return x


def in_integers(model: nn.Module) -> Callable[[Tensor], Stage]:
    """The stage that follows from the integers z."""
    codec, net = adapt(model), IntegerNet(model.h_s)
    return lambda z: only_stage(codec, (exact_z_hat(only_side(codec), z),), lambda name, values: net(values))


def integers(model: nn.Module, z: Tensor) -> NDArray[np.int64]:
    """Scales then means in units, int64 [B, 2M, h, w]."""
    stage = in_integers(model)(z)
    units = torch.cat([stage.scales, stage.means], 1).double() * 4096
    assert bool((units == units.round()).all())
    return units.long().numpy()


@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("architecture", HYPERPRIORS)
def test_it_is_the_definition(architecture: str, size: float) -> None:
    model = invented(architecture, size=size)
    z = some_z(1, 1, 4, 3, 2, largest=9000 if size > 1 else 12)
    ours, true = integers(model, z)[0], by_the_book(model.h_s, z_by_the_book(model, z[0]))
    assert np.array_equal(ours[: len(true)], true.astype(np.int64))
    if architecture == "block-transform":  # its own bounds bite: the head's, in deviations
        assert ours.max() == round(4096 * 2.5 * math.exp(5)) and len(np.unique(ours)) > (20 if size == 1 else 10)
    else:
        assert (np.abs(ours) == LARGEST).any() == (size > 1)  # clamps bite, or not one does
        assert len(np.unique(ours)) > 20


GOLDEN = {
    "block-transform": "c34e325a59a58b4c",
    "bmshj2018-hyperprior": "4d2d0f2d8bd82d1f",
    "mbt2018-mean": "79855c1813339c03",
}


@pytest.mark.parametrize("architecture", HYPERPRIORS)
def test_the_definition_does_not_drift(architecture: str) -> None:
    units = integers(invented(architecture, 8, 6), some_z(2, 2, 8, 3, 5))
    assert hashlib.sha256(units.astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN[architecture]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", HYPERPRIORS)
def test_threads_batch_and_layout_change_nothing(architecture: str, threads: None) -> None:
    model = build(architecture, 40, 56).eval()
    decoder, z = in_integers(model), some_z(3, 3, 40, 5, 7)
    one = decoder(z)
    for count, change in product((1, 2, 3), (Tensor.contiguous, lambda z: z.to(memory_format=torch.channels_last))):
        torch.set_num_threads(count)
        again = decoder(change(z))
        assert torch.equal(again.means, one.means) and torch.equal(again.scales, one.scales)
        single = [decoder(change(z[[i]])) for i in range(3)]
        assert torch.equal(torch.cat([each.means for each in single]), one.means)
        assert torch.equal(torch.cat([each.scales for each in single]), one.scales)
    assert one.scales.unique().numel() > 100


@pytest.mark.parametrize("architecture", HYPERPRIORS)
def test_a_tile_with_two_positions_around_it_equals_the_whole(architecture: str) -> None:
    model = invented(architecture, 8, 6)
    z = some_z(4, 1, 8, 11, 12)
    whole = integers(model, z)[:, :, 12:28, 16:36]
    for margin, same in ((1, False), (2, True), (3, True)):
        tile = integers(model, z[:, :, 3 - margin : 7 + margin, 4 - margin : 9 + margin])
        inside = tile[:, :, 4 * margin : 4 * margin + 16, 4 * margin : 4 * margin + 20]
        assert np.array_equal(inside, whole) == same


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", HYPERPRIORS)
def test_a_gpu_computes_the_same(architecture: str) -> None:
    model, z = build(architecture, 128, 192).eval(), some_z(5, 2, 128, 8, 12)
    here = in_integers(model)(z)
    there = in_integers(model.cuda())(z.cuda())
    assert torch.equal(there.means.cpu(), here.means) and torch.equal(there.scales.cpu(), here.scales)


def test_levels_compare_integers() -> None:
    for rule in ("nearest", "above"):
        thresholds = SCALES[:-1] if rule == "above" else np.sqrt(SCALES[:-1].astype(float) * SCALES[1:])
        cuts = np.floor(thresholds.astype(np.float32).astype(np.float64) * 4096).astype(np.int64)
        units = np.unique(np.concatenate([cuts + d for d in (-1, 0, 1)] + [[-LARGEST, 0, LARGEST]]))
        scales = torch.from_numpy(units.astype(np.float64) / 4096).float()
        expected = (units[:, None] > cuts).sum(1)
        assert np.array_equal(level_index(scales, rule).numpy(), expected)
        assert np.array_equal(level_index(scales.numpy(), rule), expected)


@pytest.mark.parametrize("source", ["base", "zoo"])
def test_it_is_close_to_the_float_network(source: str, base: Path) -> None:
    model = checkpoint.load(str(base) if source == "base" else "base-small").model
    z = some_z(6, 2, model.N, 6, 7, largest=9)
    with torch.no_grad():
        exact = only_stage(adapt(model), (dequantize_z(model, z),))
    ours = in_integers(model)(z)
    spread = float(exact.means.std())
    assert float((ours.means - exact.means).abs().max()) < 0.01 * max(1.0, spread)
    levels = [level_index(stage.to_lanes(stage.scales)).astype(int) for stage in (ours, exact)]
    apart = np.abs(levels[0] - levels[1])
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01 and len(np.unique(levels[1])) > 10


def only(*layers: nn.Module) -> nn.Module:
    """A network of these layers."""
    return nn.Sequential(*layers).requires_grad_(False)


def test_sums_that_float64_may_not_hold_are_refused() -> None:
    wide = nn.ConvTranspose2d(1400, 1, 5, 2, 2, 1)
    nn.init.constant_(wide.weight, 0.49999)
    with pytest.raises(LicError, match="too wide for exact sums"):
        IntegerNet(only(wide))  # 25 * 1400 * 2^14 * 2^24 > 2^53
    nn.init.constant_(wide.weight, 0.25001)
    IntegerNet(only(wide))
    for value in (math.nan, math.inf, 1e30):
        wide.weight[0, 0, 0, 0] = value
        with pytest.raises(LicError, match="weights too large"):
            IntegerNet(only(wide))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 1, 5, stride=2, padding=2),
        nn.Conv2d(2, 1, 3),
        nn.Conv2d(2, 1, 3, padding="same"),
        nn.Conv2d(2, 1, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 2, 3, padding=1, groups=2),
        nn.Conv2d(2, 1, 3, padding=2, dilation=2),
        nn.Conv2d(2, 1, (3, 1), padding=(1, 0)),
        nn.ConvTranspose2d(2, 1, 4, stride=2, padding=1),
        nn.ConvTranspose2d(2, 1, 5, stride=2, padding=2),
        nn.ConvTranspose2d(2, 1, 1, stride=2, output_padding=1),
        nn.LeakyReLU(2),
        nn.GELU(),
    ],
)
def test_other_layers_are_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(LicError, match=f"without a form in integers: {type(layer).__name__}"):
        IntegerNet(only(nn.Conv2d(2, 2, 3, padding=1), layer))


@pytest.fixture(scope="module")
def loaded(base: Path) -> Checkpoint:
    """The tiny model with one scale on the threshold between two levels, where the least noise moves it."""
    made = checkpoint.load(str(base))
    with torch.no_grad():
        made.model.h_s[4].weight[0] = 0
        made.model.h_s[4].bias[0] = float(SCALES[20])
    return made


def codec(loaded: Checkpoint, name: str, integer: bool) -> ImageCodec:
    record = (
        compressai_record(loaded) if name == "sq" else analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.full(12, 9.0))
    )
    return ImageCodec(loaded.model, record, integer)


@pytest.mark.parametrize("name", ["sq", "tcq"])
def test_a_file_states_it_and_any_decoder_obeys(loaded: Checkpoint, name: str, threads: None) -> None:
    image = picture(11, 100, 150)
    plain, exact = codec(loaded, name, False), codec(loaded, name, True)
    made, float_made = exact.encode(image), plain.encode(image)
    assert Container.unpack(made.data).integer and not Container.unpack(float_made.data).integer
    assert abs(made.coded_bits / float_made.coded_bits - 1) < 0.003
    for count, decoder in product((1, 2), (plain, exact)):
        torch.set_num_threads(count)
        assert np.array_equal(decoder.decode_latents(made.data).k, made.k)
    torch.set_num_threads(1)
    assert np.array_equal(plain.decode(made.data), exact.picture(made))
    assert np.array_equal(exact.decode(float_made.data), plain.picture(float_made))


def disturb(monkeypatch: pytest.MonkeyPatch, *functions: str) -> None:
    """Let functions of torch.nn.functional compute otherwise in the last bits, as other machines do."""
    generator = torch.Generator().manual_seed(1)

    def noisy(true: Any) -> Any:
        def compute(*arguments: Any, **named: Any) -> Tensor:
            out: Tensor = true(*arguments, **named)
            return out * (1 + 1e-6 * torch.randn(out.shape, generator=generator))

        return compute

    for function in functions:
        monkeypatch.setattr(nn.functional, function, noisy(getattr(nn.functional, function)))


def test_a_machine_that_computes_otherwise_decodes_it(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(12, 64, 128)
    plain, exact = codec(loaded, "sq", False), codec(loaded, "sq", True)
    fragile, made = plain.encode(image).data, exact.encode(image)
    expected = exact.picture(made)
    disturb(monkeypatch, "conv2d", "conv_transpose2d")
    with pytest.raises(BitstreamError, match="other scales.*--deterministic"):
        plain.decode(fragile)
    shown, k = plain.decode(made.data), plain.decode_latents(made.data).k
    assert np.array_equal(k, made.k)
    assert np.abs(shown.astype(int) - expected).max() <= 1  # g_s is not in integers


def test_a_file_made_in_other_tiles_decodes(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = codec(loaded, "tcq", True)
    whole = exact.encode(picture(13, 300, 400))
    monkeypatch.setattr(tiles, "TILE", 128)
    assert np.array_equal(exact.decode_latents(whole.data).k, whole.k)


def test_the_command_line_writes_it(base: Path, photos: Path, tmp_path: Path) -> None:
    from lic_dist.app.cli import app

    source, file = str(next(photos.rglob("*.png"))), tmp_path / "a.lic"
    for options, integer in (([], False), (["--deterministic"], True)):
        result = CliRunner().invoke(app, ["encode", source, str(file), "--model", str(base), *options])
        assert result.exit_code == 0 and Container.unpack(file.read_bytes()).integer == integer
        result = CliRunner().invoke(app, ["decode", str(file), str(tmp_path / "a.png"), "--model", str(base)])
        assert result.exit_code == 0


def test_half_of_tanh_is_the_nearest_unit_at_every_step() -> None:
    units = np.arange(-25_000, 25_001)
    found = (
        IntegerNet(HalfTanh())(torch.from_numpy(units / 4096).reshape(1, 1, 1, -1)).flatten().double().numpy() * 4096
    )
    true = 2048 * np.tanh(units / 4096)
    assert np.array_equal(found, found.round()) and np.abs(found - true).max() <= 0.5 + 1e-9
    assert set(found) == set(range(-2048, 2049))
