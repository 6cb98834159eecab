"""Models of channel slices with latent residual prediction: ours, and one in a public repository's style, adapted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lic_dist.codec.codec import ImageCodec, padding
from lic_dist.codec.container import Container
from lic_dist.codec.records import compressai_record
from lic_dist.errors import LicError, UsageError
from lic_dist.models.architectures import ModelSpec, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.recognise import recognise
from tests.codec.test_families import made, record
from tests.conftest import picture

FOREIGN = "foreign_architecture:WindowSlices"
FOLDERS = tuple(str(Path(__file__).parents[2] / name) for name in ("examples", "tests"))  # of adapter and model


@pytest.fixture(scope="module")
def foreign() -> Checkpoint:
    """The foreign model with random weights, whose y has a standard deviation of 3."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in FOLDERS:
            patch.syspath_prepend(folder)
        torch.manual_seed(1)
        module: Any = build(FOREIGN, 16, 32, num_slices=4).eval()
    with torch.no_grad():
        module.g_a[-1].weight *= 3 / module.g_a(torch.rand(1, 3, 256, 256)).std()
    module.update(force=True)
    return Checkpoint(module, ModelSpec(FOREIGN, 16, 32, 0.01, {"num_slices": 4}))


@pytest.fixture(params=["minnen2020-charm", FOREIGN])
def sliced(request: pytest.FixtureRequest, foreign: Checkpoint) -> Checkpoint:
    return foreign if request.param == FOREIGN else made(request.param)


@torch.no_grad()
def test_sq_is_the_modules_own_compress_and_decompress(sliced: Checkpoint) -> None:
    module, image = sliced.model, picture(5, 200, 300)
    x = torch.from_numpy(image.transpose(2, 0, 1)[None].copy()).float() / 255
    x = torch.nn.functional.pad(x, padding(200, 300, sliced.codec.strides.multiple))
    seen: list[torch.Tensor] = []
    hooks = [
        module.g_a.register_forward_hook(lambda _, __, y: y.half().float()),  # y as this project keeps it
        module.g_s.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone())),
    ]
    theirs = module.compress(x.contiguous(memory_format=torch.channels_last))
    module.decompress(theirs["strings"], theirs["shape"])
    codec = ImageCodec(module, compressai_record(sliced))
    encoded = codec.encode(image)
    for hook in hooks:
        hook.remove()
    (strings, _), stream = theirs["strings"], Container.unpack(encoded.data).y
    assert abs(len(stream) - len(strings[0])) <= 4  # a word: the order of symbols differs
    assert torch.equal(encoded.y_hat, seen[0]) and torch.equal(codec.decode_latents(encoded.data).y_hat, seen[0])


def test_every_parameter_is_of_one_part(sliced: Checkpoint) -> None:
    codec = sliced.codec
    for name, _ in sliced.model.named_parameters():
        assert sum(name.startswith(codec.prefixes(part)) for part in codec.parts) == 1, name


@pytest.mark.parametrize("shape", [(1, 1, 3), (300, 257), (256, 256, 3)])
@pytest.mark.parametrize("quantizer", ["sq", "rdoq", "tcq"])
def test_a_foreign_model_codes_pictures_of_any_size(
    foreign: Checkpoint, quantizer: str, shape: tuple[int, ...]
) -> None:
    image = picture(3, *shape[:2])
    image = image if len(shape) == 3 else image[..., 0]
    codec = ImageCodec(foreign.model, record(foreign, quantizer))
    encoded = codec.encode(image)
    assert np.array_equal(codec.decode(encoded.data), codec.picture(encoded)) and encoded.shape == shape


@pytest.mark.slow
@torch.no_grad()
def test_latents_of_a_foreign_model_are_refined(foreign: Checkpoint) -> None:
    image, plain = picture(4, 256, 256), record(foreign, "tcq")
    x = torch.from_numpy(image.transpose(2, 0, 1)[None].copy()).float() / 255
    losses = []
    for steps in (0, 2):
        encoded = ImageCodec(foreign.model, replace(plain, refine=steps)).encode(image)
        error = float((foreign.codec.synthesise(encoded.y_hat) - x).square().mean())
        losses.append(plain.lmbda * 255**2 * error + encoded.coded_bits / 256**2)
    assert losses[1] < losses[0]


def test_windows_go_in_one_tile(foreign: Checkpoint) -> None:
    codec = ImageCodec(foreign.model, record(foreign, "sq"))
    with pytest.raises(LicError, match="window-slices does not support tiles, which pictures above 1024 pixels"):
        codec.encode(np.zeros((1, 1025, 3), np.uint8))


def test_a_foreign_checkpoint_is_of_its_family_alone(foreign: Checkpoint) -> None:
    state = foreign.model.state_dict()
    assert recognise(state, FOREIGN) == (FOREIGN, {"N": 16, "M": 32, "num_slices": 4})
    with pytest.raises(LicError, match="this is a model of channel slices, a family that is not served"):
        recognise(state)


def test_supports_are_the_first_slices_corrected() -> None:
    """Slice 3 of 4 sees slices 0 and 1 where two are supported: its means follow them, and not slice 2."""
    codec = made("minnen2020-charm").codec
    z_hat = (torch.randn(1, 16, 1, 1, generator=torch.Generator().manual_seed(0)),)
    with torch.no_grad():
        for moved, seen in ((0, True), (1, True), (2, False)):
            elements = codec.layout(4, 4)[moved]
            still, _ = codec.drive(z_hat, lambda stage: stage.means)
            other, _ = codec.drive(z_hat, lambda stage, e=elements: stage.means + 5.0 * (stage.elements is e))
            assert torch.equal(still[-1].means, other[-1].means) != seen


def test_slices_that_do_not_divide_y_are_refused() -> None:
    with pytest.raises(UsageError, match="M is a multiple of num_slices"):
        build("minnen2020-charm", 8, 12, num_slices=5)
