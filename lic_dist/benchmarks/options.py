"""`lic-dist bench options`: what options of base training bring: trainings of one file, each against the first.

The file's `train` sections (configs/options.yaml) are its arms; those whose `out` ends in their seed, `plain-0` and
`plain-1`, are one arm. Each is trained, unless it is done already, and codes the pictures of every folder with SQ and
CompressAI's tables, in files that are decoded again. L = lmbda 255^2 MSE + bpp of 8-bit pictures. Changes are by
the same seeds of the first arm, with their bootstrap interval over pictures. Steps are the file's choice: CPU seconds,
from the log, say whether arms had the same; they hold held-out evaluations, not the reading of photos.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from lic_dist.benchmarks.data import pictures
from lic_dist.benchmarks.tables import machine, table
from lic_dist.building.threads import one_thread
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.records import local_record
from lic_dist.config import Train, need
from lic_dist.config.sweeps import documents
from lic_dist.data import images
from lic_dist.errors import UsageError
from lic_dist.intervals import Interval, change_interval
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.progress import Progress
from lic_dist.training.base import train
from lic_dist.training.log import read_log

Image = NDArray[np.uint8]
QUICK = 2  # pictures of a folder


def bench(file: Path, overrides: Sequence[str], folders: Sequence[Path], fast: bool) -> dict[str, Any]:
    """Train what a file says and code every picture of the folders, by default scikit-image's; print the table.

    `fast` takes the file's fast form and two pictures of each folder. Raises UsageError where the file trains nothing,
    and as training and the codec do.
    """
    experiments = [one for document in documents(file, overrides, fast) for one in document if one.train]
    if not experiments:
        raise UsageError(f"{file} has no train section", hint="configs/options.yaml is an example")
    taken = {}
    for folder in folders or (None,):
        chosen = pictures(folder)[: QUICK if fast else None]
        taken[str(folder or "scikit-image")] = {path.name: images.read(path) for path in chosen}
    figures: dict[str, Any] = {"machine": machine(), "fast": fast, "arms": {}}
    for experiment in experiments:
        section = need(experiment.train, "train")
        made = train(section, need(experiment.images, "images"))
        loaded = checkpoints.load(str(made), section.architecture)
        seeds = figures["arms"].setdefault(section.out.name.removesuffix(f"-{section.seed}"), {})
        seeds[section.seed] = {
            "steps": sum(phase.steps for phase in section.each_phase),
            "cpu_seconds": cpu_seconds(section),
            "held_out_L": loaded.history[-1]["held_out_figures"]["L"],
            "pictures": {name: coded(loaded, some, f"{section.out}: {name}") for name, some in taken.items()},
        }
    figures["changes"] = changes(figures["arms"])
    Console().print(_table(figures))
    return figures


def cpu_seconds(section: Train) -> float:
    """Return the CPU seconds of a training, over all processes that went on with it, up to their last evaluations."""
    rows = [row["cpu_seconds"] for row in read_log(section.out / "log.jsonl")]
    return float(sum(after - before if after > before else after for before, after in pairwise([0.0, *rows])))


@one_thread()
def coded(loaded: Checkpoint, taken: dict[str, Image], title: str) -> dict[str, dict[str, float]]:
    """Return L, bpp and mse of each picture."""
    codec, found = ImageCodec(loaded.model, local_record(loaded, "sq")), {}
    with Progress(title, len(taken), "picture") as bar:
        for name, picture in taken.items():
            encoded = codec.encode(picture)
            mse = float(np.square(codec.decode(encoded.data).astype(np.float64) - picture).mean())
            bpp = encoded.coded_bits / (picture.shape[0] * picture.shape[1])
            found[name] = {"L": loaded.spec.lmbda * mse + bpp, "bpp": bpp, "mse": mse}
            bar.advance()
    return found


def changes(arms: dict[str, dict[int, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the change of L of each arm against the first, in percent, by folder: mean, low, high, seeds, spread."""
    plain, *others = arms
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for arm in others:
        shared = sorted(arms[arm].keys() & arms[plain].keys())
        for folder in arms[plain][shared[0]]["pictures"] if shared else ():
            one, base = (
                [[row["L"] for row in arms[name][seed]["pictures"][folder].values()] for seed in shared]
                for name in (arm, plain)
            )
            found.setdefault(arm, {})[folder] = vars(change_interval(one, base))
    return found


def _table(figures: dict[str, Any]) -> Any:
    arms, rows = figures["arms"], []
    folders = list(next(iter(next(iter(arms.values())).values()))["pictures"])
    for arm, seeds in arms.items():
        runs = list(seeds.values())
        cells = [arm, str(runs[0]["steps"]), "/".join(f"{one['cpu_seconds']:.0f}" for one in runs)]
        cells.append("/".join(f"{one['held_out_L']:.3f}" for one in runs))
        for folder in folders:
            cells.append(
                "/".join(f"{np.mean([row['L'] for row in one['pictures'][folder].values()]):.3f}" for one in runs)
            )
            change = figures["changes"].get(arm, {}).get(folder)
            cells.append(str(Interval(**change)) if change else "")
        rows.append(cells)
    heads = [head for folder in folders for head in (f"L, {folder}", "change of L")]
    return table("Arms of a training, by seed", ("arm", "steps", "CPU s", "held-out L", *heads), rows)
