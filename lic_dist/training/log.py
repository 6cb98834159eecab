"""A job's log: one JSON object a line in log.jsonl, and the trackers that are asked for beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lic_dist.errors import LicError
from lic_dist.training.tracking import Trackers


class Log:
    """Rows with a `step`, appended to a file; on resuming, rows beyond the resumed step are removed.

    `tracking` are names of trackers, `settings` what they show of the job.
    """

    def __init__(
        self, folder: Path, resumed_at: int, tracking: Sequence[str] = (), settings: Mapping[str, Any] | None = None
    ) -> None:
        self.path = folder / "log.jsonl"
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            rows = read_log(self.path)
            kept = [row for row in rows if row["step"] <= resumed_at] if resumed_at else []
            if kept != rows:
                temporary = self.path.with_suffix(".part")
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
                temporary.replace(self.path)
            self.trackers = Trackers(tracking, folder, settings or {}, resumed_at)

    def write(self, step: int, **figures: Any) -> None:
        """Append one row."""
        with self._writing(), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **figures, "time": round(time.time(), 3)}) + "\n")
        self.trackers.write(step, figures)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LicError(
                f"cannot write {self.path}: {error.strerror}", hint="the last state on disk is good"
            ) from None

    def close(self) -> None:
        """End the trackers' runs."""
        self.trackers.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return all complete rows of a log."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
