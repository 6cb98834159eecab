"""Workers for stages from what room there is, and what drains or has too little of it."""

from __future__ import annotations

import itertools
import socket

import pytest

from lic_dist.engine import ray_cluster
from lic_dist.engine.allotment import allot, rate
from lic_dist.engine.ray_cluster import room
from lic_dist.engine.stages import Stage

POOLS = [(1, 4), (1, 8), (1, 4)]


@pytest.mark.parametrize("seconds", [(1.0, 1.0, 1.0), (0.02, 0.5, 0.1), (3.0, 0.1, 0.7)])
@pytest.mark.parametrize("total", range(3, 20))
def test_no_other_split_of_the_room_is_faster(seconds: tuple[float, ...], total: int) -> None:
    counts = allot(POOLS, seconds, total)
    others = [one for one in itertools.product(*(range(1, most + 1) for _, most in POOLS)) if sum(one) <= total]
    assert sum(counts) <= total
    assert rate(counts, seconds) == max(rate(one, seconds) for one in others)


def test_a_stage_grows_no_further_than_the_slowest_can_follow() -> None:
    assert allot([(1, 1), (1, 64)], (1.0, 0.4), 100) == [1, 1]
    assert allot([(1, 64), (1, 2)], (0.1, 1.0), 100) == [1, 2]


def test_too_little_room_leaves_one_worker_a_stage_and_fills_the_least_first() -> None:
    assert allot([(4, 4), (8, 8), (8, 8)], (0.1, 1.0, 0.2), 0) == [1, 1, 1]
    assert allot([(4, 4), (8, 8), (8, 8)], (0.1, 1.0, 0.2), 6) == [1, 4, 1]
    assert allot([(4, 9), (2, 9)], (0.1, 5.0), 7) == [4, 3]


def test_before_anything_is_measured_no_stage_grows() -> None:
    assert allot([(2, 8), (1, 8)], None, 16) == [2, 1]


def test_room_counts_whole_workers_on_each_node() -> None:
    nodes = {"a": {"CPU": 3.0, "GPU": 1.0}, "b": {"CPU": 1.5}, "head": {"memory": 1e9}}
    assert room(nodes, 1.0) == 4
    assert room(nodes, 1 / 3) == 9 + 4
    assert room(nodes, 1.0, 0.5) == 2


def test_a_node_that_nothing_connects_to_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = {"there": there.getsockname()[1], "gone": gone.getsockname()[1]}
        told = [
            {"NodeID": node, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port} for node, port in ports.items()
        ]
        monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: told)
        assert ray_cluster.unreachable({"there", "gone"}) == set()
        gone.close()
        assert ray_cluster.unreachable({"there", "gone"}) == {"gone"}
        assert ray_cluster.unreachable({"there"}) == ray_cluster.unreachable(set()) == set()


def test_a_range_on_one_machine_is_what_its_cores_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((1, 2), (4, 4), (64, 8)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert Stage("search", int, 2, 8).here == workers
        assert Stage("search", int, 3).here == 3
