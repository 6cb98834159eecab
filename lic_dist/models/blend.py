"""Blends: a decoder between two of one encoder and entropy model, its weights (1 - share) A + share B.

Network interpolation (Wang et al. 2019, arXiv 1811.10515): between a decoder that was trained for fidelity and one that
was trained on against a discriminator, a share of the way trades one for the other, without another training, at the
very same bits.
"""

from __future__ import annotations

import copy

import torch

from lic_dist.errors import UsageError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import encoder_digest, entropy_digest, model_digest

WHAT = "blending"  # of an entry of a checkpoint's history


def blended(a: Checkpoint, b: Checkpoint, share: float) -> Checkpoint:
    """Return a model that differs from `a` in the decoder alone; at a share of 0 or 1 it is that of `a` or of `b`.

    It carries the quantizers of both, but for those of one name that are not one record.

    Raises:
        UsageError: models of different families or rates, or with different encoders or entropy models.
    """
    for what, one, other in (
        ("families", a.spec.architecture, b.spec.architecture),
        ("lambdas", a.spec.lmbda, b.spec.lmbda),
        ("options", a.spec.options, b.spec.options),
        ("encoders", encoder_digest(a.model), encoder_digest(b.model)),
        ("entropy models", entropy_digest(a.model), entropy_digest(b.model)),
    ):
        if one != other:
            said = "" if isinstance(one, str) and len(one) == 64 else f": {one} and {other}"
            raise UsageError(
                f"{a.source} and {b.source} have different {what}{said}",
                hint="blend decoders that were retrained from one model, with recipe: decoder",
            )
    model, decoder = copy.deepcopy(a.model), a.codec.prefixes("decoder")
    ends = dict(b.model.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith(decoder):
                value.copy_(value.lerp(ends[name], share))
    digests = [model_digest(one.model) for one in (a, b)]
    differing = {name for name in a.quantizers.keys() & b.quantizers.keys() if a.quantizers[name] != b.quantizers[name]}
    carried = {name: text for name, text in {**a.quantizers, **b.quantizers}.items() if name not in differing}
    entry = {"what": WHAT, "share": share, "of": [a.source, b.source], "models": digests}
    return Checkpoint(model, a.spec, carried, [*a.history, {**entry, "end": b.history}])
