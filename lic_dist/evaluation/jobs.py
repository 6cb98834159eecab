"""What an evaluation is of: checkpoints, each with quantizers, over a folder of images; checked before work begins."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from lic_dist.building.records import named_record
from lic_dist.codec.codec import ImageCodec
from lic_dist.config import Engine, Experiment, need
from lic_dist.data import images, photo_files
from lic_dist.errors import UsageError
from lic_dist.evaluation.journal import Key, Keyed
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.names import label

P = TypeVar("P", bound=Keyed)
BASE = "base"  # the arm of a checkpoint that was not retrained
CARRIED = "carried"  # a quantizer's name that stands for all that a checkpoint carries


@dataclass(frozen=True)
class Job:
    """One point to measure: a checkpoint with a quantizer, and the digests that say whether it is known already.

    `checkpoint` is as the experiment names it, `quantizer` the short name; `model_at` and `record_at` are where workers
    in other folders find both.
    """

    checkpoint: str
    quantizer: str
    model_at: str
    record_at: str
    architecture: str | None
    lmbda: float
    record: str
    model: str
    arm: str
    seed: int | None = None

    def __str__(self) -> str:
        return f"{label(self.checkpoint)}, {self.quantizer}"

    def load(self) -> Checkpoint:
        """The checkpoint of this point."""
        return replace(checkpoints.load(self.model_at, self.architecture, self.lmbda), source=self.checkpoint)

    def codec(self) -> ImageCodec:
        """The codec of this point, loaded."""
        loaded = self.load()
        record = named_record(loaded, self.record_at)
        if (checkpoints.digest(loaded.model.state_dict()), record.digest) != (self.model, self.record):
            raise UsageError(f"{self} has changed since the run began", hint="start it again")
        return ImageCodec(loaded.model, record)


@dataclass(frozen=True)
class Task:
    """The jobs of an experiment, where they are done, and its images: folder, names, and one digest over them all."""

    engine: Engine
    jobs: tuple[Job, ...]
    folder: Path
    names: tuple[str, ...]
    pictures: str

    @classmethod
    def of(cls, experiment: Experiment) -> Task:
        """Load and look at everything once, so that every mistake shows before the first image is coded.

        Raises:
            LicError: no images, or one that cannot be read.
            UsageError: an unknown checkpoint or quantizer, or one made for another model.
        """
        section = need(experiment.evaluate, "evaluate")
        if not section.checkpoints and experiment.model is None:
            raise UsageError("nothing to evaluate", hint="name evaluate.checkpoints, or a model")
        found = photo_files.search(section.images)
        found.tell()
        names = [photo_files.readable(name) for name in found.names]
        pictures = images.files_digest(section.images, names)
        chosen = section.checkpoints or (need(experiment.model, "model").checkpoint,)
        asked = chosen if isinstance(chosen, dict) else dict.fromkeys(chosen, section.quantizers)
        wanted: dict[str, tuple[str, ...]] = {}
        for pattern, quantizers in asked.items():
            for one in _matching(pattern):
                wanted[one] = (*wanted.get(one, ()), *quantizers)
        named = [job for one, quantizers in wanted.items() for job in _jobs(one, quantizers, experiment)]
        # a retraining that bettered nothing leaves its base's tensors: a point of its own all the same
        jobs = list({(job.quantizer, job.record, job.model, job.arm): job for job in named}.values())
        if not jobs:
            raise UsageError("nothing to evaluate: no checkpoint carries a quantizer", hint="name evaluate.quantizers")
        return cls(experiment.engine, tuple(jobs), section.images, tuple(names), pictures)

    def require_outside(self, out: Path) -> None:
        """Raises UsageError where pictures written beside `out` would be images of the next evaluation."""
        if out.resolve().is_relative_to(self.folder.resolve()):
            raise UsageError(f"{out} lies in the folder of images", hint="give evaluate.out another folder")

    def key(self, job: Job) -> Key:
        """What a job's rows and point are measured of."""
        return Key(job.quantizer, job.record, job.model, self.pictures)

    def others(self, points: Sequence[P]) -> list[P]:
        """The points of a result file that are none of the jobs', by what they are called or by what they are."""
        keys = {(self.key(job), job.arm) for job in self.jobs}
        return [
            one
            for one in points
            if (one.checkpoint, one.quantizer) not in self.named and (Key.of(one), one.arm) not in keys
        ]

    @property
    def named(self) -> frozenset[tuple[str, str]]:
        """Checkpoints and quantizers of the jobs, as points name them."""
        return frozenset((job.checkpoint, job.quantizer) for job in self.jobs)


def _matching(pattern: str) -> list[str]:
    """The checkpoints, of the package and on disk, that a pattern names; of no pattern, itself.

    Raises:
        UsageError: it matches none.
    """
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [pattern]
    shipped = fnmatch.filter(checkpoints.zoo(), pattern)
    there = [path for path in sorted(glob.glob(pattern)) if checkpoints.exists(path)]
    if not shipped and not there:
        raise UsageError(f"no checkpoint matches '{pattern}'", hint="evaluate.checkpoints has names and paths")
    return [*shipped, *there]


def _jobs(checkpoint: str, wanted: tuple[str, ...], experiment: Experiment) -> list[Job]:
    """A checkpoint's own record of a name comes first; else a bare name is a group of the experiment's cache."""
    section = experiment.model
    architecture, lmbda = (section.architecture, section.lmbda) if section else (None, None)
    loaded = checkpoints.load(checkpoint, architecture, lmbda)
    model = checkpoints.digest(loaded.model.state_dict())
    jobs = []
    for name in dict.fromkeys(each for one in wanted for each in (carried(loaded) if one == CARRIED else (one,))):
        own = name in ("sq", *loaded.quantizers)
        bare = not (own or "/" in name or Path(name).exists())
        quantizer = f"{experiment.cache.path}/quantized/{name}" if experiment.cache is not None and bare else name
        record = named_record(loaded, quantizer)
        ImageCodec(loaded.model, record)
        jobs.append(
            Job(
                checkpoint=checkpoint,
                quantizer=short_name(quantizer),
                model_at=str(checkpoints.locate(checkpoint).resolve()),
                record_at=quantizer if own else checkpoints.absolute(quantizer),
                architecture=architecture,
                lmbda=loaded.spec.lmbda,
                record=record.digest,
                model=model,
                arm=arm_of(loaded),
                seed=seed_of(loaded),
            )
        )
    return jobs


def carried(loaded: Checkpoint) -> tuple[str, ...]:
    """The quantizers that a checkpoint carries for its own weights: not those of the caches it was trained from."""
    return tuple(name for name in loaded.quantizers if not name.endswith("-cached"))


def arm_of(loaded: Checkpoint) -> str:
    """How a checkpoint was made, by its own account: "base", "decoder", "decoder noise", "decoder+hyper round 2" ..."""
    rounds = [entry for entry in loaded.history if "recipe" in entry]
    if not rounds:
        return BASE
    last = rounds[-1]
    phases = [phase["recipe"] for phase in last.get("phases", ())] or [last["recipe"]]
    recipes = [one if isinstance(one, str) else "+".join(one) for one in phases]
    latents = "" if last["latents"] == "quantized" else f" {last['latents']}"
    return ", ".join(recipes) + latents + (f" round {len(rounds)}" if len(rounds) > 1 else "")


def seed_of(loaded: Checkpoint) -> int | None:
    """The seed of a checkpoint's last retraining; None of a base model."""
    return next((entry.get("seed") for entry in reversed(loaded.history) if "recipe" in entry), None)


def short_name(quantizer: str) -> str:
    """The name of a quantizer: of a record's path, the group or file that holds it."""
    return Path(quantizer.removesuffix("record.json")).name.removesuffix(".json") or quantizer


def file_safe(name: str) -> str:
    """A name with nothing in it that a file's name should not have."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)
