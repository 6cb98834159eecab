"""The checkpoints, quantizers and images of an evaluation, checked before work begins."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from lic_dist.building.records import named_record
from lic_dist.codec.block_codec import BlockCodec
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.records import OFFSETS
from lic_dist.config import Engine, Experiment, need
from lic_dist.config.training import ADAPTERS, TRADES, Finetune
from lic_dist.data import images, photo_files
from lic_dist.data.source import PhotoSource
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import UsageError
from lic_dist.evaluation.anchors import AnchorJob
from lic_dist.evaluation.in_blocks import SidedCodec, digest_with_boundary
from lic_dist.evaluation.journal import Key, Keyed
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.blend import WHAT
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.int8 import QUANTIZING
from lic_dist.models.names import label, split_gain, with_gain
from lic_dist.models.parts import model_digest

P = TypeVar("P", bound=Keyed)
BASE = "base"  # the arm of a checkpoint that was not retrained
INT8 = "int8"
CONTROL = "control"
CONTROLS = (CONTROL, "noise", "straight-through")  # words of arms that show what else would have gained
CARRIED = "carried"  # stands for all quantizers that a checkpoint carries


@dataclass(frozen=True)
class Job:
    """One point to measure: a checkpoint with a quantizer, of whole pictures, or of files in `blocks` of a side.

    `checkpoint` is named as in the experiment, `quantizer` by its short name. `model_at` and `record_at` say where
    workers in other folders find the two. `record` and `model` are digests, by which a stored point is recognised.
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
    snapshot: int | None = None
    cache: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    blocks: int | None = None

    def __str__(self) -> str:
        return f"{label(self.checkpoint)}, {self.quantizer}"

    def load(self) -> Checkpoint:
        """Load the checkpoint."""
        return replace(
            checkpoints.load(self.model_at, self.architecture, self.lmbda, self.options), source=self.checkpoint
        )

    def codec(self) -> ImageCodec | SidedCodec:
        """Load the codec. Raises UsageError where checkpoint or record has changed since the run began."""
        loaded = self.load()
        record = named_record(loaded, self.record_at)
        if (_digest(loaded, self.blocks), record.digest) != (self.model, self.record):
            raise UsageError(f"{self} has changed since the run began", hint="start it again")
        if self.blocks is None:
            return ImageCodec(loaded.model, record)
        return SidedCodec(BlockCodec(loaded.model, record, loaded.boundary, threads=1), self.blocks)


AnyJob = Job | AnchorJob
J = TypeVar("J", bound=AnyJob)


@dataclass(frozen=True)
class Task(Generic[J]):
    """The jobs of an experiment, the engine that runs them, and the images: source, names and a digest of all files."""

    engine: Engine
    jobs: tuple[J, ...]
    source: PhotoSource
    names: tuple[str, ...]
    pictures: str

    @classmethod
    def of(cls, experiment: Experiment) -> Task[Job]:
        """Load and check everything once, so that every mistake is reported before the first image is coded.

        Raises:
            LicError: no images, or one that cannot be read.
            UsageError: an unknown checkpoint or quantizer, or one made for another model.
        """
        section = need(experiment.evaluate, "evaluate")
        if not section.checkpoints and experiment.model is None and not section.anchors:
            raise UsageError("nothing to evaluate", hint="name evaluate.checkpoints, or a model")
        source = open_source(section.images, section.options).absolute()
        if source.packed:
            raise UsageError(f"evaluate.images: {source.where} holds pictures packed", hint="unpack them to a folder")
        found = source.search()
        found.tell()
        names = [photo_files.readable(name) for name in found.names]
        pictures = images.files_digest(source, names)
        chosen = section.checkpoints or ((experiment.model.checkpoint,) if experiment.model else ())
        by_pattern = chosen if isinstance(chosen, dict) else dict.fromkeys(chosen, section.quantizers)
        by_checkpoint: dict[str, tuple[str, ...]] = {}
        for pattern, quantizers in by_pattern.items():
            for checkpoint in _matching(pattern):
                by_checkpoint[checkpoint] = (*by_checkpoint.get(checkpoint, ()), *quantizers)
        arms = {checkpoint: arm for pattern, arm in section.arms.items() for checkpoint in _matching(pattern)}
        if unknown := arms.keys() - by_checkpoint.keys():
            raise UsageError(f"evaluate.arms names {min(unknown)}, which evaluate.checkpoints does not")
        named = [
            job
            for path, quantizers in by_checkpoint.items()
            for job in _jobs(path, quantizers, experiment, arms.get(path))
        ]
        # `arm` counts: a retraining that improved nothing has the tensors of its base, but is a point of its own
        jobs = list({(job.quantizer, job.record, job.model, job.arm): job for job in named}.values())
        if not jobs and not section.anchors:
            raise UsageError("nothing to evaluate: no checkpoint carries a quantizer", hint="name evaluate.quantizers")
        return Task(experiment.engine, tuple(jobs), source, tuple(names), pictures)

    def require_outside(self, out: Path) -> None:
        """Raise UsageError where pictures written beside `out` would be images of the next evaluation."""
        if out.resolve().is_relative_to(self.source.where):
            raise UsageError(f"{out} lies in the folder of images", hint="give another folder")

    def key(self, job: J) -> Key:
        """Return the key of a job's rows and point."""
        return Key(job.quantizer, job.record, job.model, self.pictures)

    def others(self, points: Sequence[P]) -> list[P]:
        """Return the points of a result file that match no job, neither by names and lambda nor by keys and arms.

        Those of an anchor by other versions or settings are left out: they would be on its curve.
        """
        keys = {(self.key(job), job.arm) for job in self.jobs}
        named = {(job.checkpoint, job.quantizer, job.lmbda) for job in self.jobs}
        versions = {job.quantizer: job.model for job in self.jobs if isinstance(job, AnchorJob)}
        return [
            point
            for point in points
            if (point.checkpoint, point.quantizer, point.lmbda) not in named
            and (Key.of(point), point.arm) not in keys
            and (point.lmbda is not None or versions.get(point.quantizer, point.model) == point.model)
        ]

    @property
    def named(self) -> frozenset[tuple[str, str]]:
        """The jobs' pairs of checkpoint and quantizer, as points name them."""
        return frozenset((job.checkpoint, job.quantizer) for job in self.jobs)


def _matching(pattern: str) -> list[str]:
    """Return the checkpoints that match a pattern, shipped ones first, each with the pattern's gain; a text that is no
    pattern is returned itself.

    Raises:
        UsageError: the pattern matches none.
    """
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [pattern]
    files, gain = split_gain(pattern)
    shipped = fnmatch.filter(checkpoints.zoo(), files)
    on_disk = [path for path in sorted(glob.glob(files)) if checkpoints.exists(path)]
    if not shipped and not on_disk:
        raise UsageError(f"no checkpoint matches '{pattern}'", hint="evaluate.checkpoints has names and paths")
    return [with_gain(one, gain) for one in (*shipped, *on_disk)]


def _jobs(checkpoint: str, quantizers: tuple[str, ...], experiment: Experiment, arm: str | None) -> list[Job]:
    """Return the jobs of a checkpoint, for each quantizer one of whole pictures and one of each side of blocks. A
    quantizer's name is a record that it carries, else a group of the cache. `arm` is its arm; None: what it says
    itself.
    """
    section = experiment.model
    architecture, lmbda = (section.architecture, section.lmbda) if section else (None, None)
    options = section.options if section else {}
    loaded = checkpoints.load(checkpoint, architecture, lmbda, options)
    jobs = []
    names = [name for text in quantizers for name in (carried(loaded) if text == CARRIED else (text,))]
    for name in dict.fromkeys(names):
        own = _split(name)[0] in ("sq", *loaded.quantizers)
        bare = not (own or "/" in name or Path(name).exists())
        quantizer = f"{experiment.cache.path}/quantized/{name}" if experiment.cache is not None and bare else name
        record = named_record(loaded, quantizer)
        in_blocks = BlockCodec(loaded.model, record)
        whole = Job(
            checkpoint=checkpoint,
            quantizer=short_name(quantizer),
            model_at=checkpoints.absolute(checkpoint),
            record_at=quantizer if own else _absolute(quantizer),
            architecture=architecture,
            lmbda=record.lmbda,
            record=record.digest,
            model=_digest(loaded, None),
            arm=arm or arm_of(loaded),
            seed=seed_of(loaded),
            **snapshot_of(loaded),
            options=options,
        )
        jobs.append(whole)
        for side in need(experiment.evaluate, "evaluate").blocks:
            in_blocks.require_side(side)
            named = f"{whole.quantizer} blocks {side}"
            jobs.append(replace(whole, quantizer=named, model=_digest(loaded, side), blocks=side))
    return jobs


def _digest(loaded: Checkpoint, blocks: int | None) -> str:
    return model_digest(loaded.model) if blocks is None else digest_with_boundary(loaded)


def carried(loaded: Checkpoint) -> tuple[str, ...]:
    """Return the quantizers that a checkpoint carries for its own weights, not those of the caches it trained on."""
    return tuple(name for name in loaded.quantizers if not name.endswith("-cached"))


def arm_of(loaded: Checkpoint) -> str:
    """Return how a checkpoint says it was made: "base", "decoder", "decoder noise", "decoder+hyper round 2",
    "decoder adversarial 100", "decoder control" (of weight 0), "blend 0.5", "int8", "decoder+hyper int8" ...
    """
    if loaded.history and loaded.history[-1].get("what") == WHAT:
        return f"blend {loaded.history[-1]['share']:g}"
    rounds = [entry for entry in loaded.history if "recipe" in entry]
    if loaded.history and loaded.history[-1].get("what") == QUANTIZING:
        return INT8
    if not rounds:
        return BASE
    last = rounds[-1]
    phases = [phase["recipe"] for phase in last.get("phases", ())] or [last["recipe"]]
    recipes = [one if isinstance(one, str) else "+".join(one) for one in phases]
    if ADAPTERS in phases:
        places = last.get("adapters", Finetune.model_fields["adapters"].default)
        recipes = [f"{ADAPTERS} of {'+'.join(dict.fromkeys(name.partition('.')[0] for name in places))}"]
    latents = "" if last["latents"] == "quantized" else f" {last['latents']}"
    distortion = last.get("distortion")
    weights = distortion if isinstance(distortion, dict) else {}
    traded = [(name, weights[name]) for name in TRADES if weights.get(name) is not None]
    form = f" {INT8}" if any(entry.get("what") == QUANTIZING for entry in loaded.history) else ""
    against = form + "".join(f" {name} {weight:g}" if weight else f" {CONTROL}" for name, weight in traded)
    return ", ".join(recipes) + latents + against + (f" round {len(rounds)}" if len(rounds) > 1 else "")


def is_control(arm: str) -> bool:
    """Return whether an arm is a control, by a word of its name."""
    return any(word in CONTROLS for word in arm.split())


def seed_of(loaded: Checkpoint) -> int | None:
    """Return the seed of a checkpoint's last retraining; None for a base model."""
    return next((entry.get("seed") for entry in reversed(loaded.history) if "recipe" in entry), None)


def snapshot_of(loaded: Checkpoint) -> dict[str, Any]:
    """Return number and digest of the snapshot of the cache that a checkpoint was last retrained from, if it was; of
    several stores no number, and weights and digests in one line.
    """
    last = next((entry for entry in reversed(loaded.history) if "recipe" in entry and "cache" in entry), None)
    if not last:
        return {}
    if isinstance(last["cache"], list):
        return {"cache": ", ".join(last["cache"])}
    return {"snapshot": last.get("snapshot", 0), "cache": last["cache"]}


def short_name(quantizer: str) -> str:
    """Return the name of a quantizer; for a record's path, that of the group or file that holds it. What it says of its
    lambda (tcq8@0.0067) is left out, so that the rates of one model are one curve.
    """
    path, offsets = _split(quantizer)
    name = Path(path.removesuffix("record.json")).name.removesuffix(".json") or path
    return name.partition("@")[0] + offsets


def _absolute(quantizer: str) -> str:
    """Return a record's path as an absolute one."""
    path, offsets = _split(quantizer)
    return checkpoints.absolute(path) + offsets


def _split(quantizer: str) -> tuple[str, str]:
    """Return the name or path of a record, and OFFSETS where the quantizer asks for them, else nothing."""
    path = quantizer.removesuffix(OFFSETS)
    return path, quantizer[len(path) :]


def file_safe(name: str) -> str:
    """Return a name with each run of characters that do not suit a file's name replaced by a hyphen."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)


def distinct_file_names(names: Sequence[str]) -> list[str]:
    """Return `file_safe` names that differ without regard to case: a later one of a name gets a number behind it."""
    taken: set[str] = set()
    found = []
    for name in names:
        safe, number = file_safe(name).strip("-.") or "unnamed", 1
        unique = safe
        while unique.lower() in taken:
            number += 1
            unique = f"{safe}-{number}"
        taken.add(unique.lower())
        found.append(unique)
    return found
