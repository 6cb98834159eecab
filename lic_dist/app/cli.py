"""The command line: one function for each command. Heavy imports are inside the functions, to keep --help fast."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lic_dist.app.commands import bench, cache, codec, data, evaluation, models, push, submit
from lic_dist.app.commands import config as config_commands
from lic_dist.app.commands.options import (
    ConfigFile,
    EngineName,
    JsonFile,
    Overrides,
    experiments,
    with_engine,
    write_json,
)
from lic_dist.errors import LicError, SharedError, UsageError
from lic_dist.version import __version__

# Idle OpenMP threads that spin take time from their own process on shared cores. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

INTERRUPTED = 130  # the exit code of Ctrl-C

app = typer.Typer(
    help="Distributed dataset-caching finetuning for learned image compression.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache.app, name="cache")
app.add_typer(models.app, name="models")
app.add_typer(config_commands.app, name="config")
app.add_typer(bench.app, name="bench")
app.add_typer(submit.app, name="submit")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lic-dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if debug:
        os.environ["LIC_DIST_DEBUG"] = "1"


def main() -> None:
    """Run the app. Print an error in one line and exit with its code; with --debug, raise it instead."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("stopped; the same command goes on where it is", err=True)
        raise
    except LicError as error:
        if os.environ.get("LIC_DIST_DEBUG"):
            raise
        if isinstance(error, SharedError) and os.environ.get("RANK", "0") != "0":
            sys.exit(error.exit_code)
        typer.secho(f"error: {error.message}", fg="red", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:  # an unexpected error is also one line for the user
        if os.environ.get("LIC_DIST_DEBUG"):
            raise
        text = " ".join(str(error).split())[:300]
        typer.secho(f"error: {type(error).__name__}: {text}", fg="red", err=True)
        typer.echo("hint: `lic-dist --debug ...` shows where", err=True)
        sys.exit(1)
    finally:
        if "triton" not in sys.modules:  # its bindings warn of objects that are not collected
            gc.freeze()  # spares a last collection over torch's million objects: a third of a second


def main_of(*command: str) -> None:
    """Run one command of the app with this process's arguments, as the scripts in jobs/ do."""
    sys.argv[1:1] = command
    main()


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a base model end to end (also under torchrun: torchrun ... -m lic_dist train CONFIG)."""
    from lic_dist.config import need
    from lic_dist.training.base import train as run

    for experiment in experiments(config, overrides, section="train"):
        typer.echo(run(need(experiment.train, "train"), need(experiment.images, "images")))


@app.command()
def finetune(
    config: ConfigFile,
    overrides: Overrides = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="ray: engine.trainers workers under Ray Train; default: here.")
    ] = None,
) -> None:
    """Retrain the decoder side from a cache (also under torchrun: torchrun ... -m lic_dist finetune CONFIG)."""
    chosen = experiments(config, overrides, engine, "finetune")
    if engine == "ray":
        if "WORLD_SIZE" in os.environ:
            raise UsageError(
                "--engine ray under torchrun", hint="Ray Train starts its own workers: leave one of them out"
            )
        from lic_dist.cluster.train import finetune_on_ray as run
    else:
        from lic_dist.training.finetune import finetune as run

    for experiment in chosen:
        typer.echo(run(experiment))


app.command()(evaluation.evaluate)
app.command()(evaluation.report)
app.command()(evaluation.curves)


@app.command("run")
def run_study(
    config: ConfigFile,
    overrides: Overrides = None,
    engine: EngineName = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings, builds, finetunings and codings side by side.")] = 1,
    fast: Annotated[bool, typer.Option("--fast", help="The file's short form: what it has under 'fast'.")] = False,
    logs: Annotated[Path, typer.Option(help="Folder for what several jobs say.")] = Path("runs/logs"),
) -> None:
    """Do a whole study: train, cache, finetune, evaluate, report, whatever the file has sections for; goes on."""
    from lic_dist.app.study import study
    from lic_dist.config.sweeps import documents

    study(documents(config, with_engine(overrides, engine), fast), jobs, logs)


app.command()(config_commands.init)
app.command()(data.data)
app.command()(codec.encode)
app.command()(codec.decode)
app.command()(push.push)
app.command()(models.export)


@app.command()
def quickstart(
    images: Annotated[Path | None, typer.Option(help="Your own photos instead of the embedded ones.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where everything goes; default: runs/quickstart[-DIR].")] = None,
    engine: Annotated[str, typer.Option(help="ray or local.")] = "ray",
    json_file: JsonFile = None,
) -> None:
    """The main job end to end in a few minutes: calibrate, cache, finetune, measure, with a table and pictures."""
    from lic_dist.app.quickstart.job import quickstart as run

    default = Path("runs") / ("quickstart" if images is None else f"quickstart-{images.resolve().name}")
    write_json(json_file, run(out or default, images, engine))
