"""What a fork server imports ahead, so that the processes that tests kill start in a moment."""

from multiprocessing.forkserver import _forkserver

import ray.job_submission  # noqa: F401
import torch
import torch._dynamo  # the first optimizer of a process imports it
from numba.core.registry import cpu_target

from lic_dist.app import cli  # noqa: F401
from lic_dist.building import build  # noqa: F401
from lic_dist.engine import processes
from lic_dist.evaluation import run  # noqa: F401
from lic_dist.models.compat import import_compressai
from lic_dist.training import base, finetune  # noqa: F401

import_compressai()
torch.set_num_threads(1)  # as in the processes of tests
cpu_target.typing_context.refresh()  # half a second of imports, with the first kernel that a process loads
cpu_target.target_context.refresh()
processes.START_METHOD = "forkserver"  # in what a server forks: `forked_workers` does so here
_forkserver.ensure_running = lambda: None  # what is forked from here forks from here too: Python 3.11 starts another
