"""The protocol of codec models: all that search, coder, cache, finetuning and evaluation ask of a family of models.

    x -> analyse -> y -> hyper_analyse -> z of each side, rounded about its medians -> z_hat
    z_hat -> walk -> Stage -> (y_hat of its elements is sent) -> next Stage ... -> y_hat whole -> synthesise -> x_hat

A family is a subclass of `CodecModel`. An object of it wraps a module, whose parameters keep their names and values:
checkpoints, digests and optimizers see the module alone. What a family is (its name, strides and parts) belongs to the
class, what one model computes to the object. Tensors are float32 unless it is said otherwise. B images, M channels of y
on h x w positions, N channels of a side latent z on hz x wz positions. Models without a side latent have a z of no
channels on h x w positions, so that the walk knows the size of y.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist.errors import LicError, UsageError
from lic_dist.models.compat import import_compressai
from lic_dist.models.priors import Side as Side

Part = Literal["encoder", "decoder", "hyper", "context", "prior"]
Support = Literal["deterministic", "tiles", "refinement"]
Sides = tuple[Tensor, ...]  # z_hat of each side latent, [B, N, hz, wz] each
Run = Callable[[str, Tensor], Tensor]  # runs the network of a name, one of `nets`, on its input

TRANSFORMS = ("g_a", "h_a", "g_s")  # of `nets`; all others are networks of the entropy model, which `walk` runs


@dataclass(frozen=True)
class Strides:
    """Pixels a position, along each axis: of y, of each side latent, and what a picture's sides are padded to."""

    y: int = 16
    sides: tuple[int, ...] = (64,)
    multiple: int = 64

    @property
    def side(self) -> int:
        """The stride of the first side latent, or of the `NoSide` in its place."""
        return self.sides[0] if self.sides else self.y


@dataclass(frozen=True, eq=False)
class Elements:
    """The elements of y that a stage covers, and how they lie in lanes: known from the size of y alone.

    `channels` are some of the M; `positions`, int64 [P], are raster indices into the h*w positions in the order of
    coding, None for all of them. A lane is what a trellis runs over: a channel of an image, whose steps are its
    positions; or, along "channels", a position of an image, whose steps are its channels.
    """

    channels: slice = field(default_factory=lambda: slice(None))
    positions: NDArray[np.int64] | None = None
    along: Literal["positions", "channels"] = "positions"

    def take(self, whole: Tensor) -> Tensor:
        """Return these elements of a tensor [B, M, h, w]: [B, C, P], or a view [B, C, h, w] where they have all
        positions.
        """
        part = whole[:, self.channels]
        return part if self.positions is None else part.flatten(2)[..., torch.from_numpy(self.positions)]

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write what `take` returns back into a tensor [B, M, h, w], which is changed, and is contiguous where
        `positions` are given.
        """
        if self.positions is None:
            whole[:, self.channels] = part
        else:
            whole.view(*whole.shape[:2], -1)[:, self.channels, torch.from_numpy(self.positions)] = part

    def lanes(self, part: Tensor) -> Tensor:
        """Reshape what `take` returns to [lanes, steps]; lanes are image-major."""
        lanes = part.detach().flatten(2)
        lanes = lanes.transpose(1, 2) if self.along == "channels" else lanes
        return lanes.reshape(-1, lanes.shape[2])

    def channel_plane(self, part: Tensor) -> Tensor:
        """Return the channel of each element of what `take` returns, uint16 of its shape: a view."""
        first, step = self.channels.start or 0, self.channels.step or 1
        numbers = (first + step * torch.arange(part.shape[1], device=part.device)).to(torch.uint16)
        return numbers.reshape(-1, *(1 for _ in part.shape[2:])).expand(part.shape)

    def lane_channels(self, images: int, channels: int) -> NDArray[np.int64] | None:
        """Return the channel of each lane, [lanes], of so many images and M channels, or of each step, [1, steps].

        None where the lanes are all channels of whole images.
        """
        chosen = np.arange(channels)[self.channels]
        if self.along == "channels":
            return chosen[None]
        return None if len(chosen) == channels else np.tile(chosen, images)

    def to_lanes(self, part: Tensor) -> NDArray[Any]:
        """Return `lanes` as an array on the CPU."""
        return self.lanes(part).cpu().numpy()

    def from_lanes(self, lanes: NDArray[Any] | Tensor, like: Tensor) -> Tensor:
        """Invert `lanes`: return a tensor of the shape and on the device of `like`."""
        values = torch.as_tensor(lanes)
        if self.along == "channels":
            values = values.reshape(len(like), -1, like.shape[1]).transpose(1, 2)
        return values.reshape(like.shape).to(like.device)


@dataclass(frozen=True)
class Stage:
    """What is known of some elements of y before they are coded: the means and scales of their Gaussians.

    Both have the shape of `elements.take(y)`. The scales are positive or are raised to CompressAI's bound, 0.11. Where
    y has a factorized prior (`CodecModel.prior`) the means are its medians, and there are no scales.
    """

    means: Tensor
    scales: Tensor | None = None
    elements: Elements = Elements()

    def to_lanes(self, part: Tensor) -> NDArray[Any]:
        """Reshape a tensor of the means' shape to lanes: see `Elements`."""
        return self.elements.to_lanes(part)

    def from_lanes(self, lanes: NDArray[Any]) -> Tensor:
        """Invert `to_lanes`, on the device of the means."""
        return self.elements.from_lanes(lanes, self.means)


class Rate(NamedTuple):
    """One of the rates that a variable-rate model is trained for: its gain, which multiplies y, and its lambda."""

    gain: float
    lmbda: float


class Given(NamedTuple):
    """Means and scales (see `Stage`) of all of y, and y_hat as `synthesise` takes it: [B, M, h, w] each."""

    means: Tensor
    scales: Tensor | None
    y_hat: Tensor


def one_layout(values: Tensor) -> Tensor:
    """Return a tensor in the memory layout that networks of the entropy model are given, by encoder and decoder alike.

    Other layouts, such as channels last, select other convolution kernels, whose results differ in the last bit.
    """
    return values.flatten().view(values.shape)


def mask_weights(module: nn.Module) -> None:
    """Set the masked taps of masked convolutions to zero, as their own forward does: to be done after each step.

    They are known by a buffer `mask` of the shape of their weight, such as CompressAI's MaskedConv2d has.
    """
    for layer in module.modules():
        mask, weight = layer._buffers.get("mask"), layer._parameters.get("weight")
        if mask is not None and weight is not None and mask.shape == weight.shape:
            weight.data.mul_(mask)


class CodecModel(ABC):
    """A model that codes images, as the rest of lic_dist sees it. Subclasses are families; see the module's text."""

    name: ClassVar[str]
    """What checkpoints and configurations call the family; CompressAI's name where it has one."""
    module_class: ClassVar[type[nn.Module] | str]
    """The class of the modules that it wraps, or where that is imported from: "package.module:Class"."""
    strides: ClassVar[Strides] = Strides()
    parts: ClassVar[Mapping[Part, tuple[str, ...]]]
    """How the names of each part's parameters and buffers begin; a part may be absent. The cache depends on the
    encoder; decoder, hyper and context networks and priors are what finetuning trains. Names that end in `.quantiles`
    belong to no recipe: the medians among them count as the encoder's, the rest follows the prior."""
    supports: ClassVar[frozenset[Support]] = frozenset()
    """deterministic: the networks of `walk` have a form in integers (models/integer.py). tiles: receptive fields follow
    from the layers of `nets` (codec/tiles.py). refinement: y may be moved before the search (models/refine.py)."""
    exact: ClassVar[bool] = False
    """Whether g_s and the networks of `walk` compute in exact integers by themselves."""

    def __init__(self, module: nn.Module) -> None:
        mask_weights(module)  # so that digests and files hold what the networks compute with
        self.module: Any = module

    @classmethod
    @cache
    def module_type(cls) -> type[nn.Module]:
        """Return `module_class`, imported where it is text."""
        if not isinstance(cls.module_class, str):
            return cls.module_class
        import_compressai()
        module, _, name = cls.module_class.partition(":")
        found: type[nn.Module] = getattr(import_module(module), name)
        return found

    @classmethod
    def build(cls, **sizes: Any) -> nn.Module:
        """Return a freshly initialised module: `sizes` are N, M and what else its class takes."""
        return cls.module_type()(**sizes)

    @classmethod
    def prefixes(cls, *parts: Part) -> tuple[str, ...]:
        """Return how the names of the parameters of some parts begin."""
        return tuple(prefix for part in parts for prefix in cls.parts.get(part, ()))

    @classmethod
    @abstractmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        """Return whether a state_dict, told by names and shapes, is of this family and of no other."""

    @classmethod
    @abstractmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `build`, N and M at least, that are read off the shapes of a state_dict."""

    @classmethod
    def rates(cls, state: Mapping[str, Tensor]) -> tuple[Rate, ...]:
        """Return the rates of a variable-rate model's state_dict, the lowest first; () of models of one rate."""
        return ()

    @property
    def gain(self) -> float | None:
        """The gain that a variable-rate model is used at; None where none is chosen, and of models of one rate."""
        return None

    def take_gain(self, gain: float | None) -> None:
        """Use a variable-rate model at a gain, or at none. Raises LicError for a gain of a model of one rate."""
        if gain is not None:
            raise LicError(f"{self.name} has one rate: it takes no gain")

    @property
    @abstractmethod
    def sides(self) -> tuple[Side, ...]:
        """The side latents, in the order of coding; a `NoSide` alone where there are none."""

    @property
    @abstractmethod
    def nets(self) -> Mapping[str, nn.Module]:
        """The networks by name: TRANSFORMS, and those that `walk` runs."""

    @abstractmethod
    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        """Yield the stages of y in the order of `layout`; after each, be sent y_hat of its elements, in their shape.

        Return y_hat whole, [B, M, h, w], with all corrections, as `synthesise` takes it. Networks are called by `run`
        alone, with inputs of `one_layout`.
        """

    def analyse(self, x: Tensor) -> Tensor:
        """Return y [B, M, h, w] of pictures x [B, 3, H, W] in [0, 1], sides multiples of `strides.multiple`."""
        return self.run("g_a", x)

    def hyper_analyse(self, y: Tensor) -> Sides:
        """Return z of each side, before rounding, [B, N, hz, wz] each; here, of a single one."""
        return (self.run("h_a", y),)

    def synthesise(self, y_hat: Tensor) -> Tensor:
        """Return the decoded pictures x_hat [B, 3, H, W], not clamped, of y_hat [B, M, h, w]."""
        return self.run("g_s", y_hat)

    @property
    def channels(self) -> int:
        """M, the number of channels of y."""
        return int(self.module.M)

    @property
    def prior(self) -> Side | None:
        """The factorized prior that codes y itself, with tables by channel; None where `gaussian` codes it."""
        return None

    @property
    def gaussian(self) -> Any:
        """The CompressAI GaussianConditional of y: its bounds, and its integer tables after `update`."""
        return self.module.gaussian_conditional

    def layout(self, height: int, width: int) -> tuple[Elements, ...]:
        """Return the elements of each stage, for y of this height and width in positions; one stage covers all."""
        return (Elements(),)

    def run(self, name: str, values: Tensor) -> Tensor:
        """Run one of `nets` as it is: the `run` of training."""
        result: Tensor = self.nets[name](values)
        return result

    def given(self, sides_hat: Sides, y_hat: Tensor) -> Given:
        """Return means and scales where all of y_hat [B, M, h, w] is known, differentiable in all that is given.

        It drives `walk`. A family whose stages need not be taken one after another then overrides it.
        """
        return self.follow(sides_hat, lambda stage: stage.elements.take(y_hat))

    def drive(
        self, sides_hat: Sides, y_hat_of: Callable[[Stage], Tensor], run: Run | None = None
    ) -> tuple[list[Stage], Tensor]:
        """Take every stage of `walk` in turn, sent the y_hat that `y_hat_of` returns; return all, and y_hat whole.

        `run` is that of `walk`, by default this object's. A y_hat of one stage without a correction is the tensor sent.
        """
        walk = self.walk(sides_hat, run or self.run)
        stages = [next(walk)]
        while True:
            try:
                stages.append(walk.send(y_hat_of(stages[-1])))
            except StopIteration as done:
                return stages, done.value

    def follow(self, sides_hat: Sides, y_hat_of: Callable[[Stage], Tensor], run: Run | None = None) -> Given:
        """Return what `drive` finds, means and scales of all stages put together; differentiable."""
        stages, corrected = self.drive(sides_hat, y_hat_of, run)
        if len(stages) == 1:
            return Given(stages[0].means, stages[0].scales, corrected)
        means, scales = corrected.new_empty(corrected.shape), corrected.new_empty(corrected.shape)
        for stage in stages:
            stage.elements.put(means, stage.means)
            if stage.scales is not None:
                stage.elements.put(scales, stage.scales)
        return Given(means, scales if self.prior is None else None, corrected)

    def likelihood(self, y: Tensor, stage: Stage) -> Tensor:
        """Return CompressAI's likelihood of a stage's elements y, for cells of step 1 about them, with its bound."""
        if self.prior is not None:
            return self.prior.likelihood(y)
        gaussian = self.gaussian
        likelihood: Tensor = gaussian.likelihood_lower_bound(gaussian._likelihood(y, stage.scales, stage.means))
        return likelihood

    def start(self, x: Tensor, lmbda: float) -> None:
        """Fit freshly built weights to training pictures x [n, 3, H, W] in [0, 1], to be trained at this lambda.

        Raises:
            LicError: the family has no such start, or not for these sizes.
        """
        raise LicError(f"{self.name} has no start that is fitted to pictures", hint="train.initial_crops: 0")

    def take_from(self, larger: CodecModel, x: Tensor | None = None) -> None:
        """Set freshly built weights to those of a larger model of the family, as far as this one has room for them, and
        fit them to it on pictures x [n, 3, H, W] in [0, 1], where these are given.

        Raises:
            LicError: the family has no such start, or this model is larger in something.
        """
        raise LicError(f"{self.name} has no slim models that start from a larger one", hint="train.start: null")

    def rescale(self, factor: float) -> None:
        """Multiply y, and the means and scales of y, by a factor; a y_hat multiplied by it gives the same pictures.

        Raises:
            LicError: the family cannot.
        """
        raise LicError(f"{self.name} cannot rescale y", hint="train.rescale: false")

    def update(self) -> None:
        """Make the integer tables of `gaussian` and of all priors from the present weights."""
        self.module.update(force=True)

    def packed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state_dict as files have it, which `load_state_dict` takes; the module is left as they say."""
        return dict(state)

    def require(self, what: Support, why: str = "") -> None:
        """Raise LicError where the family does not support something; `why` goes on from its name in the message."""
        if what not in self.supports:
            hint = "`lic-dist models` lists what families support"
            raise LicError(f"{self.name} does not support {what}{why}", hint=hint)

    def require_crop(self, key: str, crop: int) -> None:
        """Raise UsageError where crops of this side in pixels, which `key` of a configuration asks for, do not fit."""
        if crop % self.strides.multiple:
            raise UsageError(f"{key} {crop} is no multiple of {self.strides.multiple}, which {self.name} needs")
