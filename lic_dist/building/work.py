"""The work of a job: which stages write its shards, and their run through an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from lic_dist.building.job import Job, Workers
from lic_dist.building.latents import in_one_stage
from lic_dist.building.metrics import BuildMetrics
from lic_dist.building.reading import Shard, Target, make_reader, make_stored_reader
from lic_dist.building.shards import (
    make_coder,
    make_encoder,
    make_hyper_decoder,
    make_searcher,
    make_stored_coder,
    restore_torch_settings,
)
from lic_dist.building.threads import one_thread
from lic_dist.cache import layout
from lic_dist.cache.plan import Geometry, Plan
from lic_dist.cache.storage import Storage
from lic_dist.config import Engine, bounds
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage, Work
from lic_dist.errors import LicError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.progress import Progress


class Units(Sequence[Shard]):
    """Shards by number. Each is laid out when it is asked for, because a plan may have millions of samples."""

    def __init__(self, numbers: Sequence[int], plan: Plan | None = None) -> None:
        self.numbers, self.plan = numbers, plan

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Shard:  # type: ignore[override]
        number = self.numbers[index]
        return Shard(number, tuple(self.plan.crops_of(number)) if self.plan else ())


def build_stages(job: Job, quantizer: tuple[str, str] | None) -> list[Stage]:
    """Return the stages from photos: read, encode, search and write. `quantizer` is the group and its record as JSON;
    without one only latents are written.
    """
    engine = job.workers.engine
    target = _target(job.storage, *(quantizer or ()))
    read = Stage("read", partial(make_reader, target, job.source, job.images.crop), *bounds(engine.readers))
    if _is_walked(job.parent, job.plan.geometry):
        return [read, _code_stage(target, job.workers, job.plan.batch)]
    return [
        read,
        _encode_stage(target, job.workers, job.plan.batch),
        Stage("search", partial(make_searcher, target), *bounds(engine.searchers)),
    ]


def requantize_stages(
    storage: Storage, parent: Checkpoint, workers: Workers, group: str, record_json: str
) -> list[Stage]:
    """Return the stages from the store: the hyper-decoder over y, or the encoder over the pixels; then search and
    write.
    """
    engine, target = workers.engine, _target(storage, group, record_json)
    header = layout.read_header(target.storage)
    recall = Stage("recall", partial(make_stored_reader, target), *bounds(engine.readers))
    if _is_walked(parent, header.geometry):
        if not header.store_y:
            return [recall, _code_stage(target, workers, header.batch)]
        coder = partial(make_stored_coder, target, workers.model, header.batch)
        return [_on_encoders("code", coder, engine)]
    search = Stage("search", partial(make_searcher, target), *bounds(engine.searchers))
    if not header.store_y:
        return [recall, _encode_stage(target, workers, header.batch), search]
    hyper_decoder = partial(make_hyper_decoder, target, workers.model, header.batch)
    return [_on_encoders("view", hyper_decoder, engine), search]


@one_thread()
def _is_walked(parent: Checkpoint, geometry: Geometry) -> bool:
    """Return whether a model's shards are quantized by a walk on the encoder's device: see shards.py."""
    return not in_one_stage(parent.codec, (geometry.y_size,) * 2, (geometry.z_size,) * 2)


def _code_stage(target: Target, workers: Workers, batch: int) -> Stage:
    made = partial(make_coder, target, workers.model, batch, _z_steps(target.storage))
    return _on_encoders("code", made, workers.engine)


def _encode_stage(target: Target, workers: Workers, batch: int) -> Stage:
    made = partial(make_encoder, target, workers.model, batch, _z_steps(target.storage))
    return _on_encoders("encode", made, workers.engine)


def _on_encoders(name: str, make: Callable[[], Work], engine: Engine) -> Stage:
    return Stage(name, make, *bounds(engine.encoders), engine.gpus_per_encoder)


def _z_steps(storage: Storage) -> int:
    """Return the steps of refinement that a store's z has had."""
    return int(layout.read_header(storage).identity.get("refined", {}).get("z_steps", 0))


def _target(storage: Storage, group: str | None = None, record_json: str = "") -> Target:
    storage = storage.absolute()
    return Target(storage, layout.read_header(storage).fingerprint, group, record_json)


@dataclass(frozen=True)
class RunTotals:
    """What a run has written: shards, and bits and pixels of their good samples."""

    shards: int = 0
    bits: float = 0.0
    pixels: int = 0

    def __add__(self, other: RunTotals) -> RunTotals:
        return RunTotals(self.shards + other.shards, self.bits + other.bits, self.pixels + other.pixels)


def run_units(storage: Storage, workers: Workers, stages: list[Stage], units: Units, strict: bool = False) -> RunTotals:
    made, set_aside = RunTotals(), 0
    if not len(units):
        return made
    engine = workers.engine
    header = layout.read_header(storage)
    left = sum(header.count(number) for number in units.numbers)
    builds = stages[0].name == "read"
    title = "building the cache" if builds else "quantizing the cache"
    metrics = BuildMetrics(str(storage), "build" if builds else "quantize")
    results = run(stages, units, engine=engine.name, address=engine.address, num_cpus=engine.num_cpus)
    bar = Progress(title, header.num_samples, "crop", done=header.num_samples - left)
    with restore_torch_settings(), bar, closing(results):
        for unit, report in results:
            if report is None:  # another job was faster
                bar.advance(header.count(unit.number))
                continue
            made += RunTotals(1, report.bits, report.pixels)
            set_aside += len(report.faulty)
            metrics.add(report.samples, len({crop.source for crop in unit.crops}), len(report.faulty))
            told = {"set aside": set_aside} if set_aside else {}
            bar.advance(report.samples, bpp=made.bits / max(made.pixels, 1), **told)
            if strict and report.faulty:
                source, reason = report.faulty[0]
                raise LicError(f"{source}: {reason}", hint="--strict stops here; what is written is kept")
    return made
