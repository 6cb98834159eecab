"""Sweeps: one experiment for each combination of the values under `sweep`.

A mapping under a section's name is merged into the section: `finetune: [{recipe: decoder}, {rounds: 2}]`. Names and
paths are as the file has them, told apart by placeholders (templates.py); combinations that share a place must agree in
all that it depends on:

    train.out        train, images
    cache.path       model, images, cache; quantizer.refine; all of quantizer where y is not kept, from which a second
                     group would be searched
    quantizer.group  quantizer, for the groups of one store
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

from lic_dist.config.experiment import Experiment, parse, require_key
from lic_dist.config.templates import MODEL_NAME, text_of
from lic_dist.config.training import Section
from lic_dist.config.yaml_file import apply, read, set_key
from lic_dist.errors import UsageError
from lic_dist.models.names import label

OPTIONAL = frozenset(name for name, field in Experiment.model_fields.items() if field.default is None)
PLACES = ("train.out", "cache.path", "finetune.out", "evaluate.out")
FIRST = (MODEL_NAME, "quantizer.group")  # placeholders that say most in a word
Values = dict[str, Any]  # by key: finetune.lr


def expand(path: Path, overrides: Sequence[str] = ()) -> Iterator[Experiment]:
    """Yield the experiments of all documents of a file, see `documents`."""
    return itertools.chain.from_iterable(documents(path, overrides))


def documents(path: Path, overrides: Sequence[str] = (), fast: bool = False) -> list[list[Experiment]]:
    """The experiments of each document of a file: one for each combination of `sweep`, or itself where there is none.

    Of several documents an override is for those that have its section. `fast` sets what stands under `fast`, before
    the overrides.

    Values that are equal (1e-4 and 0.0001, a default and its value) make one experiment.

    Raises:
        UsageError: see `config.load`; two combinations that would write different content into one place.
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
    combinations: dict[str, Experiment] = {}
    found: dict[tuple[str, str], list[Values]] = {}
    for values in itertools.product(*sweep.values()):
        one = copy.deepcopy(document)
        for key, value in zip(map(str, sweep), values, strict=True):
            section = one.get(key)
            merged = section | value if isinstance(section, dict) and isinstance(value, dict) else value
            set_key(one, key, copy.deepcopy(merged))
        experiment = parse(one, where)
        combinations.setdefault(experiment.canonical_json(), experiment)
        for written, content in _written(experiment):
            if content not in found.setdefault(written, []):
                found[written].append(content)
    for (key, place), contents in found.items():
        if len(contents) > 1:
            raise _clash(where, key, place, contents, document)
    return list(combinations.values())


def _written(one: Experiment) -> Iterator[tuple[tuple[str, str], Values]]:
    """The key and name of each place that an experiment writes, with all that its content depends on."""
    values: Values = {"name": one.name}
    for section in Experiment.model_fields:
        if isinstance(part := getattr(one, section), Section):
            values |= {f"{section}.{key}": value for key, value in part}
    if one.model:
        values[MODEL_NAME] = label(one.model.checkpoint)

    def of(*wanted: str, but: str) -> Values:
        return {key: value for key, value in values.items() if key != but and {key, key.split(".")[0]} & {*wanted}}

    if one.train:
        yield ("train.out", str(one.train.out)), of("train", "images", but="train.out")
    if one.cache and one.quantizer:
        store, group = one.cache.path.rstrip("/"), one.quantizer.group
        if one.images:
            moved = "quantizer.refine" if one.cache.store_y else "quantizer"
            yield ("cache.path", store), of("model", "images", "cache", moved, but="cache.path")
        yield ("quantizer.group", f"{group} in {store}"), of("quantizer", but="quantizer.group")
    made = {*Experiment.model_fields} - {"report", "engine"}
    if one.finetune:
        yield ("finetune.out", str(one.finetune.out)), of(*made - {"evaluate", "name"}, but="finetune.out")
    if one.evaluate:
        yield ("evaluate.out", str(one.evaluate.out)), of(*made, but="evaluate.out")


def _clash(where: str, key: str, place: str, contents: list[Values], document: dict[str, Any]) -> UsageError:
    """What tells the contents of one place apart, and how its name comes to say so."""
    needed: list[str] = []
    for one, other in itertools.combinations(contents, 2):
        if not any(_apart(by, one, other) for by in needed):
            differing = [by for by in {**one, **other} if one.get(by) != other.get(by)]
            by = min(differing, key=lambda by: (not _apart(by, one, other), by not in FIRST, by in PLACES))
            if not _apart(by, one, other):
                said = f"{where}: {key} is {place} for combinations that differ in {by}"
                return UsageError(said, hint=f"give {key} beside each {by} of the sweep")
            needed.append(by)
    values = " and ".join(str(text_of(one[needed[0]])) for one in contents[:2])
    placeholders = [f"{{{by}}}" for by in needed]
    section, name = key.split(".")
    part = document.get(section)
    given = part.get(name, "auto") if isinstance(part, dict) else "auto"
    template = place.split(" in ")[0] if given == "auto" else str(given)
    longer = re.sub(r"((\.zarr|\.json)?/?)$", rf"-{'-'.join(placeholders)}\1", template, count=1)
    return UsageError(
        f"{where}: {key} is {place} for both {needed[0]} {values}: the sweep needs {', '.join(placeholders)} in it",
        hint=f"{section}: {{{name}: '{longer}'}}",
    )


def _apart(key: str, one: Values, other: Values) -> bool:
    """Whether a key's placeholder tells two combinations apart."""
    texts = {text_of(values.get(key)) for values in (one, other)}
    return len(texts) == 2 and all(texts)
