"""Where an experiment's store lies; apart from the rest of the room, which loads torch."""

from __future__ import annotations

from lic_dist.cache.storage import Storage
from lic_dist.cache.storages import open_storage
from lic_dist.config import Experiment, need


def experiment_storage(experiment: Experiment) -> Storage:
    """Where the experiment's store lies."""
    section = need(experiment.cache, "cache")
    return open_storage(section.path, section.options)
