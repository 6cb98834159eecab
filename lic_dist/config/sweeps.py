"""Sweeps: one experiment for each combination of the values under `sweep`, each writing into places of its own.

A mapping under a section's name is merged into the section: `finetune: [{recipe: decoder}, {rounds: 2}]`.

What a path holds depends on part of the file, and its suffix has the labels of just the swept keys there: learning
rates share one cache, quantizers one store, with a group for each.

    train.out        train, images
    cache.path       model, images, cache; train where the model lies in train.out; quantizer where y is not kept, from
                     which a second group would be searched; quantizer.refine, or quantizers that differ in it
    quantizer.group  quantizer; but for name and states where it is auto, which names them itself
    finetune.out     all but evaluate, report, engine
    evaluate.out     all but report, engine
    report.out       nothing: one report is of all combinations
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lic_dist.config.experiment import Evaluate, Experiment, auto_group, parse, require_key
from lic_dist.config.training import Finetune, Train
from lic_dist.config.yaml_file import apply, read, set_key
from lic_dist.errors import UsageError

ALL = frozenset(Experiment.model_fields)
OPTIONAL = frozenset(name for name, field in Experiment.model_fields.items() if field.default is None)
STORE, GROUP = "cache.path", "quantizer.group"
DEFAULTS = {
    "train.out": str(Train.model_fields["out"].default),
    GROUP: "auto",
    "finetune.out": str(Finetune.model_fields["out"].default),
    "evaluate.out": str(Evaluate.model_fields["out"].default),
}


def expand(path: Path, overrides: Sequence[str] = ()) -> Iterator[Experiment]:
    """Yield the experiments of all documents of a file, see `documents`."""
    return itertools.chain.from_iterable(documents(path, overrides))


def documents(path: Path, overrides: Sequence[str] = (), fast: bool = False) -> list[list[Experiment]]:
    """The experiments of each document of a file: one for each combination of `sweep`, or itself where there is none.

    Of several documents an override is for those that have its section. `fast` sets what stands under `fast`, before
    the overrides.

    Values that are equal (1e-4 and 0.0001, a default and its value) make one experiment.

    Each combination's `name` gets the labels of all its values as a suffix, every path that the commands write those of
    the values that it depends on, wherever it stands in the file, so that a later section finds what an earlier one
    wrote. A path that is itself swept, or given by a swept section, stays as it is given.

    Raises:
        UsageError: see `config.load`; two combinations that would write one group of a store with other quantizers.
    """
    whole = read(path)
    quick = [document.pop("fast", None) or {} for document in whole]
    if not all(isinstance(one, dict) for one in quick):
        raise UsageError(f"{path}: fast must map keys to values", hint="fast: {finetune.steps: 100}")
    for key in itertools.chain.from_iterable(quick):
        require_key(str(key), f"{path}: fast")
    if fast and not any(quick):
        raise UsageError(f"{path} has no fast form", hint="add 'fast:' with the keys that --fast shall set")
    for document, one in zip(whole, quick, strict=True):
        for key, value in one.items() if fast else ():
            set_key(document, str(key), value)
    for override in overrides:
        section = override.partition("=")[0].split(".")[0]
        having = [one for one in whole if section in one] if section in OPTIONAL else []
        for document in having or whole:
            apply(document, [override])
    return [_combinations(document, str(path)) for document in whole]


def _combinations(document: dict[str, Any], where: str) -> list[Experiment]:
    sweep = document.pop("sweep", None) or {}
    if not isinstance(sweep, dict) or not all(isinstance(values, list) and values for values in sweep.values()):
        raise UsageError(
            f"{where}: sweep must map keys to lists with values", hint="sweep: {train.lmbda: [0.0067, 0.013]}"
        )
    if not sweep:
        return [parse(document, where)]
    sweep = {str(key): _unequal(values) for key, values in sweep.items()}
    keys = list(sweep)
    labels = [_labels([_named(key, value, document) for value in values]) for key, values in sweep.items()]
    group = _auto(document.get("quantizer"))
    combinations, seen = [], set()
    for values, chosen in zip(itertools.product(*sweep.values()), itertools.product(*labels), strict=True):
        one, given = copy.deepcopy(document), set(keys)
        for key, value in zip(keys, values, strict=True):
            value = copy.deepcopy(value)
            if isinstance(value, dict):
                given |= {f"{key}.{name}" for name in value}
                if isinstance(section := one.get(key), dict):
                    value = section | value
            set_key(one, key, value)
        if (meant := parse(one, where).canonical_json()) in seen:
            continue
        seen.add(meant)
        labelled = dict(zip(keys, chosen, strict=True))
        grouped = _beyond_auto(dict(zip(keys, values, strict=True)), labelled)
        renamed = _renamed(one, labelled, given, _refining(sweep), group, grouped)
        combinations.append(parse(renamed, where))
    _refuse_clashes(combinations)
    return combinations


def _auto(quantizer: Any) -> str | None:
    """The group that a quantizer section leaves to `auto`; None where it names one, or is none."""
    if not isinstance(quantizer, dict):
        return auto_group() if quantizer is None else None
    return auto_group(**quantizer) if quantizer.get("group", "auto") == "auto" else None


def _beyond_auto(values: dict[str, Any], labels: dict[str, str]) -> list[str]:
    """The labels of what differs between groups besides name and states, which `auto` names."""
    found = []
    for key, value in values.items():
        if key == "quantizer" and isinstance(value, dict):
            value = {name: one for name, one in value.items() if name not in ("name", "states")}
            found += [_label(value)] if value else []
        elif key.startswith("quantizer.") and key not in ("quantizer.name", "quantizer.states"):
            found.append(labels[key])
    return found


def _named(key: str, value: Any, document: dict[str, Any]) -> Any:
    """A quantizer of a sweep that has no group of its own, named by the one that it gets: a label for its paths."""
    section = document.get(key)
    if key != "quantizer" or not isinstance(value, dict) or "name" not in value or "group" in value:
        return value
    whole = {**(section if isinstance(section, dict) else {}), **value}
    auto = _auto(whole)
    return {"group": "-".join([auto, *_beyond_auto({key: value}, {})])} if auto else value


def _unequal(values: list[Any]) -> list[Any]:
    """The values of a sweep without those that equal an earlier one."""
    return [value for index, value in enumerate(values) if value not in values[:index]]


def _refining(sweep: dict[str, Any]) -> set[str]:
    """The keys of a sweep that move the y of a store."""
    steps = {one.get("refine", 0) for one in sweep.get("quantizer", []) if isinstance(one, dict)}
    return {"quantizer.refine", "quantizer"} if len(steps) > 1 else {"quantizer.refine"}


def _refuse_clashes(combinations: Sequence[Experiment]) -> None:
    found: dict[tuple[str, str], Experiment] = {}
    for one in combinations:
        if one.cache is None or one.quantizer is None:
            continue
        first = found.setdefault((one.cache.path, one.quantizer.group), one)
        if first.quantizer != one.quantizer:
            raise UsageError(
                f"{first.name} and {one.name} would write group '{one.quantizer.group}' of {one.cache.path} "
                "with different quantizers",
                hint="give each quantizer of the sweep a group of its own",
            )


def _renamed(
    document: dict[str, Any],
    labels: dict[str, str],
    swept: set[str],
    refining: set[str],
    group: str | None,
    grouped: list[str],
) -> dict[str, Any]:
    """A combination with its suffixes; `labels` are those of its values by key, `swept` all keys that these set.

    Where the group is left to `auto`, `group` is what it is without the sweep, and `grouped` its suffixes.
    """
    was: dict[str, str] = {}
    now: dict[str, str] = {}
    for path, sections in _dependences(document, refining).items():
        section, name = path.split(".")
        part = document.get(section)
        if not isinstance(part, dict):
            continue
        given = {path, section} if path in swept else set()
        if path in DEFAULTS:
            part.setdefault(name, DEFAULTS[path])
        if path == GROUP and (auto := _auto(part)) is not None:
            was[path], now[path] = group or auto, "-".join([auto, *grouped])
        elif isinstance(part.get(name), str):
            chosen = [
                label
                for key, label in labels.items()
                if not sections.isdisjoint((key, key.split(".")[0])) and key not in given
            ]
            was[path] = part[name].rstrip("/")
            now[path] = "-".join([was[path], *chosen]) if path == GROUP else _suffixed(was[path], chosen)
    moved = _moved(was, now)
    renamed = {name: part if name == "images" else _follow(part, moved) for name, part in document.items()}
    if GROUP in now:
        renamed["quantizer"]["group"] = now[GROUP]
        groups = {f"{was[GROUP]}{tail}": f"{now[GROUP]}{tail}" for tail in ("", "-cached")}  # as checkpoints carry them
        if isinstance(names := _get(renamed, "evaluate.quantizers"), list):
            renamed["evaluate"]["quantizers"] = [groups.get(str(name), name) for name in names]
    suffix = [label for key, label in labels.items() if key != "name"]
    return {**renamed, "name": "-".join([str(document.get("name", "experiment")), *suffix])}


def _dependences(document: dict[str, Any], refining: set[str]) -> dict[str, frozenset[str]]:
    """The sections, or keys, that each path that is written, and the group's name, depend on."""
    store = {"model", "images", "cache", *refining}
    if _lies_in(_get(document, "model.checkpoint"), _get(document, "train.out") or DEFAULTS["train.out"]):
        store |= {"train"}
    if _get(document, "cache.store_y") is False:
        store |= {"quantizer"}
    return {
        "train.out": frozenset({"train", "images"}),
        STORE: frozenset(store),
        GROUP: frozenset({"quantizer"}),
        "finetune.out": ALL - {"evaluate", "report", "engine"},
        "evaluate.out": ALL - {"report", "engine"},
    }


def _moved(was: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Paths that moved: those that are written, the group in its store, and the group's record beside the store."""
    moved = {was[path]: now[path] for path in was if path != GROUP}
    if GROUP in was and STORE in was:
        for pattern, ending in (("{}/quantized/{}", ""), ("{}.{}.json", ".zarr")):
            old, new = (pattern.format(paths[STORE].removesuffix(ending), paths[GROUP]) for paths in (was, now))
            moved[old] = new
    return moved


def _follow(value: Any, moved: dict[str, str]) -> Any:
    """Replace every path below that is one of the moved ones, or lies in one: the innermost."""
    if isinstance(value, dict):
        return {key: _follow(one, moved) for key, one in value.items()}
    if isinstance(value, list):
        return [_follow(one, moved) for one in value]
    old = max((one for one in moved if _lies_in(value, one)), key=len, default=None)
    return value if old is None else moved[old] + value.rstrip("/")[len(old) :]


def _lies_in(value: Any, folder: str) -> bool:
    return isinstance(value, str) and f"{value}/".startswith(f"{folder.rstrip('/')}/")


def _get(document: dict[str, Any], key: str) -> Any:
    section, name = key.split(".")
    part = document.get(section)
    return part.get(name) if isinstance(part, dict) else None


def _suffixed(path: str, labels: Sequence[str]) -> str:
    """A path, or a URL, with labels at the end of its name and before its ending."""
    around, slash, name = path.rpartition("/")
    return f"{around}{slash}{'-'.join([Path(name).stem, *labels])}{Path(name).suffix}"


def _labels(values: list[Any]) -> list[str]:
    """Short names of a sweep's values, told apart by number where they would be equal."""
    labels = [_label(value) for value in values]
    return [f"{label}-{index}" if labels.count(label) > 1 else label for index, label in enumerate(labels)]


def _label(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("group") or value.get("name") or list(value.values())
    if isinstance(value, list):
        value = "-".join(map(_label, value))
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(str(value)).name.removesuffix(".pth.tar"))[:60]
