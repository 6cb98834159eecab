"""The trials of an unfinished calibration, in a file beside the store or in a job's output folder.

The file is small JSON, written whole after each trial: `identity` is a digest of all that a trial's figures depend on,
`expected` about how many trials there will be, `trials` rows of {strength, step, shift, L, bpp, mse, predicted, crops}.
A calibration that was stopped resumes from these rows and ends with the same record. Rows of another identity are
ignored.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from lic_dist.cache.storage import Storage
from lic_dist.errors import LicError

SUFFIX = ".trials"
Row = dict[str, float]


@dataclass(frozen=True)
class Trials:
    """The file of one calibration. Every method raises LicError where the storage refuses."""

    storage: Storage
    key: str

    @classmethod
    def of_group(cls, store: Storage, group: str) -> Trials:
        """Return the trials of a store's group."""
        return cls(*store.sibling(f".{group}{SUFFIX}"))

    def begin(self, identity: str, expected: int) -> list[Row]:
        """Return the rows of this identity, in order, and write the file, which marks that a calibration is running."""
        found = self.storage.get_json(self.key)
        rows = found["trials"] if isinstance(found, dict) and found.get("identity") == identity else []
        self.storage.make()
        self.write(identity, expected, rows)
        return list(rows)

    def write(self, identity: str, expected: int, rows: list[Row]) -> None:
        """Write these rows."""
        content = {"identity": identity, "expected": expected, "trials": rows}
        self.storage.put(self.key, json.dumps(content, indent=1).encode())

    def delete(self) -> None:
        """Remove the file, once the record is saved."""
        self.storage.delete(self.key)


def running_calibrations(store: Storage) -> dict[str, dict[str, Any]]:
    """Return the unfinished calibrations of a store, by group: {trial, expected, idle_seconds, L}.

    `trial` is the running one, counted from 1; `L` is the least so far, None before the first; `idle_seconds` is the
    time since the last trial ended, by which a stopped calibration is recognised.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        around, start = store.sibling(".")
        names = around.names()
    except LicError:  # a whole bucket, or an unlistable folder, holds no build
        return found
    for name in names:
        entry = around.entry(name) if name.startswith(start) and name.endswith(SUFFIX) else None
        content = around.get_json(name) if entry else None
        if entry is None or not isinstance(content, dict):
            continue
        done = content["trials"]
        found[name.removeprefix(start).removesuffix(SUFFIX)] = {
            "trial": len(done) + 1,
            "expected": max(content["expected"], len(done) + 1),
            "idle_seconds": max(0.0, time.time() - entry.modified),
            "L": min((row["L"] for row in done), default=None),
        }
    return found
