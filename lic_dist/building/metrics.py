"""A build's progress as metrics of its Ray cluster, which Ray exports to Prometheus: Grafana draws it with Ray's own.

    ray_lic_dist_shards_total, _samples_total, _set_aside_total, _photos_total   a photo counts once a shard it is in
    ray_lic_dist_samples_per_second                                              since the job began

Each is tagged with the store and with what is done: `build` or `quantize`. Without Ray there are none.
"""

from __future__ import annotations

import sys
import time
from typing import Any

TAGS = ("store", "work")
COUNTERS = {
    "shards": "Shards written.",
    "samples": "Samples written.",
    "photos": "Photos read, once for each shard.",
    "set_aside": "Samples set aside.",
}


class BuildMetrics:
    """The metrics of one job, made with the first shard, when Ray is there."""

    def __init__(self, store: str, work: str) -> None:
        self.tags = {"store": store, "work": work}
        self.counters: dict[str, Any] = {}
        self.rate: Any = None
        self.samples, self.started = 0, time.monotonic()

    def add(self, samples: int, photos: int, set_aside: int) -> None:
        """Count one shard."""
        if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
            return
        if self.rate is None:
            from ray.util.metrics import Counter, Gauge

            self.counters = {name: Counter(f"lic_dist_{name}", text, TAGS) for name, text in COUNTERS.items()}
            self.rate = Gauge("lic_dist_samples_per_second", "Samples written a second by this job.", TAGS)
        self.samples += samples
        counted = {"shards": 1, "samples": samples, "photos": photos, "set_aside": set_aside}
        for name, value in counted.items():
            if value:  # Ray refuses to count nothing
                self.counters[name].inc(value, self.tags)
        self.rate.set(self.samples / max(time.monotonic() - self.started, 1e-9), self.tags)
