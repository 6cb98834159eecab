"""Sweeps: which swept keys a path's suffix names, and what follows a path that moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lic_dist.config import Experiment
from lic_dist.config.sweeps import documents, expand
from lic_dist.errors import UsageError

WHOLE: dict[str, Any] = {
    "name": "p",
    "train": {"out": "runs/p"},
    "model": {"checkpoint": "runs/p"},
    "images": {"path": "photos"},
    "quantizer": {"group": "tcq8"},
    "cache": {"path": "runs/p/x.zarr"},
    "finetune": {"out": "runs/p/finetuned"},
    "evaluate": {
        "images": "kodak",
        "checkpoints": ["runs/p", "runs/p/finetuned/checkpoint.pth.tar"],
        "quantizers": ["sq", "runs/p/x.zarr/quantized/tcq8", "runs/p/x.tcq8.json", "runs/p/x.zarr/quantized/q", "tcq8"],
        "out": "runs/p/kodak.json",
    },
}


def expanded(folder: Path, sweep: dict[str, list[Any]], **sections: Any) -> list[Experiment]:
    path = folder / "a.yaml"
    path.write_text(yaml.safe_dump({**WHOLE, **sections, "sweep": sweep}, sort_keys=False))
    return list(expand(path))


def places(one: Experiment) -> list[str]:
    """Where a combination writes: train.out, cache.path, quantizer.group, finetune.out, evaluate.out."""
    assert one.train and one.cache and one.quantizer and one.finetune and one.evaluate
    return [str(one.train.out), one.cache.path, one.quantizer.group, str(one.finetune.out), str(one.evaluate.out)]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.lr", 3, ["runs/p-3", "runs/p/x-3.zarr", "tcq8", "runs/p/finetuned-3", "runs/p/kodak-3.json"]),
        ("images.seed", 3, ["runs/p-3", "runs/p/x-3.zarr", "tcq8", "runs/p/finetuned-3", "runs/p/kodak-3.json"]),
        ("model.lmbda", 3, ["runs/p", "runs/p/x-3.zarr", "tcq8", "runs/p/finetuned-3", "runs/p/kodak-3.json"]),
        ("cache.shard", 3, ["runs/p", "runs/p/x-3.zarr", "tcq8", "runs/p/finetuned-3", "runs/p/kodak-3.json"]),
        ("quantizer.step", 3, ["runs/p", "runs/p/x.zarr", "tcq8-3", "runs/p/finetuned-3", "runs/p/kodak-3.json"]),
        ("quantizer.refine", 3, ["runs/p", "runs/p/x-3.zarr", "tcq8-3", "runs/p/finetuned-3", "runs/p/kodak-3.json"]),
        ("finetune.lr", 3, ["runs/p", "runs/p/x.zarr", "tcq8", "runs/p/finetuned-3", "runs/p/kodak-3.json"]),
        ("evaluate.images", "3", ["runs/p", "runs/p/x.zarr", "tcq8", "runs/p/finetuned", "runs/p/kodak-3.json"]),
        ("engine.encoders", 3, ["runs/p", "runs/p/x.zarr", "tcq8", "runs/p/finetuned", "runs/p/kodak.json"]),
    ],
)
def test_a_path_names_the_swept_keys_that_it_depends_on(
    tmp_path: Path, key: str, value: Any, expected: list[str]
) -> None:
    (one,) = expanded(tmp_path, {key: [value]})
    assert places(one) == expected
    assert one.name == "p-3"


def test_references_follow_the_innermost_path_that_moved(tmp_path: Path) -> None:
    *_, one = expanded(tmp_path, {"train.lmbda": [0.01, 0.02], "quantizer.states": [4, 8], "finetune.lr": [1e-3, 1e-4]})
    assert places(one)[1:4] == ["runs/p/x-0.02.zarr", "tcq8-8", "runs/p/finetuned-0.02-8-0.0001"]
    assert one.evaluate is not None and one.model is not None
    assert one.model.checkpoint == "runs/p-0.02"
    assert one.evaluate.checkpoints == ("runs/p-0.02", "runs/p/finetuned-0.02-8-0.0001/checkpoint.pth.tar")
    store = "runs/p/x-0.02"
    assert one.evaluate.quantizers == (
        "sq",
        f"{store}.zarr/quantized/tcq8-8",
        f"{store}.tcq8-8.json",
        f"{store}.zarr/quantized/q",
        "tcq8-8",
    )


def test_photos_are_no_path_that_is_written_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    sweep = {"model.checkpoint": ["runs/a/checkpoint.pth.tar", "runs/b/checkpoint.pth.tar"]}
    one, two = expanded(tmp_path, sweep, images={"path": "runs/p/photos"}, cache={"path": "s3://b/x.zarr/"})
    assert one.cache is not None and two.images is not None and two.model is not None
    assert one.cache.path == "s3://b/x-checkpoint-0.zarr"
    assert str(two.images.path) == "runs/p/photos" and two.model.checkpoint == "runs/b/checkpoint.pth.tar"


def test_every_combination_writes_into_its_own_place(tmp_path: Path) -> None:
    sweep = {"train.lmbda": [0.01, 0.02], "train.seed": [0, 1]}
    found = expanded(tmp_path, sweep)
    assert [(e.train.lmbda, e.train.seed) for e in found if e.train] == [(0.01, 0), (0.01, 1), (0.02, 0), (0.02, 1)]
    assert all(len({places(one)[which] for one in found}) == 4 for which in (0, 1, 3, 4))
    found = expanded(tmp_path, sweep, train={}, model={"checkpoint": "base-small"})
    assert [places(one)[0] for one in found][1] == "runs/base-0.01-1"  # the default moves too
    assert {places(one)[1] for one in found} == {"runs/p/x.zarr"}  # of a model that is not trained here


def test_a_path_that_is_swept_itself_stays_as_given(tmp_path: Path) -> None:
    first, *_, last = expanded(tmp_path, {"cache.path": ["a.zarr", "b.zarr"], "images.seed": [1, 2]})
    assert places(first)[1] == "a-1.zarr" and places(last)[1] == "b-2.zarr"
    one, two = expanded(tmp_path, {"quantizer": [{"name": "sq", "group": "sq-adapted"}, {"states": 4, "group": "t4"}]})
    assert [places(each)[1:4] for each in (one, two)] == [
        ["runs/p/x.zarr", "sq-adapted", "runs/p/finetuned-sq-adapted"],
        ["runs/p/x.zarr", "t4", "runs/p/finetuned-t4"],
    ]
    one, two = expanded(tmp_path, {"quantizer": [{"states": 4}, {"states": 8}]})
    assert [places(each)[2] for each in (one, two)] == ["tcq8-4", "tcq8-8"]


def test_a_mapping_is_merged_into_its_section(tmp_path: Path) -> None:
    swept = [{"recipe": "decoder"}, {"recipe": "decoder+hyper", "rounds": 2}, {"latents": "noise", "out": "runs/noise"}]
    section = {"out": "runs/p/finetuned", "steps": 7}
    found = expanded(tmp_path, {"finetune": swept, "quantizer.states": [4, 8]}, finetune=section)
    assert {one.finetune.steps for one in found if one.finetune} == {7}
    assert [places(one)[3] for one in found] == [
        "runs/p/finetuned-decoder-4",
        "runs/p/finetuned-decoder-8",
        "runs/p/finetuned-decoder+hyper-2-4",
        "runs/p/finetuned-decoder+hyper-2-8",
        "runs/noise-4",
        "runs/noise-8",
    ]


def test_a_mapping_stands_for_what_is_no_section(tmp_path: Path) -> None:
    (one,) = expanded(tmp_path, {"quantizer": [{"states": 4, "group": "t4"}]}, quantizer="tcq")
    assert one.quantizer is not None and (one.quantizer.states, one.quantizer.group) == (4, "t4")


def study(folder: Path, *documents: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    return path


def test_a_file_may_hold_several_experiments(tmp_path: Path) -> None:
    second = {"name": "q", "evaluate": {"images": "kodak"}, "fast": {"name": "quick", "evaluate.out": "q.json"}}
    path = study(tmp_path, {**WHOLE, "sweep": {"finetune.lr": [1, 2]}}, second)
    assert [one.name for one in expand(path)] == ["p-1", "p-2", "q"]
    one, two = documents(path, ["finetune.steps=5", "engine.searchers=3"])
    assert [each.finetune and each.finetune.steps for each in (*one, *two)] == [5, 5, None]
    assert {each.engine.searchers for each in (*one, *two)} == {3}
    _, (quick,) = documents(path, ["evaluate.out=r.json"], fast=True)
    assert quick.name == "quick" and quick.evaluate and str(quick.evaluate.out) == "r.json"


@pytest.mark.parametrize("fast", [{}, [1], "x", {"finetune.step": 3}])
def test_a_faulty_fast_form_is_one_line(tmp_path: Path, fast: Any) -> None:
    with pytest.raises(UsageError) as caught:
        documents(study(tmp_path, {**WHOLE, "fast": fast}), fast=True)
    assert "\n" not in str(caught.value)


def test_a_store_without_y_holds_one_quantizer(tmp_path: Path) -> None:
    sweep = {"quantizer.states": [4], "finetune.lr": [3]}
    (one,) = expanded(tmp_path, sweep, cache={"path": "x.zarr", "store_y": False})
    assert places(one)[1:3] == ["x-4.zarr", "tcq8-4"]


def test_quantizers_of_refined_and_other_latents_have_stores_of_their_own(tmp_path: Path) -> None:
    plain, more, refined = {"group": "a"}, {"group": "b", "states": 4}, {"group": "c", "refine": 8}
    stores = [places(one)[1] for one in expanded(tmp_path, {"quantizer": [plain, more, refined]})]
    assert len(set(stores)) == 3
    assert len({places(one)[1] for one in expanded(tmp_path, {"quantizer": [plain, more]})}) == 1
    assert len({places(one)[1] for one in expanded(tmp_path, {"quantizer": [refined, {**refined, "group": "d"}]})}) == 1


def test_one_group_of_two_quantizers_is_refused(tmp_path: Path) -> None:
    same = [{"states": 4, "group": "mine"}, {"states": 8, "group": "mine"}]
    with pytest.raises(UsageError, match="group 'mine' of runs/p/x.zarr with different quantizers") as caught:
        expanded(tmp_path, {"quantizer": same})
    assert "\n" not in str(caught.value)
    one, two = expanded(tmp_path, {"quantizer": same[:1], "finetune.lr": [1, 2]})
    assert places(one)[1:3] == places(two)[1:3] == ["runs/p/x.zarr", "mine"]


@pytest.mark.parametrize("sweep", [{5: [1]}, {"train.N": 3}, {"train.N": []}, {"name.x": [1]}, {"train.M": ["many"]}])
def test_a_faulty_sweep_is_one_line(tmp_path: Path, sweep: Any) -> None:
    with pytest.raises(UsageError) as caught:
        expanded(tmp_path, sweep)
    assert "\n" not in str(caught.value)


def test_equal_values_make_one_run(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: p\nfinetune: {out: runs/f}\nsweep: {finetune.lr: [1e-4, 1.0e-4, 0.0001, '1e-4', 3e-5]}\n")
    first, last = expand(path)
    assert first.finetune and last.finetune and (first.finetune.lr, last.finetune.lr) == (1e-4, 3e-5)
    assert str(last.finetune.out) == "runs/f-3e-05"


@pytest.mark.parametrize(
    ("sweep", "groups", "outs"),
    [
        ({"quantizer.states": [4, 8]}, ["tcq4", "tcq8"], ["f-4", "f-8"]),
        ({"quantizer.states": [4, 8], "quantizer.step": [1]}, ["tcq4-1", "tcq8-1"], ["f-4-1", "f-8-1"]),
        ({"quantizer": [{"states": 4}, {"states": 8}]}, ["tcq4", "tcq8"], ["f-4", "f-8"]),
        ({"quantizer": [{"name": "sq"}, {"name": "tcq"}]}, ["sq-adapted", "tcq8"], ["f-sq-adapted", "f-tcq8"]),
        (
            {"quantizer": [{"name": "tcq", "states": 4}, {"name": "tcq", "shift": 0}]},
            ["tcq4", "tcq8-0"],
            ["f-tcq4", "f-tcq8-0"],
        ),
        ({"quantizer": [{"name": "rdoq"}, {"name": "sq", "group": "mine"}]}, ["rdoq", "mine"], ["f-rdoq", "f-mine"]),
    ],
)
def test_groups_left_to_auto_name_themselves(tmp_path: Path, sweep: Any, groups: list[str], outs: list[str]) -> None:
    named = {"quantizer": {}, "finetune": {"out": "f"}}
    found = expanded(tmp_path, sweep, **named)
    assert [one.quantizer and one.quantizer.group for one in found] == groups
    assert [one.finetune and str(one.finetune.out) for one in found] == outs
    names = [one.evaluate and one.evaluate.quantizers[-1] for one in found]
    assert names == ["tcq8" if group == "mine" else group for group in groups]  # tcq8: the group without the sweep
