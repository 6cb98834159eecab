"""A job's log: one JSON object a line in log.jsonl, and TensorBoard's event files where they are asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lic_dist.errors import LicError, UsageError


class Log:
    """Rows with a `step`, appended to a file; on resuming, rows beyond the resumed step are removed."""

    def __init__(self, folder: Path, resumed_at: int, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            rows = read_log(self.path)
            kept = [row for row in rows if row["step"] <= resumed_at] if resumed_at else []
            if kept != rows:
                temporary = self.path.with_suffix(".part")
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
                temporary.replace(self.path)
        self.board = _tensorboard_writer(folder / "tensorboard", resumed_at) if tensorboard else None

    def write(self, step: int, **figures: Any) -> None:
        """Append one row."""
        with self._writing(), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **figures, "time": round(time.time(), 3)}) + "\n")
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LicError(
                f"cannot write {self.path}: {error.strerror}", hint="the last state on disk is good"
            ) from None

    def close(self) -> None:
        """Write what TensorBoard's writer still holds."""
        if self.board is not None:
            self.board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return all complete rows of a log."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _tensorboard_writer(folder: Path, resumed_at: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:
        raise UsageError("tensorboard: true needs tensorboardX", hint="pip install tensorboardX") from None
    return SummaryWriter(str(folder), purge_step=resumed_at + 1)
