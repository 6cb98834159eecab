"""Progress with rate and ETA: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from lic_dist.text import clock, counted

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

PLAIN_INTERVAL = 10.0  # seconds between two plain lines


class Progress:
    """`with Progress("title", total=n, unit="shard") as bar: bar.advance(1, bpp=0.51)`.

    Figures given to `advance` are shown beside the bar, the latest value of each name. `done` is the count of a resumed
    job; the rate counts only new work. Of the ranks that torchrun starts, only the first prints.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit = title, max(total, done), unit
        self.done = self.first = done
        self.figures: dict[str, float] = {}
        self.rich: RichProgress | None = None
        self.quiet = os.environ.get("RANK", "0") != "0"

    def __enter__(self) -> Progress:
        self.start = self.last_line = time.monotonic()
        if sys.stderr.isatty() and not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self.rich = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )
            self.rich.start()
            self.task = self.rich.add_task(self.title, total=self.total, completed=self.done, rate="", figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.rich is not None:
            self.rich.stop()
        elif kind is None and self.done > self.first:
            self._line()

    def advance(self, count: int = 1, **figures: float) -> None:
        """Count `count` more units as done and show the figures; a count beyond the total raises the total."""
        self.done += count
        self.total = max(self.total, self.done)
        self.figures.update(figures)
        if self.rich is not None:
            self.rich.update(
                self.task, completed=self.done, total=self.total, rate=self._rate_text(), figures=self._figures_text()
            )
        elif time.monotonic() - self.last_line >= PLAIN_INTERVAL:
            self._line()

    def complete(self) -> None:
        """Set the total to what is done, where `total` was an estimate."""
        self.total = self.done
        if self.rich is not None:
            self.rich.update(self.task, total=self.total)

    def _rate(self) -> float:
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def _rate_text(self) -> str:
        return f"{self._rate():.3g} {self.unit}/s"

    def _figures_text(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self.figures.items())

    def _line(self) -> None:
        if self.quiet:
            return
        self.last_line = time.monotonic()
        eta = clock((self.total - self.done) / rate) if (rate := self._rate()) > 0 else "?"
        text = f"{self.title}: {self.done}/{counted(self.total, self.unit)}, {self._rate_text()}, ETA {eta}"
        print(f"{text}  {self._figures_text()}".rstrip(), file=sys.stderr, flush=True)
