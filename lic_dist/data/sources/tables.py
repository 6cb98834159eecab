"""Photos in a column of bytes: Hugging Face's datasets on disk (Arrow), and Parquet.

A column is one of bytes, or of `struct<bytes, path>`, as Hugging Face's Image feature writes. A photo's name is its row
in its file, and its own file's name behind it where the column has paths. Arrow's bytes, and those of a Parquet file
without compression, are read by their place. Of a compressed Parquet file a photo's whole row group is read: the place
is `GROUP/ROW@FILE`.
"""

from __future__ import annotations

import posixpath
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lic_dist.data import images, photo_files
from lic_dist.data.photo import PhotoError
from lic_dist.data.photo_files import PhotoFiles
from lic_dist.data.source import Packed, PhotoSource, Stamp
from lic_dist.data.sources.files import Files, LocalFiles
from lic_dist.data.sources.packed import PackedPhotos
from lic_dist.errors import UsageError

GROUPS_KEPT, FILES_KEPT = 2, 8  # row groups that a reader keeps, and open files
CACHES = "cache-"  # begins the names of what `datasets` leaves beside its files
_ROW = re.compile(r"(\d+)/(\d+)@(.*)", re.DOTALL)


class _TablePhotos(PackedPhotos):
    """Photos in a column of tables; `column` names it where there are several of bytes."""

    def __init__(self, files: Files, pattern: str, column: str | None = None) -> None:
        super().__init__(files, pattern)
        self.column = column

    def absolute(self) -> PhotoSource:
        return type(self)(self.files.absolute(), self.pattern, self.column)

    def walk(self, name: str, passed_over: Counter[str]) -> Iterator[Packed]:
        yield from self.walked(name, self._walk(name))

    def _walk(self, name: str) -> Iterator[Packed]:
        raise NotImplementedError

    def column_of(self, schema: pa.Schema, file: str) -> str:
        """Return the column of the photos' bytes. Raises UsageError where there is none, or several."""
        found = [field.name for field in schema if _has_bytes(field.type)]
        where = f"{self.files.where}/{file}"
        if self.column is not None and self.column not in found:
            there = f"columns of bytes: {', '.join(found)}" if found else f"columns: {', '.join(schema.names)}"
            raise UsageError(f"{where} has no column '{self.column}' of bytes", hint=there)
        if self.column is not None or len(found) == 1:
            return self.column or found[0]
        if found:
            raise UsageError(f"{where} has several columns of bytes: {', '.join(found)}", hint="set images.column")
        raise UsageError(f"{where} has no column of bytes", hint=f"columns: {', '.join(schema.names)}")

    def name_of(self, row: int, path: Any) -> str:
        """Return the name of a photo in its file."""
        return f"{row:06d}-{photo_files.readable(posixpath.basename(path))}" if path else f"{row:06d}"

    def nothing(self, file: str, row: int, path: Any) -> Packed:
        """Return a row without bytes."""
        return Packed(self.path_of(file, self.name_of(row, path)), f"@{file}", fault="no bytes")


class ArrowPhotos(_TablePhotos):
    """Photos in Arrow files, of the stream or the file format, without compression."""

    def _walk(self, name: str) -> Iterator[Packed]:
        with self._native(name) as file:
            if file.read(6) != b"ARROW1":  # the file format is the stream behind 8 bytes
                file.seek(0)
            else:
                file.seek(8)
            reader, schema, column, row = pa.ipc.MessageReader.open_stream(file), None, "", 0
            while True:
                try:
                    message = reader.read_next_message()
                except StopIteration:
                    return
                except (pa.ArrowInvalid, OSError):
                    raise PhotoError(name, "truncated" if schema is not None else "not a table") from None
                if message.type == "schema":
                    schema = pa.ipc.read_schema(message)
                    column = self.column_of(schema, name)
                elif message.type == "record batch":
                    body = message.body
                    batch = pa.ipc.read_record_batch(message, schema)
                    yield from self._photos(name, batch.column(column), body, file.tell() - body.size, row)
                    row += batch.num_rows

    def search(self) -> PhotoFiles:
        found = super().search()
        own = [name for name in found.names if not posixpath.basename(name).startswith(CACHES)]
        return PhotoFiles(self.where, own or found.names)

    def _native(self, name: str) -> Any:
        if isinstance(self.files, LocalFiles):
            return pa.memory_map(str(self.files.folder / name))
        return pa.PythonFile(self.files.open(name), mode="r")

    def _photos(self, name: str, column: Any, body: Any, begin: int, first: int) -> Iterator[Packed]:
        """Yield the photos of a batch whose buffers begin at a place of the file."""
        values, paths = _parts(column)
        _, ends, data = values.buffers()
        width = np.int64 if pa.types.is_large_binary(values.type) else np.int32
        offsets = np.frombuffer(ends, width)[values.offset : values.offset + len(values) + 1].astype(np.int64)
        if data is not None and not body.address <= data.address <= body.address + body.size:
            raise UsageError(f"{self.files.where}/{name} is compressed", hint="write it without compression")
        for row in range(len(values)):
            start, end = offsets[row : row + 2].tolist()
            path = paths[row].as_py() if paths is not None else None
            if data is None or start == end or not (values[row].is_valid and column[row].is_valid):
                yield self.nothing(name, first + row, path)
                continue
            photo = data.slice(start, end - start).to_pybytes()
            offset = begin + data.address - body.address + start
            yield self.packed_range(name, self.name_of(first + row, path), offset, photo)


class ParquetPhotos(_TablePhotos):
    """Photos in Parquet files."""

    def __init__(self, files: Files, pattern: str, column: str | None = None) -> None:
        super().__init__(files, pattern, column)
        self._forget()

    def _forget(self) -> None:
        self.lock = threading.Lock()
        self.opened: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self.groups: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("lock", "opened", "groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _walk(self, name: str) -> Iterator[Packed]:
        with closing(self.files.open(name)) as handle:
            try:
                file = pq.ParquetFile(handle)
            except pa.ArrowInvalid:
                raise PhotoError(name, "not a table") from None
            column, row = self.column_of(file.schema_arrow, name), 0
            for group in range(file.num_row_groups):
                values, paths = _parts(_read_group(file, group, column, with_paths=True))
                raw, begin = self._uncompressed(file, group, column, name)
                at = 0
                for number, value in enumerate(values):
                    path = paths[number].as_py() if paths is not None else None
                    if not value.is_valid or not (data := value.as_py()):
                        yield self.nothing(name, row + number, path)
                    elif raw and (found := raw.find(data, at)) >= 0:
                        at = found + len(data)
                        yield self.packed_range(name, self.name_of(row + number, path), begin + found, data)
                    else:
                        known_by = self.path_of(name, self.name_of(row + number, path))
                        yield Packed(known_by, f"{group}/{number}@{name}", data)
                row += len(values)

    def _uncompressed(self, file: pq.ParquetFile, group: int, column: str, name: str) -> tuple[bytes, int]:
        """Return the bytes of a row group's column as they lie in the file, and where; nothing if it is compressed."""
        meta = file.metadata.row_group(group)
        for number in range(meta.num_columns):
            chunk = meta.column(number)
            if chunk.path_in_schema in (column, f"{column}.bytes") and chunk.compression == "UNCOMPRESSED":
                first = chunk.dictionary_page_offset or chunk.data_page_offset
                return self.files.part(name, first, chunk.total_compressed_size), first
        return b"", 0

    def read(self, name: str, place: str = "") -> tuple[bytes, Stamp]:
        found = _ROW.fullmatch(place)
        if found is None:
            return super().read(name, place)
        with self.lock:
            try:
                data = self._group(found[3], int(found[1]))[int(found[2])].as_py()
            except (pa.ArrowException, IndexError, OSError, UsageError):
                raise PhotoError(name, "changed") from None  # the file is another than it was
        if not data or len(data) > images.LARGEST_FILE:
            raise PhotoError(name, "too large" if data else "changed")
        return data, (0, 0)

    def _group(self, name: str, group: int) -> Any:
        """Return the values of a row group; the last ones are kept."""
        if (name, group) not in self.groups:
            if name not in self.opened:
                self.opened[name] = pq.ParquetFile(self.files.open(name))
                if len(self.opened) > FILES_KEPT:
                    self.opened.popitem(last=False)[1].close(force=True)
            file = self.opened[name]
            if len(self.groups) == GROUPS_KEPT:
                self.groups.popitem(last=False)
            column = self.column_of(file.schema_arrow, name)
            self.groups[name, group] = _parts(_read_group(file, group, column, with_paths=False))[0]
        return self.groups[name, group]


def _read_group(file: pq.ParquetFile, group: int, column: str, with_paths: bool) -> Any:
    kind = file.schema_arrow.field(column).type
    leaves: Sequence[str] = [column]
    if pa.types.is_struct(kind):
        has_paths = with_paths and kind.get_field_index("path") >= 0
        leaves = [f"{column}.bytes", *([f"{column}.path"] if has_paths else [])]
    if not 0 <= group < file.num_row_groups:
        raise IndexError(group)
    return file.read_row_group(group, columns=list(leaves), use_threads=False).column(column).combine_chunks()


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _has_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _parts(column: Any) -> tuple[Any, Any]:
    """Return the bytes of a column, and their paths, if there are any."""
    if not pa.types.is_struct(column.type):
        return column, None
    paths = column.field("path") if column.type.get_field_index("path") >= 0 else None
    return column.field("bytes"), paths
