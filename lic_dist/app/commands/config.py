"""`lic-dist config ...`: explain experiment files and show one resolved. `lic-dist init`: write a first one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lic_dist.app.commands.options import Architecture, ConfigFile, Lmbda, Overrides, experiments

app = typer.Typer(help="Look at experiment files: what they may hold, and what one comes to.", no_args_is_help=True)


@app.command("show")
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every key there is, with what it means; absent sections as comments.")
    ] = False,
) -> None:
    """Print the resolved file, every default filled in; with a sweep, each combination."""
    import yaml

    chosen = experiments(config, overrides)
    if everything:
        from lic_dist.config.reference import commented

        typer.echo("\n---\n".join(commented(experiment) for experiment in chosen))
        return
    documents = [experiment.model_dump(mode="json", exclude_none=True) for experiment in chosen]
    typer.echo(yaml.safe_dump_all(documents, sort_keys=False).rstrip())


@app.command("explain")
def explain(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="A section, a key (finetune.lr), or its last part.")] = "",
    page: Annotated[bool, typer.Option("--markdown", help="All of it, as docs/configuration.md.")] = False,
) -> None:
    """Say what a key means, what it takes and its default; without one, which sections there are."""
    from lic_dist.config import reference as config_reference

    typer.echo(config_reference.markdown() if page else "\n".join(config_reference.explain(key)), nl=not page)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of experiment files, from which editors complete and check them."""
    import json

    from lic_dist.config import reference as config_reference

    typer.echo(json.dumps(config_reference.schema(), indent=1))


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where experiment.yaml and all results are to lie.")],
    images: Annotated[Path, typer.Option(help="Your photos.")],
    checkpoint: Annotated[str, typer.Option(help="The base model: a checkpoint, or a name of `lic-dist models`.")],
    test: Annotated[Path | None, typer.Option(help="Test pictures, such as Kodak's; none of the photos above.")] = None,
    architecture: Architecture = None,
    lmbda: Lmbda = None,
) -> None:
    """Write a commented DIR/experiment.yaml to begin with, for these photos and this checkpoint."""
    from lic_dist.app.starting import write

    typer.echo(write(folder, images, checkpoint, test, architecture, lmbda))
