"""The trials of a calibration that is not over: kept beside the store, or with what a job writes, until its record is.

One small JSON file, written whole after each trial: `identity` is a digest of all that a trial's figures depend on,
`expected` about how many there will be, `trials` rows of {strength, step, shift, L, bpp, mse, predicted}. A calibration
that was stopped takes them from there and ends with the same record; rows of another identity count for nothing.
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
    """The file of one calibration. Every method raises LicError where the place refuses."""

    storage: Storage
    key: str

    @classmethod
    def of_group(cls, store: Storage, group: str) -> Trials:
        """Those of a store's group."""
        return cls(*store.sibling(f".{group}{SUFFIX}"))

    def begin(self, identity: str, expected: int) -> list[Row]:
        """The rows of this identity, in the order of their making; from here on the file says that one calibrates."""
        found = self.storage.get_json(self.key)
        rows = found["trials"] if isinstance(found, dict) and found.get("identity") == identity else []
        self.storage.make()
        self.write(identity, expected, rows)
        return list(rows)

    def write(self, identity: str, expected: int, rows: list[Row]) -> None:
        """Keep these rows."""
        content = {"identity": identity, "expected": expected, "trials": rows}
        self.storage.put(self.key, json.dumps(content, indent=1).encode())

    def delete(self) -> None:
        """Remove the file: the record is where it belongs."""
        self.storage.delete(self.key)


def running_calibrations(store: Storage) -> dict[str, dict[str, Any]]:
    """The calibrations of a store that are not over, by group: {trial, expected, idle_seconds, L}.

    `trial` is the one at work, counted from 1; `L` the least so far, None before the first; `idle_seconds` how long ago
    one was finished, which tells a calibration that was stopped.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        around, start = store.sibling(".")
        names = around.names()
    except LicError:  # a whole bucket, or a folder that may not be listed: nobody builds there
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
