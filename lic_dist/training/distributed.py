"""Ranks: one process alone, one of those that torchrun started, or one of a group that its launcher joined already."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lic_dist.errors import UsageError

PATIENCE = timedelta(hours=2)  # the others wait while the first rank calibrates at the end


@dataclass(frozen=True)
class Ranks:
    """This process's place: its rank among `world`, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank speaks, logs and writes."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """This rank's part of a global batch.

        Raises:
            UsageError: the batch does not divide.
        """
        if batch % self.world:
            raise UsageError(f"a batch of {batch} does not divide among {self.world} ranks")
        size = batch // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module under DDP, or itself where there is one rank."""
        if self.world == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)  # none changes in training

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the process group that torchrun set up (NCCL on GPUs, gloo on CPUs); leave it at the end.

    A group that the launcher has joined, as Ray Train does, is used as it is and left to the launcher, which has set
    this thread's GPU where the group has GPUs.
    """
    if dist.is_initialized():
        on_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        here = Ranks(dist.get_rank(), dist.get_world_size(), device)
    else:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
        here = Ranks(int(os.environ.get("RANK", "0")), world, device)
        if on_gpu:
            torch.cuda.set_device(device)
    if here.world > 1 and not on_gpu:
        torch.set_num_threads(1)
    if here.world == 1 or dist.is_initialized():
        yield here
        return
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield here
    finally:
        dist.destroy_process_group()
