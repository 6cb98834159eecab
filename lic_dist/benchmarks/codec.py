"""`lic-dist bench codec`: time to encode and decode a picture beside CompressAI's own codec and the bare networks.

Parts: `codecs`, this module; `coder`, the entropy coder alone (coder.py); `whole`, pictures of Kodak's size and of 12
megapixels beside the bare networks, on one thread and on two (whole.py).

One process, one thread of torch. Every picture is coded by all arms in turn, in every round; by CompressAI's, where it
takes longer than LONG, in two rounds alone. Seconds are CPU time of this process, which other work on the machine
disturbs little, and medians over pictures and rounds; ratios are of medians. CompressAI's times are those of `compress`
and `decompress` alone, on a padded tensor; ours run from uint8 pixels to a file's bytes and back. The networks' forward
passes alone are those of g_a, h_a, h_s and contexts, or h_s, contexts and g_s. Without the transforms g_a, h_a, h_s and
g_s, whose time is taken in each run, contexts, search and coder are left: CompressAI's own loop, where it has one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lic_dist.benchmarks import coder, whole
from lic_dist.benchmarks.data import BASE, pictures
from lic_dist.benchmarks.quantization import REAL_PRICE, REAL_STEP
from lic_dist.benchmarks.tables import machine, table
from lic_dist.benchmarks.untrained import untrained
from lic_dist.building.records import analytic_record
from lic_dist.building.threads import one_thread
from lic_dist.codec.codec import ImageCodec, padding
from lic_dist.codec.container import Container
from lic_dist.codec.records import compressai_record, local_record
from lic_dist.data import images
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.protocol import CodecModel, Sides
from lic_dist.models.stages import to_input
from lic_dist.progress import Progress
from lic_dist.quantization.record import QuantizerRecord

PARTS = ("codecs", "coder", "whole")
COMPRESSAI, NETWORKS = "CompressAI, SQ", "networks alone"
LONG = 4.0  # seconds, encoding and decoding
FLUSH = 8  # bytes with which each rANS stream ends
WAYS = ("encode", "decode")
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Arm:
    """A codec to time: `encode` returns what `decode` takes, `streams` the sizes in bytes of its rANS streams."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    streams: Callable[[Any], list[int]]
    prepare: Callable[[Image], Any]


@dataclass
class Times:
    """What an arm took, for each picture and round: CPU and wall seconds, and the CPU seconds of the transforms."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    transforms: list[float] = field(default_factory=list)

    def rest(self) -> float:
        """Return the median of what the transforms leave."""
        return float(np.median(np.subtract(self.cpu, self.transforms)))


class _Watch:
    """CPU seconds inside some modules, which all arms run."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def _start(self, *_: Any) -> None:
        self.seconds -= time.process_time()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.process_time()

    @contextmanager
    def of(self, codec: CodecModel) -> Iterator[None]:
        """Count the seconds of a model's transforms."""
        hooks: list[Any] = []
        for name in ("g_a", "h_a", "h_s", "g_s"):
            if (net := codec.nets.get(name)) is not None:
                hooks += net.register_forward_pre_hook(self._start), net.register_forward_hook(self._stop)
        yield
        for hook in hooks:
            hook.remove()


def bench(
    models: Sequence[str],
    sizes: Sequence[str],
    folder: Path | None,
    rounds: int,
    quick: bool,
    parts: Sequence[str] = (),
    megapixels: float = whole.LARGE,
) -> dict[str, Any]:
    """Time checkpoints, and families with random weights (`untrained`'s NAME:N:M), on a folder of pictures.

    Without either it is the shipped model, without a folder scikit-image's pictures, without `parts` all of PARTS.
    `quick` takes two pictures. Raises UsageError for an unknown model, part or sizes that are none, LicError for a
    missing folder.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"no part '{unknown[0]}' of this benchmark", hint=f"there are {', '.join(PARTS)}")
    taken = [images.read(path) for path in pictures(folder)[: 2 if quick else None]]
    console = Console()
    figures: dict[str, Any] = {"machine": machine(), "quick": quick, "pictures": len(taken)}
    figures |= {of_part: {} for of_part in ("models", "coder", "whole")}
    made: dict[str, Callable[[str], Checkpoint]] = dict.fromkeys(models or (() if sizes else (BASE,)), checkpoints.load)
    for name, make in (made | dict.fromkeys(sizes, untrained)).items():
        loaded = make(name)
        records = {"SQ": compressai_record(loaded), "TCQ-8": tcq8_record(loaded)}
        for part in parts or PARTS:
            if part == "codecs":
                figures["models"][name] = timed(loaded, taken, rounds, name)
                tables = list(_tables(name, figures["models"][name], len(taken)))
            elif part == "coder":
                figures["coder"][name] = coder.timed(loaded.model, records, taken, rounds)
                tables = [coder.shown(name, figures["coder"][name])]
            else:
                carried = "tcq8" in loaded.quantizers
                codec = ImageCodec(loaded.model, local_record(loaded, "tcq8") if carried else records["TCQ-8"])
                figures["whole"][name] = {
                    size: whole.timed(codec, loaded.codec, some, rounds, f"{name}, {size}")
                    for size, some in whole.taken(taken, megapixels, quick).items()
                }
                tables = [whole.shown(name, figures["whole"][name])]
            for one in tables:
                console.print(one)
    if figures["coder"] and not coder.CONSTRICTION:
        console.print("constriction is not installed: `pip install constriction` adds it to the coders")
    figures["load"] = os.getloadavg()
    console.print(f"machine: {figures['machine']}; load averages {', '.join(f'{one:.1f}' for one in figures['load'])}")
    return figures


@one_thread()
def timed(loaded: Checkpoint, taken: Sequence[Image], rounds: int, name: str) -> dict[str, dict[str, Any]]:
    """Return of each arm, for encoding and decoding: seconds, their range, wall seconds, seconds outside of the
    transforms, and their ratios to CompressAI's and to the networks'; and the bytes of a picture's streams.
    """
    made = arms(loaded)
    seconds = {arm: {way: Times() for way in WAYS} for arm in made}
    sizes: dict[str, list[list[int]]] = {arm: [] for arm in made}
    for label, arm in made.items():
        if label != COMPRESSAI:
            arm.decode(arm.encode(arm.prepare(taken[0])))  # compiles and warms up
    watch = _Watch()
    with Progress(f"coding with {name}", rounds * len(taken), "picture") as bar, watch.of(loaded.codec):
        for number in range(rounds):
            for picture in taken:
                for label, arm in made.items():
                    rows = seconds[label]
                    if label == COMPRESSAI and number > 1 and sum(rows[way].cpu[0] for way in WAYS) > LONG:
                        continue
                    coded = _measured(watch, rows["encode"], arm.encode, arm.prepare(picture))
                    _measured(watch, rows["decode"], arm.decode, coded)
                    if not number:
                        sizes[label].append(arm.streams(coded))
                bar.advance(1)
    return {label: _figures(label, seconds, sizes, taken) for label in made}


def _measured(watch: _Watch, times: Times, work: Callable[[Any], Any], given: Any) -> Any:
    watch.seconds, wall, cpu = 0.0, time.perf_counter(), time.process_time()
    found = work(given)
    times.cpu.append(time.process_time() - cpu)
    times.wall.append(time.perf_counter() - wall)
    times.transforms.append(watch.seconds)
    return found


def _figures(
    label: str, seconds: dict[str, dict[str, Times]], sizes: dict[str, list[list[int]]], taken: Sequence[Image]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for way in WAYS:
        own, theirs, bare = (seconds[arm][way] for arm in (label, COMPRESSAI, NETWORKS))
        middle = float(np.median(own.cpu))
        found |= {
            f"{way}_seconds": middle,
            f"{way}_range": [min(own.cpu), max(own.cpu)],
            f"{way}_wall": float(np.median(own.wall)),
            f"{way}_rest": own.rest(),
            f"{way}_ratio": middle / float(np.median(theirs.cpu)),
            f"{way}_rest_ratio": own.rest() / theirs.rest(),
            f"{way}_of_networks": middle / float(np.median(bare.cpu)),
        }
    streams = sizes[label]
    flushes = FLUSH * sum(map(len, streams))
    payload = sum(map(sum, streams)) - flushes
    pixels = sum(picture.shape[0] * picture.shape[1] for picture in taken)
    return found | {"payload_bytes": payload, "flush_bytes": flushes, "bpp": 8 * (payload + flushes) / pixels}


def arms(loaded: Checkpoint) -> dict[str, Arm]:
    """Return CompressAI's codec, the networks alone, and ours: SQ with its tables, TCQ-8, and that in integers.

    Raises LicError for a model that has no codec of its own.
    """
    model: Any = loaded.model
    if not hasattr(model, "compress"):
        raise LicError(f"{loaded.codec.name} has no `compress` of its own, beside which it could be timed")
    tcq8 = tcq8_record(loaded)

    def padded(picture: Image) -> torch.Tensor:
        height, width = picture.shape[:2]
        x = to_input(torch.from_numpy(picture.transpose(2, 0, 1).copy())[None], torch.device("cpu"))
        return torch.nn.functional.pad(x, padding(height, width, loaded.codec.strides.multiple))

    gain = loaded.codec.gain
    of_gain: dict[str, Any] = {} if gain is None else {"stage": 2, "s": 0, "inputscale": torch.tensor(gain)}

    def compress(x: torch.Tensor) -> Any:
        with torch.no_grad():
            return model.compress(x, **of_gain)

    def decompress(coded: Any) -> Any:
        with torch.no_grad():
            return model.decompress(coded["strings"], coded["shape"], **of_gain)

    bare = _Networks(loaded.codec)
    found = {
        COMPRESSAI: Arm(
            compress,
            decompress,
            lambda coded: [len(one[0]) for one in coded["strings"]],
            lambda picture: padded(picture).contiguous(),
        ),
        NETWORKS: Arm(bare.encode, bare.decode, lambda coded: [], padded),
        "SQ": _ours(ImageCodec(model, compressai_record(loaded))),
        "TCQ-8": _ours(ImageCodec(model, tcq8)),
    }
    if "deterministic" in loaded.codec.supports:
        found["TCQ-8, in integers"] = _ours(ImageCodec(model, tcq8, integer=True))
    return found


def tcq8_record(loaded: Checkpoint) -> QuantizerRecord:
    """Return TCQ-8 with analytic tables, at the price of a bit that calibration finds for the shipped model."""
    weight = 3 / (loaded.spec.lmbda * 255**2 * REAL_STEP**2 * REAL_PRICE)
    return analytic_record(loaded, "tcq", 8, REAL_STEP, 1.0, np.full(loaded.codec.channels, weight, np.float32))


def _ours(codec: ImageCodec) -> Arm:
    def streams(data: bytes) -> list[int]:
        container = Container.unpack(data)
        return [len(one) for one in (container.z, container.y) if one]

    return Arm(lambda picture: codec.encode(picture).data, codec.decode, streams, lambda picture: picture)


class _Networks:
    """The networks' forward passes, without a search or a coder: those of the entropy model know all of y_hat."""

    def __init__(self, codec: CodecModel) -> None:
        self._codec = codec

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> tuple[Sides, torch.Tensor]:
        codec = self._codec
        y = codec.analyse(x)
        of_sides = zip(codec.sides, codec.hyper_analyse(y), strict=True)
        sides_hat = tuple(side.dequantize(torch.round(side.centred(z))) for side, z in of_sides)
        y_hat = torch.round(y).contiguous()
        codec.given(sides_hat, y_hat)
        return sides_hat, y_hat

    @torch.no_grad()
    def decode(self, latents: tuple[Sides, torch.Tensor]) -> None:
        self._codec.synthesise(self._codec.given(*latents).y_hat.contiguous())


def _tables(name: str, figures: dict[str, dict[str, Any]], count: int) -> Iterator[Table]:
    heads = ("", "s", "range", "speedup", "rest s", "speedup", "of nets")
    for way in WAYS:
        rows = [
            (
                arm,
                f"{row[f'{way}_seconds']:.3f}",
                "{:.3f}-{:.3f}".format(*row[f"{way}_range"]),
                f"{1 / row[f'{way}_ratio']:.2f}",
                f"{row[f'{way}_rest']:.3f}",
                f"{1 / row[f'{way}_rest_ratio']:.2f}",
                f"{row[f'{way}_of_networks']:.3f}",
            )
            for arm, row in figures.items()
        ]
        title = f"{name}: to {way} a picture of {count}, one thread, CPU time; rest: without g_a, h_a, h_s, g_s"
        yield table(title, heads, rows)
    theirs = figures[COMPRESSAI]["payload_bytes"]
    sizes = [
        (arm, str(row["payload_bytes"]), f"{100 * (row['payload_bytes'] / theirs - 1):+.3f} %", str(row["flush_bytes"]))
        + (f"{row['bpp']:.4f}",)
        for arm, row in figures.items()
        if arm != NETWORKS
    ]
    yield table(f"{name}: bytes of {count} pictures", ("", "streams", "against it", "their ends", "bpp of both"), sizes)
