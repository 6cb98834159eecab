"""Sweeps: one experiment for each combination of the values under `sweep`.

A mapping under a section's name is merged into the section: `finetune: [{recipe: decoder}, {rounds: 2}]`. Names and
paths of outputs stay as the file has them; placeholders (templates.py) make them differ. Combinations that write to the
same output must agree in every key that its content depends on:

    train.out        train, images
    cache.path       model, images, cache; refine_z, and its steps; all of quantizer where y is not kept, because
                     a second group is quantized from y
    quantizer.group  quantizer, for the groups of one store
    finetune.out     all but evaluate, report, engine
    evaluate.out     all but report, engine
    report.out       nothing: one report covers all combinations
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
OUTPUTS = ("train.out", "cache.path", "finetune.out", "evaluate.out")
PREFERRED = (MODEL_NAME, "quantizer.group")  # short placeholders that an error suggests first
Values = dict[str, Any]  # by full key, such as finetune.lr


def expand(path: Path, overrides: Sequence[str] = ()) -> Iterator[Experiment]:
    """Yield the experiments of all documents of a file; see `documents`."""
    return itertools.chain.from_iterable(documents(path, overrides))


def documents(path: Path, overrides: Sequence[str] = (), fast: bool = False) -> list[list[Experiment]]:
    """Return the experiments of each document of a file: one for each combination of its `sweep`, or just one.

    Combinations of equal values (1e-4 and 0.0001, a default and its value) are one experiment. An override applies to
    the documents that have its section, or to all where none has it. `fast` sets the keys under `fast` before the
    overrides.

    Raises:
        UsageError: as in `config.load`, or two combinations would write different content to one output.
    """
    parsed = read(path)
    fast_forms = [document.pop("fast", None) or {} for document in parsed]
    if not all(isinstance(form, dict) for form in fast_forms):
        raise UsageError(f"{path}: fast must map keys to values", hint="fast: {finetune.steps: 100}")
    for key in itertools.chain.from_iterable(fast_forms):
        require_key(str(key), f"{path}: fast")
    if fast and not any(fast_forms):
        raise UsageError(f"{path} has no fast form", hint="add 'fast:' with the keys that --fast shall set")
    for document, form in zip(parsed, fast_forms, strict=True):
        for key, value in form.items() if fast else ():
            set_key(document, str(key), value)
    for override in overrides:
        section = override.partition("=")[0].split(".")[0]
        chosen = [document for document in parsed if section in document] if section in OPTIONAL else []
        for document in chosen or parsed:
            apply(document, [override])
    return [_combinations(document, str(path)) for document in parsed]


def _combinations(document: dict[str, Any], where: str) -> list[Experiment]:
    """Return the experiments of one document, equal ones once. Raises UsageError as `documents` does."""
    sweep = document.pop("sweep", None) or {}
    if not isinstance(sweep, dict) or not all(isinstance(values, list) and values for values in sweep.values()):
        raise UsageError(
            f"{where}: sweep must map keys to lists with values", hint="sweep: {train.lmbda: [0.0067, 0.013]}"
        )
    combinations: dict[str, Experiment] = {}
    contents_of: dict[tuple[str, str], list[Values]] = {}
    for values in itertools.product(*sweep.values()):
        combination = copy.deepcopy(document)
        for key, value in zip(map(str, sweep), values, strict=True):
            section = combination.get(key)
            merged = section | value if isinstance(section, dict) and isinstance(value, dict) else value
            set_key(combination, key, copy.deepcopy(merged))
        experiment = parse(combination, where)
        combinations.setdefault(experiment.canonical_json(), experiment)
        for output, content in _outputs(experiment):
            if content not in contents_of.setdefault(output, []):
                contents_of[output].append(content)
    for (key, name), contents in contents_of.items():
        if len(contents) > 1:
            raise _clash(where, key, name, contents, document)
    return list(combinations.values())


def _outputs(experiment: Experiment) -> Iterator[tuple[tuple[str, str], Values]]:
    """Yield the key and name of each output of an experiment, with the values that its content depends on."""
    values: Values = {"name": experiment.name}
    for section in Experiment.model_fields:
        if isinstance(part := getattr(experiment, section), Section):
            values |= {f"{section}.{key}": value for key, value in part}
    if experiment.model:
        values[MODEL_NAME] = label(experiment.model.checkpoint)

    def of(*wanted: str, but: str) -> Values:
        return {key: value for key, value in values.items() if key != but and {key, key.split(".")[0]} & {*wanted}}

    if experiment.train:
        yield ("train.out", str(experiment.train.out)), of("train", "images", but="train.out")
    if experiment.cache and experiment.quantizer:
        store, group = experiment.cache.path.rstrip("/"), experiment.quantizer.group
        if experiment.images:
            z = ("quantizer.refine_z", "quantizer.refine")[: 1 + experiment.quantizer.refine_z]
            keys = z if experiment.cache.store_y else ("quantizer",)
            yield ("cache.path", store), of("model", "images", "cache", *keys, but="cache.path")
        yield ("quantizer.group", f"{group} in {store}"), of("quantizer", but="quantizer.group")
    sections = {*Experiment.model_fields} - {"report", "engine"}
    if experiment.finetune:
        yield ("finetune.out", str(experiment.finetune.out)), of(*sections - {"evaluate", "name"}, but="finetune.out")
    if experiment.evaluate:
        yield ("evaluate.out", str(experiment.evaluate.out)), of(*sections, but="evaluate.out")


def _clash(where: str, key: str, output: str, contents: list[Values], document: dict[str, Any]) -> UsageError:
    """Return the error for an output of several contents, with the placeholders that would tell these apart."""
    needed: list[str] = []
    for one, other in itertools.combinations(contents, 2):
        if not any(_distinguishes(by, one, other) for by in needed):
            differing = [by for by in {**one, **other} if one.get(by) != other.get(by)]
            by = min(differing, key=lambda by: (not _distinguishes(by, one, other), by not in PREFERRED, by in OUTPUTS))
            if not _distinguishes(by, one, other):
                message = f"{where}: {key} is {output} for combinations that differ in {by}"
                return UsageError(message, hint=f"give {key} beside each {by} of the sweep")
            needed.append(by)
    values = " and ".join(str(text_of(content[needed[0]])) for content in contents[:2])
    placeholders = [f"{{{by}}}" for by in needed]
    section, name = key.split(".")
    part = document.get(section)
    given = part.get(name, "auto") if isinstance(part, dict) else "auto"
    template = output.split(" in ")[0] if given == "auto" else str(given)
    longer = re.sub(r"((\.zarr|\.json)?/?)$", rf"-{'-'.join(placeholders)}\1", template, count=1)
    return UsageError(
        f"{where}: {key} is {output} for both {needed[0]} {values}: the sweep needs {', '.join(placeholders)} in it",
        hint=f"{section}: {{{name}: '{longer}'}}",
    )


def _distinguishes(key: str, one: Values, other: Values) -> bool:
    """Return whether a key's placeholder has a different text in two combinations."""
    texts = {text_of(values.get(key)) for values in (one, other)}
    return len(texts) == 2 and all(texts)
