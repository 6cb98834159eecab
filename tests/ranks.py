"""Ranks as torchrun starts them, but forked from a process that has everything imported: they start in a moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path


def launch(*command: str | Path, output: Path, dying: tuple[int, ...] = (), step: int = 0) -> list[int | None]:
    """Run `lic-dist COMMAND` in two ranks that write what they say into `output`; their exit codes.

    The ranks of `dying` kill themselves instead of their step of this number, counted from one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    words = [str(word) for word in command]
    ranks = [
        context.Process(target=_rank, args=(rank, port, words, str(output), step if rank in dying else 0))
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
        if rank.is_alive():
            rank.kill()
    return [rank.exitcode for rank in ranks]


def _rank(rank: int, port: int, command: list[str], output: str, step: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with Path(output).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if step:
        die_at(step)
    from lic_dist.app.cli import main_of

    sys.argv = ["lic-dist", *command[1:]]
    main_of(command[0])


def die_at(step: int) -> None:
    """Let this process kill itself instead of its training step of this number, counted from one."""
    from lic_dist.training import loop

    take_step, taken = loop.take_step, 0

    def dying(*arguments: object) -> object:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(*arguments)

    loop.take_step = dying
