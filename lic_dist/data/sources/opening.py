"""Which source a text names: by its scheme where the files lie, by the names of the files what they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lic_dist.data import photo_files
from lic_dist.data.source import PhotoSource
from lic_dist.data.sources.files import Files, LocalFiles
from lic_dist.data.sources.plain import PlainPhotos
from lic_dist.errors import UsageError

BUCKETS, WEB = ("s3", "gs", "az"), ("http", "https")
KINDS = (".tar", ".parquet", ".arrow")  # of files that hold several photos
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)


def open_source(
    where: PhotoSource | Path | str, options: Mapping[str, str] | None = None, column: str | None = None
) -> PhotoSource:
    """Return the photos that a text names.

    A folder, or a URL: s3://, gs://, az:// (`options` are obstore's) or http(s):// of a page that lists files, or of a
    text file that does (.txt). Or, in any of these, photos in files: a .tar, .parquet or .arrow file, or a pattern of
    such names (`photos/*.tar`). A folder without photos and folders, but with such files, is these files, and one that
    Hugging Face's `save_to_disk` wrote is its Arrow files. `column` is of tables.

    Raises:
        UsageError: a URL of another scheme, or a name that is none of these.
    """
    if isinstance(where, PhotoSource):
        return where
    text = str(where)
    root, name = _split(text)
    files = _files(root, options)
    if name:
        return _packed(files, name, column)
    if isinstance(files, LocalFiles) and _is_hugging_face(files.folder):
        return _packed(files, "**/*.arrow", column)
    kind = _kind_of_all(files)
    return _packed(files, f"*{kind}", column) if kind else PlainPhotos(files)


def _split(text: str) -> tuple[str, str]:
    """Return the root, and the name or pattern of the files that hold photos below it, "" where each file is one.

    "s3://b/photos/*.tar" => ("s3://b/photos", "*.tar")
    """
    scheme, found, path = text.rpartition("://")
    parts = path.rstrip("/").split("/") if found else str(Path(text)).split("/")
    first = next((n for n, part in enumerate(parts) if re.search(r"[*?]", part)), len(parts) - 1)
    last = parts[-1].lower()
    if COMPRESSED.search(last):
        raise UsageError(
            f"{text} is compressed: photos cannot be read out of it one by one",
            hint="unpack the compression alone (gunzip, zstd -d): photos hardly shrink",
        )
    is_folder = not found and Path(text).is_dir()
    if not is_folder and (last.endswith(KINDS) or (found and scheme in WEB and last.endswith(".txt"))):
        root = scheme + found + "/".join(parts[:first])
        return root or ("/" if text.startswith("/") else "."), "/".join(parts[first:])
    if re.search(r"[*?]", path) and not (not found and Path(text).exists()):
        raise UsageError(f"{text}: a pattern is of {', '.join(KINDS)} files", hint="give the folder that holds photos")
    return text.rstrip("/") if found else text, ""


def _files(root: str, options: Mapping[str, str] | None) -> Files:
    scheme, found, _ = root.partition("://")
    if not found:
        return LocalFiles(Path(root))
    if scheme == "file":
        raise UsageError(f"{root}: a folder is given as a plain path", hint=root.removeprefix("file://"))
    from lic_dist.data.sources.remote_files import BucketFiles, WebFiles

    chosen = tuple(sorted((options or {}).items()))
    if scheme in BUCKETS:
        return BucketFiles(root, chosen)
    if scheme in WEB:
        return WebFiles(root, chosen)
    raise UsageError(f"no photos are read from {scheme}://", hint="a folder, or s3://, gs://, az://, https://")


def _packed(files: Files, name: str, column: str | None) -> PhotoSource:
    if name.lower().endswith(".txt"):
        from lic_dist.data.sources.remote_files import WebFiles

        assert isinstance(files, WebFiles)
        return PlainPhotos(WebFiles(files.url, files.options, index=name))
    if name.lower().endswith(".tar"):
        from lic_dist.data.sources.tars import TarPhotos

        return TarPhotos(files, name)
    from lic_dist.data.sources.tables import ArrowPhotos, ParquetPhotos

    kind = ParquetPhotos if name.lower().endswith(".parquet") else ArrowPhotos
    return kind(files, name, column)


def _kind_of_all(files: Files) -> str:
    """Return the one of KINDS that lies in a root where neither photos nor folders are; "" where there is none."""
    found = set()
    for name, is_folder in files.top():
        kind = photo_files.kind_passed_over(name)
        if kind == photo_files.HIDDEN:
            continue
        if is_folder or not kind:
            return ""
        found.add(kind)
    return next((kind for kind in KINDS if kind in found), "")


def _is_hugging_face(folder: Path) -> bool:
    """Return whether `save_to_disk` of a dataset, or of several in a DatasetDict, wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )
