"""`lic-dist bench codec`: time to encode and decode a picture against CompressAI's, coder and networks included.

One process, one thread of torch. Every picture is coded by all arms in turn, in every round. Since machines drift,
seconds are medians over pictures and rounds, and ratios are medians of the ratios within one picture and round.
CompressAI's times are those of `compress` and `decompress` alone, on a padded tensor; ours run from uint8 pixels to a
file's bytes and back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lic_dist.benchmarks.data import BASE, pictures
from lic_dist.benchmarks.quantization import REAL_PRICE, REAL_STEP
from lic_dist.benchmarks.tables import machine, table
from lic_dist.building.calibrate import one_thread
from lic_dist.building.records import analytic_record
from lic_dist.codec.codec import ImageCodec, padding
from lic_dist.codec.container import OVERHEAD
from lic_dist.codec.records import compressai_record
from lic_dist.data import images
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.stages import to_input
from lic_dist.progress import Progress

COMPRESSAI = "CompressAI, SQ"
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Arm:
    """A codec to time: `encode` returns what `decode` takes, `size` its number of bytes."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    size: Callable[[Any], int]
    prepare: Callable[[Image], Any]


def bench(models: Sequence[str], folder: Path | None, rounds: int, quick: bool) -> dict[str, Any]:
    """Time every model (default: the shipped one) on a folder of pictures (default: scikit-image's).

    `quick` takes two pictures. Raises UsageError for an unknown model, LicError for a missing folder.
    """
    taken = [images.read(path) for path in pictures(folder)[: 2 if quick else None]]
    console = Console()
    figures: dict[str, Any] = {"machine": machine(), "quick": quick, "pictures": len(taken), "models": {}}
    for name in models or (BASE,):
        figures["models"][name] = timed(checkpoints.load(name), taken, rounds, name)
        console.print(_table(name, figures["models"][name], len(taken)))
    console.print(f"machine: {figures['machine']}")
    return figures


@one_thread()
def timed(loaded: Checkpoint, taken: Sequence[Image], rounds: int, name: str) -> dict[str, dict[str, float]]:
    """Return for each arm seconds to encode and decode, their ratios to CompressAI's, and bits a pixel of the
    streams.
    """
    made = arms(loaded)
    seconds: dict[str, list[tuple[float, float]]] = {arm: [] for arm in made}
    sizes = dict.fromkeys(made, 0)
    for arm in made.values():
        arm.decode(arm.encode(arm.prepare(taken[0])))  # compiles and warms up
    with Progress(f"coding with {name}", rounds * len(taken), "picture") as bar:
        for _ in range(rounds):
            for picture in taken:
                for label, arm in made.items():
                    given = arm.prepare(picture)
                    started = time.perf_counter()
                    coded = arm.encode(given)
                    middle = time.perf_counter()
                    arm.decode(coded)
                    seconds[label].append((middle - started, time.perf_counter() - middle))
                    sizes[label] += arm.size(coded)
                bar.advance(1)
    pixels = rounds * sum(picture.shape[0] * picture.shape[1] for picture in taken)
    anchor = np.array(seconds[COMPRESSAI])
    return {
        label: dict(
            zip(
                ("encode_seconds", "decode_seconds", "encode_ratio", "decode_ratio"),
                map(float, (*np.median(rows, axis=0), *np.median(np.array(rows) / anchor, axis=0))),
                strict=True,
            )
        )
        | {"bpp": 8 * sizes[label] / pixels}
        for label, rows in seconds.items()
    }


def arms(loaded: Checkpoint) -> dict[str, Arm]:
    """Return CompressAI's codec and ours: SQ with its tables, TCQ-8, and TCQ-8 with h_s in integers."""
    model: Any = loaded.model
    weight = 3 / (loaded.spec.lmbda * 255**2 * REAL_STEP**2 * REAL_PRICE)
    tcq8 = analytic_record(loaded, "tcq", 8, REAL_STEP, 1.0, np.full(loaded.spec.M, weight, np.float32))

    def padded(picture: Image) -> torch.Tensor:
        x = to_input(torch.from_numpy(picture.transpose(2, 0, 1).copy())[None], torch.device("cpu"))
        return torch.nn.functional.pad(x, padding(*picture.shape[:2])).contiguous()

    def compress(x: torch.Tensor) -> Any:
        with torch.no_grad():
            return model.compress(x)

    def decompress(coded: Any) -> Any:
        with torch.no_grad():
            return model.decompress(coded["strings"], coded["shape"])

    found = {COMPRESSAI: Arm(compress, decompress, lambda coded: sum(len(one[0]) for one in coded["strings"]), padded)}
    for label, codec in (
        ("SQ", ImageCodec(model, compressai_record(loaded))),
        ("TCQ-8", ImageCodec(model, tcq8)),
        ("TCQ-8, h_s in integers", ImageCodec(model, tcq8, integer=True)),
    ):
        found[label] = Arm(_data_of(codec), codec.decode, lambda data: len(data) - OVERHEAD, lambda picture: picture)
    return found


def _data_of(codec: ImageCodec) -> Callable[[Image], bytes]:
    return lambda picture: codec.encode(picture).data


def _table(name: str, figures: dict[str, dict[str, float]], pictures: int) -> Table:
    rows = [
        (arm, f"{row['encode_seconds']:.3f}", f"{row['decode_seconds']:.3f}")
        + (f"{row['encode_ratio']:.3f}", f"{row['decode_ratio']:.3f}", f"{row['bpp']:.4f}")
        for arm, row in figures.items()
    ]
    heads = ("", "encode s", "decode s", "encode against it", "decode against it", "bpp of the streams")
    return table(f"{name}: a picture of {pictures}, one thread", heads, rows)
