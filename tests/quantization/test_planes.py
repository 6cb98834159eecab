"""Bit planes: nested intervals, probabilities, means and slopes against numerical integration, and their walk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_dist.quantization import planes as module
from lic_dist.quantization.planes import BINARY, FRACTION, LOST, NEVER, OCTAVE, TOP, BitPlanes, Nodes
from lic_dist.quantization.rates import LEVELS, SCALES, TOTAL

PLANES = BitPlanes()
GOLDEN = "eeeb81d3064a88d8ac3ace0a79c3d5e6a0eb6f24eb4b480c75c28b3e783dde97"


def interval(plane: int, m: int) -> tuple[float, float]:
    """|r| of a node, from its definition."""
    lowest, beyond = m << plane, (m + 1) << plane
    edges = [0.0 if k == 0 else (PLANES.zero + k - 1) * PLANES.step for k in (lowest, beyond)]
    return edges[0], edges[1]


def integrals(sigma: float, low: float, high: float) -> np.ndarray:
    """Probability, and integrals of |r| and r^2, of a Gaussian over |r| in [low, high]: the midpoint rule."""
    edges = np.linspace(low, min(high, 12 * sigma), 20_001)
    r = (edges[1:] + edges[:-1]) / 2
    density = 2 * np.exp(-np.square(r / sigma) / 2) / (sigma * np.sqrt(2 * np.pi)) * np.diff(edges)
    return np.array([density.sum(), (r * density).sum(), (r * r * density).sum()])


def node(level: int, plane: int, m: int) -> int:
    return int(PLANES.base[level, plane]) + min(m, int(PLANES.last[level, plane]))


def probabilities(row: int) -> np.ndarray:
    size = PLANES.tables.size[row]
    return np.diff(PLANES.tables.cdf[row, :size]) / TOTAL


def test_the_tables_are_the_formats() -> None:
    assert PLANES.digest == GOLDEN


def test_rows_sum_to_the_whole_and_only_first_symbols_escape() -> None:
    tables = PLANES.tables
    assert (np.take_along_axis(tables.cdf, tables.size[:, None] - 1, 1) == TOTAL).all()
    rest = np.r_[0:BINARY, BINARY + LEVELS : tables.rows]
    assert {int(PLANES.tables.size[row]) for row in rest} == {4, 5}
    assert all(probabilities(row)[-1] == 1 / TOTAL for row in rest)


@pytest.mark.parametrize("plane", [1, 2, 5, 10])
def test_cells_of_a_plane_are_those_of_the_next_two_by_two(plane: int) -> None:
    for m in range(40):
        low, high = interval(plane, m)
        (low_a, high_a), (low_b, high_b) = interval(plane - 1, 2 * m), interval(plane - 1, 2 * m + 1)
        assert (low, high) == (low_a, high_b) and high_a == low_b


@pytest.mark.parametrize("level", [0, 9, 16, 21, 30, 45, 60])
def test_probabilities_means_and_slopes_are_the_gaussians(level: int) -> None:
    sigma = float(SCALES[level])
    for plane in range(int(PLANES.first[level]) + 1):
        for m in (0, 1, 2, 3, 7):
            whole = integrals(sigma, *interval(plane, m))
            if whole[0] < 1e-9:
                continue
            number = node(level, plane, m)
            mean = whole[1] / whole[0] * min(1 + 1 / (12 * sigma**2), 2) if m else 0
            assert PLANES.means[number] / FRACTION == pytest.approx(mean, rel=1e-3, abs=1 / FRACTION)
            if not plane:
                assert PLANES.slopes[number] == NEVER
                continue
            lower, upper = (integrals(sigma, *interval(plane - 1, one)) for one in (2 * m, 2 * m + 1))
            p = upper[0] / whole[0]
            given = probabilities(int(PLANES.rows[number]))
            if m:
                assert given[1] == pytest.approx(p, abs=1 / (4 * BINARY) + 1e-6)
            else:
                assert given[[0, 2]] == pytest.approx(p / 2, abs=2 / TOTAL)
            if not 1e-4 < p < 1 - 1e-4:
                continue
            bits = -p * np.log2(p) - (1 - p) * np.log2(1 - p) + (0 if m else p)
            gain = upper[1] ** 2 / upper[0] + (
                lower[1] ** 2 / lower[0] - whole[1] ** 2 / whole[0] if m else min(LOST / sigma, 3) * upper[2]
            )
            slope = OCTAVE * np.log2(gain / whole[0] / bits)
            assert PLANES.slopes[number] == pytest.approx(slope, abs=1)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.booleans(), st.integers(0, LEVELS - 1)), min_size=1, max_size=40),
)
def test_symbols_lead_to_every_index(some: list[tuple[int, bool, int]]) -> None:
    k, negative, level = (np.array(one) for one in zip(*some, strict=True))
    k, level, negative = k.astype(np.int32), level.astype(np.uint8), negative & (k > 0)
    nodes = Nodes.unknown(k.shape)
    while len(due := np.flatnonzero(nodes.plane > 0)):
        now = Nodes(nodes.plane[due], nodes.sign[due], nodes.magnitude[due])
        found = PLANES.next(level[due], now, PLANES.symbols(level[due], now, k[due], negative[due]))
        assert found is not None
        nodes.plane[due], nodes.sign[due], nodes.magnitude[due] = found.plane, found.sign, found.magnitude
        assert (found.magnitude == k[due] >> found.plane).all()
    assert (nodes.sign * nodes.magnitude == np.where(negative, -k, k)).all()


def test_the_finest_quantizer_has_the_dead_zone_and_the_step() -> None:
    edge = np.float32(PLANES.zero * PLANES.step)
    r = np.array([0, edge - 0.01, edge + 0.01, edge + PLANES.step - 0.01, edge + PLANES.step + 0.01, -5.0], np.float32)
    assert PLANES.magnitudes(r).tolist() == [0, 0, 1, 1, 2, 5]


def test_values_lie_in_their_cells_or_beyond() -> None:
    level = np.full(3000, 40, np.uint8)
    m = np.arange(3000, dtype=np.int32)
    values = PLANES.values(level, Nodes(np.zeros(3000, np.int8), np.ones(3000, np.int8), m))
    for k, value in enumerate(values):
        low, high = interval(0, k)
        assert k == 0 or low <= value <= high * 1.01, k


def test_symbols_of_no_node_are_refused() -> None:
    level, nodes = np.full(1, 30, np.uint8), Nodes(*(np.full(1, 3, kind) for kind in (np.int8, np.int8, np.int32)))
    for symbol, m in ((2, 0), (-2, 0), (-1, 3), (2, 3)):
        one = Nodes(nodes.plane, nodes.sign, np.full(1, m, np.int32))
        assert PLANES.next(level, one, np.array([symbol])) is None
    assert PLANES.next(level, Nodes.unknown((1,)), np.array([-900])) is not None


@pytest.mark.parametrize("given", [(0.0, 0.7), (1.0, 0.4), (1.0, 1.1)])
def test_what_is_no_quantizer_is_refused(given: tuple[float, float]) -> None:
    with pytest.raises(ValueError):
        BitPlanes(*given)


def test_the_first_plane_is_the_coarsest_with_some_that_are_not_zero() -> None:
    for level in range(0, LEVELS, 7):
        first, sigma = int(PLANES.first[level]), float(SCALES[level])
        beyond = [1 - integrals(sigma, *interval(plane, 0))[0] for plane in range(TOP + 1)]
        assert first == max((plane for plane in range(1, TOP + 1) if beyond[plane] > module._SOME), default=0)
