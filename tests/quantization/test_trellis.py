"""State machines: golden tables, the generator formula, levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lic_dist.quantization.quantize import active
from lic_dist.quantization.trellis import (
    CODE16,
    CODE32,
    CODE64,
    ECM8,
    SCALAR,
    VVC4,
    Trellis,
    from_generators,
    levels,
    trellis,
)

NNCODEC8 = ((0, 2), (7, 5), (1, 3), (6, 4), (2, 0), (5, 7), (3, 1), (4, 6))


def test_generators_give_nncodecs_machine_which_is_ecms_with_5_and_7_renamed() -> None:
    generated = from_generators(8, h1=0o04, h0=0o13)
    assert generated.next_state == NNCODEC8
    renamed = {5: 7, 7: 5}
    for state in range(8):
        twin = renamed.get(state, state)
        assert generated.quantizer[twin] == ECM8.quantizer[state]
        assert generated.next_state[twin] == tuple(renamed.get(s, s) for s in ECM8.next_state[state])
    assert generated.next_state != ECM8.next_state


def test_golden_states() -> None:
    k = np.array([[1, 0, -1, 2, 3, 0, 0, 1]], np.int16)
    assert active(k, VVC4).tolist() == [[0, 1, 0, 0, 0, 1, 0, 1]]
    assert active(k, ECM8).tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    assert active(k, SCALAR).tolist() == [[0] * 8]
    assert CODE16.next_state[:4] == ((0, 2), (11, 9), (1, 3), (10, 8))
    assert CODE32.next_state[:4] == ((0, 4), (22, 18), (1, 5), (23, 19))
    assert CODE64.next_state[:4] == ((0, 10), (43, 33), (1, 11), (42, 32))


@pytest.mark.parametrize("machine", [VVC4, ECM8, CODE16, CODE32, CODE64])
def test_two_parities_part_and_every_state_is_reached_and_left_by_both_quantizers(machine: Trellis) -> None:
    reached = {0}
    for _ in range(machine.states):
        reached |= {successor for state in reached for successor in machine.next_state[state]}
    assert reached == set(range(machine.states))
    assert sum(machine.quantizer) == machine.states // 2
    for state, pair in enumerate(machine.predecessors()):
        assert pair[0][0] < pair[1][0]
        assert all(machine.next_state[before][parity] == state for before, parity in pair)


def test_trellis_by_name_and_by_states() -> None:
    assert trellis("tcq8") is trellis(8) is ECM8
    assert trellis("sq") is trellis(1) is SCALAR
    with pytest.raises(ValueError, match="no trellis"):
        trellis(7)
    with pytest.raises(ValueError, match="entered"):
        Trellis("broken", (0, 1), ((0, 0), (0, 1)))
    for disconnected_or_periodic in (((0, 1), (1, 0), (2, 3), (3, 2)), ((2, 3), (3, 2), (0, 1), (1, 0))):
        with pytest.raises(ValueError, match="reaches every state"):
            Trellis("apart", (0, 0, 1, 1), disconnected_or_periodic)
    with pytest.raises(ValueError, match="one state with quantizer 0"):
        Trellis("one", (1,), ((0, 0),))


def test_levels_of_both_quantizers_and_in_torch() -> None:
    k = np.array([-2, -1, 0, 1, 2], np.int16)
    zeros, ones = np.zeros(5, np.uint8), np.ones(5, np.uint8)
    assert levels(k, zeros, 0.5, ECM8).tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert levels(k, ones, 0.5, ECM8).tolist() == [-1.5, -0.5, 0.0, 0.5, 1.5]
    assert levels(k, zeros, 0.5, SCALAR).tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    wide = np.arange(-3000, 3000, dtype=np.int16)
    q = (wide % 2).astype(np.uint8)
    in_torch = levels(torch.from_numpy(wide), torch.from_numpy(q), 0.561, ECM8)
    assert in_torch.dtype == torch.float32
    assert np.array_equal(in_torch.numpy(), levels(wide, q, 0.561, ECM8))


def test_active_of_nothing() -> None:
    assert active(np.zeros((0, 5), np.int16), ECM8).shape == (0, 5)
    assert active(np.zeros((3, 0), np.int16), ECM8).shape == (3, 0)
