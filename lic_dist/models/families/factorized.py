"""Models without a side latent: y is coded by a factorized prior, a distribution for each channel.

Balle, Minnen, Singh, Hwang and Johnston 2018, Variational Image Compression with a Scale Hyperprior. All of y is one
stage. Its means are the medians of the prior, which count as the encoder's, as those of a side latent do: cached
indices are relative to them. The rest of the prior is what finetuning may train.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lic_dist.models.priors import NoChannels, NoSide
from lic_dist.models.protocol import CodecModel, Run, Side, Sides, Stage, Strides


class FactorizedPrior(CodecModel):
    """CompressAI's `bmshj2018-factorized`."""

    name = "bmshj2018-factorized"
    module_class: ClassVar[type[nn.Module] | str] = "compressai.models:FactorizedPrior"
    strides = Strides(16, (), 64)  # padded as CompressAI's own evaluation does
    parts = {"encoder": ("g_a.",), "decoder": ("g_s.",), "prior": ("entropy_bottleneck.",)}
    supports = frozenset({"deterministic", "tiles", "refinement"})

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return _has_no_side(state) and "g_a.1.beta" in state

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"N": state["g_a.0.weight"].size(0), "M": state["g_a.6.weight"].size(0)}

    @property
    def prior(self) -> Side:
        return Side("y", self.module.entropy_bottleneck)

    @property
    def sides(self) -> tuple[Side, ...]:
        return (NoSide("z", self.module.entropy_bottleneck),)

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        return {"g_a": self.module.g_a, "h_a": NoChannels(), "g_s": self.module.g_s}

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        (z_hat,) = sides_hat
        return (yield Stage(self.prior.medians().expand(len(z_hat), -1, *z_hat.shape[2:])))


class FactorizedPriorReLU(FactorizedPrior):
    """CompressAI's `bmshj2018-factorized-relu`."""

    name = "bmshj2018-factorized-relu"
    module_class = "compressai.models:FactorizedPriorReLU"

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return _has_no_side(state) and "g_a.1.beta" not in state


def _has_no_side(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state_dict has the transforms and the prior of CompressAI's factorized models, and no more."""
    needed = {"g_a.6.weight", "g_s.6.weight", "entropy_bottleneck.quantiles"}
    return needed <= state.keys() and all(name.startswith(("g_a.", "g_s.", "entropy_bottleneck.")) for name in state)
