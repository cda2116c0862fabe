"""A Ray cluster: which one, how many copies of the model run on it, and what each may use.

`batch_ray.py` and `serve/ray.py` run there. Importing this file is cheap; Ray loads when it is connected to.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from detgpt.errors import InputError, MissingExtraError

OBJECT_STORE = 200 * 2**20  # bytes, of a cluster of our own: only texts and uploads pass through it


@dataclass(frozen=True)
class Cluster:
    """Where Ray runs, and how much of it is used.

    ray: run on a Ray cluster: its address, such as 10.0.0.1:6379; auto for the one of RAY_ADDRESS or of `ray start`
        on this machine; local for a new one, here and for this run only.
    ray_replicas: copies of the model on the cluster; one for each GPU unless given, one a machine where there is none.
    """

    ray: str | None = None
    ray_replicas: int | None = None

    def __post_init__(self) -> None:
        if self.ray_replicas is not None and self.ray is None:
            raise InputError("ray_replicas is given, but no cluster: say where with --ray, such as --ray local")
        if self.ray_replicas is not None and self.ray_replicas < 1:
            raise InputError(f"ray_replicas={self.ray_replicas!r} leaves nobody to answer: give 1 or more")


@contextmanager
def connected(cluster: Cluster, debug: bool = False) -> Iterator[None]:
    """Connect to the cluster, or stay with the one this process is connected to already.

    Raises `MissingExtraError` without Ray, `InputError` where there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    if ray.is_initialized():
        yield
        return
    if not debug:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    alone: dict[str, Any] = {}
    if cluster.ray == "local":
        cores = max(os.cpu_count() or 1, cluster.ray_replicas or 1)
        alone = {"num_cpus": cores, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    level = logging.INFO if debug else logging.ERROR
    try:
        _knock(cluster.ray or "auto")
        ray.init(cluster.ray, log_to_driver=debug, logging_level=level, **alone)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"no Ray cluster at {cluster.ray!r} ({reason}): give its address, or local for one on this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Fail at once where nobody listens, which Ray itself finds out after many minutes."""
    host, _, port = address.rpartition(":")
    if host and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def shared_out(replicas: int | None, device: str | None) -> tuple[int, dict[str, Any]]:
    """How many copies of the model the connected cluster runs, and what Ray reserves for each.

    A copy takes a GPU; on machines without, or with `device` "cpu", an equal part of the cores. Raises `InputError`
    where the cluster has less than that now.
    """
    import ray

    kind = "GPU" if device != "cpu" and ray.cluster_resources().get("GPU") else "CPU"
    if kind == "CPU" and device not in (None, "cpu"):
        raise InputError(f"device={device!r}: the Ray cluster has no GPU. Leave it out, or give cpu")
    machines = [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]
    default = sum(machines) if kind == "GPU" else sum(cores > 0 for cores in machines)
    replicas = replicas or default
    if replicas > sum(machines):
        raise InputError(f"ray_replicas={replicas}: the Ray cluster has {sum(machines)} {kind}s, and each needs one")
    if kind == "GPU":
        return replicas, {"num_gpus": 1}
    fitting = (n for n in range(max(machines), 0, -1) if sum(cores // n for cores in machines) >= replicas)
    return replicas, {"num_cpus": next(fitting)}
