"""`lic-dist models`: the families served and the checkpoints shipped; `describe`: a checkpoint; `blend`: of two.

`lic-dist export` writes one to ship.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lic_dist.app.commands.options import Architecture, Lmbda
from lic_dist.errors import UsageError

if TYPE_CHECKING:
    from lic_dist.models.checkpoint import Checkpoint

app = typer.Typer(
    help="List families of models and what they support, and the shipped checkpoints.", invoke_without_command=True
)


@app.callback()
def list_all(context: typer.Context) -> None:
    """List families of models and what they support, and the shipped checkpoints."""
    if context.invoked_subcommand is not None:
        return
    from lic_dist.models import checkpoint
    from lic_dist.models.architectures import ARCHITECTURES, family, installed

    typer.echo("families:")
    for name in (*ARCHITECTURES, *installed()):
        of = family(name)
        z = f", z a {' and '.join(map(str, of.strides.sides))}th" if of.strides.sides else ""
        typer.echo(f"  {name}: y a {of.strides.y}th{z} of the sides; {', '.join(sorted(of.supports))}")
    typer.echo("checkpoints:")
    for name, path in checkpoint.zoo().items():
        content = checkpoint.read(path)
        spec = ", ".join(f"{key} {content[key]}" for key in ("architecture", "N", "M", "lmbda"))
        typer.echo(f"  {name}: {spec}; quantizers: {', '.join(['sq', *content['quantizers']])}")


@app.command()
def describe(
    file: Annotated[str, typer.Argument(help="A checkpoint, a name of `lic-dist models`, or a pack.")],
    architecture: Architecture = None,
) -> None:
    """Say what a checkpoint is: its family, strides, stages, the parameters of its parts, the quantizers it carries; or
    what a pack changes of which model.
    """
    from lic_dist.models import checkpoint
    from lic_dist.models.names import PACK, split_gain

    if file.endswith(PACK) and Path(file).exists():
        for line in _lines_of_pack(Path(file)):
            typer.echo(line)
        return
    said = checkpoint.read(checkpoint.locate(file)).get("architecture")
    lmbda = None if split_gain(file)[1] else math.nan
    loaded = checkpoint.load(file, architecture, lmbda, at_gain=False)
    typer.echo(f"{file}: {loaded.spec.architecture}, told by {'the file' if said else architecture or 'its tensors'}")
    for line in _lines(loaded):
        typer.echo(f"  {line}")


@app.command()
def blend(
    a: Annotated[str, typer.Argument(help="A checkpoint, or a name of `lic-dist models`.")],
    b: Annotated[str, typer.Argument(help="Another one of the same encoder and entropy model.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    at: Annotated[float, typer.Option(min=0, max=1, help="Where between the two: 0 is A, 1 is B.")] = 0.5,
    architecture: Architecture = None,
) -> None:
    """Write a model whose decoder is (1 - at) A + at B, between fidelity and perception; its files have A's bits."""
    from lic_dist.models import checkpoint
    from lic_dist.models.blend import blended

    made = blended(checkpoint.load(a, architecture), checkpoint.load(b, architecture), at)
    checkpoint.save(made, out)
    typer.echo(f"{out}: {at:g} of the way from {a} to {b}; quantizers: {', '.join(['sq', *made.quantizers])}")


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


def _lines(loaded: Checkpoint) -> Iterator[str]:
    from lic_dist.models.complexity import complexity
    from lic_dist.models.parts import parameter_counts

    codec, spec = loaded.codec, loaded.spec
    options = "".join(f", {key} {value}" for key, value in spec.options.items())
    rates = codec.rates(loaded.model.state_dict())
    lmbda = "not said" if math.isnan(spec.lmbda) else f"{spec.lmbda:g}"
    yield f"N {spec.N}, M {spec.M}{options}, lambda {'of each rate' if rates and codec.gain is None else lmbda}"
    for number, rate in enumerate(rates):
        yield f"rate @{number}: gain {rate.gain:g}, lambda {rate.lmbda:g}"
    sides = [side.name for side in codec.sides if side.channels]
    strides = zip(["y", *sides], [codec.strides.y, *codec.strides.sides], strict=True)
    yield (
        f"strides: {', '.join(f'{name} {stride}' for name, stride in strides)}; "
        f"pictures are padded to multiples of {codec.strides.multiple}"
    )
    stages = codec.layout(256 // codec.strides.y, 256 // codec.strides.y)
    yield f"stages of a crop of 256x256: {len(stages)}; channels of y: {codec.channels}"
    yield f"supports: {', '.join(sorted(codec.supports)) or 'none of deterministic, tiles, refinement'}"
    if codec.exact:
        yield "decoder in exact integers, weights of 8 bits: the same pixels on every machine"
    for part, count in parameter_counts(loaded.model).items():
        yield f"{part}: {count:,} parameters"
    if not rates or codec.gain is not None:
        found = [f"{name} {cost.kmac:.2f}" for name, cost in complexity(loaded.model).items()]
        yield f"kMAC a pixel: {', '.join(found)}"
    yield f"quantizers: {', '.join(['sq', *loaded.quantizers])}"


def _lines_of_pack(path: Path) -> Iterator[str]:
    from lic_dist.models import packs
    from lic_dist.quantization.record import QuantizerRecord

    pack = packs.read(path)
    low = [one for one in pack.deltas.values() if one.rank]
    numbers = sum(one.left.size + one.right.size for one in pack.deltas.values())
    yield f"{path}: a pack of {pack.of}, weights {pack.base[:12]}; {path.stat().st_size:,} bytes, {pack.digest[:12]}"
    nets = dict.fromkeys(name.partition(".")[0] for name in pack.deltas)
    ranks = f", {len(low)} of them low-rank, rank {max(one.rank for one in low)}" if low else ""
    changed = f"{len(pack.deltas)} tensors of {', '.join(nets) or 'nothing'}{ranks}"
    yield f"  changes {changed}: {numbers:,} numbers of 8 bits"
    for name, text in pack.quantizers.items():
        record = QuantizerRecord.from_json(text)
        yield f"  quantizer {name}: {record.name} for lambda {record.lmbda:g}, {record.digest[:12]}"
