"""Where an experiment's store and photos are. A module of its own, because the others of this room load torch."""

from __future__ import annotations

from lic_dist.cache.storage import Storage
from lic_dist.cache.storages import open_storage
from lic_dist.config import Experiment, need
from lic_dist.data.source import PhotoSource


def experiment_storage(experiment: Experiment) -> Storage:
    """Return the storage of the experiment's store."""
    section = need(experiment.cache, "cache")
    return open_storage(section.path, section.options)


def experiment_photos(experiment: Experiment) -> PhotoSource:
    """Return the source of the experiment's photos."""
    from lic_dist.data.sources.opening import open_source

    section = need(experiment.images, "images")
    return open_source(section.path, section.options, section.column)
