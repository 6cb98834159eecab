"""Mutants: the kernels and the order of writing, each wrong in one place, that their tests must all notice.

    python -m tests.mutants            # or: nox -s mutants
    python -m tests.mutants viterbi    # those whose file's name holds the word

Each is applied to a copy of the package, never to the checkout, and its tests run there. First the same tests run on a
copy that is not altered. A mutant that survives is a fact that no test holds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEARCH = ("tests/quantization/test_search.py", "-k", "any_step or contracts or bad_latents or weights_of")
RDOQ = ("tests/quantization/test_search.py", "-k", "rdoq")
REFERENCE = ("tests/quantization/test_search.py", "-k", "best_of_all or cost_is_that")
SIGNED = ("tests/quantization/test_signed.py",)
TRITON = ("tests/quantization/test_search.py", "-k", "interpreter")
TRELLIS, RATES = ("tests/quantization/test_trellis.py",), ("tests/quantization/test_rates.py",)
RANS = ("tests/codec/test_rans.py", "tests/codec/test_rans_damage.py")
STORE = ("tests/cache/test_cache.py", "tests/cache/test_writing.py", "-k", "not planners_at_once")
PROGRESS = ("tests/cache/test_progress.py", "-k", "not every_way")
THERE = "self.root.stat()  # fails where the store was removed: writers do not create it again\n            "
TURN = "len(states) == 1)\n            states = "
MAKE = "path.parent.mkdir(parents=True, exist_ok=True)\n            "
DISK = ("tests/building/test_kill.py", "-k", "disk or vanishes")


@dataclass(frozen=True)
class Mutant:
    """A file of the package, pieces of it that stand there once, each with what takes its place, and the tests."""

    file: str
    changes: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]

    def __str__(self) -> str:
        old, new = (" ".join(piece.split()) for piece in self.changes[0])
        return f"{self.file}: {old[:60]} -> {new[:60] or 'nothing'}"


def mutant(file: str, old: str, new: str, tests: tuple[str, ...], *more: tuple[str, str]) -> Mutant:
    return Mutant(file, ((old, new), *more), tests)


MUTANTS = (
    mutant("quantization/selection.py", "if y < x else", "if y <= x else", SEARCH),
    mutant("quantization/traceback.py", "field(trellis.states) * back", "field(trellis.states)", SEARCH),
    mutant("quantization/traceback.py", "zero << _U(2)", "zero << _U(3)", SEARCH),
    mutant("quantization/viterbi.py", "32 // field_bits - 1), steps - 1)", "32 // field_bits - 1), steps)", SEARCH),
    mutant("quantization/viterbi.py", "BLOCK] < metric[lane + best", "BLOCK] <= metric[lane + best", SEARCH),
    mutant("quantization/viterbi.py", "0 if one < BLOCK else UNREACHED", "0", SEARCH),
    mutant("quantization/viterbi.py", "cost[lane] += least[lane]", "cost[lane] = least[lane]", SEARCH),
    mutant("quantization/viterbi.py", "-magnitude if row_r[offset] < 0", "-magnitude if row_r[offset] > 0", SEARCH),
    mutant("quantization/viterbi.py", "weight[min(step + 1, steps - 1)]", "weight[step]", SEARCH),
    mutant("quantization/candidates.py", "zero0 <= cost0", "zero0 < cost0", SEARCH),
    mutant("quantization/candidates.py", "distortion < SATURATION else", "distortion < 2 * SATURATION else", SEARCH),
    mutant("quantization/candidates.py", "value, nibbles = 2 * (magnitude", "value, nibbles = (magnitude", SEARCH),
    mutant("quantization/scalar.py", "nearest if cost < least", "nearest if cost <= least", RDOQ),
    mutant("quantization/scalar.py", "nearest - 1, reach, flag)", "nearest, reach, flag)", RDOQ),
    mutant("quantization/trellis.py", "((0, 2), (3, 1))[self", "((0, 2), (1, 3))[self", REFERENCE),
    mutant("quantization/trellis.py", "(5, 7), (1, 3), (6, 4)", "(7, 5), (1, 3), (6, 4)", TRELLIS),
    mutant("quantization/trellis.py", "2 * whole - np.sign(whole)", "2 * whole + np.sign(whole)", TRELLIS),
    mutant("quantization/rates.py", "np.searchsorted(thresholds,", "np.searchsorted(thresholds * 1.001,", RATES),
    mutant("quantization/rates.py", "_LEAST_COUNT = 0.25", "_LEAST_COUNT = 0.5", RATES),
    mutant("quantization/rates.py", "np.where(beyond == 0, 6,", "np.where(beyond == 0, 4,", RATES),
    mutant("quantization/rates.py", "in_q0 | in_q1 << 16", "in_q1 | in_q0 << 16", SEARCH),
    mutant("quantization/rates.py", "2 * level.astype(np.int32) + (r < 0)", "2 * level.astype(np.int32)", SIGNED),
    mutant("quantization/rates.py", "size - 3, -tables.offset)", "size - 3, 0 - tables.offset - 1)", SIGNED),
    mutant("quantization/rates.py", "offset.append(-below)", "offset.append(-above)", RATES),
    mutant("quantization/distributions.py", "0.5, 2 * magnitude) * step", "1.0, 2 * magnitude) * step", RATES),
    mutant("quantization/kernels.py", "+ middle, 0), width - 1)", "+ middle, 0), width - 2)", RATES),
    mutant("quantization/triton_search.py", "total += least", "total = least", TRITON),
    mutant("quantization/triton_search.py", "(z1 <= b3)", "(z1 < b3)", TRITON),
    mutant("codec/kernels.py", "else 2 * (value - escape)", "else 2 * (value - escape) + 2", RANS),
    mutant("codec/kernels.py", "one >= len(of_row)", "one > len(of_row)", RANS),
    mutant("codec/kernels.py", "range(nibbles, -1, -1)", "range(nibbles + 1)", RANS),
    mutant("codec/kernels.py", "x += _U(1)", "x += _U(0)", RANS),
    mutant("codec/kernels.py", "(np.int64(x),) + states[:-1]", "states[:-1] + (np.int64(x),)", RANS),
    mutant("codec/kernels.py", TURN + "states[1:] + (x,)", TURN + "(x,) + states[1:]", RANS),
    mutant("codec/kernels.py", "if nibbles > 0 and nibble == 0:", "if False:", RANS),
    mutant("codec/kernels.py", "& (index <= 32767)", "", RANS),
    mutant("codec/kernels.py", "escape + (coded >> 1)", "escape + coded", RANS),
    mutant("codec/kernels.py", "state[lane] << 1 | found[lane] & 1", "state[lane] << 1", RANS),
    mutant("codec/kernels.py", "_W(next_state[2 * state + 1])", "_W(next_state[2 * state])", RANS),
    mutant("codec/rans.py", "if set(self._states) != {ends}", "if False", RANS),
    mutant("codec/rans.py", "if self._position != len(self._words)", "if False", RANS),
    mutant("codec/rans.py", "self._position, self._states = position", "_, self._states = position", RANS),
    mutant("cache/store.py", "        storage.put_all(objects)\n        markers.write_marker(storage, marker)",
           "        markers.write_marker(storage, marker)\n        storage.put_all(objects)", STORE),
    mutant("cache/store.py", "        markers.remove_marker(storage, key, shard)\n", "", STORE),
    mutant("cache/store.py", "    with markers.shard_lock(storage, key, shard):", "    if True:", STORE),
    mutant("cache/store.py", "    put_documents(storage, layout.arrays_of(header, name), header)\n", "", STORE,
           ("does not parse\n    _require_same",
            "does not parse\n    put_documents(storage, layout.arrays_of(header, name), header)\n    _require_same")),
    mutant("cache/store.py", "one.base}", "one.base or True}", PROGRESS),
    mutant("cache/markers.py", "there is not None and there.bytes == size", "there is not None", PROGRESS),
    mutant("cache/folder.py", "os.fsync(file.fileno())", "pass", STORE),
    mutant("cache/folder.py", "            _sync_folder(path.parent)\n", "", STORE),
    mutant("cache/folder.py", "temporary.replace(path)", "shutil.copy(temporary, path)", STORE),
    mutant("cache/folder.py", THERE + MAKE + "temporary", MAKE + "temporary", DISK),
    mutant("cache/folder.py", "if _inode(path) == os.fstat(handle).st_ino:", "if True:", PROGRESS),
)  # fmt: skip


def run(tests: Sequence[str], mutant: Mutant | None = None) -> str:
    """ "passed", "failed" or what else came of the tests on a copy with this mutant."""
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        copy = Path(folder)
        for name in ("lic_dist", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for old, new in mutant.changes if mutant else ():
            path = copy / "lic_dist" / mutant.file
            text = path.read_text()
            if text.count(old) != 1:
                return f"stands there {text.count(old)} times: {old}"
            path.write_text(text.replace(old, new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
    return {0: "passed", 1: "failed"}.get(done.returncode, done.stdout[-1500:])


def main() -> int:
    """Run them two at a time; the exit code is 1 where one survives."""
    chosen = [one for one in MUTANTS if all(word in one.file for word in sys.argv[1:])]
    suites = list(dict.fromkeys(one.tests for one in chosen))
    with ThreadPoolExecutor(2) as pool:
        for suite, found in zip(suites, pool.map(run, suites), strict=True):
            if found != "passed":
                print(f"{' '.join(suite)} on a copy that is not altered: {found}")
                return 1
        survived = 0
        for one, found in zip(chosen, pool.map(lambda one: run(one.tests, one), chosen), strict=True):
            told = {"failed": "killed", "passed": "SURVIVED"}.get(found, found)
            survived += told != "killed"
            print(f"{told:9} {one}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} killed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
