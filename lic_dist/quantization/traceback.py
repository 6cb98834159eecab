"""Generate the traceback of a machine: a loop over the lanes of a block, without a look-up, so that it becomes SIMD.

Where a branch comes from is a function of a state and the bit of its decision, and so is the branch's class. Up to
eight states these are nibbles of a constant for either bit, shifted by four times the state; of more states each of
their bits has a constant of its own, shifted by the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from numba import types

from lic_dist.quantization.jit import pointer_kernel, pointer_to
from lic_dist.quantization.selection import field, identity, made, named
from lic_dist.quantization.trellis import Trellis

_WORDS, _BYTES = pointer_to(types.uint32), pointer_to(types.uint8)
_TRACED = (_WORDS, _WORDS, types.int64, _BYTES, _BYTES, types.int64, _WORDS, _WORDS, types.int64)


@lru_cache(maxsize=64)
def trace(trellis: Trellis, steps: int) -> Any:
    """Return the traceback of one step or of `steps_at_once`, compiled.

    `first` is the word of their decisions, the last step's `shift` bits up; of more than 32 states `second` is its
    upper half. `state` moves back; a byte a step is shifted into `path`, the earliest step lowest: the class of the
    branch that was taken, plus 4 where it takes zero.
    """
    lines = [
        "def trace(first, second, shift, zeros, later_zeros, zero_shift, state, path, width):",
        "    for lane in range(width):",
        "        s, steps = state[lane], path[lane]",
    ]
    for back in range(steps):
        if trellis.states > 32:
            lines += ["        high, low = _U(0 - _shr(s, _U(5))), _U(s & _U(31))"]
            lines += ["        word = _U(first[lane] ^ _U(high & _U(first[lane] ^ second[lane])))"]
        else:
            lines += [f"        low, word = s, _shr(first[lane], _U(shift + {field(trellis.states) * back}))"]
        nibble = "zero_shift" if steps == 1 else 4 * (1 - back % 2)
        zeros = "later_zeros" if steps == 4 and back < 2 else "zeros"
        lines += [
            "        bit = _U(0 - _U(_shr(word, low) & _U(1)))",
            *_entered(trellis),
            f"        zero = _U(_shr(_U({zeros}[lane]), _U(number + _U({nibble}))) & _U(1))",
            "        steps = _U(_U(steps << _U(8)) | _U(number | _U(zero << _U(2))))",
        ]
    lines += ["        state[lane], path[lane] = s, steps"]
    return pointer_kernel(named(made(lines), f"trace{steps}_{identity(trellis)}"), _TRACED)


def _entered(trellis: Trellis) -> list[str]:
    """Generate the class of the branch that entered a state, and the state before."""
    previous, number = (
        [[branches[bit][one] for branches in trellis.entering_branches()] for bit in (0, 1)] for one in (0, 1)
    )
    if trellis.states <= 8:
        return [
            "        at = _U(low << _U(2))",
            f"        number = _U(_shr({_chosen(number, 4)}, at) & _U(3))",
            f"        s = _U(_shr({_chosen(previous, 4)}, at) & _U(7))",
        ]
    return [_by_bits("number", number, 2), _by_bits("s", previous, (trellis.states - 1).bit_length())]


def _by_bits(name: str, values: Sequence[Sequence[int]], bits: int) -> str:
    found = ""
    for bit in range(bits):
        sliced = [[value >> bit & 1 for value in of_bit] for of_bit in values]
        constant = _chosen([of_bit[:32] for of_bit in sliced], 1)
        if len(sliced[0]) > 32:
            constant = f"_U({constant} ^ _U(high & _U({constant} ^ {_chosen([of_bit[32:] for of_bit in sliced], 1)})))"
        term = f"_U(_U(_shr({constant}, low) & _U(1)) << _U({bit}))"
        found = f"_U({found} | {term})" if found else term
    return f"        {name} = {found}"


def _chosen(values: Sequence[Sequence[int]], width: int) -> str:
    """Return the expression of one of two constants by the decision's bit: values for each state, so many bits each."""
    lower, upper = (sum(value << width * state for state, value in enumerate(of_bit)) for of_bit in values)
    return f"_U({lower})" if lower == upper else f"_U(_U({lower}) ^ _U(bit & _U({lower ^ upper})))"
