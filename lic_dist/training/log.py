"""What a job tells: one JSON object a line in log.jsonl, and TensorBoard's event files where they are asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lic_dist.errors import UsageError


class Log:
    """Rows with a `step`, appended; lines beyond the resumed step are cut off."""

    def __init__(self, folder: Path, resumed_at: int, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(self.path) if row["step"] <= resumed_at] if resumed_at else []
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.board = _board(folder / "tensorboard", resumed_at) if tensorboard else None

    def write(self, step: int, **figures: Any) -> None:
        """Append one row."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **figures, "time": round(time.time(), 3)}) + "\n")
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def close(self) -> None:
        """Write what TensorBoard's writer still holds."""
        if self.board is not None:
            self.board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a log."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _board(folder: Path, resumed_at: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:
        raise UsageError("tensorboard: true needs tensorboardX", hint="pip install tensorboardX") from None
    return SummaryWriter(str(folder), purge_step=resumed_at + 1)
