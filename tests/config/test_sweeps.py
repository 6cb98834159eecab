"""Sweeps: the experiments of a file, and that none of them overwrites what another one wrote."""

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
    "evaluate": {"images": "kodak", "out": "runs/p/kodak.json"},
}
PLACES = {  # and the part of WHOLE that each is
    "train.out": "runs/p",
    "cache.path": "runs/p/x.zarr",
    "quantizer.group": "tcq8",
    "finetune.out": "runs/p/finetuned",
    "evaluate.out": "runs/p/kodak.json",
}


def write(folder: Path, sweep: dict[str, list[Any]], **sections: Any) -> Path:
    path = folder / "a.yaml"
    path.write_text(yaml.safe_dump({**WHOLE, **sections, "sweep": sweep}, sort_keys=False))
    return path


def expanded(folder: Path, sweep: dict[str, list[Any]], **sections: Any) -> list[Experiment]:
    return list(expand(write(folder, sweep, **sections)))


def refusal(folder: Path, sweep: dict[str, list[Any]], **sections: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        expanded(folder, sweep, **sections)
    assert "\n" not in str(caught.value)
    return caught.value


def told_apart(*keys: str, by: str) -> dict[str, Any]:
    """WHOLE with a placeholder in the places of these keys."""
    document: dict[str, Any] = {name: part for name, part in WHOLE.items() if name != "name"}
    for key in keys:
        section, name = key.split(".")
        document[section] = {**document[section], name: f"{PLACES[key]}-{{{by}}}"}
    return document


@pytest.mark.parametrize(
    ("key", "values", "depend"),
    [
        ("train.lr", [1, 2], ["train.out", "finetune.out", "evaluate.out"]),
        ("images.seed", [1, 2], ["train.out", "cache.path", "finetune.out", "evaluate.out"]),
        ("model.lmbda", [1.5, 2], ["cache.path", "finetune.out", "evaluate.out"]),
        ("cache.shard", [1, 2], ["cache.path", "finetune.out", "evaluate.out"]),
        ("quantizer.step", [1, 2], ["quantizer.group", "finetune.out", "evaluate.out"]),
        ("quantizer.refine", [1, 2], ["quantizer.group", "finetune.out", "evaluate.out"]),
        ("quantizer.refine_z", [True, False], ["cache.path", "finetune.out", "evaluate.out"]),
        ("finetune.lr", [1, 2], ["finetune.out", "evaluate.out"]),
        ("evaluate.images", ["a", "b"], ["evaluate.out"]),
        ("name", ["a", "b"], ["evaluate.out"]),
        ("engine.encoders", [1, 2], []),
        ("report.out", ["a", "b"], []),
    ],
)
def test_a_place_that_depends_on_a_swept_key_needs_it(
    tmp_path: Path, key: str, values: list[Any], depend: list[str]
) -> None:
    for number, place in enumerate(depend):
        error = refusal(tmp_path, {key: values}, **told_apart(*depend[:number], by=key))
        by = "quantizer.group" if "quantizer.group" in depend[:number] else key
        assert f": {place} is {PLACES[place]}" in error.message
        assert f" for both {by} " in error.message and error.message.endswith(f": the sweep needs {{{by}}} in it")
        section, name = place.split(".")
        stem, dot, ending = PLACES[place].partition(".")
        assert error.hint == f"{section}: {{{name}: '{stem}-{{{by}}}{dot}{ending}'}}"
    one, two = expanded(tmp_path, {key: values}, **told_apart(*depend, by=key))
    assert one.canonical_json() != two.canonical_json()
    assert one.name == two.name == "p" or key == "name"


def test_the_error_names_all_that_is_missing(tmp_path: Path) -> None:
    sweep = {"model.checkpoint": ["r/a", "r/b"], "quantizer.states": [4, 8], "finetune.lr": [1, 2]}
    named = {"quantizer": {}, "cache": {"path": "x-{model.name}.zarr"}, "train": None}
    error = refusal(tmp_path, sweep, **named)
    assert "needs {finetune.lr}, {quantizer.group}, {model.name} in it" in error.message
    out = "runs/p/finetuned-{finetune.lr}-{quantizer.group}-{model.name}"
    assert error.hint == f"finetune: {{out: '{out}'}}"
    named["finetune"] = {"out": out}
    named["evaluate"] = {"images": "kodak", "checkpoints": ["{finetune.out}"], "out": "{finetune.out}.json"}
    found = expanded(tmp_path, sweep, **named)
    assert len({one.finetune and one.finetune.out for one in found}) == len(found) == 8
    assert [one.finetune and str(one.finetune.out) for one in found][:3] == [
        "runs/p/finetuned-1-tcq4-a",
        "runs/p/finetuned-2-tcq4-a",
        "runs/p/finetuned-1-tcq8-a",
    ]
    assert all(one.evaluate and one.finetune and one.evaluate.checkpoints == (str(one.finetune.out),) for one in found)
    assert {one.cache and one.cache.path for one in found} == {"x-a.zarr", "x-b.zarr"}


def test_what_no_placeholder_tells_apart_is_named(tmp_path: Path) -> None:
    phases = [[{"recipe": recipe, "steps": 1, "lr": 1}] for recipe in ("decoder", "decoder+hyper")]
    error = refusal(tmp_path, {"finetune": [{"phases": one} for one in phases]})
    assert error.message.endswith("is runs/p/finetuned for combinations that differ in finetune.phases")
    named = told_apart("evaluate.out", by="finetune.out")
    swept = [{"phases": one, "out": f"runs/{number}"} for number, one in enumerate(phases)]
    assert len(expanded(tmp_path, {"finetune": swept}, **named)) == 2
    refusal(tmp_path, {"finetune.recipe": ["decoder+hyper", ["decoder", "hyper"]]})  # of one text, decoder+hyper


def test_models_in_folders_of_one_name_need_their_paths(tmp_path: Path) -> None:
    sweep = {"model.checkpoint": ["a/x/checkpoint.pth.tar", "b/x/checkpoint.pth.tar"]}
    assert "needs {model.checkpoint} in it" in refusal(tmp_path, sweep).message


def test_a_default_place_counts_as_well(tmp_path: Path) -> None:
    error = refusal(tmp_path, {"train.lmbda": [0.0067, 0.013]}, train={})
    assert "train.out is runs/base for both train.lmbda 0.0067 and 0.013" in error.message
    assert error.hint == "train: {out: 'runs/base-{train.lmbda}'}"
    error = refusal(tmp_path, {"quantizer.step": [1, 2]}, quantizer={"group": "auto"})
    assert error.hint == "quantizer: {group: 'tcq8-{quantizer.step}'}"
    sweep = {"train": [{"out": "runs/x", "lr": 1}, {"out": "runs/x", "lr": 2}]}
    assert refusal(tmp_path, sweep, train=None).hint == "train: {out: 'runs/x-{train.lr}'}"


def test_a_mapping_is_merged_into_its_section(tmp_path: Path) -> None:
    swept = [{"recipe": "decoder"}, {"recipe": "decoder+hyper", "rounds": 2}, {"latents": "noise", "out": "runs/noise"}]
    section = {"out": "runs/{finetune.recipe}-{quantizer.group}", "steps": 7}
    named = told_apart("evaluate.out", by="finetune.out") | {"finetune": section, "quantizer": {}}
    refusal(tmp_path, {"finetune": swept, "quantizer.states": [4, 8]}, **named)  # runs/noise
    swept[2]["out"] = "runs/noise-{quantizer.states}"
    found = expanded(tmp_path, {"finetune": swept, "quantizer.states": [4, 8]}, **named)
    assert {one.finetune.steps for one in found if one.finetune} == {7}
    assert [str(one.finetune.out) for one in found if one.finetune] == [
        "runs/decoder-tcq4",
        "runs/decoder-tcq8",
        "runs/decoder+hyper-tcq4",
        "runs/decoder+hyper-tcq8",
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
    first = {"name": "p-{finetune.lr}", "finetune": {"out": "runs/{name}"}, "sweep": {"finetune.lr": [1, 2]}}
    second = {"name": "q", "evaluate": {"images": "kodak"}, "fast": {"name": "quick", "evaluate.out": "{name}.json"}}
    path = study(tmp_path, first, second)
    assert [one.name for one in expand(path)] == ["p-1", "p-2", "q"]
    one, two = documents(path, ["finetune.steps=5", "engine.searchers=3"])
    assert [each.finetune and each.finetune.steps for each in (*one, *two)] == [5, 5, None]
    assert {each.engine.searchers for each in (*one, *two)} == {3}
    _, (quick,) = documents(path, fast=True)
    assert quick.name == "quick" and quick.evaluate and str(quick.evaluate.out) == "quick.json"
    _, (quick,) = documents(path, ["evaluate.out=r.json"], fast=True)
    assert quick.evaluate and str(quick.evaluate.out) == "r.json"


@pytest.mark.parametrize("fast", [{}, [1], "x", {"finetune.step": 3}])
def test_a_faulty_fast_form_is_one_line(tmp_path: Path, fast: Any) -> None:
    with pytest.raises(UsageError) as caught:
        documents(study(tmp_path, {**WHOLE, "fast": fast}), fast=True)
    assert "\n" not in str(caught.value)


def test_a_store_without_y_holds_one_quantizer(tmp_path: Path) -> None:
    sweep, named = {"quantizer.states": [4, 8]}, {"quantizer": {}, "finetune": None, "evaluate": None}
    assert len(expanded(tmp_path, sweep, **named)) == 2
    error = refusal(tmp_path, sweep, **named, cache={"path": "x.zarr", "store_y": False})
    assert error.hint == "cache: {path: 'x-{quantizer.group}.zarr'}"


def test_a_refined_z_has_a_store_of_its_own(tmp_path: Path) -> None:
    named = {"finetune": None, "evaluate": None}
    plain, more, refined = {"group": "a"}, {"group": "b", "refine": 4}, {"group": "c", "refine": 8, "refine_z": True}
    assert "cache.path is runs/p/x.zarr" in refusal(tmp_path, {"quantizer": [plain, more, refined]}, **named).message
    assert len(expanded(tmp_path, {"quantizer": [plain, more]}, **named)) == 2
    assert len(expanded(tmp_path, {"quantizer": [refined, {**refined, "group": "d"}]}, **named)) == 2


def test_one_group_of_two_quantizers_is_refused(tmp_path: Path) -> None:
    same = [{"states": 4, "group": "mine"}, {"states": 8, "group": "mine"}]
    error = refusal(tmp_path, {"quantizer": same})
    assert "quantizer.group is mine in runs/p/x.zarr for both quantizer.states 4 and 8" in error.message
    found = expanded(
        tmp_path,
        {"quantizer": same},
        **told_apart("cache.path", "finetune.out", by="quantizer.states") | {"evaluate": None},
    )
    assert len(found) == 2  # in two stores


def test_a_store_that_is_only_read_is_no_place(tmp_path: Path) -> None:
    reading = {"train": None, "images": None, "quantizer": None, "finetune": None}
    named = {**reading, **{"evaluate": {"images": "kodak", "out": "{model.name}.json"}}}
    assert len(expanded(tmp_path, {"model.checkpoint": ["a", "b"]}, **named)) == 2


@pytest.mark.parametrize("sweep", [{5: [1]}, {"train.N": 3}, {"train.N": []}, {"name.x": [1]}, {"train.M": ["many"]}])
def test_a_faulty_sweep_is_one_line(tmp_path: Path, sweep: Any) -> None:
    refusal(tmp_path, sweep)


def test_equal_values_make_one_run(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        'finetune: {out: "runs/{finetune.lr}"}\nsweep: {finetune.lr: [1e-4, 1.0e-4, 0.0001, "1e-4", 3e-5]}\n'
    )
    first, last = expand(path)
    assert first.finetune and last.finetune and (first.finetune.lr, last.finetune.lr) == (1e-4, 3e-5)
    assert [str(one.finetune.out) for one in (first, last) if one.finetune] == ["runs/0.0001", "runs/3e-05"]
    path.write_text("quantizer: {}\nsweep: {quantizer: [{}, {states: 8}, {group: auto}, {group: tcq8}]}\n")
    assert len(list(expand(path))) == 1


def test_equal_work_shares_its_place(tmp_path: Path) -> None:
    named = told_apart("evaluate.out", by="evaluate.images")
    one, two = expanded(tmp_path, {"evaluate.images": ["kodak", "clic"]}, **named)
    assert one.finetune == two.finetune and one.cache == two.cache and one.evaluate != two.evaluate
