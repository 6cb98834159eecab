"""Slim block transforms: what they keep of a larger one, and what they cannot start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lic_dist import config
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import ModelSpec, adapt, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.complexity import complexity
from lic_dist.models.layers import Residual
from lic_dist.models.recognise import recognise
from lic_dist.training import base as job

SMALL = {"N": 4, "M": 16}


def large() -> Any:
    """A block transform whose residual blocks do something."""
    torch.manual_seed(3)
    model = build("block-transform", **SMALL)
    for one in model.modules():
        if isinstance(one, Residual):
            torch.nn.init.normal_(one.body[3].weight, std=0.02)  # type: ignore[arg-type]
    return model


def test_what_the_larger_model_does_not_use_a_slim_one_does_without() -> None:
    model = large()
    with torch.no_grad():
        for net in (model.g_a, model.g_s):
            blocks = [one for one in net if isinstance(one, Residual)]
            for number, block in enumerate(blocks):
                if number % 3:  # not the first of a row
                    block.body[3].weight.zero_()
                    block.body[3].bias.zero_()
                block.body[3].weight[:, 1::2] = 0  # every other channel within
    slim = build("block-transform", **SMALL, depth=1, expansion=1)
    adapt(slim).take_from(adapt(model))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        y = model.g_a(x)
        for theirs, ours in ((y, slim.g_a(x)), (model.g_s(y), slim.g_s(y))):
            assert torch.allclose(theirs, ours, atol=1e-5) and theirs.std() > 0.1
    kmac = {name: (complexity(one)["g_s"].kmac) for name, one in (("large", model), ("slim", slim))}
    assert kmac["slim"] < 0.3 * kmac["large"]


def test_a_fitted_slim_model_is_nearer_to_the_larger_one() -> None:
    torch.manual_seed(0)
    model, x = large(), torch.rand(8, 3, 64, 64)
    targets = [model.g_a(x), model.g_s(model.g_a(x).round())]
    errors = []
    for pictures in (None, x):
        slim = build("block-transform", **SMALL, depth=1, expansion=1)
        adapt(slim).take_from(adapt(model), pictures)
        made = [slim.g_a(x), slim.g_s(model.g_a(x).round())]
        errors.append([(one - target).square().mean().item() for one, target in zip(made, targets, strict=True)])
    (pruned_y, pruned_x), (fitted_y, fitted_x) = errors
    assert fitted_y < 0.7 * pruned_y and fitted_x < 0.7 * pruned_x


def test_a_model_takes_all_of_one_of_its_own_size() -> None:
    model, other = large(), build("block-transform", **SMALL)
    adapt(other).take_from(adapt(model))
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in other.named_parameters())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({**SMALL, "depth": 4}, "at most depth 3"),
        ({**SMALL, "expansion": 3}, "at most the expansion"),
        ({"N": 4, "M": 12}, "N=4 and M=16"),
    ],
)
def test_a_larger_model_does_not_start_from_a_smaller_one(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(LicError, match=message):
        adapt(build("block-transform", **sizes)).take_from(adapt(large()))


def test_a_file_tells_how_slim_its_model_is(tmp_path: Path) -> None:
    options = {"depth": 2, "expansion": 1}
    model = build("block-transform", **SMALL, **options)
    assert recognise(model.state_dict()) == ("block-transform", {**SMALL, **options})
    assert recognise(large().state_dict()) == ("block-transform", SMALL)
    torch.save(model.state_dict(), tmp_path / "plain.pth.tar")
    assert len(list(checkpoint.load(str(tmp_path / "plain.pth.tar"), lmbda=0.01).model.g_s)) == len(model.g_s)  # type: ignore[arg-type]
    checkpoint.save(
        Checkpoint(model, ModelSpec("block-transform", **SMALL, lmbda=0.01, options=options)), tmp_path / "a.pth.tar"
    )
    assert checkpoint.load(str(tmp_path / "a.pth.tar")).spec.options == options


def test_a_training_starts_slim_from_a_larger_checkpoint(tmp_path: Path) -> None:
    whole = Checkpoint(large(), ModelSpec("block-transform", **SMALL, lmbda=0.01), history=[{"what": "base training"}])
    checkpoint.save(whole, tmp_path / "whole.pth.tar")
    section = config.Train(
        architecture="block-transform",
        **SMALL,
        options={"depth": 1, "expansion": 1},
        lmbda=0.01,
        start=str(tmp_path / "whole.pth.tar"),
        out=tmp_path / "out",
    )
    start = job._initial_checkpoint(section)
    assert start.spec.options == section.options and start.history == whole.history
    kept = build("block-transform", **SMALL, depth=1, expansion=1)
    adapt(kept).take_from(adapt(whole.model))
    assert all(torch.equal(value, start.model.get_parameter(name)) for name, value in kept.named_parameters())
    with pytest.raises(UsageError, match="is no larger model"):
        job._initial_checkpoint(section.model_copy(update={"options": {}}), torch.rand(1, 3, 64, 64))
