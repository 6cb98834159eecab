"""The engine in this process and in several: order, errors, workers that die.

Workers of Ray load this module for what `test_on_ray.py` runs: it imports nothing heavy.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from lic_dist.data.photo import PhotoError
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def make_add(amount):
    return lambda value: value + amount


def make_square():
    return lambda value: value * value


def make_process_id():
    return lambda value: os.getpid()


def make_wide():
    import numpy as np

    return lambda value: (value, np.full(300_000, value))  # too large to travel inside Ray's messages


def make_narrow():
    return lambda pair: (pair[0], float(pair[1].mean()))


def make_fail(error):
    def work(value):
        raise error

    return work


def make_dies_once(folder: Path, unit: int):
    def work(value):
        flag = folder / "died"
        if value == unit and not flag.exists():
            flag.touch()
            os._exit(1)
        return value

    return work


def make_dies_always(folder: Path):
    def work(value):
        with (folder / "attempts").open("a") as file:
            file.write("x")
        os._exit(1)

    return work


def make_log(folder: Path, name: str, seconds: float):
    def work(value):
        time.sleep(seconds)
        with (folder / name).open("a") as file:
            file.write(f"{value} {time.time()}\n")
        return value

    return work


def make_where(log: Path, seconds: float):
    import ray

    node = ray.get_runtime_context().get_node_id()

    def work(value):
        with log.open("a") as file:
            file.write(f"{value} {node}\n")
        time.sleep(seconds)
        return node

    return work


def make_sleep(folder: Path):
    def work(value):
        (folder / str(os.getpid())).touch()
        time.sleep(600)

    return work


class Unloadable:
    """What a worker cannot unpickle: as if lic_dist were missing there, or of another version."""

    def __call__(self):
        return lambda value: value

    def __reduce__(self):
        return fail_to_load, ()


def fail_to_load():
    raise ModuleNotFoundError("no module of this name on the node")


class SlowToLoad:
    """A stage whose worker takes its time to start, as from a cold network disk."""

    def __call__(self):
        return lambda value: os.getpid()

    def __reduce__(self):
        return load_slowly, ()


def load_slowly():
    time.sleep(1)
    return SlowToLoad()


def make_broken():
    raise KeyError("of make")


def test_local_runs_all_stages_in_order():
    stages = [Stage("add", partial(make_add, 1)), Stage("square", make_square)]
    assert list(run(stages, [1, 2, 3])) == [(1, 4), (2, 9), (3, 16)]
    assert list(run(stages, [])) == []


def test_local_makes_once_and_raises_unchanged():
    made = []

    def make():
        made.append(1)
        return lambda value: 1 // value

    results = run([Stage("divide", make)], [1, 1, 0, 1])
    assert next(results) == (1, 1) and next(results) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert made == [1]


def test_local_stages_work_side_by_side():
    """Each stage waits for what the others do at the same time: in series they would wait for ever."""
    together = threading.Barrier(3, timeout=60)
    seen = []

    names, units = ["read", "encode", "write"], range(12)
    waits = {"read": range(2, 12), "encode": range(1, 11), "write": range(10)}

    def make(name):
        def work(value):
            if value in waits[name]:
                together.wait()
            seen.append((name, value))
            return value

        return work

    assert list(run([Stage(name, partial(make, name)) for name in names], units)) == [(n, n) for n in units]
    assert [value for name, value in seen if name == "write"] == list(units)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_units_before_one_that_fails_are_finished_and_none_after_it_is(failing):
    done = {number: [] for number in range(3)}

    def make(number):
        def work(value):
            if number == failing and value == 3:
                raise ValueError("of three")
            done[number].append(value)
            return value

        return work

    found = []
    before = threading.active_count()
    with pytest.raises(ValueError, match="of three"):
        found += run([Stage(str(number), partial(make, number)) for number in range(3)], range(100))
    assert all(done[number] == [0, 1, 2] for number in range(failing, 3))
    assert all(len(done[number]) < 10 for number in range(failing)) and threading.active_count() == before


def test_a_caller_that_stops_ends_what_is_under_way():
    before, done = threading.active_count(), []

    def make():
        return lambda value: done.append(value) or value

    results = run([Stage("add", partial(make_add, 0)), Stage("note", make)], range(100))
    assert next(results) == (0, 0)
    results.close()
    assert len(done) < 5 and threading.active_count() == before
    unreadable = run([Stage("add", partial(make_add, 1)), Stage("square", make_square)], Unreadable())
    assert next(unreadable) == (0, 1)
    with pytest.raises(RuntimeError, match="no unit"):
        list(unreadable)


class Unreadable(list):
    """Units of which the second cannot be laid out."""

    def __iter__(self):
        yield 0
        raise RuntimeError("no unit")


def test_local_workers_of_one_stage_are_processes():
    results = list(run([Stage("pid", make_process_id, 2)], range(12)))
    assert sorted(unit for unit, _ in results) == list(range(12))
    assert 1 <= len({process for _, process in results} - {os.getpid()}) == len({process for _, process in results})
    several = run([Stage("add", partial(make_add, 1), 2), Stage("pid", make_process_id, 2)], range(3))
    assert {process for _, process in several} == {os.getpid()}
    assert dict(run([Stage("pid", make_process_id, 2)], [1])) == {1: os.getpid()}  # one unit starts no pool


def test_local_processes_raise_the_works_own_exception():
    failing = Stage("fails", partial(make_fail, PhotoError("a.png", "truncated")), 2)
    with pytest.raises(PhotoError) as caught:
        list(run([failing], range(9)))
    assert (caught.value.message, caught.value.fault) == ("a.png: truncated", "truncated")


class Odd(Exception):
    """One that does not unpickle."""

    def __init__(self, one, two):
        super().__init__(one)


def make_odd():
    def work(unit):
        raise Odd("the cause", unit)

    return work


def test_an_exception_that_does_not_pickle_keeps_its_cause():
    with pytest.raises(LicError, match="Odd: the cause"):
        list(run([Stage("odd", make_odd, 2)], range(3)))


def test_a_local_process_that_dies_is_one_error_that_names_its_unit(tmp_path):
    results = run([Stage("deadly", partial(make_dies_once, tmp_path, 7), 2)], range(30))
    done = []
    with pytest.raises(LicError, match=r"a worker of stage 'deadly' died, at one of: .*\b7\b") as caught:
        for unit, _ in results:
            done.append(unit)
    assert "memory" in caught.value.hint and 7 not in done


def test_local_processes_end_with_a_killed_parent(tmp_path):
    code = (
        "from functools import partial; from pathlib import Path; from lic_dist.engine.run import run\n"
        "from lic_dist.engine.stages import Stage\n"
        "from tests.engine.test_engine import make_sleep\n"
        f"list(run([Stage('sleep', partial(make_sleep, Path({str(tmp_path)!r})), 2)], [1, 2]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(file.name) for file in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    while any(runs(process) for process in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(runs(process) for process in workers)


def runs(process: int) -> bool:
    """Whether a process is there and no zombie, which nobody may wait for."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_wrong_use_is_refused():
    with pytest.raises(UsageError, match="no engine 'slurm'"):
        run([Stage("square", make_square)], [1], engine="slurm")
    with pytest.raises(ValueError, match="0 workers"):
        Stage("square", make_square, workers=0)


def test_none_ends_a_unit_before_the_later_stages():
    assert_none_ends_a_unit("local")


def assert_none_ends_a_unit(engine):
    stages = [Stage("half", make_half, 1), Stage("fails", partial(make_fail, ValueError("seen")), 1)]
    assert sorted(run(stages, [1, 3, 5], engine=engine)) == [(1, None), (3, None), (5, None)]
    with pytest.raises(ValueError, match="seen"):
        list(run(stages, [1, 2], engine=engine))


def make_half():
    return lambda value: None if value % 2 else value
