"""Recognise a state_dict: unwrap it, rename its tensors to the present names, and tell which model it belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor

from lic_dist.errors import LicError
from lic_dist.models.architectures import ARCHITECTURES, family, installed

WRAPPERS = ("ema", "state_dict", "model_state_dict", "net_state_dict", "model", "net", "network")
"""Keys under which training scripts keep the tensors. `ema` comes first: it is the one that is judged."""

_PREFIX = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
_BOTTLENECK = re.compile(r"^entropy_bottleneck\.(?:_(matri|bias|factor)(?:x|ces|es|s)?\.?(\d+))$")
_PLURAL = {"matri": "matrices", "bias": "biases", "factor": "factors"}
_PUBLISHED = re.compile(
    r"^(bmshj2018-(?:factorized(?:-prior|-relu)?|hyperprior)|mbt2018(?:-mean)?|cheng2020[-_](?:anchor|attn))"
    r"-(?:(ms-ssim|mse)-)?([1-8])-[0-9a-f]{8}\.pth\.tar$"
)
_UNUSED = "QuantOffset"  # of early variable-rate models; CompressAI drops it too

_Names = Mapping[str, Tensor]


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the installed CompressAI's names, through up to three wrappers.

    Prefixes of DataParallel, DDP and torch.compile are removed; float tensors become float32.

    Raises:
        LicError: a tensor with NaN or infinity, which is named.
    """
    for _ in range(3):
        inner = next((content[key] for key in WRAPPERS if _may_wrap(content.get(key))), None)
        if inner is None:
            break
        content = inner
    plain = {
        _PREFIX.sub("", name): value.float() if value.is_floating_point() else value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    stepped = "gayn2zqstep.0.weight" in plain  # its prior of z has the old names still
    state = {name if stepped else _renamed(name): value for name, value in plain.items() if name != _UNUSED}
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            kind = "NaN" if bool(value.isnan().any()) else "infinity"
            raise LicError(f"{name} holds {kind}", hint="the training diverged; take an earlier checkpoint")
    return state


def as_named(own: Container[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that a module has for them: CompressAI's strided blocks had `downsample` for
    `skip`, which blocks of other repositories still have.
    """
    return {name if name in own else name.replace(".downsample.", ".skip."): value for name, value in state.items()}


def _may_wrap(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor | Mapping) for inner in value.values())


def _renamed(name: str) -> str:
    found = _BOTTLENECK.match(name)
    return f"entropy_bottleneck.{_PLURAL[found[1]]}.{found[2]}" if found else name


def _has(*parts: str) -> Callable[[_Names], bool]:
    return lambda state: all(any(part in name for name in state) for part in parts)


OTHERS: tuple[tuple[str, Callable[[_Names], bool]], ...] = (("a video model (ssf2020)", _has("motion_encoder")),)
"""Families that are not served, looked for from the first on, after those of installed packages."""


def recognise(state: Mapping[str, Tensor], named: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return (architecture, sizes), read off names and shapes: `named` where the state_dict is of that family.

    Sizes are N, M and what else `CodecModel.sizes` tells.

    Raises:
        LicError: a family that is not served, which is named, or no image codec.
    """
    if named and family(named).fits(state):
        return named, family(named).sizes(state)
    for name in installed():
        if family(name).fits(state):
            return name, family(name).sizes(state)
    others = [name for name, fits in OTHERS if fits(state)]
    for name in ARCHITECTURES if not others else ():
        if family(name).fits(state):
            return name, family(name).sizes(state)
    kinds = {"latent_codec.": "a model with latent codecs", "cc_mean_transforms.": "a model of channel slices"}
    others += [kind for part, kind in kinds.items() if _has(part)(state)]
    if others:
        served = ", ".join([*ARCHITECTURES, *installed()])
        raise LicError(
            f"this is {others[0]}, a family that is not served",
            hint=f"served are {served}; docs/families.md tells how to adapt one",
        )
    raise LicError("this holds no image codec", hint="a CompressAI state_dict has tensors such as g_a.0.weight")


def parse_published_name(name: str) -> tuple[str, str, int] | None:
    """Return (architecture, metric, quality) for a file name that CompressAI publishes, else None."""
    found = _PUBLISHED.match(name)
    return (found[1], found[2] or "mse", int(found[3])) if found else None
