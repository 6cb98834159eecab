"""One experiment, one YAML file, read into frozen pydantic models.

Unknown keys are errors that name the nearest valid one; `--set a.b=c` overrides; `sweep` multiplies (sweeps.py). A
section that a command does not need may be absent: `need` says so in one line when it is missed. A study has several
experiments in one file, with `---` between them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lic_dist.errors import UsageError

Auto = Literal["auto"]


class Section(BaseModel):
    """Base of every section: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Weights = Annotated[dict[Literal["mse", "ms-ssim", "lpips"], Annotated[float, Field(gt=0)]], Field(min_length=1)]


class Steps(Section):
    """How a training job takes its steps; see training/course.py."""

    batch: int = Field(8, ge=1)  # global, over all ranks
    accumulate: int = Field(1, ge=1)  # parts that a rank takes its share of the batch in: less memory, same step
    lr: float = Field(1e-4, gt=0)
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    warmup: int = Field(50, ge=0)  # steps
    anneal: float = Field(1.0, gt=0, le=1)  # the part of the steps in which the cosine takes lr to its floor
    floor: float = Field(0.05, gt=0, le=1)  # the least learning rate, as a part of lr
    patience: int = Field(3, ge=1)  # plateau: evaluations without a better held-out L after which lr is halved
    stop_after: int | None = Field(None, ge=1)  # evaluations without a better held-out L that end a phase early
    clip: float = Field(1.0, gt=0)  # the gradient's largest norm
    ema: float = Field(0.0, ge=0, lt=1)  # decay of the weights' moving average, which is what is judged; 0: none
    precision: Literal["float32", "bf16"] = "float32"  # of g_a and g_s; entropy models and rates stay in float32
    compile: bool = False  # g_a and g_s by torch.compile
    distortion: Literal["mse", "ms-ssim", "lpips"] | Weights = "mse"  # or a weighted sum; see training/distortion.py
    evaluate_every: int = Field(100, ge=1)  # steps between two measurements of held-out L, each with a state on disk
    keep: int = Field(2, ge=1)  # states kept on disk
    tensorboard: bool = False  # event files in `out` beside the log
    seed: int = Field(0, ge=0, lt=1 << 32)
    out: Path


class Train(Steps):
    """Conventional end-to-end training of a base model (`lic-dist train`)."""

    architecture: str = "mbt2018-mean"
    N: int = Field(48, ge=1)
    M: int = Field(72, ge=1)
    lmbda: float = Field(0.013, gt=0)
    steps: int = Field(10000, ge=1)
    crop: int = Field(256, ge=64, multiple_of=64)
    anneal: float = Field(0.8, gt=0, le=1)
    warmup: int = Field(200, ge=0)
    relaxation: Literal["noise", "mixed"] = "noise"  # mixed: noise for the rate, rounding for the decoder
    quantile_steps: int = Field(2000, ge=1)  # of each phase, until the auxiliary loss is small
    evaluate_every: int = Field(500, ge=1)
    start: str | None = None  # a checkpoint to warm-start from
    out: Path = Path("runs/base")


class Model(Section):
    """The base model. Architecture, N, M and lmbda come from the checkpoint unless it lacks them."""

    checkpoint: str  # a path, or a name of `lic-dist models`
    architecture: str | None = None
    N: int | None = None
    M: int | None = None
    lmbda: float | None = None


class Images(Section):
    """A folder of photos and the crops taken from it."""

    path: Path
    crop: int = Field(256, ge=64, multiple_of=64)
    variations: int = Field(1, ge=1, le=100_000)  # crops of each photo
    seed: int = 0
    held_out: Annotated[float, Field(ge=0, lt=1)] | str = 0.05  # part of the photos, by digest; or a subfolder
    tolerate: float = Field(0.01, ge=0, le=1)  # part of the samples that may be set aside


class Quantizer(Section):
    """A quantizer and what is fixed of it; `auto` is calibrated on held-out training crops."""

    name: Literal["sq", "deadzone", "rdoq", "tcq"] = "tcq"
    states: Literal[4, 8, 16, 32] = 8  # of tcq
    step: Annotated[float, Field(gt=0)] | Auto = "auto"
    rates: Literal["adapted", "analytic"] = "adapted"
    weights: Literal["sensitivity", "uniform"] = "sensitivity"
    lambda_scale: Annotated[float, Field(gt=0)] | Auto = "auto"  # g, of rdoq and tcq
    rounding: Annotated[float, Field(gt=0, le=0.5)] | Auto = "auto"  # xi, of deadzone
    shift: Annotated[float, Field(gt=-0.5, lt=0.5)] | Auto = "auto"  # of levels, in steps away from zero; sq: none
    refine: int = Field(0, ge=0)  # steps that move y toward less L before the search (models/refine.py)
    adapt_rounds: int = Field(3, ge=1)
    pilot: int = Field(256, ge=1)  # training samples that rates are adapted on
    calibration: int = Field(48, ge=1)  # held-out training samples that (g, D) are calibrated on
    group: str = Field("tcq8", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

    @field_validator("group")
    @classmethod
    def _not_compressais(cls, group: str) -> str:
        if group == "sq":
            raise ValueError("'sq' is CompressAI's own quantizer everywhere: name the group otherwise, sq-adapted say")
        return group


class Cache(Section):
    """The Zarr store."""

    path: str  # a folder, or a URL of an object store: s3://bucket/name.zarr, gs://..., az://...
    options: dict[str, str] = Field(default_factory=dict)  # of the object store: endpoint, region ... (obstore's names)
    pipeline: Literal["zarr", "zarrs"] = "zarr"  # what decodes it
    shard: int = Field(64, ge=1, le=65536)
    batch: int = Field(8, ge=1, le=4096)  # crops that the encoder sees at once: part of the plan, so that bytes repeat
    store_y: bool = True


class Engine(Section):
    """Where shard work runs."""

    name: Literal["ray", "local"] = "ray"
    encoders: int = Field(1, ge=1)
    searchers: int = Field(1, ge=1)  # of a build; the workers of an evaluation, with `local` processes
    readers: int = Field(1, ge=1)
    gpus_per_encoder: float = Field(0.0, ge=0)
    trainers: int = Field(1, ge=1)  # ranks of a finetuning under Ray Train
    gpus_per_trainer: Literal[0, 1] = 0
    address: str | None = None  # of a running Ray cluster; None starts one here
    num_cpus: int | None = None  # for a cluster started here


Recipe = Literal["decoder", "decoder+hyper", "all-but-encoder"] | Annotated[tuple[str, ...], Field(min_length=1)]


class Phase(Section):
    """One of the phases of a finetuning job: what trains, for how long, with which learning rate."""

    recipe: Recipe
    steps: int = Field(ge=1)
    lr: float = Field(gt=0)


class Finetune(Steps):
    """Retraining of the decoder side from the cache."""

    recipe: Recipe = "decoder+hyper"  # or a list of parts (decoder, hyper, prior) and parameters (g_s.6)
    latents: Literal["quantized", "noise", "straight-through"] = "quantized"  # the last two are controls
    means: Literal["likelihood", "search", "pixels"] = (
        "likelihood"  # what moves them when h_s trains: training/decoding.py
    )
    sq_rate: Literal["likelihood", "index"] = "likelihood"  # of SQ with step 1 when h_s trains; others: index
    steps: int = Field(2000, ge=1)
    phases: tuple[Phase, ...] = ()  # one after another, instead of the recipe, steps and lr above; empty: just those
    rounds: int = Field(1, ge=1)  # of search and finetuning, each with the model of the one before
    batch: int = Field(16, ge=1)
    streams: Annotated[int, Field(ge=1)] | Auto = "auto"  # of cache/order.py; auto: in RAM where the samples fit
    workers: int = Field(0, ge=0)  # processes of a rank that read streams; 0: threads of its own
    out: Path = Path("runs/finetuned")

    @property
    def course(self) -> tuple[Phase, ...]:
        """The phases, one at least."""
        return self.phases or (Phase(recipe=self.recipe, steps=self.steps, lr=self.lr),)


class Evaluate(Section):
    """A rate-distortion run with real bitstreams."""

    images: Path
    # names, paths, patterns of them (runs/*); empty: the model section's; a mapping: each with quantizers of its own
    checkpoints: tuple[str, ...] | dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = ()
    quantizers: tuple[str, ...] = Field(
        ("sq",), min_length=1
    )  # sq | a name that the checkpoint carries, or a group of the cache | carried: all of the first | a record's path
    show: tuple[str, ...] = ()  # images whose decoded pictures are kept, by their names in the results
    out: Path = Path("runs/evaluation.json")


class Report(Section):
    """What `lic-dist run` makes of the result files: see `lic-dist report`."""

    anchors: tuple[str, ...] = Field(min_length=1)
    out: Path = Path("runs/report")


class Experiment(Section):
    """One experiment: a file, or a document of it."""

    name: str = "experiment"
    train: Train | None = None
    model: Model | None = None
    images: Images | None = None
    quantizer: Quantizer | None = None
    cache: Cache | None = None
    engine: Engine = Engine()
    finetune: Finetune | None = None
    evaluate: Evaluate | None = None
    report: Report | None = None
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    fast: dict[str, Any] = Field(default_factory=dict)  # keys, as in `sweep`, that --fast sets

    def canonical_json(self) -> str:
        """The resolved file as JSON with sorted keys and no spaces: equal files give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


S = TypeVar("S", bound=Section)


def need(section: S | None, name: str) -> S:
    """Return the section, or say in one line that the command needs it.

    Raises:
        UsageError: the experiment file has no such section.
    """
    if section is None:
        raise UsageError(f"the experiment file has no section '{name}'", hint=f"add '{name}:' to it")
    return section


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read one experiment file and apply `a.b=c` overrides (values in YAML).

    Raises:
        UsageError: no such file, not YAML, an unknown key (the nearest valid one is named), a bad value.
    """
    documents = read(path)
    if len(documents) > 1:
        raise UsageError(f"{path} holds {len(documents)} experiments, not one")
    return parse(apply(documents[0], overrides), str(path))


def parse(document: dict[str, Any], where: str) -> Experiment:
    """Validate a document; the first fault becomes one line."""
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = _nearest(fault["loc"])
            raise UsageError(f"{where}: unknown key '{key}'", hint=f"did you mean '{near}'?" if near else "") from None
        raise UsageError(f"{where}: {key}: {fault['msg']}", hint=f"got {fault.get('input')!r}"[:200]) from None


def _nearest(location: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = Experiment
    for part in (one for one in location[:-1] if isinstance(one, str)):
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(one for one in options if isinstance(one, type) and issubclass(one, BaseModel))
    matches = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1, cutoff=0.0)
    return ".".join([*map(str, location[:-1]), *matches]) if matches else ""


def read(path: Path) -> list[dict[str, Any]]:
    """The file's documents as plain data. Raises UsageError: no such file, not YAML, no mapping."""
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="give the experiment's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise UsageError(f"{path} holds no mapping", hint="an experiment file has sections such as 'model:'")
    return documents


def apply(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The document, changed in place by `a.b=c` overrides. Raises UsageError: not of that form, or not YAML."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {override}: not of the form a.b=c")
        set_key(document, key, _scalar(value))
    return document


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set: {text!r} is not YAML", hint="quote it for the shell: --set 'a.b=[1, 2]'") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value) if any(digit.isdigit() for digit in value) else value
        except ValueError:
            return value
    return value


def set_key(document: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b` in place, making the sections above it. Raises UsageError: `a` is no section."""
    *parents, last = key.split(".")
    for part in parents:
        if document.get(part) is None:
            document[part] = {}
        document = document[part]
        if not isinstance(document, dict):
            raise UsageError(f"{key}: '{part}' is not a section")
    document[last] = value
