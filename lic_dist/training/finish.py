"""The end of a retraining: the quantizer calibrated for the new weights, and the checkpoint of what harms no source."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lic_dist import config
from lic_dist.building.calibrate import calibrate, z_bits
from lic_dist.building.latents import Latents
from lic_dist.building.pilot import calibration_samples
from lic_dist.building.refined import aimed_inputs
from lic_dist.cache.folder import Folder
from lic_dist.cache.trials import Trials
from lic_dist.codec.records import fits
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models import packs
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.names import PACK
from lic_dist.models.packs import Pack
from lic_dist.models.stages import to_input
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.changes import ByPhoto, SourceChange, losers, print_changes, source_changes, told, worst
from lic_dist.training.choice import Choice
from lic_dist.training.distortion import Distortion
from lic_dist.training.distributed import Ranks
from lic_dist.training.loss import HeldOut, held_out_figures, joined
from lic_dist.training.parent import Records, Source
from lic_dist.training.sources import HELD_OUT_BATCH, Sources


@dataclass(frozen=True)
class Finished:
    """A trained model whose quantizer is not calibrated yet, the job's identity, and what was measured on which
    samples.

    `by_photo` measures weights with the cache's integers; `keep_quantizer`: they stay. `pack` makes the model of its
    parent, where adapters were trained; it lacks quantizers and entry.
    """

    made: Checkpoint
    identity: dict[str, Any]
    before: HeldOut
    choice: Choice
    sources: Sources
    by_photo: Callable[[Checkpoint, Records], Mapping[str, ByPhoto]]
    keep_quantizer: bool
    pack: Pack | None = None


def calibrate_and_save(source: Source, section: config.Finetune, finished: Finished, path: Path) -> None:
    """Calibrate the quantizer for the new weights, compare with the parent, and save what harms no source."""
    made, best, sources = finished.made, finished.choice.best, finished.sources
    checkpoints.update_tables(made.model)
    cached, trials_files = source.records, []
    by_photo, pairs = finished.by_photo, {"before": (source.parent, cached)}
    if all(fits(one, made.model) for one in cached.values()):
        pairs["after, the cache's quantizer"] = made, cached
    if source.cache.store_y:
        pilot, held_out = calibration_samples(source.cache, source.groups[0].section)
        header = source.cache.stores[0].header
        batch, crop = header.batch, header.geometry.crop
        if not finished.keep_quantizer:
            anew = {}
            for one in source.groups:
                name = "calibration" if len(source.groups) == 1 else f"calibration-{one.section.group}"
                trials_files.append(Trials(Folder(path.parent), f"{name}.trials"))
                model = checkpoints.at_lambda(made, one.record.lmbda)
                anew[one.section.group] = calibrate(
                    model, one.section, pilot, held_out, batch, warm_start=one.record, trials_file=trials_files[-1]
                )
            pairs["after, calibrated anew"] = made, anew
        distortion = Distortion(section.distortion, crop, torch.device("cpu"))
        parts = _held_out_batches(len(held_out))

        def evaluated(
            checkpoint: Checkpoint, records: Records, samples: Latents, parts: Any, keys: Sequence[Hashable] = ()
        ) -> dict[str, HeldOut]:
            return {
                group: _evaluate_calibrated(checkpoint, record, samples, batch, distortion, parts, keys)
                for group, record in records.items()
            }

        by_group = {name: evaluated(*pair, held_out, parts) for name, pair in pairs.items()}
        rows = {name: joined(found) for name, found in by_group.items()}
        judged = Latents(*source.cache.load(("pixels", "latents/y", "latents/z"), sources.samples).values())

        def quantized(checkpoint: Checkpoint, records: Records) -> dict[str, ByPhoto]:
            found = evaluated(checkpoint, records, judged, *sources.photo_batches())
            return {group: one.by_source for group, one in found.items()}

        by_photo = quantized
    else:
        rows = dict(zip(pairs, (finished.before, best.figures or finished.before), strict=True))
    kept, changes, given_up = _harmless(pairs, by_photo, sources, section.tolerance)
    chosen, records = pairs[kept]
    step, share = (0, 1.0) if kept == "before" else (best.step, best.share)
    outcome = {
        "held_out_before": finished.before.plain(),
        "held_out_best": (best.figures or finished.before).plain(),
        "best_step": step,
        "share": share,
        "refused": finished.choice.refused,
        "given_up": given_up,
        "sources": [asdict(one) for one in changes],
    }
    if source.cache.store_y:
        outcome |= {"calibrated_before": rows["before"].plain(), "calibrated_after": rows[kept].plain()}
    if len(source.groups) > 1 and source.cache.store_y:
        outcome["by_group"] = {
            group: {"before": by_group["before"][group].plain(), "after": by_group[kept][group].plain()}
            for group in cached
        }
    entry = {"what": "finetuning", **finished.identity, **outcome}
    carried = {f"{group}-cached": one.to_json() for group, one in cached.items() if fits(one, chosen.model)}
    carried |= {group: one.to_json() for group, one in records.items()}
    if finished.pack is not None:
        deltas = finished.pack.deltas if chosen is made else {}
        calibrated = {group: one.to_json() for group, one in records.items()}
        pack = replace(finished.pack, deltas=deltas, quantizers=calibrated, entry=entry)
        packs.save(pack, path.with_name(f"{path.parent.name}{PACK}"))
    checkpoints.save(Checkpoint(chosen.model, chosen.spec, carried, [*source.parent.history, entry]), path)
    for trials_file in trials_files:
        trials_file.delete()
    _print_figures(rows, step)
    print_changes(changes)
    for refused in finished.choice.refused:
        print(told(refused, section.tolerance))
    for name, lost in given_up.items():
        print(f"'{name}': {worst(lost, section.tolerance)}: kept is '{kept}'.")


def _harmless(
    pairs: dict[str, tuple[Checkpoint, Records]],
    by_photo: Callable[[Checkpoint, Records], Mapping[str, ByPhoto]],
    sources: Sources,
    tolerance: float,
) -> tuple[str, list[SourceChange], dict[str, dict[str, float]]]:
    """Return the last of some models by which no source loses, and its changes; of those passed over, their changes of
    L in percent. By the first, the parent, nothing is lost.
    """
    before, given_up = by_photo(*pairs["before"]), {}
    for name in reversed(pairs):
        after = by_photo(*pairs[name])
        changes = [
            replace(one, source=f"{group} {one.source}") if len(before) > 1 else one
            for group in before
            for one in source_changes(sources, before[group], after[group])
        ]
        if not losers(changes, tolerance):
            break
        given_up[name] = {one.source: one.change.mean for one in changes}
    return name, changes, given_up


def _evaluate_calibrated(
    checkpoint: Checkpoint,
    record: QuantizerRecord,
    samples: Latents,
    batch: int,
    distortion: Distortion,
    parts: Sequence[NDArray[np.int64]],
    sources: Sequence[Hashable] = (),
) -> HeldOut:
    """Quantize samples, refined where the record says so, count bits by the integer tables and decode; return what a
    model and its quantizer cost.
    """
    found = aimed_inputs(checkpoint, record, samples, batch).quantize(Quantizer(record))
    y_hat, bits = torch.from_numpy(found.y_hat), found.bits.sum(axis=1) + z_bits(record, samples.z)

    def decode(numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        x = to_input(torch.from_numpy(samples.pixels[numbers]), torch.device("cpu"))
        return x, checkpoint.codec.synthesise(y_hat[numbers]), torch.tensor(bits[numbers].sum())

    alone = Ranks(0, 1, torch.device("cpu"))
    return held_out_figures(parts, decode, distortion, record.lmbda, alone, sources)


def _held_out_batches(count: int) -> list[NDArray[np.int64]]:
    """Return the numbers of held-out samples in batches."""
    return np.array_split(np.arange(count), -(-count // HELD_OUT_BATCH))


def _print_figures(rows: dict[str, HeldOut], step: int) -> None:
    """Print a table of figures, all over the same held-out crops."""
    table = Table(title=f"held-out crops; best weights at step {step}")
    for column in ("", "bpp", "PSNR dB", "L", "change of L"):
        table.add_column(column, justify="right" if column else "left")
    before = rows["before"]
    for name, one in rows.items():
        change = "" if one is before else f"{100 * (one.L / before.L - 1):+.2f} %"
        table.add_row(name, f"{one.bpp:.4f}", f"{one.psnr:.3f}", f"{one.L:.4f}", change)
    Console().print(table)
