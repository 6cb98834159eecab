"""`lic-dist evaluate`, `report` and `curves`: what a model and its quantizers bring, in figures and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lic_dist.app.commands.options import EngineName, JsonFile, Overrides, experiments, write_json
from lic_dist.errors import UsageError


def evaluate(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")] = None,
    overrides: Overrides = None,
    engine: EngineName = None,
    generations: Annotated[
        int | None, typer.Option(min=1, help="Instead: code each picture again, N times in all, and plot the drift.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="With --generations: a folder for the pictures that were coded, to build a cache of."),
    ] = None,
    out: JsonFile = None,
    archive: Annotated[
        Path | None,
        typer.Option("--verify", metavar="ARCHIVE", help="Instead: decode what `evaluate.bitstreams` kept, compare."),
    ] = None,
    images: Annotated[str | None, typer.Option(help="Of --verify: where the originals lie.")] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="Of --verify: a checkpoint that is not where it was; may be repeated.")
    ] = None,
) -> None:
    """Code a folder of images to real bytes with each checkpoint and quantizer, decode, compare, measure."""
    if archive is not None and config is None:
        _verify(archive, images, checkpoint or (), out)
        return
    if config is None or archive is not None:
        raise UsageError("evaluate takes an experiment's YAML file, or --verify and an archive, and not both")
    if images or checkpoint:
        raise UsageError("--images and --checkpoint are of --verify", hint="evaluate.images, evaluate.checkpoints")
    from lic_dist.evaluation.run import evaluate as code
    from lic_dist.evaluation.summary import require_coded, summary

    chosen = experiments(config, overrides, engine, "evaluate")
    if keep and not generations:
        raise UsageError("--keep without --generations", hint="`evaluate.show` names images whose pictures are kept")
    if generations:
        from lic_dist.evaluation import generations as successive

        summaries = [successive.summary(successive.evaluate_generations(one, generations, keep)) for one in chosen]
    else:
        summaries = [summary(code(one)) for one in chosen]
    write_json(out, summaries)
    require_coded(summaries)


def _verify(archive: Path, images: str | None, given: Sequence[str], out: Path | None) -> None:
    """Check an archive of bitstreams; print what differs, or that nothing does."""
    from lic_dist.evaluation.summary import print_points
    from lic_dist.evaluation.verify import verify

    found = verify(archive, images, given)
    points = print_points(found.points) if found.points else []
    found.print_differences()
    write_json(out, {"archive": str(archive), "differences": list(map(asdict, found.differences)), "points": points})
    found.require_equal()
    typer.echo(found.line)


def report(
    files: Annotated[list[Path], typer.Argument(help="Result files: ours, or published ones in CompressAI's JSON.")],
    anchor: Annotated[
        list[str] | None,
        typer.Option(help="The curve to compare with; may be repeated. Default: base sq, or else base sq-adapted."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.md and the charts.")] = Path("report"),
    curve: Annotated[list[str] | None, typer.Option(help="Pattern of the curves to show; may be repeated.")] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="What groups points into curves and names them: of {run}, {arm}, {quantizer}, {seed}, {checkpoint}, "
            "{file}. Default: {arm} {quantizer}."
        ),
    ] = None,
    study: Annotated[
        bool, typer.Option("--study", help="Write study.html too: a blind comparison of kept pictures in pairs.")
    ] = False,
    answers: Annotated[
        list[Path] | None, typer.Option(help="A viewer's answers to the study in --out; may be repeated.")
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            help="Write for other programs too: compressai, csv, parquet, latex or codec-compare; may be repeated."
        ),
    ] = None,
) -> None:
    """BD-rates between curves, gains at each lambda, charts, and a page to compare the pictures on."""
    from lic_dist.reporting.curves import LABEL
    from lic_dist.reporting.report import report as run

    run(files, anchor or (), out, curve or (), label or LABEL, study=study, answers=answers or (), exports=export or ())


def curves(
    folders: Annotated[list[Path], typer.Argument(help="Folders of trainings or finetunings, each with a log.jsonl.")],
    out: Annotated[Path, typer.Option(help="The picture, PNG or SVG.")] = Path("curves.png"),
) -> None:
    """Draw how trainings went: held-out L, bpp and PSNR over their steps."""
    from lic_dist.training.picture import learning_curves

    typer.echo("\n".join([*learning_curves(folders, out), str(out)]))
