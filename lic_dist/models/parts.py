"""Parts of a hyperprior model: which parameters belong to the encoder, the decoder, the hyper-decoder, the prior.

The medians of z's prior belong to the encoder: stored z counts from them.
"""

from __future__ import annotations

from torch import Tensor, nn

from lic_dist.models.checkpoint import digest

ENCODER = ("g_a.", "h_a.", "entropy_bottleneck.quantiles")
ENTROPY = ("h_s.", "entropy_bottleneck.")
RECIPES: dict[str, tuple[str, ...]] = {"decoder": ("g_s.",), "decoder+hyper": ("g_s.", "h_s.")}
"""The parameters that each finetuning recipe trains, by prefix."""

_TABLES = ("_quantized_cdf", "_offset", "_cdf_length", "scale_table", "target")  # follow from the parameters


def tensors(model: nn.Module, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a part by name; buffers that follow from others are left out."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(prefixes) and not name.endswith(_TABLES)
    }


def medians(model: nn.Module) -> Tensor:
    """Medians of z's prior: float32 [1, Nz, 1, 1]."""
    quantiles: Tensor = model.entropy_bottleneck.quantiles  # type: ignore[union-attr,assignment]
    return quantiles.detach()[:, 0, 1].reshape(1, -1, 1, 1)


def encoder_digest(model: nn.Module) -> str:
    """sha256 of what cached y and z depend on: g_a, h_a and the medians of z."""
    part = tensors(model, ("g_a.", "h_a."))
    return digest({**part, "medians": medians(model)})


def entropy_digest(model: nn.Module) -> str:
    """sha256 of what cached indices depend on besides y: h_s and z's prior."""
    return digest(tensors(model, ENTROPY))


def decoder_digest(model: nn.Module) -> str:
    """sha256 of g_s."""
    return digest(tensors(model, ("g_s.",)))


def freeze_all_but(model: nn.Module, prefixes: tuple[str, ...]) -> list[nn.Parameter]:
    """Let only the parameters of these prefixes train; return them in the model's order."""
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
        if parameter.requires_grad:
            trained.append(parameter)
    return trained
