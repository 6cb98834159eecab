"""A step as a CUDA graph: against the step itself on a GPU; without one, what is done around the capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lic_dist import config
from lic_dist.errors import UsageError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import adapt, build
from lic_dist.models.compat import import_compressai
from lic_dist.models.priors import Side
from lic_dist.training import base as job
from lic_dist.training.base import RelaxedModel
from lic_dist.training.capture import WARM_UP, Replay
from lic_dist.training.distributed import Ranks
from lic_dist.training.log import read_log
from tests.conftest import picture
from tests.families import CHECKERED
from tests.training.test_base_training import section

CPU = torch.device("cpu")


class Graph:
    """A graph of a function on a CPU: capturing runs nothing, replaying runs it."""

    def __init__(self) -> None:
        self.replay: Any = None


class NoStream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: NoStream) -> None:
        pass


@pytest.fixture()
def pretended(monkeypatch: pytest.MonkeyPatch) -> tuple[Replay, torch.nn.Parameter, list[str]]:
    """A replay with stand-ins for what it takes from torch.cuda, the weight of its function, and what was called."""
    called: list[str] = []
    weight = torch.nn.Parameter(torch.ones(2))

    def function(part: Tensor) -> Tensor:
        called.append("run")
        value = (weight * part).sum() + torch.rand(())
        value.backward()
        return value.detach()

    replay = Replay(function, CPU)

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        gradient = weight.grad.clone()  # type: ignore[union-attr]
        yield
        weight.grad.copy_(gradient)  # type: ignore[union-attr]
        called.append("captured")
        graph.replay = lambda: replay.result.copy_(function(replay.part))

    for name, stand_in in {
        "CUDAGraph": Graph, "graph": capture, "Stream": NoStream, "current_stream": NoStream,
        "stream": lambda stream: nullcontext(), "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: torch.set_rng_state(state),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return replay, weight, called


def test_the_first_call_is_no_other_than_the_second(pretended: tuple[Replay, torch.nn.Parameter, list[str]]) -> None:
    """Gradients and random numbers of the calls before the capture leave no trace."""
    replay, weight, called = pretended

    def zero() -> None:
        weight.grad.zero_()  # type: ignore[union-attr]

    seen = []
    for part in ([1.0, 2.0], [3.0, 5.0]):
        torch.manual_seed(7)
        if weight.grad is not None:
            zero()
        value = float(replay(torch.tensor(part), zero))
        seen.append((value - sum(part), weight.grad.tolist()))  # type: ignore[union-attr]
    torch.manual_seed(7)
    drawn = float(torch.rand(()))
    assert seen == [(pytest.approx(drawn, abs=1e-6), [1.0, 2.0]), (pytest.approx(drawn, abs=1e-6), [3.0, 5.0])]
    assert called == ["run"] * (WARM_UP + 1) + ["captured", "run", "run"]


def test_noise_of_z_is_what_compressais_prior_draws() -> None:
    import_compressai()
    from compressai.entropy_models import EntropyBottleneck

    prior = EntropyBottleneck(5).train()
    z = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    expected = prior(z)
    torch.manual_seed(0)
    found = Side("z", prior).relaxed(z)
    for one, its in zip(found, expected, strict=True):
        assert torch.equal(one, its) and one.stride() == its.stride()


@torch.no_grad()
def test_bf16_leaves_the_rotations_of_a_block_transform_in_float32() -> None:
    """In bfloat16 a latent of 200 is wrong by up to half a step."""
    torch.manual_seed(0)
    model = build("block-transform", 4, 24)
    x = torch.from_numpy(np.stack([picture(seed, 64, 64).transpose(2, 0, 1) for seed in range(4)])).float() / 255
    codec = adapt(model)
    codec.start(x, 0.2)
    y = codec.analyse(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = codec.analyse(x)
        x_hat = codec.synthesise(rough)
    assert float(y.abs().max()) > 200 and rough.dtype == x_hat.dtype == torch.float32
    assert float((rough - y).abs().max()) < 1e-3 and float((x_hat - x).abs().mean()) < 0.05
    for block in (layer for layer in model.modules() if hasattr(layer, "body")):
        block.body[-1].weight.normal_(std=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        rough = codec.analyse(x)
    assert float((rough - codec.analyse(x)).abs().max()) > 1e-3  # the blocks do compute in it


def test_what_cannot_be_one_graph_is_one_line() -> None:
    asked = section(Path("unused"), graph=True)
    codec = adapt(build(CHECKERED, 4, 6))
    with pytest.raises(UsageError, match="checkered codes y position by position"):
        job._check_capturable(codec, asked, Ranks(0, 1, CPU))
    with pytest.raises(UsageError, match="for one GPU, these are 2"):
        job._check_capturable(adapt(build("mbt2018-mean", 4, 6)), asked, Ranks(0, 2, CPU))
    with pytest.raises(UsageError, match="mbt2018-mean-vbr takes a rate a step"):
        job._check_capturable(adapt(build("mbt2018-mean-vbr", 4, 6)), asked, Ranks(0, 1, CPU))
    job._check_capturable(adapt(build("mbt2018-mean", 4, 6)), asked, Ranks(0, 1, CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_job_of_graphs_trains_as_one_of_steps(precision: str, photos: Path, tmp_path: Path) -> None:
    block = {
        "architecture": "block-transform", "N": 8, "M": 32, "relaxation": "mixed", "optimizer": "muon", "steps": 8,
        "initial_crops": 16, "precision": precision, "accumulate": 2,
    }  # fmt: skip
    folder, rows = config.Images(path=photos, held_out="valid"), {}
    for graph in (False, True):
        made = job.train(section(tmp_path / str(graph), **block, graph=graph), folder)
        rows[graph] = read_log(made.parent / "log.jsonl")
        assert checkpoint.load(str(made)).history[0].get("graph", False) == graph
    for step, captured in zip(rows[False], rows[True], strict=True):
        assert captured["loss"] == pytest.approx(step["loss"], rel=1e-2)
        assert captured["held_out_L"] == pytest.approx(step["held_out_L"], rel=1e-2)
    model = RelaxedModel(build("block-transform", 8, 32).cuda(), "mixed").train()
    assert model(torch.rand(2, 3, 64, 64, device="cuda"))[1].isfinite()
