"""Reading a store: whole shards, single samples, or everything into memory; and what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from lic_dist.cache import layout, markers
from lic_dist.cache.layout import ArraySpec
from lic_dist.cache.plan import Geometry, Plan
from lic_dist.errors import LicError
from lic_dist.images import FAULTS, Crop

PLAIN_COLUMNS = ("crop_y", "crop_x", "flip", "held_out", "status")


class LatentCache:
    """An open store: `cache = LatentCache.open(path)`. Picklable; nothing is read until asked for.

    Reading is by whole shards (`shard`, `load`: fast) or one sample (`cache[i]`: milliseconds). Array names
    are those of layout.py. Samples of unwritten shards and faulty ones are not `usable`; their rows are
    zero.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.header = layout.read_header(self.path)
        self._arrays: dict[str, zarr.Array] = {}

    @classmethod
    def open(cls, path: Path | str) -> LatentCache:
        """Open a store. Raises LicError where there is none, or not one of ours."""
        return cls(path)

    @property
    def identity(self) -> dict[str, Any]:
        return self.header.identity

    @property
    def fingerprint(self) -> str:
        return self.header.fingerprint

    @property
    def geometry(self) -> Geometry:
        return self.header.geometry

    @property
    def num_samples(self) -> int:
        return self.header.num_samples

    @property
    def num_shards(self) -> int:
        return self.header.num_shards

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the quantized groups, sorted."""
        return layout.group_names(self.path)

    def __len__(self) -> int:
        return self.header.num_samples

    @cached_property
    def samples(self) -> dict[str, NDArray[Any]]:
        """What is known of each sample, by name, each [num_samples].

        source, digest (text), crop_y, crop_x (int32), flip, held_out (bool), status (uint8). Read once.
        status is an index into lic_dist.images.FAULTS, 255 where the shard is not written.
        """
        return {
            "source": self._text("samples/source"),
            "digest": self._text("samples/digest"),
            **{name: self._column(f"samples/{name}") for name in PLAIN_COLUMNS},
        }

    @property
    def usable(self) -> NDArray[np.bool_]:
        """bool [num_samples]: written, and without fault."""
        return self._column("samples/status") == 0

    def indices(self, held_out: bool) -> NDArray[np.int64]:
        """The usable samples of the held-out or of the training part, ascending."""
        return np.flatnonzero(self.usable & (self._column("samples/held_out") == held_out))

    def plan(self) -> Plan:
        """The plan that the store was created from: to build on, or to add a group without the photos."""
        columns = [self.samples[name].tolist() for name in Crop.__dataclass_fields__]
        crops = tuple(Crop(*row) for row in zip(*columns, strict=True))
        return Plan(crops, self.geometry, self.header.shard, self.header.batch, self.identity)

    def group_attributes(self, group: str) -> dict[str, Any]:
        """{"identity", "fingerprint", "provenance"} of a group. Raises LicError for no such group."""
        if group not in self.groups:
            known = ", ".join(self.groups) or "none"
            raise LicError(f"no group '{group}' in {self.path}", hint=f"it has: {known}")
        return layout.read_attributes(self.path / "quantized" / group) or {}

    def record_json(self, group: str) -> str:
        """The quantizer record of a group, as text. Raises LicError where there is no such group."""
        self.group_attributes(group)
        return (self.path / "quantized" / group / "record.json").read_text()

    def written(self, group: str | None = None) -> list[int]:
        """The shards that are done, of the base arrays or of a group."""
        key = self._fingerprint_of(group)
        return [shard for shard in range(self.num_shards) if markers.is_done(self.path, key, shard)]

    def array(self, name: str) -> zarr.Array:
        """The Zarr array itself, rows beyond `num_samples` included."""
        if name not in self._arrays:
            if not (self.path / name / "zarr.json").is_file():
                raise LicError(f"no array '{name}' in {self.path}", hint="was it left out, or its group not made?")
            self._arrays[name] = layout.open_array(self.path, name)
        return self._arrays[name]

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """All large arrays of one sample, by name; negative indices count from the end."""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        self._require_written(position // self.header.shard, self._names())
        return {name: np.asarray(self.array(name)[position]) for name in self._names()}

    def shard(self, shard: int, arrays: Sequence[str] = ("pixels", "latents/z")) -> dict[str, NDArray[Any]]:
        """Whole arrays of one shard, padding cut off: name -> [samples in the shard, ...].

        Raises:
            LicError: no such array, or the shard is not written.
            IndexError: no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        self._require_written(shard, arrays)
        return {name: self._read(name, shard) for name in arrays}

    def load(self, arrays: Sequence[str], indices: slice | Iterable[int] | None = None) -> dict[str, NDArray[Any]]:
        """Samples into memory, in the order of `indices` (default all), each shard read once.

        Raises:
            LicError: no such array, or a sample whose shard is not written.
            IndexError: no such sample.
        """
        wanted = np.arange(len(self))
        if isinstance(indices, slice):
            wanted = wanted[indices]
        elif indices is not None:
            wanted = wanted[np.asarray(list(indices), np.int64)]
        shards = wanted // self.header.shard
        loaded = {}
        for name in arrays:
            array = self.array(name)
            loaded[name] = np.empty((len(wanted), *array.shape[1:]), array.dtype)
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            for name, values in self.shard(shard, arrays).items():
                loaded[name][rows] = values[wanted[rows] - shard * self.header.shard]
        return loaded

    def _names(self) -> list[str]:
        specs: list[ArraySpec] = list(layout.base_arrays(self.geometry, self.header.store_y))
        specs += [spec for group in self.groups for spec in layout.group_arrays(group, self.geometry)]
        return [spec.name for spec in specs]

    def _fingerprint_of(self, group: str | None) -> str:
        return self.fingerprint if group is None else str(self.group_attributes(group)["fingerprint"])

    def _require_written(self, shard: int, arrays: Iterable[str]) -> None:
        """Zarr reads a missing or empty object as zeros in silence: markers and sizes are looked at first."""
        for group in {name.split("/")[1] if name.startswith("quantized/") else None for name in arrays}:
            if not markers.is_done(self.path, self._fingerprint_of(group), shard):
                what = f"shard {shard} of {self.path}" + (f", group '{group}'," if group else "")
                hint = "`lic-dist cache build` goes on where it stopped"
                raise LicError(f"{what} is not written, or has lost an object", hint=hint)

    def _read(self, name: str, shard: int) -> NDArray[Any]:
        first = shard * self.header.shard
        return np.asarray(self.array(name)[first : first + self.header.count(shard)])

    def _column(self, name: str) -> NDArray[Any]:
        return np.asarray(self.array(name)[: len(self)])

    def _text(self, name: str) -> NDArray[Any]:
        rows = np.ascontiguousarray(self._column(name))
        return np.char.decode(rows.view(f"S{rows.shape[1]}").reshape(len(rows)), "utf-8")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}


def size_on_disk(path: Path | str) -> int:
    """Bytes of all files below a store."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def inspect(path: Path | str) -> dict[str, Any]:
    """What a store holds, as plain JSON: progress, bytes, bits per pixel, distortion, faults, identity ...

    Bits per pixel and distortion are means over the good samples of the written shards.
    """
    cache = LatentCache.open(path)
    header = cache.header
    status = cache._column("samples/status")
    base = _progress(cache, None)
    report: dict[str, Any] = {
        "path": str(path),
        "format": layout.FORMAT,
        "fingerprint": cache.fingerprint,
        "num_samples": header.num_samples,
        "num_shards": header.num_shards,
        "shard": header.shard,
        "batch": header.batch,
        "geometry": asdict(header.geometry),
        "shards_written": base["shards_written"],
        "seconds": base["seconds"],
        "usable": int((status == 0).sum()),
        "unwritten": int((status == layout.UNWRITTEN).sum()),
        "held_out": int(cache._column("samples/held_out").sum()),
        "faults": {name: int((status == code).sum()) for code, name in enumerate(FAULTS) if code},
        "groups": {},
        "arrays": {},
        "bytes": size_on_disk(path),
        "identity": cache.identity,
        "provenance": header.provenance,
    }
    for group in cache.groups:
        report["groups"][group] = {**cache.group_attributes(group), **_progress(cache, group)}
    for name in [*cache._names(), *(spec.name for spec in layout.sample_arrays(header.source_bytes))]:
        array = cache.array(name)
        raw = header.num_samples * array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        report["arrays"][name] = {"bytes": size_on_disk(cache.path / name), "raw_bytes": raw}
    return report


def _progress(cache: LatentCache, group: str | None) -> dict[str, Any]:
    """Shards written, seconds spent and, of a group, means over its good samples."""
    key = cache._fingerprint_of(group)
    found = [markers.read_marker(cache.path, key, shard) for shard in cache.written(group)]
    done = [marker for marker in found if marker is not None]
    good = sum(marker.samples - marker.faulty for marker in done)
    report: dict[str, Any] = {
        "shards_written": len(done),
        "seconds": sum(_seconds(marker.seconds) for marker in done),
    }
    if group is not None:
        pixels = good * cache.geometry.crop**2
        report["bits_per_pixel"] = sum(marker.bits or 0.0 for marker in done) / pixels if good else None
        report["distortion"] = sum(marker.distortion or 0.0 for marker in done) / good if good else None
    return report


def _seconds(value: Any) -> float:
    return float(sum(value.values()) if isinstance(value, dict) else value)
