"""Photos packed as others pack them: tars, WebDataset's, Parquet, and what Hugging Face's `save_to_disk` leaves."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def files_of(folder: Path) -> dict[str, bytes]:
    """{path below the folder: bytes}, in the order of paths."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **how: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **how) as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def table(files: Mapping[str, bytes | None], column: str = "image") -> pa.Table:
    """As Hugging Face's Image feature has it, and a label beside it."""
    rows = [{"bytes": data, "path": name} for name, data in files.items()]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table({column: pa.array(rows, kind), "label": list(range(len(rows)))})


def parquet(path: Path, files: Mapping[str, bytes | None], **how: object) -> Path:
    pq.write_table(table(files), path, **{"row_group_size": 3, **how})
    return path


def save_to_disk(folder: Path, files: Mapping[str, bytes | None], rows: int = 3) -> Path:
    """A dataset of one shard, in Arrow's stream format, `rows` in a batch."""
    folder.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    found = table(files)
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, found.schema) as writer:
        writer.write_table(found, max_chunksize=rows)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder
