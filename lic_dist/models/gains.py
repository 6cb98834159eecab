"""The gain that a variable-rate model is used at: `FILE@3` is its fourth rate, `FILE@0.35` a gain of any size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lic_dist.errors import UsageError
from lic_dist.models.protocol import Rate


def chosen_rate(rates: Sequence[Rate], held: float | None, gain: str) -> Rate | None:
    """Return the rate of the gain that a checkpoint holds, or that a text names; None where neither says one.

    Raises:
        UsageError: both say one, models of one rate are given one, or there is no such rate.
    """
    if gain and not rates:
        raise UsageError("a model of one rate takes no gain", hint=f"leave out @{gain}")
    if gain and held is not None:
        raise UsageError(f"the checkpoint is for gain {held:g} alone", hint=f"leave out @{gain}")
    return rate_of(rates, gain) if gain else None if held is None else rate_at(rates, held)


def rate_of(rates: Sequence[Rate], gain: str) -> Rate:
    """Return the rate that a text names: a whole number counts from 0, a number with a point is the gain itself.

    Raises:
        UsageError: there is no such rate.
    """
    if not gain.isdecimal():
        return rate_at(rates, float(gain))
    if int(gain) >= len(rates):
        raise UsageError(f"there is no rate {gain}", hint=f"@0 to @{len(rates) - 1}, or a gain such as @0.35")
    return rates[int(gain)]


def rate_at(rates: Sequence[Rate], gain: float) -> Rate:
    """Return the rate of a gain; between two rates the logarithm of lambda is linear in that of the gain.

    Raises:
        UsageError: a gain outside of the rates.
    """
    gains, lmbdas = np.array(sorted(rates)).T
    if not gains[0] <= gain <= gains[-1]:
        raise UsageError(f"gain {gain:g} is outside of {gains[0]:g} to {gains[-1]:g}")
    return Rate(gain, float(np.exp(np.interp(np.log(gain), np.log(gains), np.log(lmbdas)))))
