"""Killed at random moments, over and over; a full or forbidden disk: the same bytes in the end, nothing twice."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lic_dist import config
from lic_dist.building.build import build
from lic_dist.cache import markers, store
from lic_dist.cache.verify import verify
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError
from tests.stores import FIXED, RECORD, contents, experiment, make_builder, make_plan, synthetic

SHARDS = 24
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def spawner() -> multiprocessing.context.ForkServerContext:
    """Processes that have everything imported: a build starts in a fraction of a second."""
    return multiprocessing.get_context("forkserver")


def asked(base: Path, photos: Path, path: Path, **changes: dict) -> config.Experiment:
    sections = {"images": {"variations": 12}, "cache": {"shard": 4, "batch": 4}, "quantizer": FIXED, **changes}
    return experiment(base, photos, path, **sections)


@pytest.fixture(scope="module")
def whole(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that was never interrupted."""
    path = tmp_path_factory.mktemp("whole") / "a.zarr"
    assert build(asked(base, photos, path)).shards == SHARDS
    return path


def build_quietly(document: dict, environment: dict[str, str] | None = None) -> None:
    os.environ.update(environment or {})
    build(config.Experiment.model_validate(document))


def markers_of(path: Path) -> dict[Path, tuple[int, bytes]]:
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.glob(f"{markers.FOLDER}/*/*.json")}


def assert_as_never_interrupted(path: Path, whole: Path) -> None:
    assert contents(path) == contents(whole)
    assert verify(path) == []
    assert not [file for file in path.rglob("*") if file.name.endswith((".part", ".lock"))]


@pytest.mark.slow
def test_killed_again_and_again_the_store_is_the_same_and_no_shard_is_built_twice(
    base: Path, photos: Path, whole: Path, tmp_path: Path, spawner: multiprocessing.context.ForkServerContext
) -> None:
    path = tmp_path / "a.zarr"
    document = asked(base, photos, path).model_dump(mode="json")
    rng = random.Random(5)
    done: dict[Path, tuple[int, bytes]] = {}
    killed_in_the_middle = 0
    for _ in range(6):
        process = spawner.Process(target=build_quietly, args=(document,))
        process.start()
        deadline = time.monotonic() + 60
        while len(markers_of(path)) == len(done) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)  # it has to load the model each time; then any moment will do
        time.sleep(rng.uniform(0, 0.15))
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = markers_of(path)
        assert done.items() <= found.items()  # what has a marker is not touched again
        done = found
        killed_in_the_middle += 0 < len(done) < 2 * SHARDS
        if len(done) == 2 * SHARDS:
            break
    assert killed_in_the_middle >= 3
    build(asked(base, photos, path))
    assert done.items() <= markers_of(path).items()
    assert_as_never_interrupted(path, whole)


# Ray


@pytest.fixture()
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of Ray's own, with a short name; whatever still runs in it afterwards is ended."""
    folder = Path(f"/tmp/ld{os.getpid()}{random.randrange(10**6)}")
    for name, value in ray_environment(folder).items():
        monkeypatch.setenv(name, value)
    yield folder
    for process in of_ray(folder):
        end(process)
    shutil.rmtree(folder, ignore_errors=True)


def of_ray(folder: Path, title: str = "") -> list[int]:
    """Processes of a Ray of this folder with `title` in their command line, but not the fork server and its drivers."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (entry / "environ").read_bytes()
                ours = f"RAY_TMPDIR={folder}".encode() in environment
                if ours and title in command and (title or "ray" in command) and "multiprocessing" not in command:
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


def end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def ray_environment(folder: Path) -> dict[str, str]:
    """What marks the processes of a Ray as this test's own."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    impatient = {
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "12",
    }
    return {"RAY_TMPDIR": str(folder), "PYTHONPATH": search_path, "RAY_AUTH_MODE": "disabled", **impatient}


def on_ray(base: Path, photos: Path, path: Path) -> dict:
    workers = {"name": "ray", "readers": 1, "encoders": 1, "searchers": 1, "num_cpus": 3}
    return asked(base, photos, path, engine=workers).model_dump(mode="json")


def wait_for_markers(path: Path, more_than: int, process: multiprocessing.process.BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while len(markers_of(path)) <= more_than:
        assert process.is_alive() or len(markers_of(path)) > more_than, "the build ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_ray_build_outlives_its_workers_and_resumes_after_driver_and_cluster(
    base: Path,
    photos: Path,
    whole: Path,
    tmp_path: Path,
    ray_folder: Path,
    spawner: multiprocessing.context.ForkServerContext,
) -> None:
    path = tmp_path / "a.zarr"
    document = on_ray(base, photos, path)

    def start() -> multiprocessing.process.BaseProcess:
        process = spawner.Process(target=build_quietly, args=(document, ray_environment(ray_folder)))
        process.start()
        return process

    driver = start()  # 1: a worker is killed; the build goes on; then the driver is killed
    wait_for_markers(path, 2, driver)
    workers = of_ray(ray_folder, "ray::_Worker")
    assert workers
    end(workers[0])
    found = len(markers_of(path))
    wait_for_markers(path, found + 2, driver)  # two shards were under way, with results of the dead one's
    end(driver.pid)
    driver.join()
    assert of_ray(ray_folder)
    for process in of_ray(ray_folder):
        end(process)
    first = markers_of(path)
    assert found + 2 < len(first) < 2 * SHARDS

    driver = start()  # 2: all of Ray is killed under it
    wait_for_markers(path, len(first), driver)
    for process in of_ray(ray_folder):
        if process != driver.pid:
            end(process)
    driver.join(90)
    assert not driver.is_alive() and driver.exitcode != 0, "the driver must end, with an error"
    second = markers_of(path)
    assert first.items() <= second.items() and len(second) < 2 * SHARDS

    build(asked(base, photos, path))  # 3: without Ray, it goes on
    assert second.items() <= markers_of(path).items()
    assert_as_never_interrupted(path, whole)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_cluster_of_two_nodes_that_loses_one_in_mid_build_finishes_with_the_same_bytes(
    base: Path,
    photos: Path,
    whole: Path,
    tmp_path: Path,
    ray_folder: Path,
    spawner: multiprocessing.context.ForkServerContext,
) -> None:
    from ray.cluster_utils import Cluster

    path = tmp_path / "a.zarr"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    workers = {"name": "ray", "address": cluster.address, "readers": 1, "encoders": 1, "searchers": 1}
    document = asked(base, photos, path, engine=workers).model_dump(mode="json")
    try:  # three workers on three CPUs, then on one
        driver = spawner.Process(target=build_quietly, args=(document, ray_environment(ray_folder)))
        driver.start()
        wait_for_markers(path, 3, driver)
        cluster.remove_node(second, allow_graceful=False)
        left = 2 * SHARDS - len(markers_of(path))
        driver.join(180)
    finally:
        cluster.shutdown()
    assert driver.exitcode == 0 and left > 0
    assert_as_never_interrupted(path, whole)


# disks


def limited(path: Path, size: int) -> None:
    """A builder under the kernel's limit for the size of a file: what a full disk looks like to a process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        make_builder(path, make_plan())(1)
    except LicError as error:
        os._exit(7 if "cannot write to" in error.message and "marker is kept" in error.hint else 8)
    os._exit(0)


@pytest.mark.slow
def test_a_disk_that_takes_no_more_loses_nothing_that_was_marked(
    tmp_path: Path, spawner: multiprocessing.context.ForkServerContext
) -> None:
    path = tmp_path / "a.zarr"
    store.create(path, make_plan())
    store.create_group(path, "tcq8", RECORD, {"record": "cd" * 32})
    make_builder(path, make_plan())(0)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    process = spawner.Process(target=limited, args=(path, 4096))  # pixels do not fit, smaller objects do
    process.start()
    process.join(60)
    assert process.exitcode == 7
    assert all(file.read_bytes() == data for file, data in before.items())
    assert store.pending(path) == [1, 2] and not list(path.rglob("*.part"))
    list(run([Stage("build", partial(make_builder, path, make_plan()))], store.pending(path)))
    assert verify(path) == []


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO"])
def test_each_way_a_disk_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    import errno

    path = tmp_path / "a.zarr"
    store.create(path, make_plan())
    store.create_group(path, "tcq8", RECORD, {"record": "cd" * 32})
    make_builder(path, make_plan())(0)
    code = getattr(errno, number)

    def refuse(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(LicError, match=f"cannot write to .*a.zarr: {os.strerror(code)}") as caught:
        make_builder(path, make_plan())(1)
    assert "every shard that has a marker is kept" in caught.value.hint
    monkeypatch.undo()
    assert store.pending(path) == [1, 2] and verify(path)[0].shard == 1


def test_a_store_that_vanishes_is_not_made_again_in_part(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    store.create(path, make_plan())
    work = make_builder(path, make_plan())
    work_with_group = {name: array for name, array in synthetic(4, 0, group=None).items()}
    store.write_shard(path, make_plan().fingerprint, 0, work_with_group, make_plan().crops_of(0))
    shutil.rmtree(path)
    with pytest.raises(LicError, match="no cache at"):
        work(1)
    assert not path.exists()


def test_a_store_that_vanishes_within_a_shard_is_not_made_again_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, count, sync = tmp_path / "a.zarr", 0, os.fsync
    store.create(path, make_plan())
    store.create_group(path, "tcq8", RECORD, {"record": "cd" * 32})

    def vanish(handle: int) -> None:
        nonlocal count
        count += 1
        if count == 7:
            shutil.rmtree(path)
        sync(handle)

    monkeypatch.setattr(os, "fsync", vanish)
    with pytest.raises(LicError, match="cannot write to .*a.zarr: No such file or directory"):
        make_builder(path, make_plan())(1)
    assert not path.exists()


def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    with pytest.raises(LicError, match="cannot write to"):
        store.create(tmp_path / "locked" / "a.zarr", make_plan())
