"""The kinds of quantizers: what a record, a calibration and a report have to know of each, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kind:
    """A kind of quantizer.

    `strength` is the field of record and config section that trades rate for distortion, which calibration moves:
    `lambda_scale` (g) where a search weighs bits against errors, `rounding` (xi) where a rule does, None where nothing
    does. `trellis` says whether a state machine chooses between two scalar quantizers, `embedded` whether it is a cut
    of bit planes (embedded.py), where lambda says which are known.
    """

    name: str
    strength: Literal["lambda_scale", "rounding"] | None = None
    trellis: bool = False
    embedded: bool = False

    @property
    def searched(self) -> bool:
        """Whether indices depend on the rates."""
        return self.strength == "lambda_scale"

    @property
    def symbol(self) -> str:
        """The strength's letter in tables."""
        return {"lambda_scale": "g", "rounding": "xi", None: ""}[self.strength]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("sq"),
        Kind("deadzone", "rounding"),
        Kind("rdoq", "lambda_scale"),
        Kind("tcq", "lambda_scale", trellis=True),
        Kind("embedded", embedded=True),
    )
}
