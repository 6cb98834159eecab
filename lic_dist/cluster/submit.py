"""Jobs on a Ray cluster, through the HTTP Jobs API of its dashboard.

Only the experiment's YAML is sent, as it is at that moment, without photos, stores or code. The nodes have lic_dist
installed (jobs/Dockerfile) and share one file system. A job works in `folder`, a path on the cluster, in which the
relative paths of the YAML begin, as for a command typed there. By default it is the user's current folder, which suits
a shared home. A folder that the head node does not have ends the job with exit code 2.

The driver runs on the head node and reserves no CPU there: the engine and Ray Train divide all CPUs of the cluster
among their workers, and would lack one that the driver reserved. Ray never restarts a job by itself. A job that is
submitted again goes on where the last one stopped, because stores and checkpoints do.

ray is imported inside functions, so that importing this module is cheap.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from lic_dist import config
from lic_dist.config.sweeps import expand
from lic_dist.errors import LicError, ToleranceError, UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

Kind = Literal["cache", "finetune", "evaluate"]
CONNECT_SECONDS = 10.0
POLL_SECONDS = 1.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
START = "ray start --head --dashboard-host=0.0.0.0 starts one; a remote one may need a tunnel to its port 8265"
EXIT_CODES: dict[int, type[LicError]] = {error.exit_code: error for error in (UsageError, ToleranceError)}


@dataclass(frozen=True)
class JobState:
    """The state of a job on the cluster: status is PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.

    Times are in seconds; `started` counts from the Unix epoch and is None before the start.
    """

    job: str
    status: str
    message: str
    started: float | None
    seconds: float
    exit_code: int | None

    def __str__(self) -> str:
        when = "" if self.started is None else time.strftime(", %Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"{self.job}: {self.status}{when}, {self.seconds:.0f} s. {self.message}".rstrip()


def entrypoint(kind: Kind, file: str, overrides: Sequence[str], folder: str) -> str:
    """Return the shell command of a job that starts in the folder of `file` (a bare name) and works in `folder`.

    It runs the command that a user would type. PYTHONSAFEPATH keeps a checkout in `folder` from replacing the installed
    package in the driver but not in the workers.
    """
    command = ["python", "-m", "lic_dist", *(["cache", "build"] if kind == "cache" else [kind])]
    options = ["--engine", "ray"] if kind == "finetune" else []
    options += [word for override in overrides for word in ("--set", override)]
    complaint = f"error: the node that runs this has no folder {folder}; name one that it has: submit --folder"
    return (
        f'file="$PWD"/{shlex.quote(file)}; '
        f"cd {shlex.quote(folder)} || {{ echo {shlex.quote(complaint)} >&2; exit 2; }}; "
        f'exec env PYTHONSAFEPATH=1 {shlex.join(command)} "$file" {shlex.join(options)}'
    ).rstrip()


def submit(kind: Kind, path: Path, overrides: Sequence[str], address: str, folder: str = "") -> str:
    """Submit one command over an experiment file, and return the job's id (name, command, time, digest).

    `folder` is where relative paths begin on the cluster; "" is the current folder. Work that runs on Ray (finetuning
    always, others where the experiment's engine is Ray) uses the cluster that the job runs on, whatever
    `engine.address` says.

    Raises:
        UsageError: the experiment is faulty or lacks the section that the command needs; the address is no URL.
        LicError: no Ray dashboard at the address, or it refuses the job.
    """
    experiments = list(expand(path, overrides))
    for experiment in experiments:
        config.need(getattr(experiment, kind), kind)
    chosen = list(overrides)
    if kind == "finetune" or any(experiment.engine.name == "ray" for experiment in experiments):
        chosen.append("engine.address=auto")
    command = entrypoint(kind, path.name, chosen, folder or os.getcwd())
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", experiments[0].name if len(experiments) == 1 else path.stem)
    digest = hashlib.sha256(path.read_bytes() + command.encode()).hexdigest()[:6]
    job = f"{name}-{kind}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{digest}"
    with _client(address) as client, tempfile.TemporaryDirectory() as staged:
        shutil.copyfile(path, Path(staged) / path.name)
        return client.submit_job(
            entrypoint=command,
            submission_id=job,
            runtime_env={"working_dir": staged},
            entrypoint_num_cpus=0,
        )


def status(address: str, job: str) -> JobState:
    """Return the present state of a job.

    Raises:
        LicError: no such job, or no Ray dashboard at the address.
    """
    with _client(address, job) as client:
        return _state(client.get_job_info(job))


def jobs(address: str) -> list[JobState]:
    """Return all jobs that were submitted to the cluster, oldest first."""
    with _client(address) as client:
        found = [_state(details) for details in client.list_jobs() if details.submission_id]
    return sorted(found, key=lambda state: state.started or float("inf"))


def logs(address: str, job: str, follow: bool = False) -> Iterator[str]:
    """Yield what the job's driver wrote, in chunks; with `follow` until the job ends.

    Raises:
        LicError: no such job, no Ray dashboard, or the connection broke; the job itself continues.
    """
    with _client(address, job) as client:
        client.get_job_info(job)  # raises for an unknown job, which the stream would hide
        if not follow:
            yield client.get_job_logs(job)
            return
        with asyncio.Runner() as runner:
            chunks = client.tail_job_logs(job)
            while (chunk := runner.run(_next(chunks))) is not None:
                yield chunk


def stop(address: str, job: str) -> JobState:
    """Stop a job and wait until it has ended: its processes get SIGTERM, and SIGKILL three seconds later.

    A job that has ended is left as it is. What a stopped build has written stays and is not built again.
    """
    with _client(address, job) as client:
        client.stop_job(job)
    return wait(address, job)


def wait(address: str, job: str) -> JobState:
    """Wait for the end of a job and return its state."""
    with _client(address, job) as client:
        while (state := _state(client.get_job_info(job))).status not in ENDED:
            time.sleep(POLL_SECONDS)
    return state


def require_success(address: str, job: str) -> JobState:
    """Wait for the end of a job, return its state, and raise unless it succeeded.

    Raises:
        LicError: it failed or was stopped. UsageError or ToleranceError where its command ended with their exit code.
    """
    state = wait(address, job)
    if state.status == "SUCCEEDED":
        return state
    error = EXIT_CODES.get(state.exit_code or 1, LicError)
    if error is ToleranceError:
        raise error(f"job {job} is done, but set too many samples aside", hint="its log names them")
    how = "was stopped" if state.status == "STOPPED" else f"failed: {state.message}"
    raise error(f"job {job} {how}", hint="its log says more; submitted again, it goes on where it stopped")


async def _next(chunks: AsyncIterator[str]) -> str | None:
    return await anext(chunks, None)


def _state(details: JobDetails) -> JobState:
    started = None if details.start_time is None else details.start_time / 1000
    ended = time.time() if details.end_time is None else details.end_time / 1000
    return JobState(
        job=details.submission_id or "",
        status=str(details.status),
        message=(details.message or "").splitlines()[0].split(", last available logs")[0] if details.message else "",
        started=started,
        seconds=max(0.0, ended - started) if started else 0.0,
        exit_code=details.driver_exit_code,
    )


@contextmanager
def _client(address: str, job: str = "") -> Iterator[JobSubmissionClient]:
    """Open a client of the cluster at `address`; every error of Ray, here or within the block, becomes one line."""
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).netloc:
        raise UsageError(f"'{address}' is no URL of a Ray dashboard", hint="--address http://HEAD:8265")
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    address = address.rstrip("/")
    try:
        answer = requests.get(f"{address}/api/version", timeout=CONNECT_SECONDS)  # the client itself has no time limit
        if answer.status_code not in (401, 403) and "ray_version" not in answer.text:
            raise LicError(f"what answers at {address} is no Ray dashboard with a job server", hint=START)
        with _environment(RAY_API_SERVER_ADDRESS=address):  # takes precedence over the client's argument
            client = JobSubmissionClient(address)
        yield client
    except AuthenticationError as error:
        raise LicError(
            f"{address} refused the token: {str(error).splitlines()[0]}",
            hint="RAY_AUTH_MODE=token with the cluster's token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
        ) from error
    except (requests.RequestException, aiohttp.ClientError, ConnectionError) as error:
        raise LicError(f"no answer from a Ray dashboard at {address} ({type(error).__name__})", hint=START) from error
    except RuntimeError as error:  # Ray's client, for any other answer of the server
        if job and "status code 404" in str(error):
            raise LicError(f"{address} knows no job {job}", hint="`lic-dist submit status` lists them") from error
        lines = [line for line in str(error).splitlines() if line.strip(" .")]
        raise LicError(
            f"{address}: {' '.join(lines[-1:]).strip()[:300]}", hint="a job that was submitted goes on"
        ) from error


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
