"""The course of steps on a model of two layers: exact resuming, phases, averages, schedules, and what stops it."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lic_dist import config
from lic_dist.config.experiment import parse
from lic_dist.errors import LicError, Stopped, UsageError
from lic_dist.models.compat import import_compressai
from lic_dist.training import loop as module
from lic_dist.training.average import WeightAverage
from lic_dist.training.distortion import Distortion
from lic_dist.training.distributed import Ranks
from lic_dist.training.log import Log, read_log
from lic_dist.training.loop import PhasePlan, TrainingLoop
from lic_dist.training.loss import HeldOut, held_out_figures
from lic_dist.training.schedule import Patience, learning_rate
from lic_dist.training.states import ResumeStates
from tests.conftest import dying_at

ALONE = Ranks(0, 1, torch.device("cpu"))
PHASES = (PhasePlan(("a.weight", "a.bias"), 7, 0.1), PhasePlan(("a.bias", "b.weight"), 6, 0.05))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x + 0.1 * torch.randn_like(x))))


def section(out: Path, **changes: object) -> config.Finetune:
    return config.Finetune(**{"batch": 4, "evaluate_every": 3, "warmup": 2, "out": out, **changes})


def batch_of(step: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32))


def loss_of(forward: nn.Module, x: Tensor) -> Tensor:
    return (forward(x) - x.sum(1, keepdim=True)).square().mean()


def run(
    out: Path,
    model: nn.Module | None = None,
    phases: tuple[PhasePlan, ...] = PHASES,
    measure: Callable[[nn.Module], HeldOut | None] | None = None,
    loss: Callable[[nn.Module, Tensor], Tensor] = loss_of,
    from_start: bool = False,
    **changes: object,
) -> tuple[TrainingLoop, nn.Module]:
    """Run a job; `from_start` measures before the first step too."""
    model = model or Two()
    asked = section(out, **changes)

    def figures() -> HeldOut | None:
        if measure is not None:
            return measure(model)
        torch.manual_seed(1)
        return HeldOut(float(loss_of(model, batch_of(1000)).detach()), 0.0, 0.0)

    before = figures() if from_start else None
    loop = TrainingLoop("training", asked, phases, model, model, asked.model_dump(mode="json", exclude={"out"}), ALONE)
    if before is not None:
        loop.record_start(before, asked.tolerance)
    for step in loop:
        loop.train_step(batch_of(step).tensor_split(asked.accumulate), loss, lambda: f"batch {step}")  # noqa: B023
        if loop.evaluation_due:
            loop.evaluate(figures)
    return loop, model


def bits(model: nn.Module) -> list[bytes]:
    return [value.numpy().tobytes() for value in model.state_dict().values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9, "schedule": "plateau", "patience": 1, "accumulate": 2},
        {"ema": 0.5, "schedule": "constant", "stop_after": 1, "evaluate_every": 1},
    ],
)
def test_a_job_killed_at_any_step_goes_on_to_the_same_bits(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = run(tmp_path / "whole", **changes)
    rows = [
        {**row, "time": 0, "steps_per_second": 0, "cpu_seconds": 0}
        for row in read_log(tmp_path / "whole" / "log.jsonl")
    ]
    for step in range(1, whole.done + 1):
        out = tmp_path / f"cut{step}"
        with monkeypatch.context() as patch:
            patch.setattr(module, "take_step", dying_at(step))
            with pytest.raises(KeyboardInterrupt):
                run(out, **changes)
        resumed, other = run(out, **changes)
        assert bits(other) == bits(model) and resumed.best.step == whole.best.step, step
        assert [
            {**row, "time": 0, "steps_per_second": 0, "cpu_seconds": 0} for row in read_log(out / "log.jsonl")
        ] == rows


@pytest.mark.parametrize("step", [1, 3, 5, 7, 10])
def test_sigterm_leaves_a_state_after_the_step_from_which_the_job_goes_on_to_the_same_bits(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 7 end with an evaluation, which has written that state."""
    whole, model = run(tmp_path / "whole")

    def told(forward: nn.Module, x: Tensor) -> Tensor:
        if torch.equal(x, batch_of(step - 1)):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_of(forward, x)

    monkeypatch.setattr(sys.modules[__name__], "ALONE", Ranks(0, 1, torch.device("cpu")))
    before, out = signal.getsignal(signal.SIGTERM), tmp_path / "cut"
    with pytest.raises(Stopped, match=f"SIGTERM: stopped after step {step}") as caught:
        run(out, loss=told)
    assert caught.value.exit_code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    assert max(path.name for path in (out / "states").glob("*.pth")) == f"{step:08d}.pth"
    monkeypatch.setattr(sys.modules[__name__], "ALONE", Ranks(0, 1, torch.device("cpu")))
    resumed, other = run(out)
    assert resumed.first == step and bits(other) == bits(model)


def test_missing_ranks_make_more_parts_and_no_larger_ones() -> None:
    def parts(world: int, accumulate: int = 1, usual: int = 8, batch: int = 32) -> int:
        return Ranks(0, world, torch.device("cpu"), usual=usual).parts(batch, accumulate)

    assert [parts(world) for world in (8, 4, 2, 1)] == [1, 2, 4, 8]
    assert parts(16) == 1 and parts(2, usual=0) == 1 and parts(4, accumulate=2) == 4
    assert parts(3, batch=24) == 4  # 8 samples, at most 3 at a time
    with pytest.raises(UsageError, match="4 samples do not divide into 3 parts"):
        parts(8, accumulate=3)


def test_a_phase_trains_its_own_parameters_from_the_best_weights_so_far(tmp_path: Path) -> None:
    seen: list[tuple[float, dict[str, Tensor]]] = []

    def measure(model: nn.Module) -> HeldOut:
        """Best at the second of the first phase's three evaluations (3, 6, 7), then at the last of all."""
        L = {0: 5.0, 1: 1.0, 2: 2.0}.get(len(seen), 3.0 - 2.5 * (len(seen) == 4))
        seen.append((L, {name: value.clone() for name, value in model.state_dict().items()}))
        return HeldOut(L, 0.0, 0.0)

    start = bits(Two())
    loop, model = run(tmp_path, measure=measure)
    first, second, third, fourth, fifth = (weights for _, weights in seen)
    assert torch.equal(third["b.weight"], Two().b.weight) and torch.equal(third["b.bias"], Two().b.bias)
    assert not torch.equal(third["a.weight"], second["a.weight"])
    for later in (fourth, fifth):
        assert torch.equal(later["a.weight"], second["a.weight"])  # the best of phase one, frozen bit for bit
        assert torch.equal(later["b.bias"], Two().b.bias)
        assert not torch.equal(later["b.weight"], second["b.weight"])
    assert loop.best.step == 13 and loop.best.figures == HeldOut(0.5, 0.0, 0.0)
    assert all(torch.equal(value, fifth[name]) for name, value in model.state_dict().items())
    assert bits(Two()) == start


def test_early_stopping_ends_a_phase_and_keeps_the_best(tmp_path: Path) -> None:
    left = iter([3.0, 1.0, 2.0, 2.0])
    loop, model = run(
        tmp_path,
        phases=(PhasePlan(("a.weight",), 100, 0.1),),
        measure=lambda model: HeldOut(next(left), 0.0, 0.0),
        stop_after=2,
    )
    assert loop.done == 12 and loop.best.step == 6
    assert all(torch.equal(value, loop.best.weights[name]) for name, value in model.state_dict().items())


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    def loss(forward: nn.Module, x: Tensor) -> Tensor:  # without the noise, which is drawn by the part
        model: Any = forward
        return (model.b(torch.tanh(model.a(x.double()))) - x.sum(1, keepdim=True)).square().mean()

    _, whole = run(tmp_path / "one", Two().double(), loss=loss, measure=lambda model: None)
    _, parts = run(tmp_path / "four", Two().double(), loss=loss, measure=lambda model: None, accumulate=4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-9, atol=1e-12)
    with pytest.raises(UsageError, match="4 samples do not divide into 3 parts"):
        run(tmp_path / "three", accumulate=3)


def test_the_average_of_weights() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = WeightAverage([weight], decay=0.3)
    expected = weight.detach().clone()
    for update, value in enumerate([3.0, -1.0, 0.5]):
        with torch.no_grad():
            weight.fill_(value)
        average.update()
        decay = min(0.3, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        torch.testing.assert_close(weight.detach(), expected)
    assert weight.tolist() == [0.5, 0.5]
    none = WeightAverage([weight], decay=0.0)
    none.update()
    with none.applied():
        assert weight.tolist() == [0.5, 0.5]


def test_what_is_judged_and_kept_is_the_average(tmp_path: Path) -> None:
    judged: list[Tensor] = []

    def measure(model: nn.Module) -> HeldOut:
        judged.append(model.state_dict()["a.weight"].clone())
        return HeldOut(1.0 / len(judged), 0.0, 0.0)

    loop, model = run(tmp_path, measure=measure, ema=0.9, phases=PHASES[:1])
    raw = loop.states.latest()
    assert raw is not None and not torch.equal(raw["model"]["a.weight"], judged[-1])
    assert torch.equal(model.state_dict()["a.weight"], judged[-1])


def test_the_schedules(tmp_path: Path) -> None:
    cosine = section(tmp_path, warmup=10, anneal=0.8, floor=0.1)
    rates = [learning_rate(cosine, step, 100, 2.0) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and max(rates) == 2.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[45] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half of the way from 10 to 80
    assert rates[80] == rates[99] == pytest.approx(0.2)
    plateau = section(tmp_path, schedule="plateau", patience=2, floor=0.2)
    watch, halvings = Patience(), []
    for better in (True, False, False, False, True, False, False, False, False):
        watch.note(better, plateau)
        halvings.append(watch.halvings)
    assert halvings == [0, 0, 1, 1, 1, 1, 2, 2, 3]
    assert [learning_rate(plateau, 50, 100, 1.0, number) for number in range(4)] == [1.0, 0.5, 0.25, 0.2]
    assert learning_rate(section(tmp_path, schedule="constant"), 99, 100, 3.0) == 3.0


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step_and_names_the_batch(poison: str, tmp_path: Path) -> None:
    def loss(forward: nn.Module, x: Tensor) -> Tensor:
        if not torch.equal(x, batch_of(4)):
            return loss_of(forward, x)
        weight = next(forward.parameters())
        return (weight.detach() * math.inf).sum() + weight.sum() if poison == "loss" else (weight * 0).sqrt().sum()

    model = Two()
    with pytest.raises(LicError, match=r"step 5: loss .* of batch 4; gradient norm .*stopped before the step"):
        run(tmp_path, model, loss=loss)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert [path.name for path in (tmp_path / "states").glob("*.pth*")] == ["00000003.pth"]


def test_weights_that_are_lost_between_two_states_never_reach_the_disk(tmp_path: Path) -> None:
    with pytest.raises(LicError, match=r"step 3: held-out L is (nan|inf)"):
        run(tmp_path, measure=lambda model: HeldOut(math.nan, 0.0, 0.0))
    assert not list((tmp_path / "states").glob("*.pth*"))
    with pytest.raises(UsageError, match="lr must be a number above 0, not inf"):
        parse({"finetune": {"lr": math.inf}}, "a.yaml")


def test_the_last_states_are_kept_and_a_broken_one_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = ResumeStates(tmp_path / "states", {"lr": 1}, keep=2)
    assert states.latest() is None
    for step in (3, 6, 9):
        states.write(step, {"done": step})
    assert sorted(path.name for path in states.folder.glob("*.pth*")) == ["00000006.pth", "00000009.pth"]
    newest = states.folder / "00000009.pth"
    newest.write_bytes(newest.read_bytes()[:-100])
    found = states.latest()
    assert found is not None and found["done"] == 6 and "passed over" in capsys.readouterr().err
    (states.folder / "00000006.pth").write_bytes(b"")
    with pytest.raises(LicError, match="no state in .* can be read"):
        states.latest()
    ResumeStates(tmp_path / "other", {"lr": 1}, keep=2).write(1, {})
    with pytest.raises(UsageError, match=r"lr \(1 there, 2 here\)"):
        ResumeStates(tmp_path / "other", {"lr": 2}, keep=2).latest()


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EIO"])
def test_a_disk_that_takes_no_state_keeps_the_one_before(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = run(tmp_path / "whole")
    code, sync, calls = getattr(errno, number), os.fsync, 0

    def refuse(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(code, os.strerror(code))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(LicError, match=f"cannot write .*{os.strerror(code)}") as caught:
            run(tmp_path / "full")
    assert "is kept" in caught.value.hint
    assert [path.name for path in (tmp_path / "full" / "states").glob("*.pth*")] == ["00000003.pth"]
    _, resumed = run(tmp_path / "full")
    assert bits(resumed) == bits(whole)


def test_tensorboards_files_say_what_the_log_says(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    run(tmp_path, tracking=["tensorboard"])
    rows = read_log(tmp_path / "log.jsonl")
    found: dict[tuple[str, int], float] = {}
    for file in (tmp_path / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:  # TFRecord: length, its crc, the event, its crc
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + size :]
    for row in rows:
        assert found["held_out_L", row["step"]] == pytest.approx(row["held_out_L"], rel=1e-6)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 13


def test_a_state_that_a_rank_does_not_find_is_waited_for_and_then_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = ResumeStates(tmp_path, {}, keep=2)
    later = threading.Timer(0.5, states.write, (4, {"done": 4}))
    later.start()
    assert states.wait_for(4)["done"] == 4
    later.join()
    monkeypatch.setattr("lic_dist.training.states.VISIBLE_SECONDS", 0.0)
    with pytest.raises(LicError, match=r"a rank does not find .*00000008\.pth") as caught:
        states.wait_for(8)
    assert "that all see" in caught.value.hint


def test_two_jobs_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    with ResumeStates(tmp_path / "states", {}, keep=2).lock(), pytest.raises(LicError, match="another job writes into"):
        run(tmp_path)
    run(tmp_path)  # the lock went with its holder


def test_a_log_that_cannot_be_cut_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, loss=0.5)
    before = log.path.read_bytes()

    def refuse(self: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        with pytest.raises(LicError, match="cannot write .*log.jsonl: No space left"):
            Log(tmp_path, 2)
    assert log.path.read_bytes() == before
    Log(tmp_path, 2)
    assert [row["step"] for row in read_log(log.path)] == [1, 2]


# distortions and held-out figures


def test_distortions_are_compressais_losses_and_their_weighted_sum() -> None:
    import_compressai()
    from compressai.losses import RateDistortionLoss

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 192, 192, generator=generator)
    x_hat = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    likelihoods = {"y": torch.ones(2, 1, 1, 1)}
    values = {}
    for name in ("mse", "ms-ssim"):
        criterion = RateDistortionLoss(lmbda=1.0, metric=name)
        expected = criterion({"x_hat": x_hat, "likelihoods": likelihoods}, x)["loss"]
        values[name] = Distortion(name, 192, torch.device("cpu"))(x_hat, x)
        torch.testing.assert_close(values[name], expected)
    mix = Distortion({"mse": 0.5, "ms-ssim": 300.0}, 192, torch.device("cpu"))(x_hat, x)
    torch.testing.assert_close(mix, 0.5 * values["mse"] + 300 * values["ms-ssim"])
    with pytest.raises(UsageError, match="MS-SSIM needs crops of 161 pixels or more, these have 128"):
        Distortion("ms-ssim", 128, torch.device("cpu"))


def test_lpips_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UsageError, match="needs the package lpips"):
        Distortion({"mse": 1.0, "lpips": 5.0}, 64, torch.device("cpu"))


@pytest.mark.parametrize("distortion", ["psnr", {}, {"mse": 0.0}, {"mse": 1.0, "vmaf": 1.0}])
def test_other_distortions_are_refused(distortion: object) -> None:
    with pytest.raises(UsageError, match="distortion"):
        parse({"finetune": {"distortion": distortion}}, "a.yaml")


def test_held_out_figures_are_means_over_pictures_of_unequal_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    x, x_hat = torch.rand(5, 3, 8, 8, generator=generator), torch.rand(5, 3, 8, 8, generator=generator) * 1.5 - 0.2
    parts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    found = held_out_figures(
        parts,
        lambda part: (x[part], x_hat[part], torch.tensor(100.0 * len(x[part]))),
        Distortion("mse", 8, ALONE.device),
        0.01,
        ALONE,
    )
    mse = float((x_hat.clamp(0, 1) - x).square().mean())
    assert found.bpp == pytest.approx(100 / 64)
    assert found.psnr == pytest.approx(-10 * math.log10(mse), rel=1e-6)
    assert pytest.approx(0.01 * 255**2 * mse + 100 / 64, rel=1e-6) == found.L
