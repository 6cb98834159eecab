"""The parts of a model: which parameters belong to encoder, decoder, entropy model and priors, and their digests.

The medians of a prior belong to the encoder, because stored z, and k where y has the prior, are relative to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lic_dist.errors import UsageError
from lic_dist.models.architectures import adapt
from lic_dist.models.checkpoint import COMPUTED, digest
from lic_dist.models.protocol import CodecModel, Part

TRAINABLE: tuple[Part, ...] = ("decoder", "hyper", "context", "prior")
RECIPES = {
    "decoder": ("decoder",),
    "decoder+hyper": ("decoder", "hyper"),
    "all-but-encoder": ("decoder", "hyper", "prior"),
}
"""The parts that each finetuning recipe trains."""

QUANTILES = ".quantiles"  # end the names of the parameters that bound a prior's integer tables; the medians among them


def tensors(model: nn.Module, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of a part by name, without buffers that are computed from others."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(prefixes) and not name.endswith(COMPUTED)
    }


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each part that has some; the quantiles of priors count with their priors."""
    codec = adapt(model)
    found: dict[str, int] = {}
    for part in codec.parts:
        prefixes = codec.prefixes(part)
        sizes = [values.numel() for name, values in model.named_parameters() if name.startswith(prefixes)]
        found |= {part: sum(sizes)} if sizes else {}
    return found


def encoder_digest(model: nn.Module) -> str:
    """Return the sha256 of what cached y and z depend on: g_a, h_a, the medians of z, or of y in its place, a gain."""
    codec = adapt(model)
    priors = [*codec.sides, *([codec.prior] if codec.prior else [])]
    medians = {"medians": torch.cat([one.medians() for one in priors], 1)} if priors else {}
    return digest({**tensors(model, codec.prefixes("encoder")), **medians, **_gain(codec)})


def entropy_digest(model: nn.Module) -> str:
    """Return the sha256 of what cached indices depend on besides y: hyper and context networks, and the priors."""
    codec = adapt(model)
    return digest({**tensors(model, codec.prefixes("hyper", "context", "prior")), **_gain(codec)})


def decoder_digest(model: nn.Module) -> str:
    """Return the sha256 of g_s."""
    return digest(tensors(model, adapt(model).prefixes("decoder")))


def model_digest(model: nn.Module) -> str:
    """Return the sha256 of all that a model computes with."""
    return digest({**model.state_dict(), **_gain(adapt(model))})


def _gain(codec: CodecModel) -> dict[str, Tensor]:
    return {} if codec.gain is None else {"gain": torch.tensor(codec.gain)}


def trainable(model: nn.Module, recipe: str | Sequence[str], encoder: bool = False) -> tuple[str, ...]:
    """Return the names of the parameters that a recipe trains: one of RECIPES, or a list of parts and of parameters.

    "hyper" is what makes the distribution of y: context networks too, or the prior where y has one itself. A
    parameter's name may be cut at a dot: "g_s.6" stands for its weight and bias. With `encoder`, in base training, it
    is a part too, and quantiles are left out.

    Raises:
        UsageError: an unknown recipe or name, or, without `encoder`, a parameter of it, on which cached latents depend.
    """
    wanted = RECIPES.get(recipe, (recipe,)) if isinstance(recipe, str) else tuple(recipe)
    codec = adapt(model)
    named: tuple[Part, ...] = ("encoder", *TRAINABLE) if encoder else TRAINABLE
    parts: dict[str, tuple[str, ...]] = {part: codec.prefixes(part) for part in named}
    parts["hyper"] = parts["prior"] if codec.prior else parts["hyper"] + parts["context"]
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for one in wanted:
        found = {name for name in names if name == one or name.startswith(parts.get(one, (f"{one}.",)))}
        if one in parts or encoder:
            found = {name for name in found if not name.endswith(QUANTILES)}
        if one not in parts and not found:
            known = ", ".join(parts)
            raise UsageError(f"recipe: nothing is named '{one}'", hint=f"{known}, or parameters such as g_s.6")
        encoders = (name for name in found if name.startswith(codec.prefixes("encoder")) or name.endswith(QUANTILES))
        if not encoder and (frozen := sorted(encoders)):
            raise UsageError(f"recipe: {frozen[0]} belongs to the encoder", hint="the cache holds what it made")
        chosen |= found
    if not chosen:
        raise UsageError(f"recipe: a model of {codec.name} has nothing of {', '.join(wanted)}")
    return tuple(name for name in names if name in chosen)


def freeze_all_but(model: nn.Module, trained: Sequence[str]) -> list[nn.Parameter]:
    """Let only the parameters of these names train; return them in the model's order."""
    chosen, parameters = set(trained), []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name in chosen:
            parameters.append(parameter)
    return parameters
