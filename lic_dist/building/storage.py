"""The storage of an experiment's store. A module of its own, because the others of this room load torch."""

from __future__ import annotations

from lic_dist.cache.storage import Storage
from lic_dist.cache.storages import open_storage
from lic_dist.config import Experiment, need


def experiment_storage(experiment: Experiment) -> Storage:
    """Return the storage of the experiment's store."""
    section = need(experiment.cache, "cache")
    return open_storage(section.path, section.options)
