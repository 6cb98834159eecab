"""Parts of a hyperprior model: which parameters belong to encoder, decoder, hyper-decoder and z's prior.

The medians of z's prior belong to the encoder, because stored z are relative to them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lic_dist.errors import UsageError
from lic_dist.models.checkpoint import CDF, digest

ENCODER = ("g_a.", "h_a.", "entropy_bottleneck.quantiles")
ENTROPY = ("h_s.", "entropy_bottleneck.")
PARTS: dict[str, tuple[str, ...]] = {
    "decoder": ("g_s.",),
    "hyper": ("h_s.",),
    "prior": ("entropy_bottleneck.matrices.", "entropy_bottleneck.biases.", "entropy_bottleneck.factors."),
}
"""What may be retrained from a cache, by prefixes of parameters: all of z's prior but its quantiles."""

RECIPES = {
    "decoder": ("decoder",),
    "decoder+hyper": ("decoder", "hyper"),
    "all-but-encoder": ("decoder", "hyper", "prior"),
}
"""The parts that each finetuning recipe trains."""

_TABLES = (*CDF, ".scale_table", ".target")  # follow from the parameters


def tensors(model: nn.Module, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of a part by name, without buffers that are computed from others."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(prefixes) and not name.endswith(_TABLES)
    }


def medians(model: nn.Module) -> Tensor:
    """Return the medians of z's prior: float32 [1, Nz, 1, 1]."""
    quantiles: Tensor = model.entropy_bottleneck.quantiles  # type: ignore[union-attr,assignment]
    return quantiles.detach()[:, 0, 1].reshape(1, -1, 1, 1)


def encoder_digest(model: nn.Module) -> str:
    """Return the sha256 of what cached y and z depend on: g_a, h_a and the medians of z."""
    part = tensors(model, ("g_a.", "h_a."))
    return digest({**part, "medians": medians(model)})


def entropy_digest(model: nn.Module) -> str:
    """Return the sha256 of what cached indices depend on besides y: h_s and z's prior."""
    return digest(tensors(model, ENTROPY))


def decoder_digest(model: nn.Module) -> str:
    """Return the sha256 of g_s."""
    return digest(tensors(model, ("g_s.",)))


def trainable(model: nn.Module, recipe: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the parameters that a recipe trains: one of RECIPES, or a list of PARTS and of parameters.

    A parameter's name may be cut at a dot: "g_s.6" stands for its weight and bias.

    Raises:
        UsageError: an unknown recipe or name, or a parameter of the encoder, on which cached latents depend.
    """
    wanted = RECIPES.get(recipe, (recipe,)) if isinstance(recipe, str) else tuple(recipe)
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for one in wanted:
        prefixes = PARTS.get(one, (f"{one}.",))
        found = {name for name in names if name == one or name.startswith(prefixes)}
        if not found:
            known = ", ".join(PARTS)
            raise UsageError(f"recipe: nothing is named '{one}'", hint=f"{known}, or parameters such as g_s.6")
        if frozen := sorted(name for name in found if name.startswith(ENCODER)):
            raise UsageError(f"recipe: {frozen[0]} belongs to the encoder", hint="the cache holds what it made")
        chosen |= found
    return tuple(name for name in names if name in chosen)


def freeze_all_but(model: nn.Module, trained: Sequence[str]) -> list[nn.Parameter]:
    """Let only the parameters of these names train; return them in the model's order."""
    chosen, parameters = set(trained), []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name in chosen:
            parameters.append(parameter)
    return parameters
