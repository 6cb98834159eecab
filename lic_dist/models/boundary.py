"""A small network that mends the edges between blocks that were decoded alone.

After the boundary-aware post-processing of "Learned block-based hybrid image compression" (Wu et al. 2022). It looks at
strips: SEES decoded pixels on either side of an edge, and along it ROWS of them, centred at the row that it corrects by
CORRECTS pixels on either side. It is one network for upright and lying edges, which are turned, and is given
differences to the two pixels at the edge:

    strip -> ROWS x 2 SEES pixels less those at the edge -> 1x1 -> ReLU -> 1x1 -> ReLU -> 1x1 -> 2 CORRECTS corrections

The first layer is a convolution whose kernel is as wide as the strip. A decoder computes all of it in exact integers
(integer.py), so that a pixel does not depend on what else is decoded; a training computes it in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lic_dist.errors import LicError
from lic_dist.models.checkpoint import digest
from lic_dist.models.integer import IntegerNet

SEES, CORRECTS, ROWS = 8, 4, 5  # pixels
HIDDEN = 48
MARGIN = ROWS // 2  # pixels along the edge that a strip needs beyond those that it corrects
_IN, _OUT = 64.0, 8.0  # pixels of 8 bits that stand for 1


class Boundary(nn.Module):
    """The network: decoded strips, upright, float32 [B, 3, n + 2 MARGIN, 2 SEES] in pixels of 8 bits -> corrections of
    the middle in the same unit, float32 [B, 3, n, 2 CORRECTS]. It starts as zero; 15,000 parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3 * ROWS * 2 * SEES, HIDDEN, 1),
            nn.ReLU(),
            nn.Conv2d(HIDDEN, HIDDEN, 1),
            nn.ReLU(),
            nn.Conv2d(HIDDEN, 3 * 2 * CORRECTS, 1),
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]  # a Sequential's modules have no type
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]  # a Sequential's modules have no type

    def forward(self, strips: Tensor) -> Tensor:
        return _corrections(self.layers(_differences(strips)))

    def exact(self) -> IntegerNet:
        """Return the network in integers, which `exact_corrections` takes."""
        return IntegerNet(self.layers)

    def carried(self) -> dict[str, Tensor]:
        """Return what a checkpoint carries: the parameters in float16."""
        return {name: value.detach().half().cpu() for name, value in self.state_dict().items()}


def loaded(carried: Mapping[str, Tensor]) -> Boundary:
    """Return the network that a checkpoint carries. Raises LicError for tensors of another network."""
    found = Boundary()
    try:
        found.load_state_dict({name: value.float() for name, value in carried.items()})
    except (RuntimeError, AttributeError) as error:
        line = str(error).splitlines()[-1].strip()
        raise LicError(f"the checkpoint's boundary network is of another version: {line}", hint="retrain it") from None
    return found.eval()


def boundary_id(carried: Mapping[str, Tensor]) -> bytes:
    """Return the four bytes by which a file identifies a network that a checkpoint carries."""
    return bytes.fromhex(digest(dict(carried)))[:4]


def exact_corrections(network: IntegerNet, strips: Tensor) -> Tensor:
    """Return what `Boundary` does of strips of whole pixels, in multiples of 2^-9: the same for a row of a strip in
    whatever strip it comes.
    """
    return _corrections(network(_differences(strips)))


def mended(network: Boundary, squares: Tensor) -> Tensor:
    """Return squares of two by two blocks, decoded alone, float32 [B, 3, 2 s, 2 s] in pixels of 8 bits, with both their
    edges corrected: at the crossing the corrections of both add up.
    """
    middle, pad = squares.shape[-1] // 2, (0, 0, MARGIN, MARGIN)
    seen, corrected = slice(middle - SEES, middle + SEES), slice(middle - CORRECTS, middle + CORRECTS)
    found = squares.clone()
    for one, out in ((squares, found), (squares.transpose(2, 3), found.transpose(2, 3))):
        strips = nn.functional.pad(one[..., seen], pad, mode="replicate")
        out[..., corrected] += network(strips)
    return found


def _differences(strips: Tensor) -> Tensor:
    """Return what the layers take of each row, [B, 3 ROWS 2 SEES, n, 1]: exact in integers for strips of pixels."""
    at_edge = strips[..., SEES - 1 : SEES + 1].sum(3) / 2
    around = strips.unfold(2, ROWS, 1)  # [B, 3, n, 2 SEES, ROWS]
    values = (around - at_edge[:, :, MARGIN:-MARGIN, None, None]) / _IN
    return values.permute(0, 1, 4, 3, 2).flatten(1, 3)[..., None]


def _corrections(values: Tensor) -> Tensor:
    """[B, 3 2 CORRECTS, n, 1] -> [B, 3, n, 2 CORRECTS]."""
    return values[..., 0].unflatten(1, (3, 2 * CORRECTS)).transpose(2, 3) * _OUT
