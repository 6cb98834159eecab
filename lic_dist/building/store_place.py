"""Where an experiment's store lies; apart from the rest of the room, which loads torch."""

from __future__ import annotations

from lic_dist.cache.place import Place
from lic_dist.cache.places import place_of
from lic_dist.config import Experiment, need


def place(experiment: Experiment) -> Place:
    """Where the experiment's store lies."""
    section = need(experiment.cache, "cache")
    return place_of(section.path, section.options)
