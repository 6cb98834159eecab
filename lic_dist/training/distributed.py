"""Ranks: one process alone, one of those that torchrun started, or one of a process group that its launcher joined."""

from __future__ import annotations

import inspect
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lic_dist.errors import LicError, LostRank, UsageError
from lic_dist.training.notice import Notice

SILENCE_TIMEOUT = timedelta(minutes=10)  # a rank that is silent for longer within a step is taken for dead
_KNOWN = inspect.signature(
    DistributedDataParallel
).parameters  # "broadcast_buffers" is deprecated, the other is newer than 2.6
_BUFFERS = {
    "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers": False
}  # no buffer changes
LONE_RANK_TIMEOUT = timedelta(days=7)  # the first rank's own work, such as a search of the cache


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world` ranks, and its device. `waiting` is a gloo group with a long timeout, for
    `wait`; `notice` says when this rank is to leave. `usual` are the ranks that the job's settings were chosen for, of
    which some may be missing.
    """

    rank: int
    world: int
    device: torch.device
    waiting: Any = None
    notice: Notice = field(default_factory=Notice)
    usual: int = 0

    @property
    def first(self) -> bool:
        """Whether this rank prints, logs and writes."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """Return this rank's part of a global batch.

        Raises:
            UsageError: the batch does not divide.
        """
        if batch % self.world:
            raise UsageError(f"a batch of {batch} does not divide among {self.world} ranks")
        size = batch // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def parts(self, batch: int, accumulate: int) -> int:
        """Return in how many parts a rank takes its share of a global batch: `accumulate`, and where ranks are missing
        as many more as keep a part from being larger than it is with all of them.

        Raises:
            UsageError: the batch or the share does not divide.
        """
        share = self.share(batch)
        size = share.stop - share.start
        if size % accumulate:
            raise UsageError(f"a rank's {size} samples do not divide into {accumulate} parts", hint="accumulate")
        least = accumulate * self.usual / self.world
        return next(
            (parts for parts in range(accumulate, size, accumulate) if parts >= least and size % parts == 0), size
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module under DDP, or itself where there is one rank."""
        if self.world == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, **_BUFFERS)  # type: ignore[arg-type]

    def wait(self) -> None:
        """Wait for all ranks, however long one of them works alone."""
        if self.world > 1:
            dist.barrier(group=self.waiting)

    def mean(self, value: Tensor) -> tuple[float, bool]:
        """Return the mean of a scalar over the ranks, equal on all of them, and whether any has notice to leave. The
        mean is not finite where any rank's value is not.
        """
        told = value.detach().double().new_tensor([value, float(bool(self.notice.why()))])
        if self.world > 1:
            dist.all_reduce(told)
        total, leaving = told.tolist()
        return total / self.world, leaving > 0

    def average(self, values: Tensor) -> None:
        """Replace a tensor, in place, by its mean over the ranks, equal on all of them."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank; for small plain data."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def joined(notice: Notice | None = None, usual: int = 0) -> Iterator[Ranks]:
    """Join the process group that torchrun set up (NCCL on GPUs, gloo on CPUs), and leave it at the end.

    A group that the launcher has joined, as Ray Train does, is used and left to the launcher, which has also set this
    thread's GPU. `notice` and `usual`: see `Ranks`.
    """
    notice = notice or Notice()
    joined = dist.is_initialized()
    if joined:
        rank, world = dist.get_rank(), dist.get_world_size()
        on_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    else:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
        if on_gpu:
            if device.index >= torch.cuda.device_count():
                raise UsageError(
                    f"rank {rank} has no GPU: there are {torch.cuda.device_count()}", hint="fewer ranks a node"
                )
            torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(rank, world, device, None, notice, usual)
        return
    if not on_gpu:
        torch.set_num_threads(1)
    try:
        if not joined:
            store, _, _ = next(dist.rendezvous("env://", timeout=SILENCE_TIMEOUT))
            store = _fresh_store(store, rank, world)
            backend = "nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=SILENCE_TIMEOUT)
        waiting = dist.new_group(backend="gloo", timeout=LONE_RANK_TIMEOUT)
        yield Ranks(rank, world, device, waiting, notice, usual)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise LostRank(
                f"rank {rank} of {world} lost another: it died, or was silent for {SILENCE_TIMEOUT}",
                hint="its own message says why; started again, the job goes on from its last state",
            ) from error
        raise
    if not joined:  # not after an error: other ranks may never leave the group
        dist.destroy_process_group()


def _fresh_store(store: dist.Store, rank: int, world: int) -> dist.Store:
    """Return a part of the launcher's store in which no earlier start of these ranks has written.

    When torchrun restarts ranks, they find the addresses of the dead ones in its store, and hang or fail (pytorch issue
    167288). So each rank asks under a new name, and the first rank answers with the name of this start.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + SILENCE_TIMEOUT.total_seconds()
    if rank > 0:
        store.set(f"asks/{rank}", mine)
        start = store.get(f"start/{mine}").decode()  # waits for it
        store.set(f"joined/{start}/{rank}", "")
        return dist.PrefixStore(start, store)
    missing = list(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"asks/{other}"]):  # of this start or of an earlier one, whose answer nobody reads
                store.set(f"start/{store.get(f'asks/{other}').decode()}", mine)
        time.sleep(0.02)
        missing = [other for other in missing if not store.check([f"joined/{mine}/{other}"])]
        if time.monotonic() > deadline:
            raise LicError(
                f"ranks {missing} have not joined within {SILENCE_TIMEOUT}", hint="do all nodes reach the first?"
            )
    return dist.PrefixStore(mine, store)
