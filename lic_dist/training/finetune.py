"""Finetuning: retrain the decoder side on cached, really quantized latents, once or in rounds.

    lic-dist finetune CONFIG                                          one process
    torchrun --nproc-per-node=8 -m lic_dist finetune CONFIG           DDP; elastic with --max-restarts
    lic-dist finetune CONFIG --engine ray                             DDP under Ray Train

A round is calibrate, search, finetune, adapt. From the second round on, all ranks together repeat the search over the
whole cache with the model and the calibrated quantizer of the round before. Each round has its group in the cache
(`tcq8-round2-` and the model's digest), its folder in `out`, and its figures in `out/rounds.json`. `out` itself gets
the checkpoint of the best round, of those at which no source of held-out photos has lost since the first began.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lic_dist import config
from lic_dist.building.build import requantize_store
from lic_dist.building.job import Workers, load_parent, open_cache, workers_of
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.names import SUFFIX
from lic_dist.models.parts import model_digest
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.boundary import train_boundary
from lic_dist.training.distributed import Ranks, joined
from lic_dist.training.parent import Group, Source
from lic_dist.training.retrain import retrain
from lic_dist.training.snapshots import read_snapshots


def finetune(experiment: config.Experiment, launched: AbstractContextManager[Ranks] | None = None) -> Path:
    """Finetune a base model on its cache; return the path of the checkpoint.

    A finished job is left as it is, an interrupted one resumes. `launched` are a launcher's ranks, else those `joined`.

    Raises:
        LicError, UsageError: see `retrain`.
    """
    section = config.need(experiment.finetune, "finetune")
    quantizer = config.need(experiment.quantizer, "quantizer")
    with launched or joined() as ranks:
        parent, cache = load_parent(experiment), read_snapshots(_opened(experiment, section), section, ranks)
        source = Source(parent, cache, tuple(_groups(cache.stores[0], parent, section, quantizer)))
        if section.recipe == "boundary":
            return train_boundary(source, section, ranks)
        if section.rounds == 1:
            return retrain(source, section, section.out, ranks)
        if not cache.store_y:
            raise UsageError("rounds need y, which this cache does not keep", hint="build it with cache.store_y: true")
        if sealed := [str(one.storage) for one in cache.stores if one.storage.sealed]:
            raise UsageError(f"rounds add groups, and {sealed[0]} is an export", hint="name the store that it is of")
        workers = workers_of(experiment)
        if ranks.world > 1:  # the ranks hold the machines that an engine would use
            workers = replace(workers, engine=config.Engine(name="local"))
        paths: list[Path] = []
        for number in range(1, section.rounds + 1):
            if paths:
                source = _search_again(source, number, paths[-1], workers, ranks)
            paths.append(retrain(source, section, section.out / f"round-{number}", ranks))
        best = section.out / f"checkpoint{SUFFIX}"
        if ranks.first:
            _write_best_round(paths, best, section.tolerance)
        ranks.wait()
        return best


def _opened(experiment: config.Experiment, section: config.Finetune) -> list[LatentCache]:
    """Open the stores that are mixed, or the experiment's own."""
    if not section.cache:
        return [open_cache(experiment)]
    pipeline = experiment.cache.pipeline if experiment.cache else "zarr"
    return [LatentCache.open(one.path, one.options, pipeline) for one in section.cache]


def _groups(
    cache: LatentCache, parent: Checkpoint, section: config.Finetune, quantizer: config.Quantizer
) -> Iterator[Group]:
    """Yield the groups that a job trains on, each with the quantizer's section at its own lambda.

    Raises:
        LicError: the cache has no such group.
        UsageError: a group that is named twice.
    """
    if len(set(section.groups)) < len(section.groups):
        raise UsageError(f"finetune.groups names one twice: {', '.join(section.groups)}")
    for name in section.groups or (quantizer.group,):
        record = QuantizerRecord.from_json(cache.record_json(name))
        own = {"group": name, "lmbda": None if record.lmbda == parent.spec.lmbda else record.lmbda}
        yield Group(name, record, quantizer.model_copy(update=own if section.groups else {}))


def _search_again(source: Source, number: int, checkpoint: Path, workers: Workers, ranks: Ranks) -> Source:
    """Return the source of a round: the last round's model, and groups that all ranks together search with it."""
    parent = checkpoints.load(str(checkpoint), workers.model.architecture)
    workers = replace(workers, model=workers.model._replace(name_or_path=checkpoints.absolute(str(checkpoint))))
    groups = []
    for one in source.groups:
        name = f"{one.section.group}-round{number}-{model_digest(parent.model)[:8]}"
        record = QuantizerRecord.from_json(parent.quantizers[one.section.group])
        named = one.section.model_copy(update={"group": name})
        for store in source.cache.stores:
            requantize_store(store, parent, named, workers, record, (ranks.rank, ranks.world))
        groups.append(Group(name, record, one.section))
    ranks.wait()
    return Source(parent, source.cache, tuple(groups))


def _write_best_round(paths: list[Path], best: Path, tolerance: float) -> None:
    """Write rounds.json, and the checkpoint of the round of least L, each with its own calibrated quantizer.

    Rounds at which a source has lost more than the tolerance since the first began are left out.
    """
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(paths, start=1):
        entry = checkpoints.read(path)["history"][-1]
        before, after = entry["calibrated_before"], entry["calibrated_after"]
        gain = {"L_percent": 100 * (after["L"] / before["L"] - 1)}
        kept = {key: entry[key] for key in ("group", "record", "groups", "best_step", "sources") if key in entry}
        rows.append({"round": number, "checkpoint": str(path), **kept, "before": before, "after": after, **gain})
    (best.parent / "rounds.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        change = f"L {row['before']['L']:.4f} -> {row['after']['L']:.4f} ({row['L_percent']:+.2f} %)"
        print(f"round {row['round']}: {change}")
    limits = {one["source"]: one["before"] * (1 + tolerance) for one in rows[0].get("sources", ())}
    harmless = []
    for row in rows:
        after = {one["source"]: one["after"] for one in row.get("sources", ())}
        lost = [name for name, L in after.items() if limits.get(name, math.inf) < L]
        if lost:
            print(f"round {row['round']}: {', '.join(lost)} lost more than {100 * tolerance:g} % of L since the first")
        else:
            harmless.append(row)
    least = min(harmless, key=lambda row: row["after"]["L"])
    checkpoints.write(checkpoints.read(Path(least["checkpoint"])), best)
