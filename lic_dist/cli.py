"""The command line: one command a job. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lic_dist import __version__
from lic_dist.errors import LicError, UsageError

if TYPE_CHECKING:
    from lic_dist.building.build import BuildReport
    from lic_dist.cache.place import Place
    from lic_dist.cluster.submit import Kind
    from lic_dist.config import Experiment

# Idle OpenMP threads that spin starve their own process where cores are shared; read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

app = typer.Typer(
    help="Distributed dataset-caching finetuning for learned image compression.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Build and look after the latent cache.", no_args_is_help=True)
config_app = typer.Typer(help="Look at experiment files.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure, beside named baselines, in one run.", no_args_is_help=True)
submit_app = typer.Typer(
    help="Run commands as jobs on a Ray cluster. Ray never starts a job again by itself: submit it again, it resumes.",
    no_args_is_help=True,
)
app.add_typer(cache_app, name="cache")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.add_typer(submit_app, name="submit")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a key; may be repeated.")]
EngineName = Annotated[str | None, typer.Option("--engine", help="ray or local; overrides engine.name.")]
Architecture = Annotated[str | None, typer.Option(help="Of a checkpoint that does not say its own.")]
Lmbda = Annotated[float | None, typer.Option("--lambda", help="Of a checkpoint that does not say its own.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first photo that cannot be used.")]
Target = Annotated[str, typer.Argument(help="The store's path or URL, or the experiment's YAML file.")]
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
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")]


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
    """Run the app; a LicError becomes one line and its exit code."""
    try:
        app()
    except LicError as error:
        if os.environ.get("LIC_DIST_DEBUG"):
            raise
        typer.secho(f"error: {error.message}", fg="red", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:  # what no room foresaw is still one line for the user
        if os.environ.get("LIC_DIST_DEBUG"):
            raise
        text = " ".join(str(error).split())[:300]
        typer.secho(f"error: {type(error).__name__}: {text}", fg="red", err=True)
        typer.echo("hint: `lic-dist --debug ...` shows where", err=True)
        sys.exit(1)


def main_of(*command: str) -> None:
    """Run one command of the app with this process's arguments: what the scripts in jobs/ do."""
    sys.argv[1:1] = command
    main()


def _experiments(path: Path, overrides: list[str] | None, engine: str | None = None) -> list[Experiment]:
    from lic_dist import config

    chosen = [*(overrides or []), *([f"engine.name={engine}"] if engine else [])]
    return list(config.expand(path, chosen))


def _write_json(path: Path | None, figures: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a base model end to end (also under torchrun: torchrun ... -m lic_dist train CONFIG)."""
    from lic_dist.config import need
    from lic_dist.training.base import train as run

    for experiment in _experiments(config, overrides):
        typer.echo(run(need(experiment.train, "train"), need(experiment.images, "images")))


@app.command()
def finetune(config: ConfigFile, overrides: Overrides = None) -> None:
    """Retrain the decoder side from a cache (also under torchrun: torchrun ... -m lic_dist finetune CONFIG)."""
    from lic_dist.training.finetune import finetune as run

    for experiment in _experiments(config, overrides):
        typer.echo(run(experiment))


@cache_app.command("scan")
def cache_scan(
    config: ConfigFile,
    overrides: Overrides = None,
    strict: Strict = False,
    afresh: Annotated[bool, typer.Option("--afresh", help="Read the photos again that are known already.")] = False,
) -> None:
    """Read every photo once and write the manifest beside the store; goes on where a scan was stopped."""
    from lic_dist.building.job import manifest_of

    for experiment in _experiments(config, overrides):
        photos = manifest_of(experiment, afresh, strict)
        faulty = sum(photos.faults.values())
        for photo in itertools.islice((photo for photo in photos if photo.fault), 20):
            typer.echo(f"set aside: {photo.path}: {photo.fault}", err=True)
        typer.echo(f"{len(photos) - faulty} photos, {faulty} set aside{_reasons(photos.faults)}")


@cache_app.command("plan")
def cache_plan(config: ConfigFile, overrides: Overrides = None, out: JsonFile = None) -> None:
    """Print samples, shards, bytes, free space and an estimate of the time; builds nothing."""
    from dataclasses import asdict

    from lic_dist.building.estimate import describe, estimate
    from lic_dist.building.job import prepare

    estimates = []
    for experiment in _experiments(config, overrides):
        found = estimate(prepare(experiment))
        estimates.append(asdict(found))
        typer.echo("\n".join(describe(found)))
    _write_json(out, estimates)


@cache_app.command("adapt")
def cache_adapt(
    config: ConfigFile,
    out: Annotated[Path | None, typer.Option(help="The record's file; default: beside the store.")] = None,
    overrides: Overrides = None,
) -> None:
    """Calibrate step and strength and adapt the tables on the pilot; write the quantizer record and its curve."""
    from lic_dist.building.calibrate import describe
    from lic_dist.building.job import prepare
    from lic_dist.building.pilot import adapt, record_beside
    from lic_dist.cache.folder import Folder
    from lic_dist.evaluation.plots import calibration_plot

    for experiment in _experiments(config, overrides):
        job = prepare(experiment)
        record = adapt(job)
        around, key = record_beside(job.place, job.quantizer.group)
        plot = Path(out or key).with_suffix(".png")
        if out is not None:
            record.save(out)
        else:
            around.put(key, record.to_json().encode())
            plot = around.root / plot if isinstance(around, Folder) else plot
        calibration_plot(record.notes, plot, job.quantizer.group)
        typer.echo("\n".join([*describe(record), f"{out or f'{around}/{key}'}, {plot}"]))


@cache_app.command("build")
def cache_build(
    config: ConfigFile,
    overrides: Overrides = None,
    engine: EngineName = None,
    strict: Strict = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Remove the store that is there first; asks.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    out: JsonFile = None,
) -> None:
    """Build the cache, or what is left of it: scan, plan, pilot and every shard without a marker."""
    from lic_dist.building.build import build

    experiments = _experiments(config, overrides, engine)
    if rebuild and not yes:
        for experiment in experiments:
            _ask_to_remove(experiment)
    _write_json(out, [_show_build(build(experiment, strict, rebuild)) for experiment in experiments])


@cache_app.command("requantize")
def cache_requantize(
    config: ConfigFile, overrides: Overrides = None, engine: EngineName = None, out: JsonFile = None
) -> None:
    """Add a quantizer's group from the stored y: other states, step, lambda, tables or entropy model; no photo is read.

    For example --set quantizer.states=4 --set quantizer.group=tcq4, or --set model.checkpoint=runs/finetuned.
    """
    from lic_dist.building.build import requantize

    _write_json(out, [_show_build(requantize(one)) for one in _experiments(config, overrides, engine)])


def _show_build(report: BuildReport) -> dict[str, Any]:
    from dataclasses import asdict

    if report.faults:
        typer.secho(f"warning: samples set aside{_reasons(report.faults)}", fg="yellow", err=True)
    rate = f", {report.bpp:.4f} bpp" if report.shards_built else ""
    typer.echo(
        f"{report.path}: {report.samples} samples, {report.shards_built} of {report.shards} shards built now"
        f"{rate}, {report.seconds:.0f} s"
    )
    return asdict(report)


def _reasons(faults: Mapping[str, int]) -> str:
    return ": " + ", ".join(f"{count} {reason}" for reason, count in sorted(faults.items())) if faults else ""


def _ask_to_remove(experiment: Experiment) -> None:
    from lic_dist.building.job import place
    from lic_dist.cache.inspect import inspect
    from lic_dist.cache.layout import read_attributes

    there = place(experiment)
    if read_attributes(there) is None:
        return
    found = inspect(there)
    groups = ", ".join(found["groups"]) or "none"
    typer.echo(
        f"{there}: {found['shards_written']} of {found['num_shards']} shards, {found['bytes'] / 1e6:.1f} MB, "
        f"groups: {groups}"
    )
    if not sys.stdin.isatty():
        raise UsageError("--rebuild removes this store", hint="say --yes where nobody can be asked")
    if not typer.confirm("Remove it and build anew?"):
        raise typer.Exit(1)


def _stores(target: str, overrides: list[str] | None) -> list[tuple[Place, Experiment | None]]:
    """A store by its path or URL, or those of an experiment's YAML file."""
    from lic_dist.building.job import place
    from lic_dist.cache.place import place_of

    if Path(target).suffix in (".yaml", ".yml"):
        return [(place(experiment), experiment) for experiment in _experiments(Path(target), overrides)]
    return [(place_of(target), None)]


@cache_app.command("inspect")
def cache_inspect(
    target: Target,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="Draw rates, distortions and sizes to this PNG file.")] = None,
    out: JsonFile = None,
) -> None:
    """Show progress with rate and ETA, sizes, rates and distortions, identity and provenance of a store."""
    from lic_dist.cache.inspect import describe, inspect
    from lic_dist.evaluation.plots import cache_plot

    reports = [inspect(place) for place, _ in _stores(target, overrides)]
    for report in reports:
        typer.echo("\n".join(describe(report)))
        if plot is not None:
            cache_plot(report, plot)
    _write_json(out, reports[0] if len(reports) == 1 else reports)


@cache_app.command("verify")
def cache_verify(
    target: Target,
    overrides: Overrides = None,
    repair: Annotated[bool, typer.Option("--repair", help="Write again just what is damaged; needs the YAML.")] = False,
    out: JsonFile = None,
) -> None:
    """Read everything again; name each shard and array that is missing, zero, torn or altered."""
    from dataclasses import asdict

    from lic_dist.building.build import repair as mend
    from lic_dist.cache.verify import verify

    figures, left = [], 0
    for place, experiment in _stores(target, overrides):
        findings = verify(place)
        for finding in findings:
            shard = f"shard {finding.shard}: " if finding.shard >= 0 else ""
            typer.echo(f"{shard}{finding.array}: {finding.what}")
        if findings and repair:
            if experiment is None:
                raise UsageError("--repair needs to know how the store is built", hint="give the experiment's YAML")
            typer.echo(f"{place}: {mend(experiment, findings)} shards written again")
            findings = verify(place)
        left += len(findings)
        figures.append({"path": str(place), "findings": [asdict(finding) for finding in findings]})
        typer.echo(f"{place}: {f'{len(findings)} faults' if findings else 'whole'}")
    _write_json(out, figures)
    if left:
        raise LicError(f"{left} faults in {target}", hint="`lic-dist cache verify CONFIG --repair` mends them")


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None, engine: EngineName = None) -> None:
    """Code a folder of images to real bytes with each checkpoint and quantizer, decode, compare, measure."""
    from lic_dist.evaluation.run import evaluate as run

    for experiment in _experiments(config, overrides, engine):
        typer.echo(run(experiment))


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="Result files: ours, or published ones in CompressAI's JSON.")],
    anchor: Annotated[str, typer.Option(help="The curve that BD-rates refer to.")],
    out: Annotated[Path, typer.Option(help="Folder for results.md and rd.png.")] = Path("report"),
) -> None:
    """BD-rates between curves and a rate-distortion plot."""
    from lic_dist.evaluation.report import report as run

    run(files, anchor, out)


@app.command()
def encode(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    file: Annotated[Path, typer.Argument(help="The bitstream to write.")],
    model: Annotated[str, typer.Option(help="A checkpoint, or a name of `lic-dist models`.")],
    quantizer: Annotated[str, typer.Option(help="sq, a name that the checkpoint carries, or a record.")] = "sq",
    architecture: Architecture = None,
    lmbda: Lmbda = None,
) -> None:
    """Code one picture."""
    from lic_dist import images

    data = _codec(model, quantizer, architecture, lmbda).encode(images.read(image)).data
    file.write_bytes(data)
    typer.echo(f"{file}: {len(data)} bytes")


@app.command()
def decode(
    file: Annotated[Path, typer.Argument(help="The bitstream.")],
    image: Annotated[Path, typer.Argument(help="The picture to write (PNG).")],
    model: Annotated[str, typer.Option(help="The checkpoint it was made with.")],
    quantizer: Annotated[str, typer.Option(help="The quantizer it was made with.")] = "sq",
    architecture: Architecture = None,
    lmbda: Lmbda = None,
) -> None:
    """Decode one picture."""
    from PIL import Image

    try:
        data = file.read_bytes()
    except OSError as error:
        raise LicError(f"cannot read {file}: {error.strerror}") from None
    Image.fromarray(_codec(model, quantizer, architecture, lmbda).decode(data)).save(image)
    typer.echo(str(image))


def _codec(model: str, quantizer: str, architecture: str | None, lmbda: float | None) -> Any:
    from lic_dist.building.records import named_record
    from lic_dist.codec.codec import ImageCodec
    from lic_dist.models import checkpoint

    loaded = checkpoint.load(model, architecture, lmbda)
    return ImageCodec(loaded.model, named_record(loaded, quantizer))


@app.command()
def models() -> None:
    """List the checkpoints shipped with the package."""
    from lic_dist.models import checkpoint

    for name, path in checkpoint.zoo().items():
        content = checkpoint.read(path)
        spec = ", ".join(f"{key} {content[key]}" for key in ("architecture", "N", "M", "lmbda"))
        typer.echo(f"{name}: {spec}; quantizers: {', '.join(['sq', *content['quantizers']])}")


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the resolved file, every default filled in; with a sweep, each combination."""
    import yaml

    documents = [
        experiment.model_dump(mode="json", exclude_none=True) for experiment in _experiments(config, overrides)
    ]
    typer.echo(yaml.safe_dump_all(documents, sort_keys=False).rstrip())


@bench_app.command("quantization")
def bench_quantization(
    parts: Annotated[
        list[str] | None, typer.Option("--part", help="speed, gap, mixture, lanes or candidates; may be repeated.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Photos for the real latents; default: scikit-image's.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of which medians are taken.")] = 9,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples: under a minute.")] = False,
    out: JsonFile = None,
) -> None:
    """Speed of every quantizer, gap to Shannon's bound, gain on a mixture, loss by lanes and candidates."""
    from lic_dist.benchmarks.quantization import bench

    _write_json(out, bench(parts or (), images, rounds, quick))


@app.command()
def quickstart(
    images: Annotated[Path | None, typer.Option(help="Your own photos instead of the embedded ones.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where everything goes; default: runs/quickstart[-DIR].")] = None,
    engine: Annotated[str, typer.Option(help="ray or local.")] = "ray",
    json_file: JsonFile = None,
) -> None:
    """The main job end to end in a few minutes: calibrate, cache, finetune, measure, with a table and pictures."""
    from lic_dist.quickstart import quickstart as run

    default = Path("runs") / ("quickstart" if images is None else f"quickstart-{images.resolve().name}")
    _write_json(json_file, run(out or default, images, engine))


@submit_app.command("cache")
def submit_cache(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = LOCAL_DASHBOARD,
    folder: Folder = "",
    follow: Follow = False,
) -> None:
    """Submit `cache build`; its workers spread over the cluster. Only the YAML travels, photos and store are shared."""
    _submit("cache", config, overrides, address, folder, follow)


@submit_app.command("finetune")
def submit_finetune(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=0, help="Ranks, a GPU each, on one node; 0: one rank on a CPU.")] = 0,
    address: Address = LOCAL_DASHBOARD,
    folder: Folder = "",
    follow: Follow = False,
) -> None:
    """Submit `finetune`, on one node; under torchrun where it has several ranks."""
    _submit("finetune", config, overrides, address, folder, follow, gpus)


@submit_app.command("evaluate")
def submit_evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = LOCAL_DASHBOARD,
    folder: Folder = "",
    follow: Follow = False,
) -> None:
    """Submit `evaluate`; its workers spread over the cluster."""
    _submit("evaluate", config, overrides, address, folder, follow)


def _submit(
    kind: Kind, path: Path, overrides: list[str] | None, address: str, folder: str, follow: bool, gpus: int = 0
) -> None:
    from lic_dist.cluster.submit import submit

    job = submit(kind, path, overrides or (), address, folder, gpus)
    typer.echo(job)
    if follow:
        _follow(address, job)


def _follow(address: str, job: str) -> None:
    from lic_dist.cluster.submit import logs, require_success

    for text in logs(address, job, follow=True):
        typer.echo(text, nl=False)
    typer.echo(require_success(address, job), err=True)


@submit_app.command("status")
def submit_status(
    job: Annotated[str, typer.Argument(metavar="[JOB]", help="Default: every job of the cluster.")] = "",
    address: Address = LOCAL_DASHBOARD,
) -> None:
    """Show the state of a job, or of all."""
    from lic_dist.cluster.submit import jobs, status

    for state in [status(address, job)] if job else jobs(address):
        typer.echo(state)


@submit_app.command("logs")
def submit_logs(job: JobName, follow: Follow = False, address: Address = LOCAL_DASHBOARD) -> None:
    """Show what a job wrote."""
    from lic_dist.cluster.submit import logs

    if follow:
        _follow(address, job)
        return
    for text in logs(address, job):
        typer.echo(text, nl=False)


@submit_app.command("stop")
def submit_stop(job: JobName, address: Address = LOCAL_DASHBOARD) -> None:
    """Stop a job and wait for its end; what it wrote stays and is not built again."""
    from lic_dist.cluster.submit import stop

    typer.echo(stop(address, job))
