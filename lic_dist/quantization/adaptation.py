"""Re-estimate rate tables from what a quantizer chose on real latents: count, make tables, search again.

    record --search every shard--> counts, added up --> P(k | level, Q) --> tables --> the next record

Counts of shards add up, wherever they were made. Every adaptation makes zeros cheaper, so judge it by the loss L on
latents that were not counted, never by the bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from lic_dist.quantization.distributions import Cdf, adapted_pmf, analytic_pmf, count, factorized_pmf, pmf_shape
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import CdfTables, tables_from_pmf, tables_from_signed_pmf
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.trellis import SCALAR, Trellis

# r float32 and level, both [lanes, steps]; where the lanes are no whole images also their channels, see `quantize`
Part = tuple[NDArray[Any], NDArray[Any]] | tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def gaussian_record(
    name: str,
    step: float,
    weights: NDArray[Any],
    lmbda: float,
    lambda_scale: float = 1.0,
    trellis: Trellis = SCALAR,
    rounding: float = 0.5,
    z_tables: CdfTables | None = None,
) -> QuantizerRecord:
    """Return a quantizer with the Gaussian's own index distributions, where adaptation starts; see
    `QuantizerRecord`.
    """
    record = QuantizerRecord(
        name=name,
        step=step,
        lmbda=lmbda,
        lambda_scale=lambda_scale,
        weights=weights,
        level_rule="nearest",
        y_tables=tables_from_pmf(analytic_pmf(step, trellis, rounding)),
        trellis=trellis,
        rounding=rounding,
        notes={"rates": "analytic"},
    )
    return record if z_tables is None else replace(record, z_tables=z_tables)


def factorized_record(
    name: str,
    step: float,
    weights: NDArray[Any],
    lmbda: float,
    cdf: Cdf,
    lambda_scale: float = 1.0,
    trellis: Trellis = SCALAR,
    rounding: float = 0.5,
) -> QuantizerRecord:
    """Return a quantizer with the index distributions of a factorized prior of y, F(channel, r) = `cdf` (see
    distributions.py), from which adaptation starts. Its levels are channels.
    """
    return QuantizerRecord(
        name=name,
        step=step,
        lmbda=lmbda,
        lambda_scale=lambda_scale,
        weights=weights,
        level_rule="channel",
        y_tables=tables_from_signed_pmf(factorized_pmf(cdf, len(weights), step, trellis, rounding)),
        trellis=trellis,
        rounding=rounding,
        notes={"rates": "analytic"},
    )


def count_indices(quantizer: Quantizer, part: Part, threads: int = 1) -> NDArray[Any]:
    """Count how often a quantizer chooses each |k| in each row on a shard, int64 [rows, K+1], or where levels are
    channels each k, [rows, 2K+1]. Counts of shards add up.
    """
    record, (r, level, *channels) = quantizer.record, part
    k = quantizer.quantize(r, level, threads, *channels)
    _, width = pmf_shape(record.step, record.trellis, record.levels if record.by_channel else None)
    return count(k, level, record.trellis, record.levels, width, record.by_channel)


def record_from_counts(record: QuantizerRecord, counts: NDArray[Any], cdf: Cdf | None = None) -> QuantizerRecord:
    """Return the record with tables re-estimated from counts, shrunk towards the analytic ones (`adapted_pmf`).

    Where levels are channels, the analytic ones are those of `cdf`; ValueError without it.
    """
    if not record.by_channel:
        prior = analytic_pmf(record.step, record.trellis, record.rounding)
        tables = tables_from_pmf(adapted_pmf(counts, prior))
    elif cdf is None:
        raise ValueError("tables by channel are adapted with the cdf of their prior")
    else:
        prior = factorized_pmf(cdf, record.levels, record.step, record.trellis, record.rounding)
        tables = tables_from_signed_pmf(adapted_pmf(counts, prior, signed=True))
    rounds = int(record.notes.get("rounds", 0)) + 1
    return replace(record, y_tables=tables, notes={**record.notes, "rates": "adapted", "rounds": rounds})


def adaptation_rounds(
    record: QuantizerRecord, parts: Sequence[Part], rounds: int, threads: int = 1, cdf: Cdf | None = None
) -> Iterator[QuantizerRecord]:
    """Yield the record of each round. Quantizers without a search choose the same k at any rates, so they have one
    round. `cdf` as in `record_from_counts`.
    """
    for _ in range(rounds if record.kind.searched else min(rounds, 1)):
        quantizer = Quantizer(record)
        counts = sum_counts(count_indices(quantizer, part, threads) for part in parts)
        record = record_from_counts(record, counts, cdf)
        yield record


def sum_counts(counts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Return the sum of the counts of one or more shards."""
    first, *others = counts
    return sum(others, first)
