"""Several ranks under torchrun on gloo: the gradients of one process, and ranks that die."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lic_dist import config
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.models import checkpoint
from lic_dist.models.parts import freeze_all_but, trainable
from lic_dist.models.stages import to_input
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training import distributed
from lic_dist.training import finetune as job
from lic_dist.training.decoding import Decoding
from lic_dist.training.distributed import Ranks
from lic_dist.training.log import read_log
from lic_dist.training.samples import Samples
from tests.forked import python, ranks
from tests.training.test_finetune import document


def torchrun(dying: str, step: int, *command: object) -> subprocess.CompletedProcess[str]:
    """`lic-dist COMMAND` in two ranks under torchrun's agent, which starts them again once; see `tests.dying`.

    Ranks are forked, where torchrun's own would import everything twice.
    """
    code = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tests.dying import main

agreed = {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "elastic"}
launch = LaunchConfig(nproc_per_node=2, max_restarts=1, start_method="forkserver", **agreed)
elastic_launch(launch, main)(*sys.argv[1:])
"""
    return python(code, dying, step, *command, timeout=240)


def gradients(base: str, store: str, rank: int, world: int, meeting: str, out: str) -> None:
    """Save a rank's gradients in float64 of all-but-encoder on its share of a batch of eight, once of each form."""
    torch.set_num_threads(1)
    waiting = None
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", f"file://{meeting}", timedelta(seconds=60), rank=rank, world_size=world
        )
        waiting = torch.distributed.new_group(backend="gloo")
    ranks = Ranks(rank, world, torch.device("cpu"), waiting)
    cache = LatentCache.open(store)
    record = QuantizerRecord.from_json(cache.record_json("tcq8"))
    samples = Samples(cache, {"tcq8": Quantizer(record)}, cache.indices(False), with_y=True)
    found = {}
    for form in ("quantized", "likelihood", "noise", "straight-through"):
        model = checkpoint.load(base).model
        freeze_all_but(model, trainable(model, "all-but-encoder"))
        wrapped = ranks.wrap(Decoding(model, record, form, means_gradient="search").double())
        batch = samples.batch(np.arange(8)[ranks.share(8)], key=(0, 3))
        x = to_input(batch.pixels, ranks.device).double()
        x_hat, bits = wrapped(batch)
        (0.05 * 255**2 * (x_hat - x).square().mean() + bits / x[:, 0].numel()).backward()
        found |= {f"{form} {name}": value.grad for name, value in model.named_parameters() if value.grad is not None}
    torch.save(found, f"{out}.{rank}")
    if world > 1:
        torch.distributed.destroy_process_group()


def above_bound(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Where a parameter is free. At its bound CompressAI's GDN lets a gradient pass by its sign alone, in which each
    rank's share and the whole batch may differ; everywhere else DDP's mean is the gradient of the whole."""
    value = model.get_parameter(name).detach()
    if not name.endswith(("gamma", "beta")):
        return torch.ones_like(value)
    return (value > model.get_buffer(f"{name}_reparam.lower_bound.bound") * (1 + 1e-6)).float()


@pytest.mark.slow
def test_gradients_of_two_ranks_are_those_of_one_process(base: Path, store: Path, tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("forkserver")
    gradients(str(base), str(store), 0, 1, "", str(tmp_path / "one"))
    meeting, out = str(tmp_path / "meeting"), str(tmp_path / "two")
    processes = [
        context.Process(target=gradients, args=(str(base), str(store), rank, 2, meeting, out)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    one, *two = (torch.load(path) for path in (f"{tmp_path}/one.0", f"{out}.0", f"{out}.1"))
    assert {name.split()[1].split(".")[0] for name in one} == {"g_s", "h_s", "entropy_bottleneck"}
    model = checkpoint.load(str(base)).model
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name])
        free = above_bound(model, name.split()[1])
        assert float(((two[0][name] - value) * free).norm()) <= 1e-10 * float(value.norm()), name


@pytest.mark.slow
def test_ranks_that_die_end_the_job_which_goes_on_to_the_same_bits(
    base: Path, photos: Path, store: Path, tmp_path: Path
) -> None:
    def file(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        phases = [{"recipe": "decoder", "steps": 5, "lr": 1e-3}, {"recipe": "decoder+hyper", "steps": 7, "lr": 1e-3}]
        more = {"latents": "noise", "ema": 0.5, "phases": phases}
        path.write_text(yaml.safe_dump(document(base, photos, store, tmp_path / name, **more)))
        return path

    said = tmp_path / "said"
    assert ranks("finetune", file("whole"), output=said) == [0, 0], said.read_text()[-3000:]
    weights = checkpoint.digest(checkpoint.load(str(tmp_path / "whole")).model.state_dict())

    codes = ranks("finetune", file("cut"), output=said, dying=(1,), step=5)  # after the state of step 4
    assert codes == [1, -signal.SIGKILL] and "rank 0 of 2 lost another" in said.read_text()
    assert not (tmp_path / "cut" / "checkpoint.pth.tar").exists()
    assert [path.name for path in (tmp_path / "cut" / "states").glob("*.pth*")] == ["00000004.pth"]
    codes = ranks("finetune", file("cut"), output=said, dying=(0, 1), step=4)  # after those of steps 5, a phase's last
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]
    assert ranks("finetune", file("cut"), output=said) == [0, 0], said.read_text()[-3000:]
    assert checkpoint.digest(checkpoint.load(str(tmp_path / "cut")).model.state_dict()) == weights
    assert [row["step"] for row in read_log(tmp_path / "cut" / "log.jsonl")] == [0, 4, 5, 9, 12]

    elastic = torchrun("0", 7, "finetune", file("elastic"))  # torchrun starts all ranks again
    assert elastic.returncode == 0, [line for line in elastic.stderr.splitlines() if "rror" in line][:30]
    assert checkpoint.digest(checkpoint.load(str(tmp_path / "elastic")).model.state_dict()) == weights


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["auto", 2])
def test_two_ranks_take_the_steps_of_one(
    base: Path, photos: Path, store: Path, tmp_path: Path, streams: int | str
) -> None:
    """After twelve steps, within a relative 1e-4 of each weight."""
    more = {"recipe": "decoder+hyper", "streams": streams, "workers": 0 if streams == "auto" else 1, "accumulate": 2}
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(document(base, photos, store, tmp_path / "two", **more)))
    job.finetune(config.Experiment.model_validate(document(base, photos, store, tmp_path / "one", **more)))
    said = tmp_path / "said"
    assert ranks("finetune", file, output=said) == [0, 0], said.read_text()[-3000:]
    one, two = (checkpoint.load(str(tmp_path / name)).model.state_dict() for name in ("one", "two"))
    for name, value in one.items():
        if name.startswith(("g_s.", "h_s.")) and not name.endswith("gamma"):  # see above_bound
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-6)
    again = tmp_path / "again"
    assert ranks("finetune", file, output=again) == [0, 0]
    assert again.read_text().count("done already") == 1 and "step/s" not in again.read_text()
    losses = [read_log(tmp_path / part / "log.jsonl")[-1]["held_out_L"] for part in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.slow
def test_a_job_of_two_ranks_of_which_one_is_told_to_leave_goes_on_with_one(
    base: Path, photos: Path, store: Path, tmp_path: Path
) -> None:
    """The order of global batches and their noise do not depend on the ranks; sums of gradients round otherwise."""
    more = {"recipe": "decoder+hyper", "latents": "noise"}
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(document(base, photos, store, tmp_path / "a", **more)))
    said = tmp_path / "said"
    assert ranks("finetune", path, output=said, dying=(1,), step=6, by=signal.SIGTERM) == [143, 143], said.read_text()
    assert said.read_text().count("error: SIGTERM: stopped after step 7, whose state is on disk") == 1
    job.finetune(config.Experiment.model_validate(document(base, photos, store, tmp_path / "a", **more)))
    job.finetune(config.Experiment.model_validate(document(base, photos, store, tmp_path / "b", **more)))
    one, two = (checkpoint.load(str(tmp_path / name)).model.state_dict() for name in "ab")
    for name, value in one.items():
        if not name.startswith(("g_s.", "h_s.")):
            assert torch.equal(two[name], value), name
        elif not name.endswith("gamma"):  # see above_bound
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_two_ranks_share_the_search_between_rounds(base: Path, photos: Path, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "a.zarr")
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(document(base, photos, tmp_path / "a.zarr", tmp_path / "out", steps=4, rounds=2)))
    said = tmp_path / "said"
    assert ranks("finetune", path, output=said) == [0, 0], said.read_text()[-3000:]
    second = json.loads((tmp_path / "out" / "rounds.json").read_text())[1]
    assert LatentCache.open(tmp_path / "a.zarr").written(second["group"]) == [0, 1, 2]
    assert not verify(tmp_path / "a.zarr")


def test_a_lost_rank_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from lic_dist.errors import LicError

    told = {"is_initialized": True, "get_rank": 0, "get_world_size": 2, "get_backend": "gloo", "new_group": None}
    for name, value in told.items():
        monkeypatch.setattr(distributed.dist, name, lambda value=value, **_: value)
    with pytest.raises(LicError, match="rank 0 of 2 lost another"), distributed.joined():
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]")
    with pytest.raises(RuntimeError, match="of its own"), distributed.joined():
        raise RuntimeError("an error of its own")
