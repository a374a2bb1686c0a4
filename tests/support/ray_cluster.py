"""A Ray cluster on this machine: a head that runs nothing, and nodes that come and go."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_STORE_BYTES = 80_000_000  # nearly the least that Ray takes; nothing is put there


class RayNodes:
    """The nodes of a running cluster, each with one CPU. Processes of the same machine stand for machines."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.address: str = cluster.address
        self._nodes: list[Any] = []

    def add(self, **settings: Any) -> str:
        """Adds a node, and waits until it is there; Ray's name of it."""
        self._nodes.append(self._cluster.add_node(object_store_memory=_STORE_BYTES, **{"num_cpus": 1, **settings}))
        name: str = self._nodes[-1].node_id
        return name

    def crash(self, name: str) -> None:
        """Kills the manager of a node with SIGKILL: what ran there dies, and nobody tells Ray."""
        (node,) = (node for node in self._nodes if node.node_id == name)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes that are there, in the order in which ranks are numbered."""
        return tuple(sorted(node.node_id for node in self._nodes))


@contextmanager
def ray_nodes(count: int) -> Iterator[RayNodes]:
    """A cluster with `count` nodes."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from ray.cluster_utils import Cluster

    # pytest's own folders are too deep for the names of Ray's sockets.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    handler = signal.getsignal(signal.SIGTERM)
    head = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "include_dashboard": False, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = RayNodes(cluster)
        for _ in range(count):
            nodes.add()
        yield nodes
    finally:
        cluster.shutdown()
        signal.signal(signal.SIGTERM, handler)
        shutil.rmtree(folder, ignore_errors=True)
