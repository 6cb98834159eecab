"""Finetuning on several stores as one: exact and resumable, by weight, by source, and refusals that name the store."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml

from lic_dist import config
from lic_dist.cache.folder import Folder
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.jobs import snapshot_of
from lic_dist.models import checkpoint
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training import finetune as job
from lic_dist.training import loop
from lic_dist.training.distributed import Ranks
from lic_dist.training.samples import training_data
from lic_dist.training.snapshots import read_snapshots
from lic_dist.training.sources import sources_of_all, trained_elsewhere
from tests.cache.test_growth import grow
from tests.conftest import Once, dying_at
from tests.forked import ranks
from tests.training.several import TCQ, make_store
from tests.training.test_finetune import document


@pytest.fixture(scope="module")
def two(base: Path, once: Once) -> list[Path]:
    """Stores of one encoder and record, of 20 and 12 samples, four of each held out. Not to be changed."""
    parent = checkpoint.load(str(base))

    def made(folder: Path) -> None:
        for name, samples in (("a", 20), ("b", 12)):
            make_store(folder / f"{name}.zarr", parent, TCQ, samples)

    folder = once("two-stores", made)
    return [folder / "a.zarr", folder / "b.zarr"]


def experiment(base: Path, stores: list, out: Path, weights: tuple[float, ...] = (1, 3), **finetune: object) -> dict:
    mixed = [{"path": str(path), "weight": weight} for path, weight in zip(stores, weights, strict=False)]
    made = document(
        base, out, out, out, **{"recipe": "decoder", "cache": mixed, "steps": 6, "evaluate_every": 3, **finetune}
    )
    del made["cache"], made["images"]
    return {**made, "quantizer": json.loads(TCQ.model_dump_json())}


def run(*arguments, **finetune: object) -> checkpoint.Checkpoint:
    return checkpoint.load(str(job.finetune(config.Experiment.model_validate(experiment(*arguments, **finetune)))))


def digest(made: checkpoint.Checkpoint) -> str:
    return checkpoint.digest(made.model.state_dict())


@pytest.mark.slow
def test_a_killed_job_on_two_stores_goes_on_to_the_same_weights_and_is_one_of_its_weights(
    base: Path, two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(base, two, tmp_path / "whole", latents="noise")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", dying_at(5))
        with pytest.raises(KeyboardInterrupt):
            run(base, two, tmp_path / "cut", latents="noise")
    with pytest.raises(
        UsageError, match=r"is of another job: cache \(\['1 of .*', '3 of .*'\] there, \['1 of .*', '2 of"
    ):
        run(base, two, tmp_path / "cut", (1, 2), latents="noise")
    with pytest.raises(UsageError, match="is of another job: cache"):
        run(base, two[::-1], tmp_path / "cut", (3, 1), latents="noise")
    resumed = run(base, two, tmp_path / "cut", latents="noise")
    assert digest(resumed) == digest(whole)
    entry = whole.history[-1]
    fingerprints = [LatentCache.open(path).fingerprint for path in two]
    assert entry["cache"] == [f"{weight} of {one[:16]}" for weight, one in zip((1, 3), fingerprints, strict=True)]
    assert snapshot_of(whole) == {"cache": ", ".join(entry["cache"])}
    assert entry["samples"] == 24 and {one["source"] for one in entry["sources"]} == {"a", "b"}
    assert json.loads((tmp_path / "cut" / "snapshot.json").read_text())["stores"] == [
        {"path": str(path), "weight": weight, "snapshot": 0, "digest": one}
        for path, weight, one in zip(two, (1, 3), fingerprints, strict=True)
    ]
    assert "warning: 4 photos that one store holds out train in another" in capsys.readouterr().err
    alone = run(base, two[:1], tmp_path / "alone", (7,), latents="noise")
    assert alone.history[-1]["cache"] == fingerprints[0]  # as of cache.path: no weight
    assert digest(alone) != digest(whole)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_on_two_stores(base: Path, two: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(experiment(base, two, tmp_path / "two", streams=2)))
    made = run(base, two, tmp_path / "one", streams=2)
    assert ranks("finetune", file, output=tmp_path / "said") == [0, 0], (tmp_path / "said").read_text()[-3000:]
    other = checkpoint.load(str(tmp_path / "two")).model.state_dict()
    for name, value in made.model.state_dict().items():
        if name.startswith("g_s.") and not name.endswith("gamma"):  # see test_ranks.above_bound
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("streams", ["auto", 2])
def test_batches_of_two_stores_are_the_same_for_any_ranks_and_starts(two: list[Path], streams: object) -> None:
    mixed = Mixture([LatentCache.open(path) for path in two], (1, 3))
    record = QuantizerRecord.from_json(mixed.stores[0].record_json("g"))
    section = config.Finetune(batch=4, streams=streams)
    training = training_data(mixed, {"g": Quantizer(record)}, True, section)

    def taken(rank: int, world: int, first: int = 0) -> list:
        with closing(training.batches(first, Ranks(rank, world, torch.device("cpu")))) as batches:
            return list(islice(batches, 8 - first))

    whole = taken(0, 1)
    halves = zip(taken(0, 2), taken(1, 2), strict=True)
    for one, (left, right) in zip(whole, halves, strict=True):
        assert all(
            torch.equal(value, torch.cat([vars(left)[name], vars(right)[name]])) for name, value in vars(one).items()
        )
    for one, other in zip(whole[3:], taken(0, 1, 3), strict=True):
        assert all(torch.equal(value, vars(other)[name]) for name, value in vars(one).items())
    of_second = torch.cat([one.sample for one in whole]) >= mixed.firsts[1] * mixed.shard_length
    assert int(of_second.sum()) == 24


def test_each_store_has_sources_of_its_own(two: list[Path]) -> None:
    mixed = Mixture([LatentCache.open(path) for path in two], (1, 3))
    found = sources_of_all(mixed, "g")
    assert found.names == ("a", "b") and found.of_sample == ("a",) * 4 + ("b",) * 4
    assert found.samples.tolist() == mixed.parts(held_out=True)[0].tolist() + mixed.parts(held_out=True)[1].tolist()
    assert trained_elsewhere(mixed) == 4 and trained_elsewhere(Mixture(mixed.stores[:1])) == 0


@pytest.mark.slow
def test_a_store_that_does_not_fit_is_named(base: Path, two: list[Path], tmp_path: Path) -> None:
    parent = checkpoint.load(str(base))
    record = tmp_path / "altered.zarr/quantized/g/record.json"
    shutil.copytree(two[1], tmp_path / "altered.zarr")
    record.write_text(replace(QuantizerRecord.from_json(record.read_text()), lmbda=0.01).to_json())
    make_store(tmp_path / "step.zarr", parent, TCQ.model_copy(update={"step": 0.6}), 12)
    make_store(tmp_path / "lmbda.zarr", checkpoint.at_lambda(parent, 0.01), TCQ, 12)
    stranger = copy.deepcopy(parent)
    with torch.no_grad():
        next(stranger.model.g_a.parameters()).mul_(1.1)
    make_store(tmp_path / "encoder.zarr", stranger, TCQ, 12)
    make_store(tmp_path / "group.zarr", parent, TCQ.model_copy(update={"group": "h"}), 12)
    for name, why in {
        "altered": "does not fit: record_sha256",
        "step": "/quantized/g is another quantizer: step",
        "lmbda": "/quantized/g is another quantizer: lmbda",
        "encoder": "holds latents of another model: model.encoder_sha256",
        "group": "",
    }.items():
        with pytest.raises(LicError, match=f"{name}.zarr.*{why}|no group 'g' in .*{name}.zarr"):
            run(base, [two[0], tmp_path / f"{name}.zarr"], tmp_path / "out")
    made = experiment(base, [two[0], tmp_path / "step.zarr"], tmp_path / "out")
    made["quantizer"]["step"] = "auto"  # each as it was calibrated
    with pytest.raises(
        LicError, match=r"step\.zarr/quantized/g is another quantizer than that of .*a\.zarr"
    ) as refused:
        job.finetune(config.Experiment.model_validate(made))
    assert "step.g.json before `lic-dist cache build`" in refused.value.hint


@pytest.mark.slow
def test_each_store_is_read_at_the_snapshot_that_the_job_began_with(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "b.zarr")  # of one beginning: either digest is in either chain
    grow(Folder(tmp_path / "b.zarr"))
    paths, alone = [built, tmp_path / "b.zarr"], Ranks(0, 1, torch.device("cpu"))

    def read(out: str, *snapshots: int) -> list[int]:
        chosen = [{"path": str(path)} for path in paths]
        for one, snapshot in zip(chosen, snapshots, strict=False):
            one["snapshot"] = snapshot  # type: ignore[assignment]
        section = config.Finetune.model_validate({"out": tmp_path / out, "cache": chosen})
        mixed = read_snapshots([LatentCache.open(path) for path in paths], section, alone)
        return [one.header.snapshot for one in mixed.stores]

    assert read("first") == [0, 2]
    grow(Folder(built))
    assert read("first") == [0, 2] and read("second") == [2, 2] and read("third", 1, 0) == [1, 0]
    assert read("third") == [1, 0]
    with pytest.raises(LicError, match="has no snapshot 7"):
        read("fourth", 7)
