"""States of a job on disk: the last few, each written whole or not at all. A job resumes from the newest readable
one.
"""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lic_dist.errors import LicError, SharedError, UsageError
from lic_dist.models import checkpoint
from lic_dist.training.distributed import Ranks

VISIBLE_SECONDS = 60.0  # seconds to wait for another node's file
SHARED_FOLDER_HINT = "every node needs the same 'out', on a file system that all see"


def is_finished(path: Path, identity: dict[str, Any], ranks: Ranks) -> bool:
    """Return whether a checkpoint is the result of this very job, on every rank.

    Raises:
        SharedError: some ranks find it and others do not.
    """
    found = ranks.gather(checkpoint.is_result_of(path, identity))
    if any(found) and not all(found):
        raise SharedError(f"not every rank finds {path}", hint=SHARED_FOLDER_HINT)
    return all(found)


class ResumeStates:
    """The files `<step>.pth` of one job in a folder; `identity` is all that the job's weights depend on."""

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int) -> None:
        self.folder, self.identity, self.keep = folder, identity, keep

    def latest(self) -> dict[str, Any] | None:
        """Return the newest state that can be read; None where there is none.

        Raises:
            UsageError: it belongs to a job with other settings; each differing one is named.
            LicError: there are states, and none can be read.
        """
        files = self._files()
        for path in reversed(files):
            try:
                state = checkpoint.read(path)
                found = state["identity"]
            except (LicError, KeyError) as error:
                print(f"warning: {error}: passed over", file=sys.stderr)
                continue
            differing = [key for key in sorted({*found, *self.identity}) if found.get(key) != self.identity.get(key)]
            if differing:
                named = ", ".join(f"{key} ({found.get(key)} there, {self.identity.get(key)} here)" for key in differing)
                raise UsageError(
                    f"{self.folder} is of another job: {named}", hint="give another 'out', or remove that folder"
                )
            return state
        if files:
            raise LicError(f"no state in {self.folder} can be read", hint="remove it to start from the first step")
        return None

    def wait_for(self, step: int) -> dict[str, Any]:
        """Wait for the state after `step` steps and return it; on a shared file system other nodes see a file later.

        Raises:
            LicError: it does not appear.
        """
        path, deadline = self._file(step), time.monotonic() + VISIBLE_SECONDS
        while not path.is_file():
            if time.monotonic() > deadline:
                raise LicError(f"a rank does not find {path}", hint=SHARED_FOLDER_HINT)
            time.sleep(0.2)
        return checkpoint.read(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other jobs from the folder until this one ends or dies.

        Raises:
            LicError: another job is at work there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LicError(f"another job writes into {self.folder}", hint="wait for its end, or stop it") from None
            yield

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps, then remove all but the newest `keep`, and leftovers of killed jobs.

        Raises:
            LicError: the disk refuses it; the earlier states are unchanged.
        """
        checkpoint.write({"identity": self.identity, **state}, self._file(step))
        for path in [*self._files()[: -self.keep], *self.folder.glob("*.pth.*")]:
            path.unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self.folder / f"{step:08d}.pth"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.pth"))
