"""The engine: order and errors in this process, pools and lost workers, of processes and on Ray."""

from __future__ import annotations

import os
import subprocess
import sys
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


def make_sleep(folder: Path):
    def work(value):
        (folder / str(os.getpid())).touch()
        time.sleep(600)

    return work


@pytest.fixture(scope="module")
def cluster():
    """A Ray of four logical CPUs, shared by the tests of this file: starting one takes five seconds."""
    from lic_dist.engine import on_ray

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    with on_ray.connected(None, num_cpus=4):
        yield
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


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


@pytest.mark.slow
def test_ray_gives_every_unit_once_from_pools_larger_than_the_machine(cluster):
    stages = [Stage("square", make_square, 3), Stage("pid", make_process_id, 3)]  # six actors on four CPUs
    results = list(run(stages, range(20), engine="ray"))
    assert sorted(unit for unit, _ in results) == list(range(20))
    assert os.getpid() not in {process for _, process in results}


@pytest.mark.slow
def test_ray_hands_large_results_between_stages(cluster):
    results = dict(run([Stage("wide", make_wide, 1), Stage("narrow", make_narrow, 1)], range(6), engine="ray"))
    assert results == {n: (n, float(n)) for n in range(6)}


@pytest.mark.slow
def test_ray_bounds_units_in_flight(cluster, tmp_path):
    delays = {"fast": 0.0, "slow": 0.1}
    stages = [Stage(name, partial(make_log, tmp_path, name, seconds)) for name, seconds in delays.items()]
    list(run(stages, range(8), engine="ray"))
    fast, slow = (
        sorted(float(line.split()[1]) for line in (tmp_path / name).read_text().splitlines()) for name in delays
    )
    for n in range(2, 8):  # the unit after the first two enters only when one has left
        assert fast[n] >= slow[n - 2]


@pytest.mark.slow
def test_ray_replaces_a_dead_worker_and_repeats_its_unit(cluster, tmp_path):
    stages = [Stage("add", partial(make_add, 10)), Stage("dies", partial(make_dies_once, tmp_path, 12))]
    assert sorted(run(stages, range(5), engine="ray")) == [(n, n + 10) for n in range(5)]
    assert (tmp_path / "died").exists()


class Unloadable:
    """What a worker cannot unpickle: as if lic_dist were missing there, or of another version."""

    def __call__(self):
        return lambda value: value

    def __reduce__(self):
        return fail_to_load, ()


def fail_to_load():
    raise ModuleNotFoundError("no module of this name on the node")


@pytest.mark.slow
def test_ray_gives_up_on_workers_that_do_not_start(cluster):
    with pytest.raises(LicError, match="workers of stage 'strange' do not start") as caught:
        list(run([Stage("strange", Unloadable(), 1)], [1], engine="ray"))
    assert "installed on every node" in caught.value.hint


class SlowToLoad:
    """A stage whose worker takes its time to start, as from a cold network disk."""

    def __call__(self):
        return lambda value: os.getpid()

    def __reduce__(self):
        return load_slowly, ()


def load_slowly():
    time.sleep(2)
    return SlowToLoad()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])  # with CPUs to spare, and with none: then it shares one, once
def test_ray_waits_for_workers_that_are_slow_to_start(cluster, monkeypatch, workers):
    from lic_dist.engine import on_ray

    monkeypatch.setattr(on_ray, "PLACEMENT_SECONDS", 0.3)
    results = list(run([Stage("slow", SlowToLoad(), workers)], range(6), engine="ray"))
    assert sorted(unit for unit, _ in results) == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_none_ends_a_unit_before_the_later_stages(cluster, engine):
    stages = [Stage("half", make_half, 1), Stage("fails", partial(make_fail, ValueError("seen")), 1)]
    assert sorted(run(stages, [1, 3, 5], engine=engine)) == [(1, None), (3, None), (5, None)]
    with pytest.raises(ValueError, match="seen"):
        list(run(stages, [1, 2], engine=engine))


def make_half():
    return lambda value: None if value % 2 else value


@pytest.mark.slow
def test_ray_gives_up_on_a_unit_that_kills_its_workers(cluster, tmp_path, monkeypatch):
    from lic_dist.engine import on_ray

    assert on_ray.RETRIES == 3
    monkeypatch.setattr(on_ray, "RETRIES", 1)
    with pytest.raises(LicError, match="shard 7: its worker in stage 'deadly' died 2 times"):
        list(run([Stage("deadly", partial(make_dies_always, tmp_path))], ["shard 7"], engine="ray"))
    assert (tmp_path / "attempts").read_text() == "xx"


@pytest.mark.slow
def test_ray_raises_the_works_own_exception(cluster):
    failing = Stage("fails", partial(make_fail, LicError("no such checkpoint", hint="train one")))
    with pytest.raises(LicError) as caught:
        list(run([failing, Stage("add", partial(make_add, 0))], [1, 2], engine="ray"))
    assert type(caught.value) is LicError
    assert str(caught.value) == "no such checkpoint (train one)"


def make_broken():
    raise KeyError("of make")


def test_ray_raises_what_make_raises(cluster):
    with pytest.raises(KeyError, match="of make") as caught:
        list(run([Stage("broken", make_broken)], [1], engine="ray"))
    assert type(caught.value) is KeyError


def test_ray_refuses_gpus_that_are_not_there(cluster):
    import ray

    if ray.cluster_resources().get("GPU", 0) >= 64:
        pytest.skip("so many GPUs")
    with pytest.raises(LicError, match="ask for 64 GPUs"):
        list(run([Stage("encode", make_square, 64, gpus=1.0)], [1], engine="ray"))


def test_ray_frees_its_workers_when_the_caller_stops_early(cluster):
    import ray

    results = run([Stage("square", make_square, 1)], range(50), engine="ray")
    next(results)
    results.close()
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == 4
