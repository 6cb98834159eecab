"""The sections of training jobs, and the base class and types of all sections (see experiment.py)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

Auto = Literal["auto"]


class Section(BaseModel):
    """Base of every section: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    LATER: ClassVar[frozenset[str]] = frozenset()
    """Keys younger than the first states and checkpoints, which say nothing of them: their defaults are what was."""

    def identity(self, without: set[str]) -> dict[str, Any]:
        """Return the values of all keys but some, as plain data; those `LATER` only where they are not the default."""
        fields = type(self).model_fields
        unset = {key for key in self.LATER if getattr(self, key) == fields[key].get_default(call_default_factory=True)}
        return self.model_dump(mode="json", exclude=without | unset)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and _takes_only_numbers(cls.model_fields[info.field_name or ""].annotation):
            raise PydanticCustomError("no_bool", "true and false are no numbers")  # pydantic would read 1 and 0
        return value


def _takes_only_numbers(annotation: Any) -> bool:
    """Return whether an annotation has none of bool, str and Any in it."""
    return annotation not in (bool, str, Any) and all(map(_takes_only_numbers, get_args(annotation)))


def expanded(value: Any) -> Any:
    """Return a path with `~` and variables ($SCRATCH) replaced; URLs and values that are not text stay as they are.

    Raises:
        ValueError: the path is empty, or has an unknown home folder or variable.
    """
    if not isinstance(value, str) or "://" in value:
        return value
    if not value.strip():
        raise ValueError("the path is empty")
    whole = os.path.expandvars(os.path.expanduser(value))
    if whole.startswith("~"):
        raise ValueError(f"there is no home folder '{whole.split('/')[0]}': write the whole path")
    if unknown := re.search(r"\$(\w+|\{.*?\})", whole):
        raise ValueError(f"the variable {unknown[0]} is not set")
    return whole


File = Annotated[Path, BeforeValidator(expanded)]


def photos_path(value: Any) -> Any:
    """Return what `expanded` does, but all that is no URL as a path."""
    whole = expanded(value)
    return whole if not isinstance(whole, str) or "://" in whole else Path(whole)


Photos = Annotated[Path | str, BeforeValidator(photos_path)]  # a folder, a pattern of files, or a URL
PathText = Annotated[str, BeforeValidator(expanded)]  # a path, a name or a URL
Weights = Annotated[dict[Literal["mse", "ms-ssim", "lpips"], Annotated[float, Field(gt=0)]], Field(min_length=1)]
Traded = Annotated[  # with terms that L does not show, for which L is traded
    dict[Literal["mse", "ms-ssim", "lpips", "adversarial", "idempotence"], Annotated[float, Field(ge=0)]],
    Field(min_length=1),
]
TRADES = ("adversarial", "idempotence")
IDEMPOTENCE_TOLERANCE = 0.02  # of L: 0.2 dB where half of L is distortion, a quarter of what six generations lose
ADVERSARIAL_TOLERANCE = 0.25  # of L: 1.8 dB where half of L is distortion; perfect perception costs 3 dB at most
RefinedWeights = Annotated[dict[Literal["mse", "ms-ssim"], Annotated[float, Field(gt=0)]], Field(min_length=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]
Recipe = Literal["decoder", "decoder+hyper", "all-but-encoder"] | Names
Retrained = Literal["decoder", "decoder+hyper", "all-but-encoder", "boundary", "adapters"] | Names
ADAPTERS = "adapters"  # the recipe that writes a pack


class Steps(Section):
    """How a training job takes its steps; see training/loop.py."""

    batch: int = Field(8, ge=1, description="Crops of a step, over all ranks.")
    accumulate: int = Field(
        1, ge=1, description="Parts that a rank takes its share of the batch in, one after another: less memory."
    )
    optimizer: Literal["adam", "muon"] = Field(
        "adam", description="Adam; or Muon for the kernels of convolutions, which are matrices, and Adam for the rest."
    )
    lr: float = Field(1e-4, gt=0, description="Learning rate of the optimizer, the largest of the schedule.")
    schedule: Literal["cosine", "plateau", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warm-up."
    )
    warmup: int = Field(50, ge=0, description="Steps in which the learning rate rises to lr.")
    anneal: float = Field(
        1.0, gt=0, le=1, description="Part of the steps in which the cosine takes the learning rate to its floor."
    )
    floor: float = Field(0.05, gt=0, le=1, description="The least learning rate, as a part of lr.")
    patience: int = Field(
        3, ge=1, description="Schedule plateau: evaluations without a better held-out L after which lr is halved."
    )
    stop_after: int | None = Field(
        None, ge=1, description="Evaluations without a better held-out L that end a phase early; null: never."
    )
    clip: float = Field(1.0, gt=0, description="The gradient's largest norm.")
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay, a step, of the weights' moving average, which is what is judged; 0: none."
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="Of g_a and g_s; entropy models and rates stay in float32."
    )
    compile: bool = Field(False, description="Whether g_a and g_s run by torch.compile.")
    distortion: Literal["mse", "ms-ssim", "lpips"] | Weights = Field(
        "mse",
        description="What the loss weighs by lambda: one (mse is 255^2 MSE, ms-ssim 1 - MS-SSIM), or a weighted sum, "
        "{mse: 1, ms-ssim: 1000}.",
    )
    evaluate_every: int = Field(
        100, ge=1, description="Steps between two measurements of held-out L, each with a state on disk."
    )
    keep: int = Field(2, ge=1, description="States kept on disk.")
    tracking: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (),
        description="Where figures go beside out/log.jsonl: event files in out/tensorboard, MLflow, Weights & Biases; "
        "the last two are set up by variables of theirs (MLFLOW_TRACKING_URI, WANDB_MODE ...).",
    )
    seed: int = Field(0, ge=0, lt=1 << 32, description="Seed of crops, order and noise.")
    out: File = Field(description="Folder for the checkpoint, log and states.")

    LATER: ClassVar[frozenset[str]] = frozenset({"optimizer"})

    @property
    def adversarial(self) -> float | None:
        """The weight of the distortion's adversarial term; None where it has none, which a weight of 0 is not."""
        return self._weight_of("adversarial")

    @property
    def idempotence(self) -> float | None:
        """The weight of the distortion's idempotence term; None where it has none."""
        return self._weight_of("idempotence")

    @property
    def trades(self) -> bool:
        """Whether the distortion has a term that L does not show."""
        return any(self._weight_of(name) is not None for name in TRADES)

    def _weight_of(self, name: str) -> float | None:
        return self.distortion.get(name) if isinstance(self.distortion, dict) else None  # type: ignore[call-overload]

    @model_validator(mode="before")
    @classmethod
    def _read_tensorboard(cls, values: Any) -> Any:
        """Read `tensorboard`, as lic_dist 0.1.0 called it."""
        if not isinstance(values, dict) or not isinstance(asked := values.get("tensorboard"), bool):
            return values
        rest = {key: value for key, value in values.items() if key != "tensorboard"}
        return {"tracking": ["tensorboard"], **rest} if asked else rest


class Phase(Section):
    """One of the phases of a job: what trains, for how long, with which learning rate."""

    recipe: Retrained = Field(description="What trains, as finetune.recipe.")
    steps: int = Field(ge=1, description="Steps of the optimizer.")
    lr: float = Field(gt=0, description="Learning rate of the optimizer, the largest of the schedule.")


class TrainPhase(Phase):
    """One of the phases of a base training."""

    recipe: Literal["all"] | Recipe = Field(  # type: ignore[assignment]  # the encoder's parts too
        description="What trains, the rest is frozen: all, or as finetune.recipe, where a list may name the encoder."
    )


class Train(Steps):
    """Conventional end-to-end training of a base model (`lic-dist train`)."""

    architecture: str = Field(
        "mbt2018-mean",
        description="The model's family: a name of `lic-dist models`, or my_package.my_module:MyCodec, a CodecModel.",
    )
    N: int = Field(48, ge=1, description="Channels of the hyper-latents z and of the layers.")
    M: int = Field(72, ge=1, description="Channels of the latents y.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the model's class beyond N and M, by name."
    )
    lmbda: float = Field(
        0.013,
        gt=0,
        description="lambda of the loss L = lambda 255^2 MSE + bits per pixel; variable-rate models have their own "
        "unless options name a gain.",
    )
    steps: int = Field(10000, ge=1, description="Steps of the optimizer.")
    phases: tuple[TrainPhase, ...] = Field(
        (), description="Phases one after another, instead of steps and lr, each with parts frozen; empty: just those."
    )
    crop: int = Field(256, ge=64, multiple_of=64, description="Side of a crop, in pixels.")
    halved: bool = Field(
        False, description="Whether photos are drawn at half their size too, where that is as large as a crop."
    )
    anneal: float = Field(
        0.8, gt=0, le=1, description="Part of the steps in which the cosine takes the learning rate to its floor."
    )
    warmup: int = Field(200, ge=0, description="Steps in which the learning rate rises to lr.")
    relaxation: Literal["noise", "mixed"] = Field(
        "noise", description="What stands for rounding; mixed: noise for the rate, rounding for the decoder."
    )
    tails: bool = Field(
        False,
        description="Whether a latent beyond the floor of its likelihood costs the more the farther it is, so that "
        "means and scales that are far off come back.",
    )
    compaction: float = Field(
        0.0,
        ge=0,
        description="Weight in the loss of the bits that the coding gain of y's channels saves, so that few channels "
        "hold the energy; 0: none.",
    )
    graph: bool = Field(
        False,
        description="Whether loss and gradients are one CUDA graph, which light models gain from; CPUs ignore it.",
    )
    evaluate_every: int = Field(
        500, ge=1, description="Steps between two measurements of held-out L, each with a state on disk."
    )
    start: PathText | None = Field(
        None,
        description="A checkpoint, or a name of `lic-dist models`, to start from, of the same options or, of "
        "`block-transform`, larger ones ({depth: 1, expansion: 1} are options of a slim one); null: fresh weights.",
    )
    initial_crops: int = Field(
        0,
        ge=0,
        description="Training crops that fresh weights are fitted to, where the family can: `block-transform` begins "
        "as their Karhunen-Loeve transform, and is fitted on them to a larger model that it starts from; 0: none.",
    )
    rescale: bool = Field(
        False,
        description="Whether y of `start` and what the model says of it are scaled by the root of lmbda over its own.",
    )
    out: File = Field(Path("runs/base"), description="Folder for the checkpoint, log and states.")

    LATER: ClassVar[frozenset[str]] = Steps.LATER | {
        "options", "halved", "graph", "initial_crops", "tails", "rescale", "phases", "compaction",
    }  # fmt: skip

    @property
    def each_phase(self) -> tuple[TrainPhase, ...]:
        """The phases; a single one of everything, steps and lr where `phases` is empty."""
        return self.phases or (TrainPhase(recipe="all", steps=self.steps, lr=self.lr),)

    @model_validator(mode="after")
    def _start_fits(self) -> Self:
        if self.rescale and self.start is None:
            raise ValueError("rescale is of a checkpoint to start from: give start too")
        if self.initial_crops and self.start is not None and not self.options:
            raise ValueError("initial_crops are for fresh weights, or slim ones: leave it out, or start")
        return self


class Int8(Section):
    """How a decoder in 8 bits is made, before it is retrained as a whole; see training/layerwise.py."""

    samples: int = Field(64, ge=1, description="Training samples of the cache that layers are fitted to.")
    fine: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Part of the multiplications of residual blocks that is done twice, for channels of two codes, "
        "those whose noise weighs most; 0: none.",
    )
    steps: int = Field(40, ge=1, description="Steps of each layer of h_s by itself.")
    lr: float = Field(0.02, gt=0, description="Learning rate of these, in units of the layer's 8-bit weights.")


class Mixed(Section):
    """One of several stores of one encoder that a finetuning mixes; its samples are drawn by its weight."""

    path: PathText = Field(description="A folder, or a URL of an object store, as cache.path.")
    weight: float = Field(
        1.0,
        gt=0,
        description="Its share of the samples drawn, relative to the other stores' weights, whatever its size.",
    )
    options: dict[str, str] = Field(default_factory=dict, description="Of the object store, as cache.options.")
    snapshot: Annotated[int, Field(ge=0)] | str | None = Field(
        None, description="Its snapshot that is read, as finetune.snapshot."
    )


class Finetune(Steps):
    """Retraining of the decoder side from the cache (`lic-dist finetune`)."""

    recipe: Retrained = Field(
        "decoder+hyper",
        description="What trains: a name, or a list of parts (decoder, hyper, context, prior) and parameters (g_s.6). "
        "boundary: a network for the edges of blocks alone, from a cache of images.squares. adapters: what becomes a "
        "pack, beside the checkpoint.",
    )
    adapters: Annotated[dict[str, Annotated[int, Field(ge=1, le=128)]], Field(min_length=1)] = Field(
        {"decoder": 8, "hyper": 8},
        description="Of recipe adapters: where they are, parts and parameters as in a recipe, and of what rank each is "
        "that is added to a matrix, {decoder: 8} or {g_s.8: 32, g_s.9: 32, hyper: 8}. Without hyper, bits stay.",
    )
    latents: Literal["quantized", "noise", "straight-through"] = Field(
        "quantized", description="What the decoder trains on; the last two are controls."
    )
    means: Literal["likelihood", "search", "pixels"] = Field(
        "likelihood",
        description="What moves the means when h_s trains: the likelihood of y, the search's cost, pixels.",
    )
    sq_rate: Literal["likelihood", "index"] = Field(
        "likelihood", description="The rate of SQ with step 1 when h_s trains; other quantizers: index."
    )
    steps: int = Field(2000, ge=1, description="Steps of the optimizer.")
    phases: tuple[Phase, ...] = Field(
        (), description="Phases one after another, instead of recipe, steps and lr; empty: just those."
    )
    groups: tuple[str, ...] = Field(
        (),
        description="Groups of the cache to retrain on together, each step on one of them: the rates of one model, "
        "[tcq8, tcq8@0.0067]; empty: quantizer.group.",
    )
    int8: Int8 | None = Field(
        None,
        description="Make the decoder one of 8 bits, exact integers, and retrain it layer by layer before the phases; "
        "null: floats stay floats, and 8 bits 8 bits.",
    )
    rounds: int = Field(1, ge=1, description="Rounds of search and finetuning, each with the model of the one before.")
    distortion: Literal["mse", "ms-ssim", "lpips"] | Traded = Field(  # type: ignore[assignment]  # one term more
        "mse",
        description="What the loss weighs by lambda: one (mse is 255^2 MSE, ms-ssim 1 - MS-SSIM), or a weighted sum, "
        "{mse: 1, ms-ssim: 1000}. {mse: 1, adversarial: 8}: at fixed bits, against a discriminator of patches; "
        "{mse: 1, idempotence: 1}: so that pictures that are coded again stay; with "
        "it, 0 too, the last weights are kept, and the cache's quantizer.",
    )
    tolerance: float = Field(
        0.002,
        ge=0,
        description="Part of its L that no source of held-out photos, a folder or a kind of crop, may lose; weights "
        "that lose more are pulled towards the old ones, or not kept. Unless it is given: with an adversarial term "
        f"{ADVERSARIAL_TOLERANCE}, with idempotence {IDEMPOTENCE_TOLERANCE}.",
    )
    snapshot: Annotated[int, Field(ge=0)] | str | None = Field(
        None,
        description="Snapshot of the cache that is read, a number or a name of `cache log`; null: the newest when the "
        "job begins, and the same one when it goes on.",
    )
    cache: tuple[Mixed, ...] = Field(
        (),
        description="Stores to draw from together, by weight: [{path: runs/a.zarr, weight: 3}, {path: runs/b.zarr}]; "
        "their groups have one record. Empty: cache.path.",
    )
    batch: int = Field(16, ge=1, description="Crops of a step, over all ranks.")
    streams: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="Shards read side by side, in an order of their own; auto: in RAM where the samples fit."
    )
    workers: int = Field(0, ge=0, description="Processes of a rank that read streams; 0: threads of its own.")
    out: File = Field(Path("runs/finetuned"), description="Folder for the checkpoint, log and states.")

    LATER: ClassVar[frozenset[str]] = Steps.LATER | {"tolerance", "groups", "cache", "int8", "adapters"}

    @model_validator(mode="before")
    @classmethod
    def _let_trades_cost(cls, values: Any) -> Any:
        named = values.get("distortion") if isinstance(values, dict) else None
        if not isinstance(named, dict) or named.keys().isdisjoint(TRADES):
            return values
        return {"tolerance": ADVERSARIAL_TOLERANCE if "adversarial" in named else IDEMPOTENCE_TOLERANCE, **values}

    @field_validator("distortion")
    @classmethod
    def _is_a_distortion(cls, value: Any) -> Any:
        if isinstance(value, dict) and any(not weight for name, weight in value.items() if name not in TRADES):
            raise ValueError(f"weights are above 0; that of {' or '.join(TRADES)} may be 0, which is its control")
        if isinstance(value, dict) and not value.keys() - {*TRADES}:
            raise ValueError(f"{' and '.join(value)} alone holds no content: {{mse: 1, {next(iter(value))}: 8}}")
        return value

    @model_validator(mode="after")
    def _int8_fits(self) -> Self:
        if self.int8 and self.rounds > 1:
            raise ValueError("int8 is made once: rounds 1, and rounds of the checkpoint that comes out")
        if self.int8 and any(one.recipe not in ("decoder+hyper", "all-but-encoder") for one in self.each_phase):
            raise ValueError("int8 changes h_s as well as g_s: recipe decoder+hyper or all-but-encoder")
        return self

    @model_validator(mode="after")
    def _trades_fit(self) -> Self:
        if not self.trades:
            return self
        if self.schedule == "plateau" or self.stop_after is not None:
            raise ValueError("with such a distortion L does not tell progress: schedule cosine, and no stop_after")
        if self.adversarial is not None and self.rounds > 1:
            raise ValueError("an adversarial term is of fixed bits, and rounds search again: rounds 1")
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        recipes = [one.recipe for one in self.each_phase]
        if self.packs and any(one != ADAPTERS for one in recipes):
            raise ValueError("a pack is of adapters alone: recipe adapters in each phase, or in none")
        if self.packs and self.int8:
            raise ValueError("a pack is of the model as it is: without int8")
        if self.packs and self.rounds > 1:
            raise ValueError("a pack is of the model that it was begun with, and rounds begin again: rounds 1")
        if not self.packs and self.adapters != type(self).model_fields["adapters"].default:
            raise ValueError("adapters are of recipe adapters: leave them out, or take it")
        return self

    @property
    def packs(self) -> bool:
        """Whether adapters train, and a pack is written."""
        return any(one.recipe == ADAPTERS for one in self.each_phase)

    @property
    def each_phase(self) -> tuple[Phase, ...]:
        """The phases; a single one of recipe, steps and lr where `phases` is empty."""
        return self.phases or (Phase(recipe=self.recipe, steps=self.steps, lr=self.lr),)
