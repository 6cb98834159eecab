"""`lic-dist submit ...`: run commands as jobs on a Ray cluster, and list, follow and stop them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lic_dist.app.commands.options import ConfigFile, Overrides

if TYPE_CHECKING:
    from lic_dist.cluster.submit import Kind

app = typer.Typer(
    help="Run commands as jobs on a Ray cluster. Ray never starts a job again by itself: submit it again, it resumes.",
    no_args_is_help=True,
)

Address = Annotated[
    str,
    typer.Option(envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], metavar="URL", help="The cluster's Ray dashboard."),
]
Folder = Annotated[str, typer.Option(help="Where on the cluster relative paths begin; default: the present folder.")]
Follow = Annotated[
    bool, typer.Option("--follow", help="Show the log and exit as the job does; Ctrl-C leaves it running.")
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="As `submit` printed it.")]
LOCAL_DASHBOARD = "http://127.0.0.1:8265"


@app.command("cache")
def cache(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = LOCAL_DASHBOARD,
    folder: Folder = "",
    follow: Follow = False,
) -> None:
    """Submit `cache build`; its workers spread over the cluster. Only the YAML travels, photos and store are shared."""
    _submit("cache", config, overrides, address, folder, follow)


@app.command("finetune")
def finetune(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = LOCAL_DASHBOARD,
    folder: Folder = "",
    follow: Follow = False,
) -> None:
    """Submit `finetune` under Ray Train: engine.trainers ranks, each with engine.gpus_per_trainer GPUs (0 or 1)."""
    _submit("finetune", config, overrides, address, folder, follow)


@app.command("evaluate")
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = LOCAL_DASHBOARD,
    folder: Folder = "",
    follow: Follow = False,
) -> None:
    """Submit `evaluate`; its workers spread over the cluster."""
    _submit("evaluate", config, overrides, address, folder, follow)


def _submit(kind: Kind, path: Path, overrides: list[str] | None, address: str, folder: str, follow: bool) -> None:
    from lic_dist.cluster.submit import submit

    job = submit(kind, path, overrides or (), address, folder)
    typer.echo(job)  # alone on stdout, for scripts
    option = "" if address == LOCAL_DASHBOARD else f" --address {address}"
    if follow:
        _follow(address, job)
    else:
        typer.echo(f"watch it: lic-dist submit logs {job} --follow{option}", err=True)
        typer.echo(f"end it:   lic-dist submit stop {job}{option}", err=True)
    typer.echo(_next_step(kind, path, overrides, option), err=True)


def _next_step(kind: Kind, path: Path, overrides: list[str] | None, option: str) -> str:
    """Return a line that says what a job writes and what to do after it."""
    from lic_dist.config import need
    from lic_dist.config.sweeps import expand

    first = next(iter(expand(path, overrides or ())))
    output = need(first.cache, "cache").path if kind == "cache" else need(getattr(first, kind), kind).out
    after = {
        "cache": f"lic-dist submit finetune {path}{option}" if first.finetune else "a finetune section in the file",
        "finetune": f"lic-dist submit evaluate {path}{option}" if first.evaluate else "an evaluate section in the file",
        "evaluate": f"lic-dist report {output}",
    }
    return f"it writes {output}; then: {after[kind]}"


def _follow(address: str, job: str) -> None:
    from lic_dist.cluster.submit import logs, require_success

    for text in logs(address, job, follow=True):
        typer.echo(text, nl=False)
    typer.echo(require_success(address, job), err=True)


@app.command("status")
def status(
    job: Annotated[str, typer.Argument(metavar="[JOB]", help="Default: every job of the cluster.")] = "",
    address: Address = LOCAL_DASHBOARD,
) -> None:
    """Show the state of a job, or of all."""
    from lic_dist.cluster.submit import jobs, status

    for state in [status(address, job)] if job else jobs(address):
        typer.echo(state)


@app.command("logs")
def logs(job: JobName, follow: Follow = False, address: Address = LOCAL_DASHBOARD) -> None:
    """Show what a job wrote."""
    from lic_dist.cluster.submit import logs

    if follow:
        _follow(address, job)
        return
    for text in logs(address, job):
        typer.echo(text, nl=False)


@app.command("stop")
def stop(job: JobName, address: Address = LOCAL_DASHBOARD) -> None:
    """Stop a job and wait for its end; what it wrote stays and is not built again."""
    from lic_dist.cluster.submit import stop

    typer.echo(stop(address, job))
