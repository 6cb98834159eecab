"""Decoders trained against a discriminator: its gradients, exact resuming, equal bits, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lic_dist import config
from lic_dist.codec.codec import ImageCodec
from lic_dist.config.experiment import parse
from lic_dist.errors import UsageError
from lic_dist.evaluation.jobs import arm_of
from lic_dist.models import checkpoint
from lic_dist.models.blend import blended
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import decoder_digest, entropy_digest
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training import loop
from lic_dist.training.adversary import Adversary, PatchDiscriminator
from lic_dist.training.choice import Choice
from lic_dist.training.distributed import Ranks
from lic_dist.training.loss import HeldOut
from tests.conftest import Once, dying_at, picture
from tests.forked import ranks
from tests.training.test_finetune import document, run

ALONE = Ranks(0, 1, torch.device("cpu"))
FEW = {"steps": 6, "evaluate_every": 3}


def pictures(seed: int, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [count, 3, 64, 64] in [0, 1], and the same but blurred."""
    x = torch.from_numpy(np.stack([picture(seed + one, 64, 64) for one in range(count)]).transpose(0, 3, 1, 2) / 255)
    x = x.float()
    return x, torch.nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False)


def adversary(weight: float = 3.0) -> Adversary:
    return Adversary(weight, 1e-3, 0, ALONE.device)


def test_scores_are_of_patches_and_bounded() -> None:
    net = adversary().network
    x, _ = pictures(0)
    assert net(x).shape == (4, 1, 8, 8) and 200_000 < sum(value.numel() for value in net.parameters()) < 500_000
    assert torch.equal(net(x), net(x))  # a call iterates nothing
    probe = torch.zeros(1, 3, 128, 128, requires_grad=True)
    net(probe + 0.5)[0, 0, 8, 8].backward()
    rows = probe.grad.abs().sum((0, 1, 3)).nonzero()  # type: ignore[union-attr]
    assert int(rows.max() - rows.min()) + 1 == 58
    for _ in range(30):
        net.iterate()
    for layer in net.layers:
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.05)


def test_both_sides_learn_from_their_own_loss() -> None:
    made = adversary()
    x, blurred = pictures(0)
    weights = blurred.clone().requires_grad_(True)
    term = made.term(weights, x)
    term.backward()
    assert float(term.detach()) == pytest.approx(-3 * float(made.network(blurred).mean().detach()), rel=1e-5)
    assert weights.grad is not None and float(weights.grad.norm()) > 0
    assert all(one.grad is None for one in made.parameters)  # the decoder's loss teaches the discriminator nothing
    first = made.gradients(ALONE)
    assert all(float(one.grad.norm()) > 0 for one in made.parameters if one.dim() > 1)  # type: ignore[union-attr]
    for _ in range(12):
        made.step()
        made.term(blurred, x)
        last = made.gradients(ALONE)
    assert last < 0.7 * first  # blur is told from pictures
    made.term(torch.full_like(x, torch.nan), x)
    assert not np.isfinite(made.gradients(ALONE))


def test_parts_and_ranks_give_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, blurred = pictures(0)
    whole, parts = adversary(), adversary()
    whole.term(blurred, x)
    for part in (slice(0, 2), slice(2, 4)):
        parts.term(blurred[part], x[part])
    assert parts.gradients(ALONE) == pytest.approx(whole.gradients(ALONE), rel=1e-5)
    for one, other in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)

    def summed(values: torch.Tensor) -> None:  # of another rank with the same pictures
        values *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", summed)
    of_two = adversary()
    of_two.term(blurred, x)
    of_two.gradients(Ranks(0, 2, ALONE.device))
    for one, other in zip(whole.parameters, of_two.parameters, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_state_holds_all_that_later_steps_depend_on() -> None:
    def steps(made: Adversary, first: int, last: int) -> None:
        for number in range(first, last):
            x, blurred = pictures(number, 2)
            made.term(blurred, x)
            made.gradients(ALONE)
            made.step()

    whole, cut = adversary(), adversary()
    steps(whole, 0, 4)
    steps(cut, 0, 2)
    torch.manual_seed(99)  # which nothing depends on
    resumed = Adversary(3.0, 1e-3, 5, ALONE.device)
    resumed.load_state_dict(cut.state_dict())
    steps(resumed, 2, 4)
    one, other = (PatchDiscriminator.state_dict(made.network) for made in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one) and any(name.endswith("_u") for name in one)


def test_the_last_weights_are_kept_within_the_tolerance() -> None:
    def weights(value: float) -> torch.nn.Module:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, value)
        return model

    def figures(model: torch.nn.Module) -> HeldOut:
        L = 1 + float(model.weight.detach())  # 1 at the start, which only ever gets worse
        return HeldOut(L, 0.0, 0.0, {"a": L})

    def chosen(*values: float) -> tuple[float, int, float]:
        start = weights(0)
        choice = Choice(start.state_dict(), latest=True)
        choice.begin(figures(start), 0.25, resumed=False)
        for step, value in enumerate(values, start=1):
            model = weights(value)
            assert choice.offer(figures(model), step, model)
        choice.settle(figures(model), step, model, lambda: figures(model))
        return float(choice.best.weights["weight"]), choice.best.step, choice.best.share

    assert chosen(0.05, 0.01, 0.2) == (pytest.approx(0.2), 3, 1.0)
    assert chosen(0.05, 0.1, 0.4) == (pytest.approx(0.2), 3, 0.5)  # pulled: the largest share that is within
    assert chosen(0.05, 0.1, 3.0) == (pytest.approx(0.1), 2, 1.0)  # no share is: the last that was


@pytest.fixture(scope="module")
def decoders(base: Path, photos: Path, store: Path, once: Once) -> Path:
    """Decoders of weights 0 and 3, in folders of these names. Not to be changed."""

    def train(folder: Path) -> None:
        for weight in (0, 3):
            out = folder / str(weight)
            run(base, photos, store, out, distortion={"mse": 1, "adversarial": weight}, **FEW)

    return once("adversarial", train)


@pytest.mark.slow
def test_bits_are_equal_at_every_weight_and_blends_lie_between(base: Path, decoders: Path) -> None:
    parent = checkpoint.load(str(base))
    fidelity, perception = (checkpoint.load(str(decoders / name)) for name in "03")
    assert len({decoder_digest(one.model) for one in (parent, fidelity, perception)}) == 3
    assert {entropy_digest(one.model) for one in (fidelity, perception)} == {entropy_digest(parent.model)}
    assert fidelity.model.state_dict().keys() == parent.model.state_dict().keys()  # nothing of the discriminator
    assert (
        fidelity.quantizers == perception.quantizers
        and fidelity.quantizers["tcq8"] == fidelity.quantizers["tcq8-cached"]
    )
    assert [arm_of(one) for one in (fidelity, perception)] == ["decoder control", "decoder adversarial 3"]
    assert perception.history[-1]["best_step"] == 6 and perception.history[-1]["tolerance"] == 0.25

    half = blended(fidelity, perception, 0.5)
    assert arm_of(half) == "blend 0.5" and half.quantizers == fidelity.quantizers
    record = QuantizerRecord.from_json(fidelity.quantizers["tcq8"])
    image = picture(7, 100, 130)
    files = [ImageCodec(one.model, record).encode(image) for one in (fidelity, perception, half)]
    assert len({len(one.data) for one in files}) == 1 < len({one.data for one in files})  # the models' digests differ
    assert all(np.array_equal(one.k, files[0].k) for one in files)
    for name, value in half.model.named_parameters():
        one, other = (end.model.get_parameter(name) for end in (fidelity, perception))
        if name.startswith("g_s."):
            torch.testing.assert_close(value, (one + other) / 2)
        else:
            assert torch.equal(value, one) and torch.equal(value, other)
    for share, end in ((0, fidelity), (1, perception)):
        assert decoder_digest(blended(fidelity, perception, share).model) == decoder_digest(end.model)


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_weights(
    base: Path, photos: Path, store: Path, decoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job() -> Checkpoint:
        return run(base, photos, store, tmp_path, distortion={"mse": 1, "adversarial": 3}, **FEW)

    monkeypatch.setattr(loop, "take_step", dying_at(5))
    with pytest.raises(KeyboardInterrupt):
        job()
    monkeypatch.undo()
    whole = checkpoint.load(str(decoders / "3"))
    assert checkpoint.digest(job().model.state_dict()) == checkpoint.digest(whole.model.state_dict())


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(base: Path, photos: Path, store: Path, decoders: Path, tmp_path: Path) -> None:
    file, said = tmp_path / "two.yaml", tmp_path / "said"
    settings = {"distortion": {"mse": 1, "adversarial": 3}, **FEW}
    file.write_text(yaml.safe_dump(document(base, photos, store, tmp_path / "two", **settings)))
    assert ranks("finetune", file, output=said) == [0, 0], said.read_text()[-3000:]
    one, two = (checkpoint.load(str(path)).model.state_dict() for path in (decoders / "3", tmp_path / "two"))
    for name, value in one.items():
        if name.startswith("g_s.") and not name.endswith("gamma"):  # see above_bound of test_ranks.py
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_only_a_decoder_of_one_model_is_blended(base: Path) -> None:
    one, other = (checkpoint.load(str(base)) for _ in range(2))
    with torch.no_grad():
        other.model.h_s[0].weight += 1
    with pytest.raises(UsageError, match="have different entropy models"):
        blended(one, other, 0.5)
    with pytest.raises(UsageError, match="have different families: mbt2018-mean and block-transform"):
        blended(one, checkpoint.load("base-0.013"), 0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distortion": {"adversarial": 3}}, "holds no content"),
        ({"distortion": {"mse": 0, "adversarial": 3}}, "weights are above 0"),
        ({"distortion": {"mse": 1, "adversarial": -1}}, "lpips, adversarial or idempotence to numbers of at least 0"),
        ({"schedule": "plateau"}, "L does not tell progress"),
        ({"stop_after": 3}, "L does not tell progress"),
        ({"rounds": 2}, "rounds search again"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(changes: dict, said: str) -> None:
    section = {"distortion": {"mse": 1, "adversarial": 3}, **changes}
    with pytest.raises(UsageError, match=said):
        parse({"finetune": section}, "a.yaml")


def test_a_base_is_not_trained_against_it_and_bits_stay_fixed(
    base: Path, photos: Path, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"train\.distortion must be"):
        parse({"train": {"distortion": {"mse": 1, "adversarial": 3}}}, "a.yaml")
    with pytest.raises(UsageError, match="the decoder alone trains"):
        run(base, photos, store, tmp_path, recipe="decoder+hyper", distortion={"mse": 1, "adversarial": 3})


def test_the_tolerance_is_wider_where_it_is_not_given() -> None:
    given = {"distortion": {"mse": 1, "adversarial": 0}}
    assert [config.Finetune(**more).tolerance for more in ({}, given, {**given, "tolerance": 0.1})] == [
        0.002,
        0.25,
        0.1,
    ]
