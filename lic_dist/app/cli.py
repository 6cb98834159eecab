"""The command line: one function for each command. Heavy imports are inside the functions, to keep --help fast."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from lic_dist.app.commands import cache, codec, data, models, push, submit
from lic_dist.app.commands import config as config_commands
from lic_dist.app.commands.options import (
    Architecture,
    ConfigFile,
    EngineName,
    JsonFile,
    Lmbda,
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
bench_app = typer.Typer(help="Measure, beside named baselines, in one run.", no_args_is_help=True)
app.add_typer(cache.app, name="cache")
app.add_typer(models.app, name="models")
app.add_typer(config_commands.app, name="config")
app.add_typer(bench_app, name="bench")
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


@app.command()
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


@app.command()
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


@app.command()
def curves(
    folders: Annotated[list[Path], typer.Argument(help="Folders of trainings or finetunings, each with a log.jsonl.")],
    out: Annotated[Path, typer.Option(help="The picture, PNG or SVG.")] = Path("curves.png"),
) -> None:
    """Draw how trainings went: held-out L, bpp and PSNR over their steps."""
    from lic_dist.training.picture import learning_curves

    typer.echo("\n".join([*learning_curves(folders, out), str(out)]))


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


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, or a name of `lic-dist models`.")],
    file: Annotated[Path, typer.Argument(help="The checkpoint to write.")],
    quantizers: Annotated[
        list[str] | None,
        typer.Option("--quantizer", metavar="NAME=RECORD", help="A record it shall carry; repeatable."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Parameters in float16.")] = False,
    architecture: Architecture = None,
    lmbda: Lmbda = None,
) -> None:
    """Write a checkpoint to ship: in half the size; with the quantizers that were calibrated for it, by name.

    float16 is another model: round it first, then calibrate and build caches with what was written.
    """
    import torch

    from lic_dist.building.records import named_record
    from lic_dist.models import checkpoint as checkpoints

    loaded = checkpoints.load(checkpoint, architecture, lmbda)
    checkpoints.check_agrees(loaded.spec, architecture=architecture, lmbda=lmbda)
    for text in quantizers or ():
        name, equals, record = text.partition("=")
        if not (name and equals) or name == "sq":
            raise UsageError(f"--quantizer {text}: not of the form NAME=RECORD", hint="tcq8=runs/x.zarr/quantized/tcq8")
        loaded.quantizers[name] = named_record(loaded, record).to_json()
    changes = any(not torch.equal(value, value.half().float()) for value in loaded.model.parameters())
    if half and changes and loaded.quantizers:
        raise UsageError(
            "--half rounds the weights that the quantizers were calibrated for",
            hint="export with --half first, calibrate for what that writes, export again with --quantizer",
        )
    checkpoints.save(loaded, file, torch.float16 if half else torch.float32)
    typer.echo(f"{file}: {file.stat().st_size / 1e6:.2f} MB; quantizers: {', '.join(['sq', *loaded.quantizers])}")


@bench_app.command("quantization")
def bench_quantization(
    parts: Annotated[
        list[str] | None,
        typer.Option("--part", help="speed, parts, gap, mixture, lanes or candidates; may be repeated."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Photos for the real latents; default: scikit-image's.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of which medians are taken.")] = 9,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples: under a minute.")] = False,
    out: JsonFile = None,
) -> None:
    """Speed of every quantizer, gap to Shannon's bound, gain on a mixture, loss by lanes and candidates."""
    from lic_dist.benchmarks.quantization import bench

    write_json(out, bench(parts or (), images, rounds, quick))


@bench_app.command("cache")
def bench_cache(
    parts: Annotated[
        list[str] | None,
        typer.Option("--part", help="build, loader, size, memory, plan, append, photos or engine; may be repeated."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Photos to build from; default: scikit-image's.")] = None,
    crops: Annotated[int, typer.Option(min=64, help="Crops of the build.")] = 2000,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of everything.")] = False,
    out: JsonFile = None,
) -> None:
    """A build against the bare work, rates of reading, bytes on disk, memory of workers."""
    from lic_dist.benchmarks.cache import bench

    write_json(out, bench(parts or (), images, crops, quick))


@bench_app.command("training")
def bench_training(
    parts: Annotated[list[str] | None, typer.Option("--part", help="feeding or in-loop; may be repeated.")] = None,
    images: Annotated[Path | None, typer.Option(help="Photos to build from; default: scikit-image's.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of which medians are taken.")] = 9,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples and steps.")] = False,
    out: JsonFile = None,
) -> None:
    """Training from a cache against tensors in memory, and against quantizing inside the training loop."""
    from lic_dist.benchmarks.training import bench

    write_json(out, bench(parts or (), images, rounds, quick))


@bench_app.command("codec")
def bench_codec(
    parts: Annotated[
        list[str] | None, typer.Option("--part", help="codecs, coder or whole; may be repeated; default: all.")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A checkpoint, or a name of `lic-dist models`; may be repeated.")
    ] = None,
    untrained: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:N:M", help="A family with random weights of a size; may be repeated."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Pictures to code; default: scikit-image's.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each picture is coded.")] = 3,
    megapixels: Annotated[float, typer.Option(min=0.1, help="Of the large picture of `whole`.")] = 12.0,
    quick: Annotated[bool, typer.Option("--quick", help="Two pictures, and no large one.")] = False,
    out: JsonFile = None,
) -> None:
    """Time to encode and decode a picture beside CompressAI's own codec and the bare networks, and the size."""
    from lic_dist.benchmarks.codec import bench

    write_json(out, bench(models or (), untrained or (), images, rounds, quick, parts or (), megapixels))


@bench_app.command("refine")
def bench_refine(
    model: Annotated[str | None, typer.Option(help="A checkpoint, or a name of `lic-dist models`.")] = None,
    images: Annotated[Path | None, typer.Option(help="Pictures to refine; default: scikit-image's.")] = None,
    passes: Annotated[
        list[int] | None, typer.Option(min=0, help="Passes; may be repeated; default: 0, 4, 8, 32 and 128.")
    ] = None,
    distortion: Annotated[
        Literal["mse", "ms-ssim", "balanced"], typer.Option(help="As quantizer.refine_distortion.")
    ] = "mse",
    quick: Annotated[bool, typer.Option("--quick", help="Two pictures, 0 and 4 passes.")] = False,
    out: JsonFile = None,
) -> None:
    """What refining y gains over its passes, with SQ and TCQ-8, beside stochastic Gumbel annealing."""
    from lic_dist.benchmarks.refinement import bench

    write_json(out, bench(model, images, passes or (), distortion, quick))


@bench_app.command("progressive")
def bench_progressive(
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A checkpoint, or a name of `lic-dist models`; may be repeated.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Pictures to code; default: scikit-image's.")] = None,
    against: Annotated[
        str | None, typer.Option(help="The model whose dead-zone SQ all are compared with; default: each with its own.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw the change of rate over PSNR, PNG or SVG.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two pictures.")] = False,
    out: JsonFile = None,
) -> None:
    """BD-rates of progressive files, cut, against files of dead-zone SQ at each rate."""
    from lic_dist.benchmarks.progressive import bench

    write_json(out, bench(models or (), images, chart, quick, against))


@bench_app.command("options")
def bench_options(
    file: ConfigFile,
    images: Annotated[
        list[Path] | None, typer.Option(help="A folder of test pictures; may be repeated. Default: scikit-image's.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="The file's fast form, and two pictures a folder.")] = False,
    overrides: Overrides = None,
    out: JsonFile = None,
) -> None:
    """What options of base training bring: trainings of one file, each against the first."""
    from lic_dist.benchmarks.options import bench

    write_json(out, bench(file, overrides or (), images or (), fast))


@bench_app.command("blocks")
def bench_blocks(
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A checkpoint, or a name of `lic-dist models`; may be repeated.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Pictures to code; default: scikit-image's.")] = None,
    sides: Annotated[list[int] | None, typer.Option("--side", help="Of blocks, in pixels; may be repeated.")] = None,
    quantizer: Annotated[str | None, typer.Option(help="As of `encode`.")] = None,
    parts: Annotated[
        list[str] | None, typer.Option("--part", help="rate, speed or memory; may be repeated; default: all.")
    ] = None,
    megapixels: Annotated[float, typer.Option(min=0.1, help="Of the large picture of `memory`.")] = 12.0,
    threads: Annotated[int, typer.Option(min=2, help="Of `speed`, beside one.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Two pictures, and small mosaics.")] = False,
    out: JsonFile = None,
) -> None:
    """Files in blocks against whole pictures: BD-rates with and without mended edges, speed by threads, memory."""
    from lic_dist.benchmarks.blocks import bench

    write_json(out, bench(models or (), images, sides or (), quantizer, parts or (), megapixels, threads, quick))


@bench_app.command("calibration")
def bench_calibration(
    model: Annotated[str | None, typer.Option(help="A checkpoint, or a name of `lic-dist models`.")] = None,
    images: Annotated[Path | None, typer.Option(help="Pictures whose centres are taken.")] = None,
    quantizers: Annotated[list[str] | None, typer.Option("--quantizer", help="May be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="RDOQ, six pictures.")] = False,
    out: JsonFile = None,
) -> None:
    """CPU time and L of calibration beside the pattern search that it took the place of."""
    from lic_dist.benchmarks.calibration import bench

    write_json(out, bench(model, images, quantizers or (), quick))


@bench_app.command("scale")
def bench_scale(
    parts: Annotated[
        list[str] | None, typer.Option("--part", help="megapixels, photos, shards or searchers; may be repeated.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint, or a name of `lic-dist models`.")] = None,
    largest: Annotated[float, typer.Option(min=0.1, help="Megapixels of the largest picture.")] = 6.0,
    rounds: Annotated[int, typer.Option(min=1, help="Times that a quick call is measured.")] = 5,
    fast: Annotated[bool, typer.Option("--fast", help="Few, small sizes: under a minute on one free core.")] = False,
    out: JsonFile = None,
) -> None:
    """Time and memory over megapixels, photos by plan, shards and searchers, with the exponent of each."""
    from lic_dist.benchmarks.scale import bench

    write_json(out, bench(parts or (), model, largest, rounds, fast))


@bench_app.command("gpu")
def bench_gpu(
    parts: Annotated[
        list[str] | None,
        typer.Option("--part", help="search, batch, all-reduce, training or reading; may be repeated."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint, or a name of `lic-dist models`.")] = None,
    megapixels: Annotated[float, typer.Option(min=0.2, help="Of each of the million photos.")] = 2.0,
    crops: Annotated[int, typer.Option(min=1, help="Crops of 256x256 taken of each.")] = 4,
    price: Annotated[float, typer.Option(min=0, help="Of the machine, in dollars an hour.")] = 3.0,
    out: JsonFile = None,
) -> None:
    """Search, a batch from pixels to k, NCCL, training and reading on a GPU machine in three minutes; dollars."""
    from lic_dist.benchmarks.gpu import bench

    write_json(out, bench(parts or (), model, megapixels, crops, price))


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
