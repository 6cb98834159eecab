"""What a fork server imports ahead, so that the processes that tests kill start in a moment."""

import ray.job_submission  # noqa: F401
import torch._dynamo  # noqa: F401  (the first optimizer of a process imports it)

from lic_dist.app import cli  # noqa: F401
from lic_dist.building import build  # noqa: F401
from lic_dist.engine import processes
from lic_dist.evaluation import run  # noqa: F401
from lic_dist.models.compat import import_compressai
from lic_dist.training import base, finetune  # noqa: F401

import_compressai()
processes.START_METHOD = "forkserver"  # in what a server forks: `forked_workers` does so here
