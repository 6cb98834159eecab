"""Train the network for the edges of blocks (models/boundary.py) from a cache of squares, as the recipe `boundary`.

The crops of such a cache are neighbours, two by two, and each was coded alone, as blocks are: decoded, four of them
are a piece of a picture in blocks, with two edges and their crossing. Nothing of the model changes, so rate and latents
are the cache's, and the pictures are decoded before the first step. L is that of whole squares.

From a cache of other crops the same is trained on edges that are none, in the middle of crops that were coded whole:
the control, which says what the network gains without blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist import config
from lic_dist.building.latents import DECODED, to_decode
from lic_dist.cache.reader import LatentCache
from lic_dist.codec import walk
from lic_dist.data.folders import folder_names
from lic_dist.data.photo import SQUARE
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.boundary import Boundary, mended
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.names import SUFFIX
from lic_dist.models.parts import model_digest
from lic_dist.models.stages import only_side
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.distributed import Ranks
from lic_dist.training.loop import PhasePlan, TrainingLoop
from lic_dist.training.loss import HeldOut, held_out_figures
from lic_dist.training.parent import Source
from lic_dist.training.sources import batches_of
from lic_dist.training.states import is_finished

MOST_SQUARES = 2048  # of each part, which are held decoded: 0.8 GB of crops of 128
NOT_IDENTITY = {"out", "streams", "workers", "rounds", "keep", "tracking", "snapshot", "cache"}


@dataclass(frozen=True)
class Squares:
    """Squares: `decoded` and `original`, uint8 [n, 3, s, s], the bits of each, float64 [n], and its photo's path; they
    are some `of` those of the cache.
    """

    decoded: NDArray[np.uint8]
    original: NDArray[np.uint8]
    bits: NDArray[np.float64]
    paths: tuple[str, ...]
    of: int

    def batch(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return some, decoded and original, float32 in pixels of 8 bits."""
        decoded, original = (torch.from_numpy(one[numbers]).float() for one in (self.decoded, self.original))
        return decoded, original


class Mending(nn.Module):
    """The forward pass: decoded squares float32 [B, 3, s, s] in pixels of 8 bits, to the same with mended edges."""

    def __init__(self, network: Boundary) -> None:
        super().__init__()
        self.network = network

    def forward(self, squares: Tensor) -> Tensor:
        return mended(self.network, squares)


def train_boundary(source: Source, section: config.Finetune, ranks: Ranks) -> Path:
    """Train the network, and save the parent with it; return the checkpoint's path. A finished job is left as it is.

    Raises:
        LicError: as `retrain`; or a cache without a whole square of either part.
        UsageError: several caches, groups, phases or rounds, or a distortion other than mse.
    """
    if len(source.cache.stores) > 1 or len(source.groups) > 1 or section.rounds > 1:
        raise UsageError("recipe: boundary is of one cache and one group", hint="leave out cache, groups and rounds")
    if section.distortion != "mse" or section.latents != "quantized":
        raise UsageError("recipe: boundary lowers MSE on quantized latents", hint="leave out distortion and latents")
    source.check()
    parent, (group,), (cache,) = source.parent, source.groups, source.cache.stores
    identity = {**section.identity(NOT_IDENTITY), **source.identity, "parent": model_digest(parent.model)}
    path = section.out / f"checkpoint{SUFFIX}"
    if is_finished(path, identity, ranks):
        if ranks.first:
            print(f"{path}: done already")
        return path
    if ranks.first and not cache.header.squares:
        print(f"the crops of {cache.storage} were coded whole: a control, edges that are none")
    training, held_out = (
        _decoded(cache, parent, group.record, group.name, part, section.seed) for part in (False, True)
    )
    if ranks.first:
        counts = [f"{len(part.paths)} of {part.of}" for part in (training, held_out)]
        print(f"the boundary network trains on {counts[0]} squares, and is judged by {counts[1]}", flush=True)
    torch.manual_seed(section.seed)
    mending = Mending(network := Boundary().to(ranks.device))
    names = tuple(name for name, _ in network.named_parameters())
    parts, keys = batches_of(folder_names(held_out.paths))

    def decode(numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        decoded, original = (one.to(ranks.device) for one in held_out.batch(numbers))
        return original / 255, mending(decoded) / 255, torch.tensor(held_out.bits[numbers].sum())

    def figures() -> HeldOut:
        return held_out_figures(parts, decode, _mse, group.record.lmbda, ranks, keys if len(set(keys)) > 1 else ())

    def loss(forward: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        decoded, original = batch
        return group.record.lmbda * _mse(forward(decoded) / 255, original / 255)

    before = figures()
    phases = [PhasePlan(names, section.steps, section.lr)]
    loop = TrainingLoop("training the boundary network", section, phases, mending, network, identity, ranks)
    loop.record_start(before, section.tolerance)
    for step in loop:
        numbers = np.random.default_rng((section.seed, step)).integers(len(training.bits), size=section.batch)
        batch = [one.to(ranks.device) for one in training.batch(numbers[ranks.share(section.batch)])]
        pieces = list(zip(*(one.tensor_split(loop.parts) for one in batch), strict=True))
        loop.train_step(pieces, loss, lambda: f"squares {numbers.tolist()}")  # noqa: B023  # called in this step
        if loop.evaluation_due:
            loop.evaluate(figures)
    if ranks.first:
        network.load_state_dict(loop.best.weights)
        after = loop.best.figures or before
        outcome = {"best_step": loop.best.step, "held_out_before": before.plain(), "held_out_best": after.plain()}
        entry = {"what": "boundary network", **identity, **outcome}
        quantizers = {**parent.quantizers, group.section.group: group.record.to_json()}
        made = Checkpoint(parent.model, parent.spec, quantizers, [*parent.history, entry], boundary=network.carried())
        checkpoints.save(made, path)
        change = 100 * (after.L / before.L - 1)
        print(f"held-out squares: L {before.L:.4f} -> {after.L:.4f} ({change:+.2f} %), step {loop.best.step}")
    ranks.wait()
    return path


def _mse(x_hat: Tensor, x: Tensor) -> Tensor:
    return 255**2 * (x_hat - x).square().mean()


def _decoded(
    cache: LatentCache, parent: Checkpoint, record: QuantizerRecord, group: str, held_out: bool, seed: int
) -> Squares:
    """Return the squares of a part of a cache as a decoder shows them, MOST_SQUARES at most."""
    side = SQUARE if cache.header.squares else 1
    chosen = _squares(cache, held_out) if side > 1 else [(one,) for one in cache.indices(held_out).tolist()]
    if not chosen:
        raise LicError(
            f"{cache.storage} has no whole square to {'judge' if held_out else 'train'} on", hint="more photos"
        )
    sources = cache.samples["source"]
    numbers = evenly([str(sources[one[0]]) for one in chosen], MOST_SQUARES, seed)
    samples = np.array(chosen, np.int64)[numbers]
    names = ("pixels", "latents/z", f"quantized/{group}/k", f"quantized/{group}/bits", "samples/flip")
    rows = cache.load(names, samples.ravel())
    decoded = np.empty_like(rows["pixels"])
    with Progress("decoding the cache", len(decoded), "crop") as bar, torch.no_grad():
        for first in range(0, len(decoded), DECODED):
            part = slice(first, first + DECODED)
            decoded[part] = _pictures(parent, record, rows["latents/z"][part], rows[f"quantized/{group}/k"][part])
            bar.advance(len(decoded[part]))
    bits = rows[f"quantized/{group}/bits"].astype(np.float64).reshape(samples.shape)
    paths = tuple(sources[samples[:, 0]].tolist())
    flip = rows["samples/flip"].reshape(samples.shape)[:, 0]
    return Squares(_joined(decoded, side, flip), _joined(rows["pixels"], side, flip), bits.sum(1), paths, len(chosen))


def evenly(paths: Sequence[str], most: int, seed: int) -> NDArray[np.int64]:
    """Return the numbers of some of these photos' squares, ascending: all, or `most`, as many of each photo and of each
    folder as it has of the whole, but for one. The seed says which.
    """
    if len(paths) <= most:
        return np.arange(len(paths))
    generator = np.random.default_rng(seed)
    order = np.lexsort((generator.permutation(len(paths)), np.array(paths)))
    places = (np.arange(most) + generator.random()) * len(paths) / most
    return np.sort(order[places.astype(np.int64)])


def _pictures(
    parent: Checkpoint, record: QuantizerRecord, z: NDArray[np.int16], k: NDArray[np.int16]
) -> NDArray[np.uint8]:
    """Return the pictures of cached samples in 8 bits, uint8 [n, 3, s, s]."""
    codec, device = parent.codec, next(parent.model.parameters()).device
    z_hat = only_side(codec).dequantize(torch.from_numpy(z).to(device))
    y_hat = walk.dequantize(codec, (z_hat,), torch.from_numpy(k).to(device), Quantizer(record))
    x_hat = codec.synthesise(to_decode(y_hat.cpu().numpy(), device))
    whole: NDArray[np.uint8] = x_hat.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
    return whole


def _squares(cache: LatentCache, held_out: bool) -> list[tuple[int, ...]]:
    """Return the samples of each square of a part that is whole, in raster order as they are shown."""
    columns, crop = cache.samples, cache.geometry.crop
    usable = cache.indices(held_out)
    keys = zip(*(columns[name][usable].tolist() for name in ("digest", "flip", "crop_y", "crop_x")), strict=True)
    at: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for key, sample in zip(keys, usable.tolist(), strict=True):
        at[key].append(sample)
    found: list[tuple[int, ...]] = []
    for digest, flip, y, x in list(at):
        corners = [(digest, flip, y + row * crop, x + column * crop) for row in (0, 1) for column in (0, 1)]
        if all(corner in at for corner in corners):
            found.append(tuple(at[corner][0] for corner in corners))
    return found


def _joined(samples: NDArray[np.uint8], side: int, flip: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return samples [n side^2, 3, s, s] as squares, uint8 [n, 3, side s, side s]: mirrored ones lie mirrored."""
    _, colours, size, _ = samples.shape
    grid = samples.reshape(-1, side, side, colours, size, size).copy()
    grid[flip] = grid[flip][:, :, ::-1]
    return np.ascontiguousarray(grid.transpose(0, 3, 1, 4, 2, 5).reshape(-1, colours, side * size, side * size))
