"""Sources of held-out photos: how they are told apart, and that no training harms one of them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lic_dist import config
from lic_dist.building.build import build
from lic_dist.cache.reader import LatentCache
from lic_dist.models import checkpoint
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training import loop as course
from lic_dist.training import sources as module
from lic_dist.training.changes import losers, source_changes
from lic_dist.training.choice import BestWeights, Choice, interpolated
from lic_dist.training.distributed import Ranks
from lic_dist.training.finetune import _write_best_round, finetune
from lic_dist.training.finish import _harmless
from lic_dist.training.log import read_log
from lic_dist.training.loss import HeldOut, held_out_figures
from lic_dist.training.sources import Sources, sources_of
from tests import stores
from tests.conftest import Once, dying_at
from tests.training import studio
from tests.training.test_course import Two, batch_of, bits, loss_of, run

SECTION = {"recipe": "decoder", "steps": 12, "batch": 4, "evaluate_every": 4, "warmup": 2}


def test_one_folder_is_one_source_and_of_enough_samples_thirds_by_their_bits(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = LatentCache.open(made)
    one = sources_of(cache, "tcq8")
    assert one.names == ("all",) and np.array_equal(one.samples, cache.indices(held_out=True))
    parts, names = one.batches()
    assert [part.tolist() for part in parts] == [list(range(6))] and names == []
    parts, keys = one.photo_batches()
    paths = cache.samples["source"][one.samples]
    assert sorted(key[1] for key in keys) == sorted(set(paths)) == ["valid/6.png", "valid/7.png"]
    assert all(set(paths[part]) == {photo} for part, (_, photo) in zip(parts, keys, strict=True))
    monkeypatch.setattr(module, "LEAST_SAMPLES", 2)
    thirds = sources_of(cache, "tcq8")
    measured = cache.load(("quantized/tcq8/bits",), thirds.samples)["quantized/tcq8/bits"]
    by_source = [sorted(measured[[name == one for one in thirds.of_sample]]) for name in thirds.names]
    assert thirds.names == ("smooth", "medium", "detailed") and [len(some) for some in by_source] == [2, 2, 2]
    assert all(lower[-1] <= higher[0] for lower, higher in pairwise(by_source))


def test_folders_are_sources_and_the_rarest_of_many_one_together(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["big/1.png"] * 70 + [f"{number}/x/{number}.png" for number in range(9) for _ in range(10 - number)]
    monkeypatch.setattr(module, "_paths", lambda cache, samples: [paths[sample - 3] for sample in samples])
    held_out: Any = SimpleNamespace(indices=lambda held_out: np.arange(3, 3 + len(paths)))
    found = sources_of(held_out, "tcq8")
    assert found.names == ("0", "1", "2", "3", "4", "5", "big", "others")
    counts = {name: found.of_sample.count(name) for name in found.names}
    assert counts == {"big": 64, "0": 8, "1": 8, "2": 8, "3": 7, "4": 6, "5": 5, "others": 8}  # 64, and 8 of the rare
    assert (np.diff(found.samples) > 0).all()
    assert all(paths[sample - 3] == photo for sample, photo in zip(found.samples, found.photos, strict=True))
    parts, names = found.batches()
    assert all(
        len(part) <= 8 and {found.of_sample[row] for row in part} == {name}
        for part, name in zip(parts, names, strict=True)
    )
    assert sorted(row for part in parts for row in part) == list(range(len(found.samples)))


def figures(**by_source: float) -> HeldOut:
    return HeldOut(sum(by_source.values()) / len(by_source), 0.0, 0.0, by_source)


def choice_of(offered: list[HeldOut], tolerance: float = 0.002) -> Choice:
    made = Choice(Two().state_dict())
    made.begin(figures(a=1.0, b=10.0), tolerance, resumed=False)
    for step, one in enumerate(offered, start=1):
        made.offer(one, step, Two())
    return made


def test_the_best_weights_are_the_least_mean_of_those_that_harm_no_source() -> None:
    offered = [
        figures(a=0.99, b=10.0),
        figures(a=1.0021, b=5.0),  # the least L, and of b half; but a loses .21 %
        figures(a=0.95, b=10.01),  # of a larger L than the first
        figures(a=0.96, b=9.99),
    ]
    assert choice_of(offered).best.step == 3
    assert choice_of(offered, tolerance=0.01).best.step == 2
    assert choice_of(offered[1:2]).best.step == 0
    assert choice_of([figures(a=float("nan"), b=1.0)]).best.step == 0


@pytest.mark.parametrize(("limit", "share"), [(0.8, 0.75), (0.6, 0.5), (0.3, 0.25), (0.2, 1.0)])
def test_weights_that_harm_are_pulled_as_far_as_needed(limit: float, share: float) -> None:
    start, end = Two(), Two()
    with torch.no_grad():
        end.b.bias += 1.0

    def measure() -> HeldOut:
        moved = float((end.b.bias - start.b.bias).detach())
        return figures(a=1.0 - 0.1 * moved, b=10.0 + (1.0 if moved > limit else 0.0))

    choice = Choice(start.state_dict())
    choice.begin(figures(a=1.0, b=10.0), 0.002, resumed=False)
    before, last = bits(end), measure()
    choice.offer(last, 7, end)
    choice.settle(last, 7, end, measure)
    kept = 7 if share < 1 else 0
    assert (choice.best.step, choice.best.share) == (kept, share) and bits(end) == before
    moved = choice.best.weights["b.bias"] - start.b.bias
    assert float(moved.detach()) == pytest.approx(share if kept else 0.0, abs=1e-6)
    (refused,) = choice.refused
    assert refused["step"] == 7 and refused["change_percent"]["b"] == pytest.approx(10)
    assert (refused["kept_step"], refused["kept_share"]) == (kept, share)


def test_what_does_not_train_keeps_its_bits_between_two_weights() -> None:
    start, end = Two(), Two()
    with torch.no_grad():
        end.b.bias += 1.0
    found = interpolated(start.state_dict(), end.state_dict(), 0.75)
    assert all(torch.equal(found[name], start.state_dict()[name]) for name in found if name != "b.bias")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"ema": 0.5, "stop_after": 1, "evaluate_every": 2}])
def test_a_job_killed_at_any_step_pulls_to_the_same_weights(
    changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Two().state_dict()

    def measure(model: nn.Module) -> HeldOut:
        torch.manual_seed(1)
        moved = sum(float((value - begun[name]).square().sum()) for name, value in model.state_dict().items())
        return figures(learnt=float(loss_of(model, batch_of(1000)).detach()), forgotten=1.0 + 0.02 * moved)

    def outcome(out: Path) -> tuple[object, ...]:
        loop, model = run(out, measure=measure, from_start=True, **changes)
        rows = [{**row, "time": 0, "steps_per_second": 0, "cpu_seconds": 0} for row in read_log(out / "log.jsonl")]
        return bits(model), loop.best.step, loop.best.share, loop.choice.refused, rows, loop.done

    whole = outcome(tmp_path / "whole")
    assert len(whole[3]) == 2 and whole[1] > 0 and whole[2] < 1  # type: ignore[arg-type, operator]
    for step in range(1, whole[-1] + 1):  # type: ignore[operator]
        with monkeypatch.context() as patch:
            patch.setattr(course, "take_step", dying_at(step))
            with pytest.raises(KeyboardInterrupt):
                outcome(tmp_path / f"cut{step}")
        assert outcome(tmp_path / f"cut{step}") == whole, step


def test_figures_by_source_are_the_means_of_its_parts_for_any_ranks() -> None:
    parts, names = [torch.full((count, 3, 2, 2), value) for count, value in ((2, 0.5), (1, 0.25), (3, 0.0))], "xyx"

    class Both(Ranks):
        def gather(self, value: list[object]) -> list[object]:
            return [own(rank, 1) for rank in range(2)] if self.world == 2 else [value]

    def decode(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(part), part, torch.tensor(4.0 * len(part))

    def mse(x_hat: Tensor, x: Tensor) -> Tensor:
        return (x_hat - x).square().mean()

    def own(rank: int, world: int) -> object:
        rows: list[object] = []
        for part in parts[rank::2]:
            x, x_hat, bits = decode(part)
            squared = float((x_hat - x).double().square().sum())
            rows.append((len(x) * float(mse(x_hat, x)), squared, float(bits), len(x), x.numel()))
        return rows

    one = held_out_figures(parts, decode, mse, 10.0, Ranks(0, 1, torch.device("cpu")), names)
    assert one == held_out_figures(parts, decode, mse, 10.0, Both(1, 2, torch.device("cpu")), names)
    assert one.by_source == {"x": pytest.approx(10 * (2 * 0.25) / 5 + 1), "y": pytest.approx(10 * 0.0625 + 1)}
    assert pytest.approx(sum(one.by_source[name] * count for name, count in (("x", 5), ("y", 1))) / 6) == one.L


SOURCES = Sources(np.arange(4), ("p", "p", "q", "r"), ("a", "a", "a", "b"), ("a", "b"))


def test_changes_weigh_photos_by_their_crops() -> None:
    before = {("a", "p"): 1.0, ("a", "q"): 4.0, ("b", "r"): 5.0}
    a, b = source_changes(SOURCES, before, {("a", "p"): 1.1, ("a", "q"): 4.0, ("b", "r"): 5.02})
    assert (a.photos, a.crops, b.photos, b.crops) == (2, 3, 1, 1)
    assert a.before == 2 and a.after == pytest.approx(6.2 / 3) and a.change.mean == pytest.approx(100 * 0.2 / 6)
    assert a.change.low == pytest.approx(0) and a.change.high == pytest.approx(10)
    assert [one.source for one in losers([a, b], 0.0041)] == ["a"] and len(losers([a, b], 0.0039)) == 2


def test_a_quantizer_or_weights_that_harm_are_given_up(base: Path, made: Path) -> None:
    loaded, record = checkpoint.load(str(base)), QuantizerRecord.from_json(LatentCache.open(made).record_json("tcq8"))
    records = {"tcq8": record}
    pairs = {name: (Checkpoint(loaded.model, loaded.spec), records) for name in ("before", "the cache's", "anew")}
    before = {("a", "p"): 1.0, ("a", "q"): 1.0, ("b", "r"): 1.0}

    def kept(**b: float) -> tuple[str, list[str]]:
        by_name = {name: {**before, ("b", "r"): b.get(name.split("'")[0].replace(" ", "_"), 1.0)} for name in pairs}

        def by_photo(checkpoint: Checkpoint, _: object) -> dict[str, dict[tuple[str, str], float]]:
            return {"tcq8": by_name[next(name for name, pair in pairs.items() if pair[0] is checkpoint)]}

        name, _, given_up = _harmless(pairs, by_photo, SOURCES, 0.002)
        return name, list(given_up)

    assert kept(anew=0.9) == ("anew", [])
    assert kept(anew=1.01) == ("the cache's", ["anew"])
    assert kept(anew=1.01, the_cache=1.003) == ("before", ["anew", "the cache's"])


def test_older_states_tell_no_sources_apart_and_begin_anew() -> None:
    resumed = Choice(Two().state_dict())
    resumed.load_state({"best": {"figures": {"L": 1.0, "bpp": 0.0, "psnr": 0.0}, "step": 9, "weights": {}}})
    assert resumed.best == BestWeights(HeldOut(1.0, 0.0, 0.0), 9, {})
    resumed.begin(figures(a=1.0, b=1.0), 0.002, resumed=True)
    assert resumed.best.step == 0 and resumed.best.weights.keys() == Two().state_dict().keys()


def test_the_best_round_has_harmed_no_source_since_the_first_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss within the tolerance of each of two rounds is more than it of both."""
    paths = []
    for number, (L, before, after) in enumerate([(9.0, 1.0, 1.0015), (8.0, 1.0015, 1.003)], start=1):
        source = {"source": "studio", "before": before, "after": after}
        figures = {"calibrated_before": {"L": 10.0}, "calibrated_after": {"L": L}, "sources": [source]}
        entry = {"group": "tcq8", "record": "", "best_step": 5, **figures}
        paths.append(tmp_path / f"{number}.pth.tar")
        checkpoint.write({"history": [entry], "number": number}, paths[-1])
    for tolerance, best in ((0.002, 1), (0.01, 2)):
        _write_best_round(paths, tmp_path / "best.pth.tar", tolerance)
        assert checkpoint.read(tmp_path / "best.pth.tar")["number"] == best
    assert capsys.readouterr().out.count("round 2: studio lost more than 0.2 % of L since the first") == 1


@pytest.fixture(scope="module")
def studio_store(once: Once) -> Path:
    """A folder with `photos` of tests/training/studio.py and their store by `base-small`. Not to be changed."""

    def fill(folder: Path) -> None:
        photos = studio.draw(folder / "photos")
        build(stores.experiment(Path("base-small"), photos, folder / "a.zarr", quantizer=stores.FIXED))

    return once("studio", fill)


def retrained(folder: Path, out: Path, **section: object) -> Checkpoint:
    document = stores.experiment(Path("base-small"), folder / "photos", folder / "a.zarr", quantizer=stores.FIXED)
    asked = {**document.model_dump(), "finetune": {**SECTION, **section, "out": str(out)}}
    return checkpoint.load(str(finetune(config.Experiment.model_validate(asked))))


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "share"), [(5e-5, 0.25), (1e-3, 1.0)])
def test_studio_pictures_with_smooth_grounds_are_not_harmed_by_training_on_textures(
    lr: float, share: float, studio_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their L rises by per cents; pulled weights gain on both kinds, and where none do, the old ones are kept."""
    made = retrained(studio_store, tmp_path, lr=lr)
    entry, rows = made.history[-1], read_log(tmp_path / "log.jsonl")
    assert rows[-1]["held_out_L valid/studio"] > 1.01 * rows[0]["held_out_L valid/studio"]
    (refused,) = entry["refused"]
    assert refused["step"] == 12 and refused["change_percent"]["valid/studio"] > 1
    said = capsys.readouterr().out
    assert "Weights of step 12: valid/studio loses" in said and "more than 0.2 %: kept are the old ones" in said
    assert [one["source"] for one in entry["sources"]] == ["valid/studio", "valid/textured"]
    assert all(one["after"] <= 1.002 * one["before"] for one in entry["sources"])
    assert entry["share"] == share
    old, new = checkpoint.load("base-small").model.state_dict(), made.model.state_dict()
    if share < 1:
        assert entry["best_step"] == 12 and "and 0.25 of the change to these" in " ".join(said.split())
        assert any(not torch.equal(value, old[name]) for name, value in new.items())
        assert sum(one["after"] / one["before"] for one in entry["sources"]) < 2
    else:
        assert entry["best_step"] == 0 and all(torch.equal(value, old[name]) for name, value in new.items())
