"""Generate add-compare-select for a machine: a loop over the lanes of a block, with a variable for every state.

Each state keeps the cheaper of the two branches that enter it, the first (from the lower state) on a tie; a bit says
whether it is the second. The bits of a step are a field of a 32-bit word, which holds as many steps as fit, the last
one lowest. What is generated is compiled by numba, and kept in its cache on disk.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import types

from lic_dist.quantization.candidates import BLOCK, shift_right
from lic_dist.quantization.jit import pointer_kernel, pointer_to
from lic_dist.quantization.trellis import Trellis

GROUP = 8  # states of a loop where all are too many
SELECT = "def select(metric, fresh, branch, first, second, width):"
_SELECTED = (*[pointer_to(types.int32)] * 3, *[pointer_to(types.uint32)] * 2, types.int64)


def words(states: int) -> int:
    """Return how many 32-bit words a step's decisions take at least, a bit a state."""
    return 1 if states <= 32 else 2


def field(states: int) -> int:
    """Return how many bits of a word a step's decisions take: a power of two from 4 to 32."""
    return min(32, max(4, 1 << (states - 1).bit_length()))


def steps_at_once(states: int) -> int:
    """Return how many steps a loop over the lanes takes at once: a divisor of those that a word holds."""
    return 4 if states <= 8 else 2 if states <= 16 else 1


def named(function: Any, name: str) -> Any:
    """Name a function that is kept on disk. numba distinguishes functions by the age of their file and their names, so
    the name must contain a digest of what else they are made from.
    """
    function.__name__ = function.__qualname__ = name
    return function


@lru_cache(maxsize=64)
def identity(trellis: Trellis) -> str:
    """Return a machine's number of states and a digest: of its tables and of the text that its loops are made from."""
    tables = repr((trellis.quantizer, trellis.next_state))
    return f"{trellis.states}_{digest('candidates.py', 'jit.py', 'selection.py', 'traceback.py', more=tables)}"


def digest(*names: str, more: str = "") -> str:
    """Return a short digest of the text of modules of this room."""
    texts = [Path(__file__).with_name(name).read_text() for name in names]
    return hashlib.sha256("".join([more, *texts]).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)
def select(trellis: Trellis, steps: int) -> Any:
    """Return add-compare-select of so many steps of `width` lanes, compiled: from `metric` to `fresh`, or in place
    where `steps_at_once` are several.
    """
    lines = _by_groups(trellis) if steps_at_once(trellis.states) == 1 else _at_once(trellis, steps)
    return pointer_kernel(named(made(lines), f"select{steps}_{identity(trellis)}"), _SELECTED)


def _at_once(trellis: Trellis, steps: int) -> list[str]:
    """Generate steps whose metrics stay in the registers."""
    states, bits = trellis.states, field(trellis.states)
    lines = [
        SELECT,
        "    for lane in range(width):",
        "        word = first[lane]",
        *(f"        m{state} = metric[lane + {state * BLOCK}]" for state in range(states)),
    ]
    for step in range(steps):
        lines += [f"        b{number} = branch[lane + {(4 * step + number) * BLOCK}]" for number in range(4)]
        for state, entering in enumerate(trellis.entering_branches()):
            lines += _survivor(state, entering, f"n{state}")
        lines += [f"        m{state} = n{state}" for state in range(states)]
        lines += [f"        word = {_union([f'_U(word << _U({bits}))', *(f'd{state}' for state in range(states))])}"]
    lines += [f"        metric[lane + {state * BLOCK}] = m{state}" for state in range(states)]
    return [*lines, "        first[lane] = word"]


def _by_groups(trellis: Trellis) -> list[str]:
    """Generate one step in loops over few states each, whose metrics fit the registers."""
    lines = [SELECT]
    begun = set()
    for group in _groups(trellis):
        entering = {state: trellis.entering_branches()[state] for state in group}
        lines += ["    for lane in range(width):"]
        lines += [f"        b{number} = branch[lane + {number * BLOCK}]" for number in range(4)]
        for before in sorted({previous for branches in entering.values() for previous, _ in branches}):
            lines += [f"        m{before} = metric[lane + {before * BLOCK}]"]
        for state, branches in entering.items():
            lines += _survivor(state, branches, f"fresh[lane + {state * BLOCK}]")
        for word in sorted({("first", "second")[state // 32] for state in group}):
            bits = [f"d{state}" for state in group if ("first", "second")[state // 32] == word]
            lines += [f"        {word}[lane] = {_union([f'{word}[lane]', *bits] if word in begun else bits)}"]
            begun.add(word)
    return lines


def _groups(trellis: Trellis) -> list[list[int]]:
    """Divide the states into groups of GROUP or more that no branch out of one previous state leaves."""
    entering = trellis.entering_branches()
    groups: list[list[int]] = [[]]
    left = list(range(trellis.states))
    while left:
        joined = [left[0]]
        while joined:
            groups[-1] += joined
            left = [state for state in left if state not in joined]
            previous = {state for one in joined for state, _ in entering[one]}
            joined = [one for one in left if previous & {state for state, _ in entering[one]}]
        if left and len(groups[-1]) >= GROUP:
            groups.append([])
    return groups


def _survivor(state: int, entering: tuple[tuple[int, int], tuple[int, int]], metric: str) -> list[str]:
    """Generate the choice of a state's cheaper branch: its metric, and its bit of the decisions."""
    (lower, lower_class), (upper, upper_class) = entering
    return [
        f"        x = _I(m{lower} + b{lower_class})",
        f"        y = _I(m{upper} + b{upper_class})",
        f"        {metric} = min(x, y)",
        f"        d{state} = _U({1 << state % 32}) if y < x else _U(0)",
    ]


def _union(fields: list[str]) -> str:
    """Return the expression of the union of fields, in pairs."""
    half = len(fields) // 2
    return f"_U({_union(fields[:half])} | {_union(fields[half:])})" if half else fields[0]


def made(lines: list[str]) -> Any:
    """Return the function of generated text."""
    namespace: dict[str, Any] = {"_I": np.int32, "_U": np.uint32, "_shr": shift_right, "__name__": __name__}
    exec(compile("\n".join(lines), __file__, "exec"), namespace)  # this file's name: where numba puts its cache
    return next(value for name, value in namespace.items() if name in ("select", "trace"))
