"""What a cache takes on disk, and how fast training is fed from it."""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from PIL import Image
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import MemoryStore

from lic_dist import config
from lic_dist.benchmarks.building import FIXED, photographs, variations_for
from lic_dist.building.build import build
from lic_dist.building.calibrate import one_thread, z_bits
from lic_dist.cache.inspect import inspect
from lic_dist.cache.layout import inner_chunk
from lic_dist.cache.order import Order
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.stream import ShardStream
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import freeze_all_but, trainable
from lic_dist.models.stages import to_input
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.course import take_step
from lic_dist.training.decoding import Decoding
from lic_dist.training.distributed import Ranks
from lic_dist.training.samples import Batch, Samples, Shuffled, Streamed, array_names

CODECS: dict[str, Any] = {
    "zstd, level 1": ZstdCodec(level=1),
    "zstd, level 9": ZstdCodec(level=9),
    "zstd, shuffled bytes": BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"),
    "zstd, shuffled bits": BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"),
}
TRIES = 5  # of which the medians are reported
STEP_BATCH = 8
WARM, SECTION = 24, 64  # steps of a section: until reading is no further ahead than it keeps, and timed


def built(folder: Path | None, work: Path, crops: int) -> Path:
    """A cache of the shipped model, TCQ-8, over so many crops of photographs."""
    source = folder or photographs()
    experiment = config.Experiment.model_validate(
        {
            "model": {"checkpoint": "base-small"},
            "images": {
                "path": str(source),
                "variations": variations_for(source, crops),
                "held_out": 0.2,
                "tolerate": 1.0,
            },
            "quantizer": {**FIXED, "group": "tcq8"},
            "cache": {"path": str(work / "a.zarr")},
            "engine": {"name": "local"},
        }
    )
    build(experiment)
    return work / "a.zarr"


def size(folder: Path | None, crops: int) -> dict[str, Any]:
    """Bytes of the arrays as stored, k and z against their entropy-coded size; other codecs, with read rates.

    The bits are those of the integer tables that the coder writes with. WebP is no codec of Zarr's core: it stands
    here to show what the pixels could take.
    """
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name:
        store = built(folder, Path(name), crops)
        report, cache = inspect(store), LatentCache.open(store)
        arrays = {name: one for name, one in report["arrays"].items() if not name.startswith("samples/")}
        whole = cache.load(("pixels", "latents/y", "latents/z", "quantized/tcq8/k"), cache.usable.nonzero()[0])
        record = QuantizerRecord.from_json(cache.record_json("tcq8"))
        bits = report["groups"]["tcq8"]["bits_per_pixel"] * report["usable"] * cache.geometry.crop**2
        of_z = float(z_bits(record, whole["latents/z"]).sum())
        group = sum(one["bytes"] for name, one in arrays.items() if name.startswith("quantized/tcq8/"))
        return {
            "samples": report["num_samples"],
            "arrays": arrays,
            "group_to_entropy_coded": group / ((bits - of_z) / 8),
            "z_to_entropy_coded": arrays["latents/z"]["bytes"] / (of_z / 8),
            "codecs": {name: _codecs(values, cache.header.shard) for name, values in whole.items()},
        }


def _codecs(values: NDArray[Any], shard: int) -> dict[str, dict[str, float]]:
    values = values[:shard]
    rows = {}
    for name, codec in CODECS.items():
        rows[name] = _measured(*_in_memory(values, codec), values)
    if values.dtype == np.uint8:
        files = [_webp(one) for one in values]
        rows["lossless WebP"] = _measured(sum(map(len, files)), lambda: [_picture(file) for file in files], values)
    return rows


def _measured(size: int, read: Callable[[], Any], values: NDArray[Any]) -> dict[str, float]:
    read()
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        read()
        times.append(time.perf_counter() - started)
    return {"part_of_raw": size / values.nbytes, "samples_per_second": len(values) / median(times)}


def _in_memory(values: NDArray[Any], codec: Any) -> tuple[int, Callable[[], Any]]:
    chunk = inner_chunk(len(values), values[0].nbytes)
    store = MemoryStore()
    array = zarr.create_array(
        store,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *values.shape[1:]),
        shards=values.shape,
        compressors=codec,
    )
    array[:] = values
    return array.nbytes_stored(), lambda: array[:]


def _webp(crop: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(crop.transpose(1, 2, 0))).save(data, "WEBP", lossless=True, method=0)
    return data.getvalue()


def _picture(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)))


def feeding(folder: Path | None, crops: int, rounds: int) -> dict[str, Any]:
    """Training steps a second from RAM-decoded samples and from the shard stream, against tensors already in memory.

    The step of recipe `decoder` on the shipped model, one thread, batch 8. The arms take sections of steps in turn,
    each from a reader begun anew, so that none reads ahead while another is timed; ratios are of the median sections.
    Amplification: shards decoded for each that an epoch needs.
    """
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name, one_thread():
        store = built(folder, Path(name), crops)
        cache, parent = LatentCache.open(store), checkpoints.load("base-small")
        record = QuantizerRecord.from_json(cache.record_json("tcq8"))
        quantizer, part = Quantizer(record), cache.indices(held_out=False)
        names = array_names("tcq8", with_y=False)
        in_memory = Shuffled(Samples(cache, "tcq8", quantizer, part, with_y=False), seed=0, batch=STEP_BATCH)
        order = Order(part, cache.header.shard, STEP_BATCH, seed=0)
        streamed = Streamed(cache, names, quantizer, order, workers=0)
        alone = Ranks(0, 1, torch.device("cpu"))
        ready = list(itertools.islice(in_memory.batches(0, alone), 8))
        arms: dict[str, Callable[[int], Iterator[Batch]]] = {
            "tensors in memory": lambda first: (ready[number % 8] for number in itertools.count(first)),
            "samples in RAM": lambda first: in_memory.batches(first, alone),
            "stream of shards": lambda first: streamed.batches(first, alone),
        }
        step = _training_step(parent, record)
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        with Progress("training steps", rounds * len(arms), "section") as bar:
            for number in range(rounds):
                for arm, make in arms.items():
                    batches = make(number * SECTION)
                    for _ in range(WARM):
                        step(next(batches))
                    started = time.perf_counter()
                    for _ in range(SECTION):
                        step(next(batches))
                    times[arm].append((time.perf_counter() - started) / SECTION)
                    batches.close()  # type: ignore[attr-defined]
                    bar.advance()
        seconds = {arm: median(one) for arm, one in times.items()}
        rates = {
            arm: {"steps_per_second": 1 / one, "ratio": seconds["tensors in memory"] / one}
            for arm, one in seconds.items()
        }
        rates["stream of shards"]["amplification"] = _amplification(cache, names, order)
        return {"batch": STEP_BATCH, "samples": len(cache), "arms": rates, "whole_shards": _shard_rates(store, names)}


def _training_step(parent: Checkpoint, record: QuantizerRecord) -> Callable[[Batch], None]:
    model: Any = parent.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decoding = Decoding(model, record)
    trained = freeze_all_but(model, trainable(model, "decoder"))
    optimizer = torch.optim.Adam(trained, lr=1e-5)

    def step(batch: Batch) -> None:
        x = to_input(batch.pixels, torch.device("cpu"))
        x_hat, bits = decoding(batch)
        loss = parent.spec.lmbda * 255**2 * (x_hat - x).square().mean() + bits / x[:, 0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        take_step(float(loss.detach()), trained, optimizer, clip=1.0)

    return step


def _amplification(cache: LatentCache, names: tuple[str, ...], order: Order) -> float:
    """Shards decoded in one epoch of every stream, for each shard that holds samples of the part."""
    stream = ShardStream(cache, names, order)
    steps = len(order.part) // STEP_BATCH
    for _ in itertools.islice(stream, steps):
        pass
    return stream.reads / len(np.unique(order.part // cache.header.shard))


def _shard_rates(store: Path, names: tuple[str, ...]) -> dict[str, float]:
    rates = {}
    for pipeline in ("zarr", "zarrs"):
        if pipeline == "zarrs" and find_spec("zarrs") is None:
            continue
        cache = LatentCache.open(store, pipeline=pipeline)  # type: ignore[arg-type]
        for array in names:
            times = []
            for _ in range(TRIES):
                started = time.perf_counter()
                for shard in range(cache.num_shards):
                    cache.shard(shard, (array,))
                times.append(time.perf_counter() - started)
            rates[f"{array}, {pipeline}"] = len(cache) / median(times[1:])
    return rates
