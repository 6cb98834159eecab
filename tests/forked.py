"""Processes forked from one that has everything imported: they start in a moment, and may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path


def start(
    command: Sequence[object],
    out: Path,
    err: Path | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    dies_at: int = 0,
    by: int = signal.SIGKILL,
) -> BaseProcess:
    """Start `lic-dist COMMAND` with this environment (this process's) and folder; what it says goes into files.

    It sends itself a signal before the training step `dies_at`, counted from one.
    """
    return _start(partial(_lic_dist, [*map(str, command)], dies_at, by), out, err or out, environment, folder)


def run(
    *command: object, environment: Mapping[str, str] | None = None, folder: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `lic-dist COMMAND` to its end, as `subprocess.run` would."""
    return _run(partial(_lic_dist, [*map(str, command)], 0), environment, folder, timeout)


def python(
    code: str, *arguments: object, environment: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `python -c CODE ARGUMENTS` to its end, as `subprocess.run` would."""
    return _run(partial(_python, code, [*map(str, arguments)]), environment, None, timeout)


def ranks(
    *command: object, output: Path, dying: Sequence[int] = (), step: int = 0, by: int = signal.SIGKILL
) -> list[int | None]:
    """Run `lic-dist COMMAND` in two ranks as torchrun starts them; their exit codes.

    The ranks of `dying` send themselves the signal `by` before their step of this number, counted from one.
    """
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **meeting, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(start(command, output, None, environment, dies_at=step if int(rank) in dying else 0, by=by))
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


def die_at(step: int, by: int = signal.SIGKILL) -> None:
    """Let this process send itself a signal before its training step of this number, counted from one."""
    from lic_dist.training import loop

    take_step, taken = loop.take_step, 0

    def dying(*arguments: object) -> object:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), by)
        return take_step(*arguments)

    loop.take_step = dying


def _start(
    work: Callable[[], None], out: Path, err: Path, environment: Mapping[str, str] | None, folder: Path | None
) -> BaseProcess:
    environment = dict(os.environ if environment is None else environment)
    arguments = (work, str(out), str(err), environment, str(folder or Path.cwd()))
    process = multiprocessing.get_context("forkserver").Process(target=_main, args=arguments)
    process.start()
    return process


def _run(
    work: Callable[[], None], environment: Mapping[str, str] | None, folder: Path | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name) / "out", Path(name) / "err"
        process = _start(work, out, err, environment, folder)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode
        assert code is not None and code >= 0, (code, out.read_text(), err.read_text())
        return subprocess.CompletedProcess([], code, out.read_text(), err.read_text())


def _main(work: Callable[[], None], out: str, err: str, environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        with Path(path).open("a") as file:
            os.dup2(file.fileno(), number)
    work()


def _lic_dist(command: list[str], dies_at: int, by: int = signal.SIGKILL) -> None:
    if dies_at:
        die_at(dies_at, by)
    from lic_dist.app.cli import main

    sys.argv = ["lic-dist", *command]
    main()


def _python(code: str, arguments: list[str]) -> None:
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
