"""One experiment, read from a YAML file into frozen pydantic models.

An unknown key is an error that names the nearest valid one. `--set a.b=c` overrides a key. Names and paths are
templates (templates.py). `sweep` makes several experiments of one (sweeps.py). A section may be absent; `need` raises
an error of one line where a command needs it. A file may hold several experiments, with `---` between them.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from lic_dist.config.faults import fault_of, keys, nearest
from lic_dist.config.templates import fill
from lic_dist.config.training import (
    Auto,
    File,
    Finetune,
    PathText,
    Phase,
    Photos,
    RefinedWeights,
    Section,
    Steps,
    Train,
)
from lic_dist.config.yaml_file import NUMBER, apply, read, set_key
from lic_dist.errors import UsageError

__all__ = ["Finetune", "Phase", "Section", "Steps", "Train", "set_key"]


class Model(Section):
    """The base model. Architecture, N, M and lmbda come from the checkpoint unless it lacks them."""

    checkpoint: PathText = Field(
        description="A checkpoint's path, or a name of `lic-dist models`; of a variable-rate model with its rate: "
        "FILE@3 is the fourth, FILE@0.35 a gain."
    )
    architecture: str | None = Field(
        None,
        description="The model's family: a name of `lic-dist models`, or my_package.my_module:MyCodec, a CodecModel; "
        "null: as the checkpoint says.",
    )
    N: int | None = Field(
        None, description="Channels of the hyper-latents z and of the layers; null: as the checkpoint says."
    )
    M: int | None = Field(None, description="Channels of the latents y; null: as the checkpoint says.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the model's class beyond N and M, where the checkpoint has none.",
    )
    lmbda: float | None = Field(
        None, description="lambda of L = lambda 255^2 MSE + bits per pixel; null: as the checkpoint says."
    )
    quality: int | None = Field(
        None, ge=1, le=8, description="CompressAI's quality, 1 to 8, in place of lmbda; null: lmbda counts."
    )

    @model_validator(mode="before")
    @classmethod
    def _lmbda_of_quality(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("quality") not in range(1, 9):
            return values
        from lic_dist.models.lambdas import LAMBDAS

        lmbda = LAMBDAS["mse"][int(values["quality"]) - 1]
        if values.get("lmbda") not in (None, lmbda):
            raise ValueError(f"quality {values['quality']} is lmbda {lmbda}, not {values['lmbda']}: give one of them")
        return values | {"lmbda": lmbda}


def _parse_held_out(value: Any) -> Any:
    """Return a part as a number ('5%' is 0.05) or a folder as a normalized path ('./valid' is 'valid')."""
    wrong = ValueError("must be a part, at least 0 and below 1 (0.05 or 5%), or the name of a subfolder of images.path")
    if not isinstance(value, str):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise wrong
        return value
    text = value.strip()
    number, unit = (text[:-1].rstrip(), 100) if text.endswith("%") else (text, 1)
    if NUMBER.fullmatch(number) and 0 <= float(number) / unit < 1:
        return float(number) / unit
    folder = posixpath.normpath(text)
    if not text or unit == 100 or folder.split("/")[0] in ("", ".", ".."):
        raise wrong
    if NUMBER.fullmatch(folder):  # so that reading it again does not make it a part
        folder = f"./{folder}"
    return folder + "/" * text.endswith("/")  # kept, because it is in the identity of stores


class Images(Section):
    """The photos and the crops taken from them."""

    path: Photos = Field(
        description="Folder of the photos, subfolders too; or s3://, gs://, az://, or https:// of a page that lists "
        "them; or files that hold photos, in any of these: photos/*.tar, *.parquet, *.arrow."
    )
    crop: int = Field(256, ge=64, multiple_of=64, description="Side of a crop, in pixels.")
    variations: int = Field(1, ge=1, le=100_000, description="Crops taken of each photo.")
    squares: bool = Field(
        False,
        description="Whether each four crops of a photo are neighbours, two by two, as blocks of a picture lie, for "
        "finetune.recipe: boundary; variations is then a multiple of 4.",
    )
    seed: int = Field(0, description="Seed of the crops' places, flips and order.")
    held_out: Annotated[Annotated[float, Field(ge=0, lt=1)] | str, BeforeValidator(_parse_held_out)] = Field(
        0.05,
        description="What calibration and the choice of weights are judged on, and never trained on: a part of the "
        "photos (0.05 or 5%), chosen by digest, or a subfolder of path.",
    )
    tolerate: float = Field(
        0.01, ge=0, le=1, description="Part of the samples that may be set aside before a job ends with exit code 3."
    )
    options: dict[str, str] = Field(
        default_factory=dict, description="Of the object store: endpoint, region and so on (obstore's names)."
    )
    column: str | None = Field(
        None, description="Column of the photos' bytes, where files are tables; null: the only one of bytes."
    )

    @model_validator(mode="after")
    def _squares_are_whole(self) -> Self:
        if self.squares and self.variations % 4:
            raise ValueError(f"squares are of four crops: variations {self.variations} is no multiple of 4")
        return self


class Quantizer(Section):
    """A quantizer and what is fixed of it; `auto` is calibrated on held-out training crops."""

    LATER: ClassVar[frozenset[str]] = frozenset({"lmbda", "refine_distortion", "refine_z", "scale_offsets"})

    name: Literal["sq", "deadzone", "rdoq", "tcq", "embedded"] = Field(
        "tcq",
        description="Scalar, with a dead zone, rate-distortion optimized scalar, trellis-coded; or the bit planes of a "
        "progressive file, cut where lmbda says.",
    )
    states: Literal[4, 8, 16, 32, 64] = Field(
        8, description="States of the trellis, of tcq: more cost time and gain rate."
    )
    lmbda: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="lambda that it is calibrated for, and a decoder retrained for with it: other rates of one model; "
        "null: the model's.",
    )
    step: Annotated[float, Field(gt=0)] | Auto = Field("auto", description="Step D, in units of y.")
    rates: Literal["adapted", "analytic"] = Field(
        "adapted", description="Tables of rates: adapted to the pilot's indices, or of the Gaussian."
    )
    weights: Literal["sensitivity", "rounding", "uniform"] = Field(
        "sensitivity",
        description="Weights of the channels' errors: the decoder's sensitivity, what the errors of rounding cost the "
        "picture, or all equal.",
    )
    lambda_scale: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="g, the strength of the rate in the search of rdoq and tcq."
    )
    rounding: Annotated[float, Field(gt=0, le=0.5)] | Auto = Field(
        "auto", description="xi of deadzone, in steps: 0.5 rounds to the nearest level, less to a smaller one."
    )
    shift: Annotated[float, Field(gt=-0.5, lt=0.5)] | Auto = Field(
        "auto", description="Shift of the levels, in steps away from zero; sq has none."
    )
    spread: Annotated[float, Field(ge=0, lt=1)] | Auto | Literal["fitted"] = Field(
        0.0,
        description="Levels lie spread D / sigma steps further from zero yet, one at most: for decoders that take "
        "small latents for noise. fitted: each scale's own, by the decoder's gradient; of bit planes each kind of "
        "node's. Where y has scales.",
    )
    refine: int = Field(
        0,
        ge=0,
        description="How often a picture is decoded and searched again by the decoder's answer (codec/refine.py); each "
        "time costs a pass of g_s, forward and back. The least L is kept.",
    )
    refine_distortion: Literal["mse", "ms-ssim", "balanced"] | RefinedWeights = Field(
        "mse",
        description="What that weighs by lambda, as finetune.distortion does; balanced: MSE, and 1 bit a pixel times "
        "1 - MS-SSIM.",
    )
    refine_z: bool = Field(
        False, description="Whether z, too, takes as many steps toward fewer bits of y and z, before y is searched."
    )
    scale_offsets: bool = Field(
        False,
        description="Whether a picture's file may hold offsets for the scales of its channels, where they save more "
        "than they cost; crops of a cache have none.",
    )
    adapt_rounds: int = Field(3, ge=1, description="Rounds of search and adaption of the tables.")
    pilot: int = Field(256, ge=1, description="Training samples that the tables are adapted on.")
    calibration: int = Field(48, ge=1, description="Held-out samples that step, strength and shift are calibrated on.")
    group: str = Field(
        "auto",
        pattern=r"^([A-Za-z0-9]|\{[A-Za-z0-9_.]+\})([A-Za-z0-9._@-]|\{[A-Za-z0-9_.]+\})*$",  # or placeholders
        validate_default=True,
        description="Its name in the store and in checkpoints; auto: name and states (tcq8, rdoq, deadzone, "
        "sq-adapted), and @lambda behind it where that is not the model's.",
    )

    @field_validator("group")
    @classmethod
    def _resolve_auto(cls, group: str, info: ValidationInfo) -> str:
        if group == "sq":
            raise ValueError("'sq' is CompressAI's own quantizer everywhere: name the group otherwise, sq-adapted say")
        return auto_group(**{"name": "", "states": "", **info.data}) if group == "auto" else group


def auto_group(name: str = "tcq", states: object = 8, lmbda: float | None = None, **_: object) -> str:
    """Return the group that `auto` stands for, from the keys of a quantizer section."""
    group = {"tcq": f"tcq{states}", "sq": "sq-adapted"}.get(name, name)
    return group if lmbda is None else f"{group}@{lmbda:g}"


class Cache(Section):
    """The Zarr store."""

    path: PathText = Field(
        description="A folder, or a URL of an object store: s3://bucket/name.zarr, gs://..., az://...; to be read, an "
        "export: icechunk://FOLDER."
    )
    options: dict[str, str] = Field(
        default_factory=dict, description="Of the object store: endpoint, region and so on (obstore's names)."
    )
    pipeline: Literal["zarr", "zarrs"] = Field("zarr", description="What decodes it.")
    shard: int = Field(64, ge=1, le=65536, description="Samples of a shard: one file an array, one unit of work.")
    batch: int = Field(
        8, ge=1, le=4096, description="Crops that the encoder sees at once: part of the plan, so that bytes repeat."
    )
    store_y: bool = Field(
        True, description="Whether y is kept, from which other groups are quantized without the photos."
    )


def _parse_pool(value: Any) -> Any:
    """Return a pool's size as it is. Raises ValueError for a range that begins above its end, or a bool."""
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    if isinstance(value, str) and RANGE.fullmatch(value):
        least, most = map(int, value.split(".."))
        if least > most:
            raise ValueError(f"the range begins above its end: {most}..{least}?")
    return value


RANGE = re.compile(r"[1-9]\d*\.\.[1-9]\d*")
Pool = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=f"^{RANGE.pattern}$", examples=["a range like 2..8"])],
    BeforeValidator(_parse_pool),
]


def bounds(pool: int | str) -> tuple[int, int]:
    """Return the least and the greatest number of a pool's workers: 2 is (2, 2), and "2..8" is (2, 8)."""
    least, _, most = str(pool).partition("..")
    return int(least), int(most or least)


class Engine(Section):
    """Where shard work runs. A pool is a number of workers, or a range, 2..8, within which it follows the cluster."""

    name: Literal["ray", "local"] = Field("ray", description="Ray, on a machine or a cluster; or processes here.")
    encoders: Pool = Field(1, description="Workers that run g_a and h_a.")
    searchers: Pool = Field(
        1, description="Workers that quantize, of a build; with `local`, those of an evaluation too."
    )
    readers: Pool = Field(1, description="Workers that read and crop photos.")
    gpus_per_encoder: float = Field(0.0, ge=0, description="GPUs of an encoder, or a part of one; 0: on the CPU.")
    trainers: Pool = Field(1, description="Ranks of a finetuning under Ray Train; the batch must divide by them.")
    gpus_per_trainer: Literal[0, 1] = Field(0, description="GPUs of a rank.")
    address: str | None = Field(None, description="Of a running Ray cluster; null: one is started here.")
    num_cpus: int | None = Field(None, description="CPUs of a cluster started here; null: all.")


MetricName = Literal[
    "psnr",
    "ms-ssim",
    "psnr-yuv",
    "ssim",
    "iw-ssim",
    "vif",
    "fsim",
    "gmsd",
    "ssimulacra2",
    "vmaf",
    "cvvdp",
    "swd",
    "flip",
]


class Evaluate(Section):
    """A rate-distortion run with real bitstreams (`lic-dist evaluate`)."""

    images: Photos = Field(description="Folder of the test pictures, or a URL as in images.path.")
    checkpoints: tuple[PathText, ...] | dict[PathText, Annotated[tuple[PathText, ...], Field(min_length=1)]] = Field(
        (),
        description="Names, paths, or patterns of them (runs/*); empty: the model section's; a mapping: each with "
        "quantizers of its own.",
    )
    quantizers: tuple[PathText, ...] = Field(
        ("sq",),
        min_length=1,
        description="sq, a name that the checkpoint carries or a group of the cache, `carried` for all of the first, "
        "or a record's path.",
    )
    blocks: tuple[Annotated[int, Field(ge=64, le=65535, multiple_of=64)], ...] = Field(
        (),
        description="Sides in pixels of blocks, [256]: beside whole pictures, files in blocks, as `lic-dist encode "
        "--blocks` writes them, with points of their own: `tcq8 blocks 256`.",
    )
    arms: dict[PathText, Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict,
        description="The arms of checkpoints, by name, path or pattern, where they do not tell them themselves: "
        "{runs/continued-*: base training control}.",
    )
    anchors: tuple[str, ...] | dict[str, tuple[float, ...]] = Field(
        (),
        description="Classic codecs over the same pictures: jpeg, jpeg 4:4:4, webp, avif, avif 4:4:4, avif iq, jxl, "
        "jpeg2000, at qualities that cover the points' PSNR; a mapping: each with qualities of its own, {webp: [20, "
        "50, 80]}.",
    )
    metrics: tuple[MetricName, ...] = Field(
        ("psnr", "ms-ssim"),
        min_length=1,
        description="What is measured of each decoded picture; psnr always. Most need a package, of the extras "
        "`metrics` and `cvvdp`.",
    )
    show: tuple[str, ...] = Field(
        (), description="Pictures that are kept decoded for the report, by their names in the results."
    )
    bitstreams: bool | Literal["with checkpoints"] = Field(
        False,
        description="Keep every bitstream, in an archive beside `out` that `lic-dist evaluate --verify` checks; `with "
        "checkpoints`: and the models' files.",
    )
    out: File = Field(Path("runs/evaluation.json"), description="The result file.")
    options: dict[str, str] = Field(
        default_factory=dict, description="Of the object store of the pictures: endpoint, region and so on."
    )


class Report(Section):
    """What `lic-dist run` makes of the result files: see `lic-dist report`."""

    anchors: tuple[str, ...] = Field(
        ("base sq",), min_length=1, description="Curves that changes and BD-rates refer to."
    )
    label: str = Field(
        "{arm} {quantizer}",
        description="What groups points into curves and names them, of the fields {run}, {arm}, {quantizer}, {seed}, "
        "{checkpoint}, {file}.",
    )
    out: File = Field(Path("runs/report"), description="Folder for report.html, results.md and the charts.")


class Experiment(Section):
    """One experiment: a file, or a document of it."""

    name: str = Field("experiment", description="Its name, of jobs, results and charts.")
    train: Train | None = Field(None, description="Training of a base model.")
    model: Model | None = Field(None, description="The base model.")
    images: Images | None = Field(None, description="The photos and the crops taken from them.")
    quantizer: Quantizer | None = Field(None, description="The quantizer.")
    cache: Cache | None = Field(None, description="The store of latents and indices.")
    engine: Engine = Field(Engine(), description="Where shard work runs.")
    finetune: Finetune | None = Field(None, description="Retraining of the decoder side.")
    evaluate: Evaluate | None = Field(None, description="Coding of test pictures.")
    report: Report | None = Field(None, description="The page and tables of the results.")
    sweep: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict,
        description="Keys, each with a list of values: one experiment for each combination, "
        "{finetune.lr: [1e-4, 3e-5]}; placeholders in their paths tell them apart, runs/{finetune.lr}.",
    )
    fast: dict[str, Any] = Field(
        default_factory=dict, description="Keys, each with the value that `lic-dist run --fast` sets."
    )

    @field_validator("engine", mode="before")
    @classmethod
    def _null_is_default(cls, engine: Any) -> Any:
        return {} if engine is None else engine  # a section whose keys are all commented out

    def canonical_json(self) -> str:
        """Return the experiment as JSON with sorted keys and no spaces; equal experiments give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


S = TypeVar("S", bound=Section)


def need(section: S | None, name: str) -> S:
    """Return a section that a command needs.

    Raises:
        UsageError: the experiment file has no such section.
    """
    if section is None:
        raise UsageError(f"the experiment file has no section '{name}'", hint=f"add '{name}:' to it")
    return section


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a file that holds one experiment, and apply `a.b=c` overrides (values in YAML).

    Raises:
        UsageError: no such file, not YAML, several experiments, an unknown key (the nearest valid one is named), or a
            bad value.
    """
    documents = read(path)
    if len(documents) > 1:
        raise UsageError(f"{path} holds {len(documents)} experiments, not one")
    return parse(apply(documents[0], overrides), str(path))


def parse(document: dict[str, Any], where: str) -> Experiment:
    """Validate a document and fill its templates. Raises UsageError with the first fault in one line."""
    try:
        experiment = Experiment.model_validate(document)
        filled = fill(document, experiment)
        return experiment if filled == document else Experiment.model_validate(document := filled)
    except ValidationError as error:
        message, hint = fault_of(error, Experiment, document)
        raise UsageError(f"{where}: {message}", hint=hint) from None
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from None


def require_key(key: str, where: str) -> None:
    """Raise UsageError, with the nearest keys, for a full key that does not exist; any `cache.options.x` exists."""
    known = [name for name, _, _ in keys(Experiment)]
    section, _, rest = key.partition(".")
    if key not in known and f"{section}.{rest.split('.')[0]}" not in known:
        near = " or ".join(repr(name) for name in nearest(Experiment, key))
        hint = f"did you mean {near}?" if near else "`lic-dist config explain` lists all keys"
        raise UsageError(f"{where}: unknown key '{key}'", hint=hint)
