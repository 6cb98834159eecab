"""What a fork server imports ahead, so that the processes that tests kill start in a moment."""

import ray.job_submission  # noqa: F401

from lic_dist.app import cli  # noqa: F401
from lic_dist.building import build  # noqa: F401
from lic_dist.models.compat import import_compressai
from lic_dist.training import finetune  # noqa: F401

import_compressai()
