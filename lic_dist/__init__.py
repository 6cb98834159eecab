"""lic_dist: a distributed dataset-caching finetuning system for learned image compression."""

__version__ = "0.1.0"
