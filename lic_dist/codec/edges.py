"""Mend the edges between blocks that were decoded alone, in a whole picture or a region of it, to the same pixels.

The network (models/boundary.py) corrects CORRECTS pixels on either side of an edge from decoded pixels as they were
before any correction, in exact integers: upright edges first, rounded to 8 bits, then lying ones. Beyond the ends of an
edge the picture's last pixels are repeated. So a pixel depends on those within SEES across and MARGIN along alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lic_dist.codec.blocks import Layout
from lic_dist.codec.strips import Pool
from lic_dist.models.boundary import CORRECTS, MARGIN, SEES, exact_corrections
from lic_dist.models.integer import IntegerNet

_LONGEST = 1 << 12  # pixels of an edge that are corrected at a time


@dataclass(frozen=True)
class Part:
    """A part of a picture, `rows` and `columns`, in pixels."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def within(self, other: Part) -> tuple[slice, slice]:
        """Return this part's rows and columns, counted from those of another part."""
        row, column = other.rows.start, other.columns.start
        return (
            slice(self.rows.start - row, self.rows.stop - row),
            slice(self.columns.start - column, self.columns.stop - column),
        )


def _near(edges: list[int], part: slice) -> list[int]:
    """Return the edges whose corrections reach into a part of an axis."""
    return [edge for edge in edges[1:-1] if edge - CORRECTS < part.stop and edge + CORRECTS > part.start]


def _beside(part: slice, length: int) -> slice:
    """Return a part of an axis with the margin that strips along it need."""
    return slice(max(0, part.start - MARGIN), min(length, part.stop + MARGIN))


def _sources(layout: Layout, wanted: Part) -> Iterator[Part]:
    """Yield the parts of a picture from which the corrections within a part are made."""
    for edge in _near(layout.columns, wanted.columns):
        yield Part(_beside(wanted.rows, layout.height), slice(edge - SEES, edge + SEES))
    for edge in _near(layout.rows, wanted.rows):
        yield Part(slice(edge - SEES, edge + SEES), _beside(wanted.columns, layout.width))


def needed(layout: Layout, wanted: Part, mended: bool) -> tuple[list[int], Part]:
    """Return the blocks that a part of a picture is decoded from, ascending, and the part that it lies in with all that
    its corrections see.
    """
    parts = [wanted, *(_sources(layout, wanted) if mended else ())]
    numbers = {number for part in parts for number in layout.meeting(part.rows, part.columns)}
    rows, columns = ([getattr(part, name) for part in parts] for name in ("rows", "columns"))
    whole = (slice(min(one.start for one in some), max(one.stop for one in some)) for some in (rows, columns))
    return sorted(numbers), Part(*whole)


def mend(picture: NDArray[np.uint8], at: Part, layout: Layout, wanted: Part, network: IntegerNet, pool: Pool) -> None:
    """Correct the edges within a wanted part, in place, of a decoded `picture` uint8 [h, w, 3] or [h, w], which is that
    of the part `at`.
    """
    strips = list(_strips(picture, at, layout, wanted))

    def correct(strip: _Strip) -> None:
        found = exact_corrections(network, strip.source.float())[0].permute(1, 2, 0).numpy()
        whole = found if strip.target.ndim == 3 else found.mean(2)
        strip.target[...] = np.rint(strip.target + whole[strip.kept]).clip(0, 255).astype(np.uint8)

    for upright in (True, False):
        for _ in pool.map(correct, [one for one in strips if one.upright == upright]):
            pass


@dataclass(frozen=True)
class _Strip:
    """A copy of decoded pixels uint8 [1, 3, n + 2 MARGIN, 2 SEES], upright; where the corrections go, a view of the
    picture, turned as the strip is; and which of them.
    """

    upright: bool
    source: torch.Tensor
    target: NDArray[np.uint8]
    kept: tuple[slice, slice]


def _strips(picture: NDArray[np.uint8], at: Part, layout: Layout, wanted: Part) -> Iterator[_Strip]:
    turned = picture.swapaxes(0, 1)
    axes = (
        (True, picture, layout.columns, wanted.columns, at.columns, wanted.rows, at.rows, layout.height),
        (False, turned, layout.rows, wanted.rows, at.rows, wanted.columns, at.columns, layout.width),
    )
    for upright, pixels, edges, across, across_at, along, along_at, length in axes:
        for edge in _near(edges, across):
            for first in range(along.start, along.stop, _LONGEST):
                part = slice(first, min(along.stop, first + _LONGEST))
                rows = np.arange(part.start - MARGIN, part.stop + MARGIN).clip(0, length - 1) - along_at.start
                source = pixels[rows, edge - SEES - across_at.start : edge + SEES - across_at.start]
                colours = source if source.ndim == 3 else np.repeat(source[..., None], 3, 2)
                corrected = slice(max(across.start, edge - CORRECTS), min(across.stop, edge + CORRECTS))
                target = pixels[
                    part.start - along_at.start : part.stop - along_at.start,
                    corrected.start - across_at.start : corrected.stop - across_at.start,
                ]
                kept = slice(corrected.start - edge + CORRECTS, corrected.stop - edge + CORRECTS)
                strip = torch.from_numpy(colours).permute(2, 0, 1)[None]
                yield _Strip(upright, strip, target, (slice(None), kept))
