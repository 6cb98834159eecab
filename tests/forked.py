"""`lic-dist` in processes forked from one that has everything imported: they start in a moment, and may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path


def start(
    command: Sequence[object],
    out: Path,
    err: Path | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    dies_at: int = 0,
) -> BaseProcess:
    """Start `lic-dist COMMAND` with this environment (this process's) and folder; what it says goes into files.

    It kills itself instead of the training step `dies_at`, counted from one.
    """
    environment = dict(os.environ if environment is None else environment)
    arguments = ([*map(str, command)], str(out), str(err or out), environment, str(folder or Path.cwd()), dies_at)
    process = multiprocessing.get_context("forkserver").Process(target=_main, args=arguments)
    process.start()
    return process


def run(
    *command: object, environment: Mapping[str, str] | None = None, folder: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `lic-dist COMMAND` to its end, as `subprocess.run` would."""
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name) / "out", Path(name) / "err"
        process = start(command, out, err, environment, folder)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode
        assert code is not None and code >= 0, (code, out.read_text(), err.read_text())
        return subprocess.CompletedProcess([*map(str, command)], code, out.read_text(), err.read_text())


def ranks(*command: object, output: Path, dying: Sequence[int] = (), step: int = 0) -> list[int | None]:
    """Run `lic-dist COMMAND` in two ranks as torchrun starts them; their exit codes.

    The ranks of `dying` kill themselves instead of their step of this number, counted from one.
    """
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **meeting, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(start(command, output, None, environment, dies_at=step if int(rank) in dying else 0))
    for process in processes:
        process.join(100)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def _main(command: list[str], out: str, err: str, environment: dict[str, str], folder: str, dies_at: int) -> None:
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        with Path(path).open("a") as file:
            os.dup2(file.fileno(), number)
    if dies_at:
        die_at(dies_at)
    from lic_dist.app.cli import main

    sys.argv = ["lic-dist", *command]
    main()
