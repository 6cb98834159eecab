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

from lic_dist.quantization.distributions import adapted_pmf, analytic_pmf, count, pmf_shape
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import CdfTables, tables_from_pmf
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.trellis import SCALAR, Trellis

Part = tuple[NDArray[Any], NDArray[Any]]  # r float32, level uint8, both [lanes, steps]


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


def count_indices(quantizer: Quantizer, part: Part, threads: int = 1) -> NDArray[Any]:
    """Count how often a quantizer chooses each |k| in each row on a shard: int64 [rows, K+1]. Counts of shards add
    up.
    """
    record, (r, level) = quantizer.record, part
    k = quantizer.quantize(r, level, threads)
    return count(k, quantizer.rows(k, level), pmf_shape(record.step, record.trellis))


def record_from_counts(record: QuantizerRecord, counts: NDArray[Any]) -> QuantizerRecord:
    """Return the record with tables re-estimated from counts, shrunk towards the analytic ones (`adapted_pmf`)."""
    prior = analytic_pmf(record.step, record.trellis, record.rounding)
    tables = tables_from_pmf(adapted_pmf(counts, prior))
    rounds = int(record.notes.get("rounds", 0)) + 1
    return replace(record, y_tables=tables, notes={**record.notes, "rates": "adapted", "rounds": rounds})


def adaptation_rounds(
    record: QuantizerRecord, parts: Sequence[Part], rounds: int, threads: int = 1
) -> Iterator[QuantizerRecord]:
    """Yield the record of each round. Quantizers without a search choose the same k at any rates, so they have one
    round.
    """
    for _ in range(rounds if record.kind.searched else min(rounds, 1)):
        quantizer = Quantizer(record)
        record = record_from_counts(record, sum_counts(count_indices(quantizer, part, threads) for part in parts))
        yield record


def sum_counts(counts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Return the sum of the counts of one or more shards."""
    first, *others = counts
    return sum(others, first)
