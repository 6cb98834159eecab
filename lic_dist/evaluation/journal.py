"""The journal of an evaluation: one line of JSON for each coded image, so that a killed run resumes within a point.

It lies beside the result file until the run is finished. Lines are only appended. Each has the `Key` of what was
measured, so that lines of other tensors, records or pictures are ignored. An incomplete last line is cut off.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from lic_dist.errors import LicError
from lic_dist.evaluation.results import write_whole


class Keyed(Protocol):
    """A point of a result file, of `evaluate` or of `evaluate_generations`."""

    @property
    def checkpoint(self) -> str: ...
    @property
    def quantizer(self) -> str: ...
    @property
    def record(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def lmbda(self) -> float | None: ...
    @property
    def pictures(self) -> str: ...
    @property
    def arm(self) -> str: ...


@dataclass(frozen=True)
class Key:
    """What identifies a measurement: a quantizer's name, and the digests of its record, the model and the pictures."""

    quantizer: str
    record: str
    model: str
    pictures: str

    @classmethod
    def of(cls, point: Keyed) -> Key:
        """Return the key of a point."""
        return cls(point.quantizer, point.record, point.model, point.pictures)


class Journal:
    """The rows of unfinished points, by key and image; a row is a plain dictionary with its "image"."""

    def __init__(self, path: Path, file: TextIO, lines: list[dict[str, Any]]) -> None:
        self.path, self.file, self.lines = path, file, lines
        self.rows = {(_key_of(line), line["row"]["image"]): line["row"] for line in lines}

    @classmethod
    @contextmanager
    def of(cls, out: Path) -> Iterator[Journal]:
        """Open and lock the journal of a result file; delete it at the end if it is empty.

        Raises:
            LicError: another run has it open, or the folder cannot be written.
        """
        path = beside(out, ".rows.jsonl")
        with ExitStack() as open_files:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = open_files.enter_context(out.with_name(f".{out.name}.lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lines = _read_lines(path)
                file = open_files.enter_context(path.open("a", encoding="utf-8"))
            except BlockingIOError:
                raise LicError(f"another run writes {out}", hint="wait for its end, or stop it") from None
            except OSError as error:
                raise _write_error(error, path) from None
            journal = cls(path, file, lines)
            try:
                yield journal
            finally:
                if not journal.lines:
                    path.unlink(missing_ok=True)

    def add(self, key: Key, checkpoint: str, row: dict[str, Any]) -> None:
        """Append a row; it is in the file when this returns."""
        line = {**asdict(key), "checkpoint": checkpoint, "row": row}
        try:
            self.file.write(_json_line(line))
            self.file.flush()
        except OSError as error:
            raise _write_error(error, self.path) from None
        self.lines.append(line)
        self.rows[key, row["image"]] = row

    @property
    def keys(self) -> frozenset[Key]:
        """The keys of its rows that are not settled."""
        return frozenset(map(_key_of, self.lines))

    def settle(self, named: Set[tuple[str, str]]) -> None:
        """Drop the rows of these checkpoints and quantizers, whose points are in the result file; others stay."""
        self.lines = [line for line in self.lines if (line["checkpoint"], line["quantizer"]) not in named]
        write_whole(self.path, "".join(map(_json_line, self.lines)).encode())


def beside(out: Path, ending: str) -> Path:
    """Return the path of a file beside a result file: its name without .json, and an ending."""
    return out.with_name(out.name.removesuffix(".json") + ending)


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"


def _write_error(error: OSError, path: Path) -> LicError:
    return LicError(f"cannot write {error.filename or path}: {error.strerror}")


def _key_of(line: dict[str, Any]) -> Key:
    return Key(line["quantizer"], line["record"], line["model"], line["pictures"])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal, none where there is no file; an incomplete last line is cut off from the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [line for text in whole.decode("utf-8", "replace").splitlines() if (line := _parsed(text)) is not None]


def _parsed(text: str) -> dict[str, Any] | None:
    """Return a line with all it should have; None for any other, which a failing disk may leave."""
    try:
        line = json.loads(text)
        _key_of(line), line["row"]["image"], line["checkpoint"]
    except (ValueError, KeyError, TypeError):
        return None
    return line
