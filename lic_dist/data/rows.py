"""The rows of a manifest in the making, some taken over from an earlier one, some read now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lic_dist.data import photo_files
from lic_dist.data.photo import Photo
from lic_dist.data.source import version_of

SCHEMA = pa.schema(
    {
        "path": pa.large_string(),
        "digest": pa.large_string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "bytes": pa.int64(),
        "mtime_ns": pa.int64(),
        "fault": pa.large_string(),
    },
    metadata={"lic_dist.data.manifest": "2"},
)
PLACED = SCHEMA.append(pa.field("place", pa.large_string())).with_metadata({"lic_dist.data.manifest": "3"})
"""Of archives and tables, whose photos have places."""
ROWS = 4096  # photos held as objects at a time, before they become a table
AGAIN = "its name comes again"


def table_of(photos: Sequence[Photo]) -> pa.Table:
    """Return photos as a table, of PLACED where one has a place."""
    schema = PLACED if any(photo.place for photo in photos) else SCHEMA
    return pa.table({name: [getattr(photo, name) for photo in photos] for name in schema.names}, schema=schema)


def photos_of(table: pa.Table) -> Iterable[Photo]:
    """Return the photos of a table."""
    for batch in table.to_batches(max_chunksize=ROWS):
        yield from map(Photo, *(column.to_pylist() for column in batch.columns))


def numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return a column without nulls as an array, avoiding `to_numpy`, which loads pandas."""
    return np.from_dlpack(column.combine_chunks())


def without_fault(table: pa.Table) -> NDArray[np.bool_]:
    """Return the mask of the photos without a fault: bool [photos]."""
    faults = table["fault"].combine_chunks()
    ends = np.frombuffer(faults.buffers()[1], np.int64)[faults.offset :][: len(faults) + 1]
    return np.diff(ends) == 0


def row_in(values: pa.Array | pa.ChunkedArray, among: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Return where each value is found first among others, -1 where it is not: int64 [values]."""
    import pyarrow.compute as pc

    values, among = (one.combine_chunks() if isinstance(one, pa.ChunkedArray) else one for one in (values, among))
    found = pc.index_in(values, value_set=among).fill_null(-1)
    return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


class Rows:
    """Rows of photos that are files of their own, in the order of the files' `names`."""

    def __init__(self, names: Sequence[str], known: pa.Table) -> None:
        self.names, self.known = names, known
        self.fresh = np.arange(len(names))  # rows that are to be read
        self.kept = np.empty(0, np.int64)  # rows that are known
        self.kept_table = SCHEMA.empty_table()
        self.tables: list[pa.Table] = []
        self.photos: list[Photo] = []
        self.added = 0

    @property
    def done(self) -> int:
        """The files that are known or read."""
        return len(self.names) - len(self.fresh) + self.added

    def take_over(self, stamps: NDArray[np.int64]) -> None:
        """Reuse the known rows whose size and time are unchanged; `stamps` int64 [names, 2]."""
        paths = pa.array([photo_files.readable(name) for name in self.names], pa.large_string())
        known = self.known.select(SCHEMA.names).replace_schema_metadata(SCHEMA.metadata)
        rows = row_in(paths, known["path"])
        same = rows >= 0
        for values, expected in (
            (without_fault(known), np.ones(len(rows), np.bool_)),
            (numbers(known["bytes"]), stamps[:, 0]),
            (numbers(known["mtime_ns"]), stamps[:, 1]),
        ):
            same[same] = values[rows[same]] == expected[same]
        self.kept, self.fresh = np.flatnonzero(same), np.flatnonzero(~same)
        self.kept_table = known.take(rows[same])

    def add(self, photo: Photo) -> None:
        """Add a photo that was read, in the order of `fresh`."""
        self.photos.append(photo)
        self.added += 1
        if len(self.photos) == ROWS:
            self._pack()

    def so_far(self) -> pa.Table:
        """Return what can be saved, so that a later scan takes it over."""
        self._pack()
        new = pa.concat_tables([SCHEMA.empty_table(), *self.tables])
        rows = np.concatenate([self.kept, self.fresh[: new.num_rows]])
        return pa.concat_tables([self.kept_table, new]).take(np.argsort(rows, kind="stable"))

    def all(self) -> pa.Table:
        """Return all rows, when all are there."""
        return self.so_far()

    def _pack(self) -> None:
        if self.photos:
            self.tables.append(table_of(self.photos))
            self.photos = []


class PackedRows:
    """Rows of photos in files of several, sorted by path. What is saved has a file's rows whole or not at all.

    `mtime_ns` of a row stands for size and version of its file.
    """

    def __init__(self, names: Sequence[str], known: pa.Table) -> None:
        self.names, self.known = names, known
        self.fresh = np.arange(len(names))  # files that are to be walked through
        self.again: list[Photo] = []  # photos set aside, of the other files
        self.tables = [PLACED.empty_table()]
        self.file, self.of_file = "", list[Photo]()  # the file that is walked through, and its photos
        self.done = 0

    def take_over(self, stamps: NDArray[np.int64]) -> None:
        """Reuse the known rows whose file is unchanged, but read again what was set aside: its reader may be
        installed by now.
        """
        import pyarrow.compute as pc

        if "place" not in self.known.schema.names:
            return
        versions = np.array([version_of(*stamp) for stamp in stamps.tolist()], np.int64)
        place, fault = self.known["place"], self.known["fault"]
        files = row_in(file_of(place), pa.array(self.names, pa.large_string()))
        same = files >= 0
        same[same] = numbers(self.known["mtime_ns"])[same] == versions[files[same]]
        unread = ~pc.starts_with(place, "@").to_numpy() & ~pc.equal(fault, AGAIN).to_numpy()
        again = same & ~without_fault(self.known) & unread
        self.again = list(photos_of(self.known.filter(again)))
        self.tables.append(self.known.filter(same & ~again))
        self.fresh = np.setdiff1d(np.arange(len(self.names)), files[same])
        self.done = len(self.names) - len(self.fresh)

    def add(self, photo: Photo) -> None:
        """Add a photo: first those `again`, then those of the fresh files in their order."""
        file = photo.place.partition("@")[2]
        if file != self.file:
            self._pack()
            self.done += bool(self.file) and self.done < len(self.names)
            self.file = file
        self.of_file.append(photo)

    def so_far(self) -> pa.Table:
        """Return what can be saved, so that a later scan takes it over."""
        return pa.concat_tables(self.tables)

    def all(self) -> pa.Table:
        """Return all rows, when all are there; of several of one name in a file the last one counts, as it would
        unpacked.
        """
        import pyarrow.compute as pc

        self._pack()
        self.done = len(self.names)
        table = self.so_far()
        names = table["path"].combine_chunks().dictionary_encode().indices.to_numpy()
        last = np.zeros(len(names), np.bool_)
        last[len(names) - 1 - np.unique(names[::-1], return_index=True)[1]] = True
        if not last.all():
            hidden = pa.array(~last & ~pc.equal(table["fault"], AGAIN).to_numpy())
            faults = pc.if_else(hidden, pa.scalar(AGAIN, pa.large_string()), table["fault"])
            table = table.set_column(table.schema.get_field_index("fault"), table.schema.field("fault"), faults)
        return table.take(pc.sort_indices(table, [("path", "ascending")]))

    def _pack(self) -> None:
        if self.of_file:
            self.tables.append(table_of(self.of_file))
            self.of_file = []


def file_of(place: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the files that places are in."""
    import pyarrow.compute as pc

    return pc.replace_substring_regex(place, "^[^@]*@", "")
