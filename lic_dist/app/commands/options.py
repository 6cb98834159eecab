"""Arguments that commands share, and helpers to read experiments and to write figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lic_dist.errors import UsageError

if TYPE_CHECKING:
    from lic_dist.cache.storage import Storage
    from lic_dist.config import Experiment

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a key; may be repeated.")]
EngineName = Annotated[str | None, typer.Option("--engine", help="ray or local; overrides engine.name.")]
Architecture = Annotated[
    str | None,
    typer.Option(help="Of a checkpoint that does not say its own, or is of your class package.module:Class."),
]
Lmbda = Annotated[float | None, typer.Option("--lambda", help="Of a checkpoint that does not say its own.")]
PackFile = Annotated[
    Path | None, typer.Option("--pack", metavar="FILE.pack", help="A domain's pack, merged into the model.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first photo that cannot be used.")]
Target = Annotated[str, typer.Argument(help="The store's path or URL, or the experiment's YAML file.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")]


def packed(model: str, pack: Path | None) -> str:
    """Return the name of a model with a pack. UsageError: a file that no name can tell as a pack."""
    from lic_dist.models.names import PACK, split_pack, with_pack

    if pack is None:
        return model
    named = with_pack(model, str(pack))
    if split_pack(named) != (model, str(pack)):
        raise UsageError(f"--pack {pack}: the name of a pack ends in {PACK}, and its path has no +")
    return named


def experiments(
    path: Path, overrides: list[str] | None, engine: str | None = None, section: str = "name"
) -> list[Experiment]:
    """Return the experiments of a file, sweeps expanded: those that have `section`, or all where none has it."""
    from lic_dist.config.sweeps import expand

    found = list(expand(path, with_engine(overrides, engine)))
    return [experiment for experiment in found if getattr(experiment, section) is not None] or found


def with_engine(overrides: list[str] | None, engine: str | None) -> list[str]:
    """Return the overrides, and after them that of --engine where it is given."""
    return [*(overrides or []), *([f"engine.name={engine}"] if engine else [])]


def stores_of(target: str, overrides: list[str] | None) -> list[tuple[Storage, Experiment | None]]:
    """Return the store at a path or URL, or each store of a YAML file with its first experiment."""
    from lic_dist.building.storage import experiment_storage
    from lic_dist.cache.storages import open_storage

    if Path(target).suffix in (".yaml", ".yml"):
        return [
            (experiment_storage(experiment), experiment)
            for experiment in first_of_each_store(experiments(Path(target), overrides, section="cache"))
        ]
    return [(open_storage(target), None)]


def the_store(target: str, overrides: list[str] | None, what: str) -> tuple[Storage, Experiment | None]:
    """Return the only store of a target, as `stores_of` does. UsageError: it has several, and `what` is of one."""
    stores = stores_of(target, overrides)
    if len(stores) > 1:
        raise UsageError(f"{target} has {len(stores)} stores, {what} is of one", hint="give the store's path")
    return stores[0]


def first_of_each_store(chosen: list[Experiment]) -> list[Experiment]:
    """Return the first experiment of each store."""
    from lic_dist.building.storage import experiment_storage

    found: dict[str, Experiment] = {}
    for experiment in chosen:
        found.setdefault(str(experiment_storage(experiment)), experiment)
    return list(found.values())


def write_json(path: Path | None, figures: Any) -> None:
    """Write a command's figures as JSON to the path of --json, where it is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")
