"""Whole pictures, from uint8 pixels to a file's bytes and back, beside the bare networks: a part of `bench codec`.

The bare networks are g_a, h_a and h_s (and those of contexts) to encode, h_s and g_s to decode, on the whole padded
picture under `torch.inference_mode`, one thread, and nothing else: neither the conversion of pixels nor rounding is
timed. Pictures are those of a folder, mirrored or cut to Kodak's size, and a mosaic of them. Within a round the arms of
a picture take turns, forwards and backwards; a ratio is within a picture and round, and figures are medians. Seconds
are CPU time of the process; of several threads they are of the clock on the wall. Files of pictures are neither read
nor written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from lic_dist.benchmarks.data import sides
from lic_dist.benchmarks.tables import table
from lic_dist.building.threads import one_thread
from lic_dist.codec.codec import ImageCodec, padding
from lic_dist.data import images
from lic_dist.models.protocol import CodecModel
from lic_dist.models.stages import to_input
from lic_dist.progress import Progress

KODAK = 512, 768
LARGE = 12.0  # megapixels
CELLS = 3  # photos of the mosaic along each axis
MOST = 4  # pictures of Kodak's size
WAYS = ("encode", "decode")
Image = NDArray[np.uint8]


class Seconds(NamedTuple):
    """What a call took: CPU seconds of the process, and those of the clock."""

    cpu: float
    wall: float


def taken(pictures: Sequence[Image], megapixels: float, quick: bool) -> dict[str, list[Image]]:
    """Return the pictures to code, by the name of their size; `quick` has one of Kodak's size, and no large one."""
    found = {"768x512": [mirrored(one, *KODAK) for one in pictures[: 1 if quick else MOST]]}
    if not quick:
        height, width = sides(megapixels)
        found[f"{width}x{height}"] = [mosaic(pictures, height, width)]
    return found


def mirrored(picture: Image, height: int, width: int) -> Image:
    """Return the middle of a picture [H, W, 3], continued by its mirror image where it is smaller."""
    more = ((0, max(0, height - picture.shape[0])), (0, max(0, width - picture.shape[1])), (0, 0))
    return np.ascontiguousarray(images.middle(np.pad(picture, more, "symmetric"), height, width))


def mosaic(pictures: Sequence[Image], height: int, width: int) -> Image:
    """Return CELLS by CELLS pictures side by side, each mirrored to its cell; few are taken several times."""
    cell = -(-height // CELLS), -(-width // CELLS)
    rows = [
        np.concatenate([mirrored(pictures[(CELLS * row + at) % len(pictures)], *cell) for at in range(CELLS)], axis=1)
        for row in range(CELLS)
    ]
    return np.ascontiguousarray(np.concatenate(rows)[:height, :width])


@one_thread()
def timed(codec: ImageCodec, model: CodecModel, pictures: Sequence[Image], rounds: int, title: str) -> dict[str, Any]:
    """Return, for each way, the medians of seconds bare and whole, of the ratio of whole to bare, and of what two
    threads gain.
    """
    seconds: dict[str, list[Seconds]] = {}
    with Progress(title, rounds * len(pictures), "picture") as bar:
        for number in range(-1, rounds):
            for picture in pictures[: 1 if number < 0 else None]:
                found = _round(codec, model, picture, backwards=bool(number % 2))
                if number < 0:  # compiles and warms up
                    continue
                for arm, one in found.items():
                    seconds.setdefault(arm, []).append(one)
                bar.advance()
    figures: dict[str, Any] = {"pictures": len(pictures), "rounds": rounds}
    for way in WAYS:
        bare, whole, two = (np.array(seconds[f"{way}, {arm}"]) for arm in ("bare", "whole", "two threads"))
        figures[way] = {
            "bare": float(np.median(bare[:, 0])),
            "whole": float(np.median(whole[:, 0])),
            "ratio": float(np.median(whole[:, 0] / bare[:, 0])),
            "range": [float(one) for one in np.percentile(whole[:, 0] / bare[:, 0], (0, 100))],
            "ratio_by_the_clock": float(np.median(whole[:, 1] / bare[:, 1])),
            "two_threads": float(np.median(whole[:, 1] / two[:, 1])),
            "two_threads_cpu": float(np.median(two[:, 0] / whole[:, 0])),
        }
    return figures


def _round(codec: ImageCodec, model: CodecModel, picture: Image, backwards: bool) -> dict[str, Seconds]:
    height, width = picture.shape[:2]
    x = to_input(torch.from_numpy(picture.transpose(2, 0, 1).copy())[None], torch.device("cpu"))
    x = torch.nn.functional.pad(x, padding(height, width, model.strides.multiple))
    codec.threads = 1
    data = codec.encode(picture).data

    def on(threads: int, work: Callable[[Any], Any], given: Any) -> Seconds:
        codec.threads = threads
        return _clocked(lambda: work(given))

    networks: dict[str, Seconds] = {}
    arms: list[tuple[str, Callable[[], Seconds]]] = [
        ("encode, whole", lambda: on(1, codec.encode, picture)),
        ("bare", lambda: networks.update(bare_networks(model, x)) or Seconds(0, 0)),
        ("decode, whole", lambda: on(1, codec.decode, data)),
        ("encode, two threads", lambda: on(2, codec.encode, picture)),
        ("decode, two threads", lambda: on(2, codec.decode, data)),
    ]
    found = {arm: work() for arm, work in (reversed(arms) if backwards else arms)}
    del found["bare"]
    return found | networks


@torch.inference_mode()
def bare_networks(model: CodecModel, x: torch.Tensor) -> dict[str, Seconds]:
    """Return the seconds of the networks of each way on a padded picture, float32 [1, 3, H, W]."""
    y: list[torch.Tensor] = []
    z: list[tuple[torch.Tensor, ...]] = []
    encoding = [_clocked(lambda: y.append(model.analyse(x))), _clocked(lambda: z.append(model.hyper_analyse(y[0])))]
    found = (side.dequantize(torch.round(side.centred(one))) for side, one in zip(model.sides, z[0], strict=True))
    sides_hat = tuple(found)
    y_hat = torch.round(y.pop()).contiguous()
    of_y = _clocked(lambda: model.given(sides_hat, y_hat))
    decoding = _clocked(lambda: model.synthesise(y_hat))
    return {"encode, bare": _sum(*encoding, of_y), "decode, bare": _sum(of_y, decoding)}


def _sum(*some: Seconds) -> Seconds:
    return Seconds(sum(one.cpu for one in some), sum(one.wall for one in some))


def _clocked(work: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def shown(name: str, figures: dict[str, dict[str, Any]]) -> Table:
    """Return the table of a model's figures by size."""
    rows = [
        (
            f"{way}, {size}",
            f"{one['bare']:.3f}",
            f"{one['whole']:.3f}",
            f"{one['ratio']:.3f}",
            "{:.2f}-{:.2f}".format(*one["range"]),
            f"{one['ratio_by_the_clock']:.3f}",
            f"{one['two_threads']:.2f}",
            f"{one['two_threads_cpu']:.2f}",
        )
        for size, of_size in figures.items()
        for way, one in ((way, of_size[way]) for way in WAYS)
    ]
    heads = ("", "nets s", "s", "of nets", "range", "clock", "2 threads", "CPU")
    title = f"{name}, TCQ-8: whole pictures beside the bare networks, one thread; two threads against one"
    return table(title, heads, rows)
