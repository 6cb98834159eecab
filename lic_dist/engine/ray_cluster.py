"""The Ray cluster that work runs on: connect to it or start one, and see what room its nodes have.

A node that drains has no room: Ray places nothing new there. `ray drain-node` told it to leave, an autoscaler, or
SIGTERM to its `ray start --block`, as on spot instances.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
os.environ.setdefault("RAY_prestart_worker_first_driver", "false")  # a Ray of our own: no idle process for each core

import ray

from lic_dist.errors import LicError
from lic_dist.temporary import can_write

ANSWER_SECONDS = 10.0  # seconds in which a cluster's address has to answer
PROBES, PROBE_SECONDS = 32, 0.5  # nodes that are connected to at once, and seconds in which one has to answer


def staying_nodes() -> dict[str, dict[str, float]]:
    """Return the resources of the nodes that are alive and do not drain, by the nodes' ids."""
    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    from ray.util.client import ray as client

    draining: Any = {} if client.is_connected() else ray._private.state.state.get_draining_nodes()  # none by a client
    return {node: resources for node, resources in alive.items() if node not in draining}


def unreachable(nodes: Collection[str]) -> set[str]:
    """Return those of the nodes to whose Ray no connection can be made: they are gone, which Ray itself says after some
    ten seconds of missed answers. None by a client, which has no way to them.
    """
    from ray.util.client import ray as client

    if not nodes or client.is_connected():
        return set()
    asked = [(node["NodeID"], (node["NodeManagerAddress"], node["NodeManagerPort"])) for node in ray.nodes()]
    asked = [(node, address) for node, address in asked if node in nodes]
    with ThreadPoolExecutor(PROBES) as pool:
        answers = pool.map(_answers, [address for _, address in asked])
        return {node for (node, _), answer in zip(asked, answers, strict=True) if not answer}


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def room(nodes: dict[str, dict[str, float]], cpus: float, gpus: float = 0.0) -> int:
    """Return how many workers of so many CPUs and GPUs each the nodes hold, if nothing else runs there."""
    asked = [(name, amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount]
    return sum(
        min(math.floor(resources.get(name, 0.0) / amount + 1e-6) for name, amount in asked)
        for resources in nodes.values()
    )


def cpu_share(workers: int) -> float:
    """Return the CPUs that each worker asks for: one, or the largest fraction by which all workers fit on the nodes."""
    cpus = [int(resources.get("CPU", 0)) for resources in staying_nodes().values()]
    return 1 / max(1, -(-workers // sum(cpus))) if sum(cpus) else 1.0


def require_gpus(wanted: float) -> None:
    """Refuse workers that would wait for GPUs for ever.

    Raises:
        LicError: the cluster has fewer GPUs.
    """
    present = ray.cluster_resources().get("GPU", 0.0)
    if wanted > present:
        raise LicError(f"the workers ask for {wanted:g} GPUs, the Ray cluster has {present:g}")


@contextmanager
def connected(address: str | None, num_cpus: int | None, show_workers: bool = False) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start one that ends with the block. An initialised Ray is left alone.

    `show_workers` shows here what the workers print, and of Ray's own logs only errors.

    Raises:
        LicError: no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": show_workers, "logging_level": "ERROR"}
    if show_workers:
        options["logging_config"] = ray.LoggingConfig(log_level="ERROR")
    told = os.environ.get("RAY_ADDRESS", "")
    address = address or ("" if told.startswith("http") else told)  # an http URL is the job server's address
    if address:
        _require_answer(address)
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise LicError(f"no Ray cluster at {address}: {error}", hint="`ray start --head` starts one") from error
    else:
        if not can_write(Path(os.path.expanduser("~/.ray"))):  # where Ray would keep the token of its clusters
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())
        ray.init(address="local", num_cpus=num_cpus or os.cpu_count(), include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise LicError where nothing answers at a host and port within ANSWER_SECONDS: Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto", or a form that Ray judges at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        from_environment = address == os.environ.get("RAY_ADDRESS")
        hint = "unset RAY_ADDRESS to work on this machine, or " if from_environment else ""
        raise LicError(
            f"no Ray cluster answers at {address}: {error}", hint=f"{hint}`ray start --head` starts one"
        ) from None
