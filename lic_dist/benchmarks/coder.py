"""The entropy coder alone: nanoseconds an index of y, in both layouts, beside CompressAI's coder and constriction's.

All arms code the same indices with the same tables, in turn within a round; figures are CPU time, medians over the
rounds. CompressAI's coder takes lists and returns one, as its models call it. constriction (PyPI) codes them in the two
ways that it has: a call for each table, with symbols that are sorted by tables beforehand, which is its fastest and no
trellis allows; and a Gaussian for each index, as learned codecs use it. Its escapes have no bits behind them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from lic_dist.benchmarks.tables import table
from lic_dist.building.threads import one_thread
from lic_dist.codec import rans
from lic_dist.codec.codec import ImageCodec
from lic_dist.models.compat import import_compressai
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import SCALES, TOTAL, CdfTables
from lic_dist.quantization.record import QuantizerRecord

MOST_PICTURES = 4
WAYS = ("encode", "decode")
CONSTRICTION = find_spec("constriction") is not None
LARGEST = 4095  # magnitude to which constriction's Gaussians reach


@dataclass(frozen=True)
class Arm:
    """A coder to time: `encode` returns what `decode` takes, of so many bytes."""

    encode: Callable[[], Any]
    decode: Callable[[Any], Any]
    size: Callable[[Any], int] = len


@one_thread()
def timed(model: Any, records: dict[str, QuantizerRecord], taken: Sequence[Any], rounds: int) -> dict[str, Any]:
    """Return of each arm ns an index and bytes of the first pictures of `taken`, uint8 [H, W, 3]; and the indices.

    CompressAI's coder and constriction's are timed with the first record.
    """
    made: dict[str, list[Arm]] = {}
    latents = 0
    for label, record in records.items():
        codec, others = ImageCodec(model, record), not made
        coded = [codec.encode(picture) for picture in taken[:MOST_PICTURES]]
        latents = sum(one.k.size for one in coded)
        for one in coded:
            for name, arm in arms(one.k, one.level, codec.quantizer, others).items():
                made.setdefault(f"{label}, {name}", []).append(arm)
    seconds: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in made}
    sizes = {}
    with Progress("coding indices", rounds + 1, "round") as bar:
        for number in range(rounds + 1):  # the first one compiles and warms up
            for name, of_pictures in made.items():
                begun = time.process_time()
                streams = [arm.encode() for arm in of_pictures]
                between = time.process_time()
                for arm, stream in zip(of_pictures, streams, strict=True):
                    arm.decode(stream)
                if number:
                    seconds[name]["encode"].append(between - begun)
                    seconds[name]["decode"].append(time.process_time() - between)
                sizes[name] = sum(arm.size(stream) for arm, stream in zip(of_pictures, streams, strict=True))
            bar.advance()
    rows = {
        name: {way: 1e9 * float(np.median(values[way])) / latents for way in WAYS} | {"bytes": sizes[name]}
        for name, values in seconds.items()
    }
    return {"latents": latents, "arms": rows}


def arms(k: NDArray[Any], level: NDArray[Any], quantizer: Quantizer, others: bool) -> dict[str, Arm]:
    """Return the coders of a plane k int16 [lanes, steps] with its levels, and the others' where they are asked for."""
    tables, rows = quantizer.record.y_tables, quantizer.rows(k, level)

    def ours(interleaved: bool) -> Arm:
        return Arm(
            lambda: rans.encode(k, rows, tables, interleaved),
            lambda stream: rans.decode(stream, level, tables, quantizer.trellis, interleaved),
        )

    made = {"one state": ours(False), "interleaved": ours(True)}
    if others:
        made["CompressAI's coder"] = _compressai(k, rows, tables)
    if others and CONSTRICTION:
        made["constriction, by table"] = _constriction_by_table(k, rows, tables)
        if not quantizer.record.by_channel:
            made["constriction, by Gaussian"] = _constriction_by_gaussian(k, level)
    return made


def _compressai(k: NDArray[Any], rows: NDArray[Any], tables: CdfTables) -> Arm:
    ans = import_compressai().ans
    lists = tables.cdf.tolist(), tables.size.tolist(), tables.offset.tolist()
    return Arm(
        lambda: ans.RansEncoder().encode_with_indexes(k.T.ravel().tolist(), rows.T.ravel().tolist(), *lists),
        lambda stream: ans.RansDecoder().decode_with_indexes(stream, rows.T.ravel().tolist(), *lists),
    )


def _constriction_by_table(k: NDArray[Any], rows: NDArray[Any], tables: CdfTables) -> Arm:
    from constriction import stream

    escape = (tables.size - 2)[rows]
    symbols = k - tables.offset[rows]
    symbols = np.where((symbols < 0) | (symbols > escape), escape, symbols).astype(np.int32)
    parts = []
    for row in np.unique(rows):
        frequencies = np.diff(tables.cdf[row, : tables.size[row]])
        parts.append(
            (symbols[rows == row], stream.model.Categorical((frequencies / TOTAL).astype(np.float32), perfect=False))
        )

    def encode() -> Any:
        coder = stream.stack.AnsCoder()
        for part, model in reversed(parts):
            coder.encode_reverse(part, model)
        return coder.get_compressed()

    def decode(words: Any) -> Any:
        coder = stream.stack.AnsCoder(words)
        return [coder.decode(model, len(part)) for part, model in parts]

    return Arm(encode, decode, lambda words: int(words.nbytes))


def _constriction_by_gaussian(k: NDArray[Any], level: NDArray[Any]) -> Arm:
    from constriction import stream

    family = stream.model.QuantizedGaussian(-LARGEST, LARGEST)
    symbols = np.clip(k.T.ravel(), -LARGEST, LARGEST).astype(np.int32)
    scales = SCALES[level.T.ravel()].astype(np.float64)
    means = np.zeros_like(scales)

    def encode() -> Any:
        coder = stream.stack.AnsCoder()
        coder.encode_reverse(symbols, family, means, scales)
        return coder.get_compressed()

    return Arm(
        encode,
        lambda words: stream.stack.AnsCoder(words).decode(family, means, scales),
        lambda words: int(words.nbytes),
    )


def shown(name: str, figures: dict[str, Any]) -> Table:
    """Return the table of what `timed` found with a model of that name."""
    rows = [
        (arm, f"{row['encode']:.1f}", f"{row['decode']:.1f}", str(row["bytes"])) for arm, row in figures["arms"].items()
    ]
    title = f"{name}: the entropy coder alone, {figures['latents']} indices of y"
    return table(title, ("", "ns to encode", "ns to decode", "bytes"), rows)
