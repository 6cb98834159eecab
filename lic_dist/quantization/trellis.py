"""Trellis-coded quantizers as data: a state machine whose state says which scalar quantizer is active.

    state 0 --k--> state' = next_state[state][k & 1] --k--> ...     the parity of the index drives it

Two scalar quantizers share a union lattice of step D, and both contain 0:

    Q0:  ... -4D    -2D    0    2D    4D ...        level 2k D
    Q1:  ...    -3D    -D  0  D    3D    ...        level (2k - sgn k) D

A scalar quantizer is the machine with one state and one quantizer, whose level is k times its step.

Sources: VVC's dependent quantization (Schwarz et al., DCC 2019) for 4 states, ECM for 8, and generator
polynomials in the manner of Ungerboeck's codes for 8, 16, 32 and 64. Another machine is three lines away:

    from lic_dist.quantization.trellis import Trellis, register
    two = Trellis("tcq2", quantizer=(0, 1), next_state=((0, 1), (1, 0)))
    register(two)

The searches are generated from these tables, compiled at first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

MOST_STATES = 64


@dataclass(frozen=True)
class Trellis:
    """A state machine: `quantizer[s]` is active in state s, an index k leads to `next_state[s][k & 1]`.

    Every search, rate and decoder reads these two tables and no other description. Raises ValueError where the tables
    are no machine that a Viterbi search with two predecessors a state can walk.
    """

    name: str
    quantizer: tuple[int, ...]
    next_state: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        states = len(self.quantizer)
        if not states or len(self.next_state) != states or not set(self.quantizer) <= {0, 1}:
            raise ValueError(f"{self.name!r}: a quantizer (0 or 1) and a pair of next states for each state")
        if (states == 1) != (self.quantizer == (0,)) or states > MOST_STATES:
            raise ValueError(f"{self.name!r}: one state with quantizer 0, or 2 to {MOST_STATES} states")
        entered = sorted(state for pair in self.next_state for state in pair)
        if entered != sorted(2 * list(range(states))):
            raise ValueError(f"{self.name!r}: every state is entered by exactly two branches")
        if states > 1 and any(even == odd for even, odd in self.next_state):
            raise ValueError(f"{self.name!r}: the two parities of a state lead to two states")
        reached = {0}
        for _ in range(states * states):  # searches need every state to be reachable in one number of steps
            if len(reached) == states:  # and so in any larger one
                break
            reached = {state for before in reached for state in self.next_state[before]}
        if len(reached) < states:
            raise ValueError(f"{self.name!r}: from state 0 a path of any great length reaches every state")

    @property
    def states(self) -> int:
        """How many states there are."""
        return len(self.quantizer)

    @property
    def quantizers(self) -> int:
        """How many scalar quantizers the states share: 1 or 2."""
        return max(self.quantizer) + 1

    def predecessors(self) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
        """Return for each state its two entering branches as (previous state, parity), the lower state first."""
        branches: list[list[tuple[int, int]]] = [[] for _ in range(self.states)]
        for state, pair in enumerate(self.next_state):
            for parity, successor in enumerate(pair):
                branches[successor].append((state, parity))
        return tuple((first, second) for first, second in branches)

    def branch_class(self, state: int, parity: int) -> int:
        """Return the class of a branch out of `state`: the union levels m that it takes, modulo 4.

        Union level m is |k| = (m + 1) // 2 of quantizer m & 1, so 0 is Q0 with an even index, 2 Q0 odd, 1 Q1 odd, 3 Q1
        even.
        """
        return ((0, 2), (3, 1))[self.quantizer[state]][parity]

    def entering_branches(self) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
        """Return for each state its two entering branches as (previous state, class), the lower state first."""
        return tuple(
            ((lower, self.branch_class(lower, even)), (upper, self.branch_class(upper, odd)))
            for (lower, even), (upper, odd) in self.predecessors()
        )


def from_generators(states: int, h1: int, h0: int) -> Trellis:
    """Return the machine of a systematic feedback code with generators h1 and h0 (integers; the literature writes
    octal).

    A state is the bits w_1..w_v, w_1 the lowest. Its quantizer is Q = w_1; with u = parity xor Q, `w_j' = w_(j+1) xor
    h1_j u xor h0_j Q`, where w_(v+1) = 0 and h_j is bit j of h.
    """
    length = states.bit_length() - 1
    if states != 1 << length or length < 1:
        raise ValueError(f"a generator code has 2, 4, 8, ... states, not {states}")

    def successor(state: int, parity: int) -> int:
        active = state & 1
        driven = parity ^ active
        shifted = state >> 1
        return shifted ^ (((h1 >> 1) * driven) & (states - 1)) ^ (((h0 >> 1) * active) & (states - 1))

    return Trellis(
        name=f"tcq{states}",
        quantizer=tuple(state & 1 for state in range(states)),
        next_state=tuple((successor(state, 0), successor(state, 1)) for state in range(states)),
    )


SCALAR = Trellis("sq", (0,), ((0, 0),))
VVC4 = Trellis("tcq4", (0, 0, 1, 1), ((0, 2), (2, 0), (1, 3), (3, 1)))
ECM8 = Trellis("tcq8", (0, 1, 0, 1, 0, 1, 0, 1), ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)))
CODE16 = from_generators(16, h1=0o04, h0=0o23)
CODE32 = from_generators(32, h1=0o10, h0=0o45)
CODE64 = from_generators(64, h1=0o24, h0=0o103)

_BUILT_IN = (SCALAR, VVC4, ECM8, CODE16, CODE32, CODE64)
_BY_NAME = {machine.name: machine for machine in _BUILT_IN}
_BY_STATES = {machine.states: machine for machine in _BUILT_IN}


def register(machine: Trellis) -> None:
    """Make a machine known to `trellis` by its name; ValueError where another machine has that name."""
    if _BY_NAME.setdefault(machine.name, machine) != machine:
        raise ValueError(f"{machine.name} is another machine already: give this one another name")


def trellis(name_or_states: str | int) -> Trellis:
    """Return the machine of that name ("sq", "tcq4", .. "tcq64", or registered), or the built-in one of so many states.

    ValueError if there is none.
    """
    known: dict[Any, Trellis] = {**_BY_NAME, **_BY_STATES}
    if name_or_states not in known:
        raise ValueError(f"no trellis {name_or_states!r}: there are {', '.join(_BY_NAME)}")
    return known[name_or_states]


def levels(k: Any, q: Any, step: float, trellis: Trellis, shift: Any = 0.0) -> Any:
    """Return reconstruction levels, float32, of indices k under active quantizers q (same shape, 0 or 1; unused by SQ).

    Takes integer arrays or tensors and returns the same kind. The multiple of the step is an exact integer, so there is
    one rounding; a `shift` (in steps, away from zero; zero is not shifted), a number or float32 of the shape and kind
    of k, adds a second.
    """
    if isinstance(k, torch.Tensor):
        multiple = k.to(torch.int32)
        if trellis.quantizers == 2:
            multiple = 2 * multiple - torch.sign(multiple) * q.to(torch.int32)
        units = multiple.to(torch.float32)
        if isinstance(shift, torch.Tensor):
            units = units + torch.sign(units) * shift
        elif shift:
            units = units + torch.sign(units) * float(np.float32(shift))
        return units * float(np.float32(step))
    whole = np.asarray(k).astype(np.int32)
    if trellis.quantizers == 2:
        whole = 2 * whole - np.sign(whole) * np.asarray(q).astype(np.int32)
    scaled: NDArray[Any] = whole.astype(np.float32)
    if isinstance(shift, np.ndarray) or shift:
        scaled = scaled + np.sign(scaled) * np.asarray(shift, np.float32)
    return scaled * np.float32(step)
