"""Read a store as numpy arrays: whole shards, single samples, everything into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from lic_dist.cache import chain, columns, growth, layout, markers, store
from lic_dist.cache.layout import ArraySpec, Header, Pipeline
from lic_dist.cache.plan import Geometry
from lic_dist.cache.storage import Storage
from lic_dist.cache.storages import open_storage
from lic_dist.errors import LicError, UsageError

T = TypeVar("T")
Indices = slice | Iterable[int] | NDArray[Any] | None

REPAIR_HINT = "`lic-dist cache verify` finds what is damaged, --repair mends it"
PLAIN_COLUMNS = ("crop_y", "crop_x", "flip", "held_out", "status")
MASKED = 254  # `samples["status"]` of a sample that the snapshot masks


class ShardReader:
    """The part of `LatentCache` that reads numpy arrays: see there."""

    def __init__(self, storage: Storage, pipeline: Pipeline = "zarr", header: Header | None = None) -> None:
        """Open a snapshot by its header; without one the newest that is complete."""
        self.storage, self.pipeline = storage, pipeline
        self.header = header or layout.read_header(storage).complete
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._fingerprints: dict[str | None, str] = {None: self.header.fingerprint}
        self._done: dict[str, set[int]] = {}  # shards known to be finished, by the fingerprint of base or group

    @classmethod
    def open(
        cls,
        path: Path | str | Storage,
        options: Mapping[str, str] | None = None,
        pipeline: Pipeline = "zarr",
        snapshot: int | str | None = None,
    ) -> Self:
        """Open the store of a path or URL (`options`: see `open_storage`), decoded by Zarr or by the package zarrs.

        `snapshot` is a number or a name (`lic-dist cache log`); by default the newest that is complete.

        With `zarrs` start loader processes by `spawn` or `forkserver`: its threads do not survive a fork.

        Raises:
            LicError: no store there, another kind of Zarr group, or no such snapshot.
            UsageError: zarrs is asked for and not installed.
        """
        if pipeline == "zarrs" and find_spec("zarrs") is None:
            raise UsageError("pipeline zarrs needs the package zarrs", hint="pip install zarrs")
        storage = open_storage(path, options).absolute().at(snapshot)
        return cls(storage, pipeline, growth.header_at(storage, snapshot))

    def at(self, snapshot: int | str | None = None) -> Self:
        """Return the store at another snapshot, by its number or name; by default at the newest that is complete.

        Raises:
            LicError: no such snapshot.
        """
        storage = self.storage.at(snapshot)
        return type(self)(storage, self.pipeline, growth.header_at(storage, snapshot))

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
    def shard_length(self) -> int:
        """Samples of a shard, with padding."""
        return self.header.shard

    @property
    def num_samples(self) -> int:
        return self.header.num_samples

    @property
    def num_shards(self) -> int:
        return self.header.num_shards

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the quantized groups, sorted."""
        return layout.group_names(self.storage)

    def __len__(self) -> int:
        """Rows: samples have their row's number, and those of an instalment's last shard that hold none count."""
        return self.header.num_rows

    @cached_property
    def masked(self) -> NDArray[np.int64]:
        """Numbers of the samples that the snapshot masks, ascending: read as they are, and not usable."""
        if self.storage.sealed:
            return np.flatnonzero(self._whole_column("samples/status") == MASKED)
        masked = [chain.masked_by(self.storage, one) for one in self.header.chain]
        return np.unique(np.concatenate(masked, dtype=np.int64))

    @cached_property
    def samples(self) -> dict[str, NDArray[Any]]:
        """What is known of each row, by name, each [len(cache)].

        source, digest (text), crop_y, crop_x (int32), flip, held_out (bool), status (uint8): an index into
        lic_dist.data.photo.FAULTS, 255 where there is no sample or its shard is not written, 254 where the snapshot
        masks it. It is read once: open a store that is still being written again to see more.
        """
        found = {
            "source": _text(self._whole_column("samples/source")),
            "digest": _text(self._whole_column("samples/digest")),
            **{name: self._whole_column(f"samples/{name}") for name in PLAIN_COLUMNS},
        }
        found["status"][self.masked] = MASKED
        return found

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Mask of the samples that are written, have no fault and are not masked: bool [len(cache)]."""
        usable: NDArray[np.bool_] = self._whole_column("samples/status") == 0
        usable[self.masked] = False
        return usable

    def indices(self, held_out: bool) -> NDArray[np.int64]:
        """Return the usable samples of the held-out or of the training part, ascending."""
        return np.flatnonzero(self.usable & (self._whole_column("samples/held_out") == held_out))

    def group_attributes(self, group: str) -> dict[str, Any]:
        """Return {"identity", "fingerprint", "provenance"} of a group. Raises LicError for no such group."""
        return store.group_attributes(self.storage, group)

    def record_json(self, group: str) -> str:
        """Return the quantizer record of a group as text. Raises LicError where group or record are missing."""
        self.group_attributes(group)
        try:
            return self.storage.get(f"quantized/{group}/record.json").decode()
        except FileNotFoundError:
            raise LicError(f"group '{group}' of {self.storage} has lost its record.json", hint="see `verify`") from None

    def written(self, group: str | None = None) -> list[int]:
        """Return the finished shards, of the base arrays or of a group."""
        if self.storage.sealed:
            return sorted(self._known_written(group))
        done = list(store.finished_markers(self.storage, self.header, group))
        self.take_as_written(done, group)
        return done

    def take_as_written(self, shards: Iterable[int], group: str | None = None) -> None:
        """Spare reads a look at the markers of shards that are known to be finished, of the base arrays or a group."""
        self._done[self._fingerprint_of(group)] = set(shards)

    def array(self, name: str) -> zarr.Array[Any]:
        """Return the Zarr array itself, with its rows beyond the last sample; "latents/z" has no channels where the
        model has no side latent.
        """
        if name == "latents/z" and not self.geometry.z_channels:
            self._arrays.setdefault(name, layout.without_channels(self.header))
        if name not in self._arrays:
            if self.storage.entry(f"{name}/zarr.json") is None:
                raise LicError(f"no array '{name}' in {self.storage}", hint="was it left out, or its group not made?")
            self._arrays[name] = layout.open_array(self.storage, name, self.pipeline)
        return self._arrays[name]

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of one sample (`names`), by name; negative indices count from the end."""
        if not isinstance(index, (int, np.integer)):
            raise TypeError(f"a sample has a number, not {index!r}: `load` takes slices and lists")
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {name: rows[0] for name, rows in self.rows(position, position + 1, self.names).items()}

    def shard(self, shard: int, arrays: Sequence[str] = ("pixels", "latents/z")) -> dict[str, NDArray[Any]]:
        """Return arrays of one shard without padding: name -> [samples in the shard, ...].

        Raises:
            LicError: no such array, or the shard is not written.
            IndexError: no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        first = shard * self.header.shard
        return self.rows(first, first + self.header.count(shard), arrays)

    def rows(self, first: int, end: int, arrays: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return samples `first` to `end` (exclusive), all of one shard; only the inner chunks they lie in are decoded.

        Raises:
            LicError: no such array, or the shard is not written or cannot be read.
        """
        self._require_written(first // self.header.shard, arrays)
        return {name: self._read(name, first, end) for name in arrays}

    def load(self, arrays: Sequence[str], indices: Indices = None) -> dict[str, NDArray[Any]]:
        """Load samples into memory in the order of `indices` (default all); each shard is read once.

        `indices` are numbers, a slice, or a mask of all samples (`cache.usable`).

        Raises:
            LicError: no such array, or a sample whose shard is not written.
            IndexError: no such sample, or a mask of another length.
            TypeError: indices that are no integers.
        """
        wanted = self._sample_numbers(indices)
        order = np.argsort(wanted // self.header.shard, kind="stable")
        shards, starts = np.unique((wanted // self.header.shard)[order], return_index=True)
        loaded = {}
        for name in arrays:
            array = self.array(name)
            loaded[name] = np.empty((len(wanted), *array.shape[1:]), array.dtype)
        size = self.header.shard
        for shard, rows in zip(shards.tolist(), np.split(order, starts[1:]), strict=False):
            for name, values in self.rows(shard * size, (shard + 1) * size, arrays).items():  # with the padding's
                loaded[name][rows] = values[wanted[rows] - shard * size]
        return loaded

    def _sample_numbers(self, indices: Indices) -> NDArray[np.int64]:
        every = np.arange(len(self))
        if indices is None or isinstance(indices, slice):
            return every if indices is None else every[indices]
        asked = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
        if asked.dtype.kind not in "iub" and asked.size:
            raise TypeError(f"samples have numbers, not {asked.dtype}")
        if asked.dtype.kind != "b":
            asked = asked.astype(np.int64)
        chosen: NDArray[np.int64] = every[asked]
        return chosen

    @property
    def names(self) -> list[str]:
        """Names of the arrays that building fills: pixels, latents, status, and those of every group."""
        specs: list[ArraySpec] = list(layout.base_arrays(self.geometry, self.header.store_y))
        specs += [spec for group in self.groups for spec in layout.group_arrays(group, self.geometry)]
        return [spec.name for spec in specs]

    def _fingerprint_of(self, group: str | None) -> str:
        """Return the fingerprint of the base or a group, cached because every read of a shard needs it."""
        if group not in self._fingerprints:
            self._fingerprints[group] = store.fingerprint_of(self.storage, self.header, group)
        return self._fingerprints[group]

    def _known_written(self, group: str | None) -> set[int]:
        """Return the shards known to be finished, of the base or of a group, to which others are added."""
        return self._done.setdefault(
            self._fingerprint_of(group), set(range(self.num_shards)) if self.storage.sealed else set()
        )

    def _require_written(self, shard: int, arrays: Iterable[str]) -> None:
        for group in set(map(layout.group_of, arrays)):
            known = self._known_written(group)
            if shard not in known:
                if store.finished_marker(self.storage, self.header, shard, group) is None:
                    what = f"shard {shard} of {self.storage}" + (f", group '{group}'," if group else "")
                    hint = "`lic-dist cache build` goes on where it stopped"
                    raise LicError(f"{what} is not written, or has lost an object", hint=hint)
                known.add(shard)

    def _read(self, name: str, first: int, end: int) -> NDArray[Any]:
        """Read rows of one shard. Zarr silently reads a missing object as fill values, so rows of these are checked."""
        shard = first // self.header.shard
        where = f"shard {shard} of {self.storage}, array {name},"
        array = self.array(name)
        try:
            values = np.asarray(array[first:end])
        except Exception as error:  # the error for cut or altered bytes depends on the codec
            raise LicError(f"{where} does not decode: {str(error)[:200]}", hint=REPAIR_HINT) from error
        if values.size and not (values != array.fill_value).any():
            entry = self.storage.entry(f"{name}/{layout.chunk_key(shard, values.ndim)}")
            if entry is None or not entry.bytes:
                raise LicError(f"{where} has lost its object", hint=REPAIR_HINT)
        return values

    def column(self, name: str, shards: Sequence[int]) -> NDArray[Any]:
        """Return a small array's samples in some of the shards, in their order; many shards are read in parallel.

        Raises:
            LicError: no such array, a shard that is not written, or one that does not decode.
        """
        group = layout.group_of(name)
        unknown = set(shards) - self._known_written(group)
        if 2 * len(unknown) > self.num_shards:
            self.written(group)  # one listing, in place of a look at each marker
        for shard in shards:
            self._require_written(shard, [name])
        try:
            if shards and (spec := columns.plain_spec(self.storage, self.header, name)):
                return np.concatenate(
                    self._decoded(name, lambda: columns.read(self.storage, self.header, spec, shards))
                )
            size = self.header.shard
            rows = [np.arange(shard * size, shard * size + self.header.count(shard)) for shard in shards]
            return self._decode_rows(name, np.concatenate(rows) if rows else np.arange(0))
        except LicError:
            for shard in shards:
                self.shard(shard, [name])  # raises for the one that does not decode
            raise

    def _decode_rows(self, name: str, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        array = self.array(name)
        found: NDArray[Any] = self._decoded(
            name, lambda: np.asarray(array[rows] if isinstance(rows, slice) else array.oindex[rows])
        )
        return found

    def _decoded(self, name: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except Exception as error:  # the error for cut or altered bytes depends on the codec
            raise LicError(
                f"array {name} of {self.storage} does not decode: {str(error)[:200]}", hint=REPAIR_HINT
            ) from error

    def _whole_column(self, name: str) -> NDArray[Any]:
        """Return a small array whole, with fill values where a shard is not written.

        Raises:
            LicError: a shard with a marker has lost its object, or does not decode.
        """
        array = self.array(name)
        there = self.storage.listing(name)
        if (spec := columns.plain_spec(self.storage, self.header, name)) is not None:
            shape = (self.header.blocks() * spec.shape[0],) if spec.widens else spec.shape
            values = np.full((len(self), *shape), spec.fill_value, spec.dtype)
            whole = [
                one for one in range(self.num_shards) if (at := there.get(layout.object_key(spec, one))) and at.bytes
            ]
            read = self._decoded(name, lambda: columns.read(self.storage, self.header, spec, whole))
            for shard, rows in zip(whole, read, strict=True):
                values[shard * self.header.shard :][: len(rows)] = rows
        else:
            values = self._decode_rows(name, slice(0, len(self)))
        marked = (
            range(self.num_shards) if self.storage.sealed else markers.marked_shards(self.storage, self.fingerprint)
        )
        for shard in marked:
            entry = there.get(f"{name}/{layout.chunk_key(shard, array.ndim)}")
            if shard < self.num_shards and (entry is None or not entry.bytes):
                raise LicError(f"shard {shard} of {self.storage}, array {name}, has lost its object", hint=REPAIR_HINT)
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}


def _text(rows: NDArray[np.uint8]) -> NDArray[Any]:
    """Decode rows of bytes as text: [n, L] -> str [n]."""
    rows = np.ascontiguousarray(rows)
    return np.char.decode(rows.view(f"S{rows.shape[1]}").reshape(len(rows)), "utf-8")
