"""Decoders in 8 bits: exact integers against a plain reference, bounds, files, the same pixels however they are cut."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.records import compressai_record
from lic_dist.codec.strips import Pool, Strips, first_rows
from lic_dist.errors import LicError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.architectures import ModelSpec, adapt, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.fine import choose_fine
from lic_dist.models.int8 import (
    BODY_REACH,
    LARGEST_BIAS,
    LEAST_GELU,
    MOST_GELU,
    REACH,
    Convolution8,
    Convolving,
    Gelu8,
    Rotation8,
    Transposed8,
    gelu,
    gelu_table,
    units,
)
from lic_dist.models.parts import model_digest

LAYERS = {
    "3x3": lambda: Convolution8(6, 5, 3, padding=1),
    "1x1": lambda: Convolution8(6, 5, 1),
    "codes": lambda: Convolution8(6, 5, 1, bits=None, reach=BODY_REACH),
    "depthwise": lambda: Convolution8(6, 6, 5, padding=2, groups=6),
    "transposed": lambda: Transposed8(6, 5, 5, stride=2, padding=2, output_padding=1),
    "two bytes": lambda: Rotation8(6, 5),
}


def _numbers(seed: int, *shape: int) -> Tensor:
    """Return float32 in -1 .. 1 that are the same on every machine."""
    found = np.random.RandomState(seed).randint(-(1 << 20), 1 << 20, shape)
    return torch.from_numpy((found / (1 << 20)).astype(np.float32))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Give layers weights and units that are the same on every machine."""
    for seed, layer in enumerate(one for one in model.modules() if isinstance(one, Convolving | Gelu8)):
        if isinstance(layer, Gelu8):
            layer.makes.copy_(-24 + torch.arange(len(layer.makes)) % 5)
            continue
        terms = layer.weight[0].numel()
        layer.weight.copy_(_numbers(seed, *layer.weight.shape) / terms**0.5)
        layer.bias.copy_(_numbers(1000 + seed, *layer.bias.shape) / 8)
        layer.reads.copy_(-20 + torch.arange(len(layer.reads)) % 3)
        layer.makes.copy_(-44 + torch.arange(len(layer.makes)) % 3)


def _read_finely(model: nn.Module) -> None:
    """Give every other channel of layers that read 8 bits two codes."""
    for layer in model.modules():
        if isinstance(layer, Convolving | Gelu8) and layer.fine is not None:
            layer.fine[::2] = True


def _made() -> nn.Module:
    model = build("block-transform-int8", 8, 16).eval()
    for part in (model.g_a, model.h_a):
        for seed, one in enumerate(part.parameters()):
            one.data.copy_(_numbers(500 + seed, *one.shape) / max(1, one[0].numel()) ** 0.5)
    _fill(model)
    _read_finely(model)
    return model


def _reference(layer: Convolving, x: Tensor) -> np.ndarray:
    """Return X of a layer's output by the definition, with int64 sums, one output after the other."""
    u, v = units(layer.reads).numpy(), units(layer.makes).numpy()
    bits = layer.bits or 9
    fine = np.zeros(len(u), bool) if layer.fine is None else layer.fine.numpy()
    parts = np.where(fine, 16, 1)[:, None, None]
    A = np.rint(x[0].numpy() * (parts.astype(np.float32) * units(-layer.reads).numpy()[:, None, None])).astype(np.int64)
    A = A.clip(-(parts << bits - 1), (parts << bits - 1) - 1)
    A, low = A // parts, np.where(fine[:, None, None], A % parts, 0)
    inverse = units(-layer.makes).numpy()
    transposed = isinstance(layer, nn.ConvTranspose2d)
    weight = layer.weight.detach().numpy()
    weight = weight.swapaxes(0, 1) if transposed else weight
    channels = np.arange(len(v))[:, None] if layer.groups > 1 else np.arange(len(u))[None]
    W = np.rint(weight * (u[channels] * inverse[:, None])[:, :, None, None]).clip(-127, 127).astype(np.int64)
    B = np.rint(layer.bias.detach().numpy() * inverse).clip(-LARGEST_BIAS, LARGEST_BIAS).astype(np.int64)
    (_, high, wide), k, pad, stride = A.shape, W.shape[2], layer.padding[0], layer.stride[0]
    sums, lows = np.zeros((2, len(v), high * stride, wide * stride), np.int64)
    for o, i, row, column in np.ndindex(len(v), W.shape[1], k, k):
        for y, z in np.ndindex(high, wide):
            if transposed:
                at, value = (stride * y + row - pad, stride * z + column - pad), A[i, y, z]
                if 0 <= at[0] < high * stride and 0 <= at[1] < wide * stride:
                    sums[o][at] += W[o, i, row, column] * value
            elif 0 <= y + row - pad < high and 0 <= z + column - pad < wide:
                read = o if layer.groups > 1 else i, y + row - pad, z + column - pad
                sums[o, y, z] += W[o, i, row, column] * A[read]
                lows[o, y, z] += W[o, i, row, column] * low[read]
    sums += B[:, None, None] + np.rint(lows / 16).astype(np.int64)
    kind = np.float32 if layer.single else np.float64
    shift = units(48 + layer.makes).numpy().astype(kind)[:, None, None]
    return np.rint(sums.astype(kind) * shift).clip(-layer.reach * 4096, layer.reach * 4096)


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_what_its_definition_says(name: str, fine: bool) -> None:
    layer = LAYERS[name]()
    _fill(nn.Sequential(layer))
    if fine:
        _read_finely(layer)
    x = 3 * _numbers(7, 1, 6, 5, 4)
    with torch.no_grad():
        found = layer(x)
        last = layer(x.contiguous(memory_format=torch.channels_last))
    assert np.array_equal(found[0].numpy() * 4096, _reference(layer, x))
    assert torch.equal(found, last)
    trained = layer(x)
    assert trained.requires_grad
    unit = float(units(layer.makes).max()) if fine else 0.0  # the sum of second codes is not rounded in training
    assert float((trained.detach() - found).abs().max()) <= unit + (2**-12 if fine else 0)


@pytest.mark.parametrize(("inner", "single"), [(384, True), (1024, False)])
def test_the_largest_sums_that_a_shape_allows_are_exact(inner: int, single: bool) -> None:
    layer = Convolution8(inner, 2, 1, bits=None)
    layer.fine.fill_(inner == 384)
    assert layer.single is single
    with torch.no_grad():
        layer.weight.fill_(127.0)
        layer.weight[1, 0] = 126.0
        layer.bias.fill_(1.0)
        layer.makes.fill_(-4 * 20)  # v: sums keep their lowest bit in X where reach allows
        layer.weight.mul_(2.0**-20)
        layer.bias.mul_(2.0**-20)
        sums = layer._exact(torch.full((1, inner, 1, 1), 255 + (15 / 16 if single else 0)), *layer.integers())
    low = [round(15 * (127 * inner - one) / 16) if single else 0 for one in (0, 1)]
    assert sums.flatten().tolist() == [inner * 127 * 255 + 1 + low[0], inner * 127 * 255 + 1 - 255 + low[1]]


def test_every_layer_of_the_decoder_sums_within_float32_or_reads_two_bytes() -> None:
    layers = {
        name: one for name, one in build("block-transform-int8", 96, 192).named_modules() if isinstance(one, Convolving)
    }
    doubles = [name for name, one in layers.items() if not one.single]
    assert doubles == ["g_s.4", "g_s.9", "h_s.0", "h_s.2", "h_s.4"]
    assert REACH + 6 * BODY_REACH <= 1 << 12, "a stream of float32 holds six blocks' sums"


def test_no_entry_of_a_gelu_lies_near_a_half() -> None:
    for q in range(LEAST_GELU, MOST_GELU + 1):
        unit = float(units(torch.tensor(q)))
        for fine, parts, inverse, entries in ((False, 1, 4, 2048), (True, 16, 16, 8192)):
            x = torch.arange(-entries // 2, entries // 2, dtype=torch.float64) * (unit / inverse)
            curved = gelu(x[x < 6]) * (parts / unit)
            assert (curved % 1 - 0.5).abs().min() > 1e-10, q  # a million times what libraries' erfc differ by
            table = gelu_table(q, fine)
            exact = [round(math.erfc(-a / math.sqrt(2)) / 2 * a * parts / unit) / parts for a in x[x < 6].tolist()[::7]]
            assert torch.equal(table[: len(curved)][::7], torch.tensor(exact).clamp(max=float(table.max())))
            codes = table.floor()
            assert codes.max() - codes.min() <= 255 and table.abs().max() < 256


def test_pictures_are_those_of_a_plain_reference_on_every_machine() -> None:
    """Golden digests: another machine, thread count or library that gives others has another arithmetic."""
    model = _made()
    y_hat, z_hat = 4 * _numbers(1, 1, 16, 4, 8), 8 * _numbers(2, 1, 8, 1, 2)
    with torch.no_grad():
        pictures, sides = model.g_s(y_hat), model.h_s(z_hat)
    assert _digest(pictures) == "c80c1b2a9913f1a4"
    assert _digest(sides) == "f932eb83b768a648"


def _digest(values: Tensor) -> str:
    return hashlib.sha256((values * 4096).to(torch.int32).contiguous().numpy().tobytes()).hexdigest()[:16]


def test_a_picture_is_the_same_in_strips_batches_layouts_and_threads() -> None:
    model = _made()
    codec = adapt(model)
    y_hat = 4 * _numbers(3, 2, 16, 40, 8)
    with torch.no_grad():
        whole = model.g_s(y_hat)
        least = first_rows(codec.nets["g_s"])
        for rows in (least, least + 3, 40):
            with Pool(2) as pool:
                strips = Strips(codec.nets["g_s"], 40, pool)
                parts = [strips(part) for part in y_hat[:1].split(rows, 2)]
            assert torch.equal(torch.cat(parts, 2), whole[:1]), rows
        assert torch.equal(model.g_s(y_hat[1:].contiguous(memory_format=torch.channels_last)), whole[1:])
        z_hat = 8 * _numbers(4, 2, 8, 3, 2)
        sides = model.h_s(z_hat)
        assert torch.equal(model.h_s(z_hat[1:]), sides[1:])
    assert float(whole.std()) > 0.01 and len(whole.unique()) > 1000, "a picture of something"


def test_a_file_holds_bytes_and_gives_the_same_model(tmp_path: Path) -> None:
    made = Checkpoint(_made(), ModelSpec("block-transform-int8", 8, 16, 0.013))
    path = tmp_path / "checkpoint.pth.tar"
    checkpoints.save(made, path)
    content = checkpoints.read(path)["state_dict"]
    assert content["g_s.4.weight"].dtype == content["h_s.2.weight"].dtype == torch.int8
    loaded = checkpoints.load(str(path))
    assert loaded.spec == made.spec and model_digest(loaded.model) == model_digest(made.model)
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    codecs = [ImageCodec(one.model, compressai_record(one), threads=n) for one, n in ((made, 1), (loaded, 2))]
    files = [one.encode(image).data for one in codecs]
    assert files[0] == files[1]
    assert np.array_equal(codecs[0].decode(files[1]), codecs[1].decode(files[0]))
    portable = ImageCodec(made.model, compressai_record(made), integer=True).encode(image).data
    assert np.array_equal(codecs[0].decode(portable), codecs[1].decode(portable)), "h_s needs no other form"


@pytest.mark.parametrize(
    ("name", "value", "told"), [("g_s.4.makes", 1 << 30, "beyond"), ("g_s.1.body.2.makes", 77, "beyond")]
)
def test_a_file_of_units_out_of_range_is_refused(tmp_path: Path, name: str, value: int, told: str) -> None:
    made = Checkpoint(_made(), ModelSpec("block-transform-int8", 8, 16, 0.013))
    path = tmp_path / "checkpoint.pth.tar"
    checkpoints.save(made, path)
    content = checkpoints.read(path)
    content["state_dict"][name][0] = value
    torch.save(content, path)
    with pytest.raises(LicError, match=told):
        checkpoints.load(str(path))


def test_fine_channels_take_a_share_of_the_multiplications_and_those_of_most_noise_come_first() -> None:
    parent, made = build("block-transform", 8, 16), build("block-transform-int8", 8, 16)
    for seed, one in enumerate(parent.g_s.parameters()):
        one.data.copy_(_numbers(seed, *one.shape) / max(1, one[0].numel()) ** 0.5)
    parent.g_s[6].body[0].weight.data[7] *= 100  # what the next layer reads of it
    y_hat = 4 * _numbers(5, 2, 16, 4, 4)
    blocks = {at: 4 if at > 4 else 1 for at in (1, 2, 3, 6, 7, 8)}  # positions of each for one of y_hat
    read = [(one, n) for at, n in blocks.items() for one in made.g_s[at].body if isinstance(one, Convolving)]
    each = [torch.full((one.in_channels,), n * one.weight.numel() // one.in_channels) for one, n in read]
    costs = torch.cat(each)
    chosen, shares = [], []
    for share in (0.0, 0.02, 0.3):
        choose_fine(adapt(made), adapt(parent), y_hat, share)
        chosen.append(torch.cat([one.fine for one, _ in read]))
        shares.append(float(costs[chosen[-1]].sum() / costs.sum()))
        for at in blocks:
            assert torch.equal(made.g_s[at].body[2].fine, made.g_s[at].body[3].fine)
        if share:
            assert made.g_s[6].body[1].fine[7]
    assert shares[0] == 0 and 0.018 < shares[1] <= 0.02 and 0.29 < shares[2] <= 0.3
    assert bool((chosen[2] | ~chosen[1]).all()), "a larger share has all of a smaller one"
