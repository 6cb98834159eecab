"""A paired test: Wilcoxon's signed-rank test (1945) of what changed for each image between two points or curves."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import wilcoxon

SAYS = "Wilcoxon's signed-rank test, two-sided, paired by image, of its row alone."


def signed_rank(changes: ArrayLike) -> float:
    """p of the two-sided test that changes of paired images, [images], lie about zero.

    Exact for up to 50 images, unless some change alike or not at all; images without change count half for either side
    (Pratt 1959), and where no image changes p is 1.
    """
    found = np.asarray(changes, np.float64)
    return float(wilcoxon(found, zero_method="pratt").pvalue) if found.any() else 1.0


def shown(p: float | None) -> str:
    """In three decimals without the zero before them; empty for None."""
    return "" if p is None else "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")
