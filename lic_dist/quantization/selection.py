"""Generate add-compare-select for a machine: a loop over the lanes of a block, with a variable for every state.

Each state keeps the cheaper of the two branches that enter it, the first (from the lower state) on a tie; a bit says
whether it is the second. What is generated is compiled by numba, and kept in its cache on disk.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lic_dist.quantization import candidates
from lic_dist.quantization.candidates import BLOCK
from lic_dist.quantization.jit import kernel
from lic_dist.quantization.trellis import Trellis

_I = np.int32


def words(states: int) -> int:
    """Return how many words of at most 32 bits a step's decisions take, a bit a state."""
    return 1 if states <= 32 else 2


def compiled(function: Any, name: str) -> Any:
    """Compile with a cache on disk. numba distinguishes functions by the age of their file and their names, so the name
    must contain `identity`.
    """
    function.__name__ = function.__qualname__ = name
    return kernel(function)


@lru_cache(maxsize=64)
def identity(trellis: Trellis) -> str:
    """Return a machine's number of states and a digest: of its tables and of the text that its search is made from
    besides viterbi.py.
    """
    texts = [Path(one).read_text() for one in (candidates.__file__, __file__)]
    made_from = "".join([repr((trellis.quantizer, trellis.next_state)), *texts])
    return f"{trellis.states}_{hashlib.sha256(made_from.encode()).hexdigest()[:16]}"


def select(trellis: Trellis, steps: int) -> Any:
    """Return add-compare-select of one or two steps of a block, compiled."""
    states = trellis.states
    lines = ["def select(metric, branch, first, second):"]
    if words(states) == 2:
        for half, word in enumerate(("first", "second")):
            lines += _select_half(trellis, half, word)
        lines += [f"    metric[: {states * BLOCK}] = metric[{states * BLOCK} :]"]
        return _made(lines, f"select1_{identity(trellis)}")
    lines += ["    for lane in range(len(first)):"]
    lines += [f"        m{state} = metric[lane + {state * BLOCK}]" for state in range(states)]
    for step in range(steps):
        lines += [f"        b{number} = branch[lane + {(4 * step + number) * BLOCK}]" for number in range(4)]
        for state, entering in enumerate(trellis.entering_branches()):
            lines += _survivor(state, entering, f"n{state}")
        lines += [f"        m{state} = n{state}" for state in range(states)]
        lines += [f"        taken{step} = " + " | ".join(f"d{state}" for state in range(states))]
    lines += [f"        metric[lane + {state * BLOCK}] = m{state}" for state in range(states)]
    if states <= 4:
        both = "taken0 | taken1 << np.uint32(4)" if steps == 2 else "taken0"
        lines += [f"        first[lane] = {both}"]
    else:
        lines += ["        first[lane] = taken0"]
        lines += ["        second[lane] = taken1"] if steps == 2 else []
    return _made(lines, f"select{steps}_{identity(trellis)}")


def _select_half(trellis: Trellis, half: int, word: str) -> list[str]:
    """Generate add-compare-select of one step for 32 of more states, whose metrics go behind those of all states."""
    entering = dict(enumerate(trellis.entering_branches()[32 * half : 32 * half + 32], 32 * half))
    lines = ["    for lane in range(len(first)):"]
    lines += [f"        b{number} = branch[lane + {number * BLOCK}]" for number in range(4)]
    for before in sorted({state for pair in entering.values() for state, _ in pair}):
        lines += [f"        m{before} = metric[lane + {before * BLOCK}]"]
    for state, branches in entering.items():
        lines += _survivor(state, branches, f"metric[lane + {(trellis.states + state) * BLOCK}]")
    return [*lines, f"        {word}[lane] = " + " | ".join(f"d{state}" for state in entering)]


def _survivor(state: int, entering: tuple[tuple[int, int], tuple[int, int]], metric: str) -> list[str]:
    """Generate the choice of a state's cheaper branch: its metric, and its bit of the decisions."""
    (lower, lower_class), (upper, upper_class) = entering
    return [
        f"        x = _I(m{lower} + b{lower_class})",
        f"        y = _I(m{upper} + b{upper_class})",
        f"        {metric} = min(x, y)",
        f"        d{state} = np.uint32({1 << state % 32}) if y < x else np.uint32(0)",
    ]


def _made(lines: list[str], name: str) -> Any:
    namespace: dict[str, Any] = {"np": np, "_I": _I, "__name__": __name__}
    exec(compile("\n".join(lines), __file__, "exec"), namespace)  # this file's name: where numba puts its cache
    return compiled(namespace["select"], name)
