"""`lic-dist bench`: measurements, each beside named baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lic_dist.app.commands.options import ConfigFile, JsonFile, Overrides, write_json

app = typer.Typer(help="Measure, beside named baselines, in one run.", no_args_is_help=True)


@app.command("quantization")
def quantization(
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


@app.command("cache")
def cache(
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


@app.command("training")
def training(
    parts: Annotated[list[str] | None, typer.Option("--part", help="feeding or in-loop; may be repeated.")] = None,
    images: Annotated[Path | None, typer.Option(help="Photos to build from; default: scikit-image's.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of which medians are taken.")] = 9,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples and steps.")] = False,
    out: JsonFile = None,
) -> None:
    """Training from a cache against tensors in memory, and against quantizing inside the training loop."""
    from lic_dist.benchmarks.training import bench

    write_json(out, bench(parts or (), images, rounds, quick))


@app.command("codec")
def codec(
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


@app.command("refine")
def refine(
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


@app.command("progressive")
def progressive(
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


@app.command("options")
def options(
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


@app.command("blocks")
def blocks(
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


@app.command("calibration")
def calibration(
    model: Annotated[str | None, typer.Option(help="A checkpoint, or a name of `lic-dist models`.")] = None,
    images: Annotated[Path | None, typer.Option(help="Pictures whose centres are taken.")] = None,
    quantizers: Annotated[list[str] | None, typer.Option("--quantizer", help="May be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="RDOQ, six pictures.")] = False,
    out: JsonFile = None,
) -> None:
    """CPU time and L of calibration beside the pattern search that it took the place of."""
    from lic_dist.benchmarks.calibration import bench

    write_json(out, bench(model, images, quantizers or (), quick))


@app.command("scale")
def scale(
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


@app.command("gpu")
def gpu(
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
