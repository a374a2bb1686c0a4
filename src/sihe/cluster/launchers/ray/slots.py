"""How many ranks fit into a Ray cluster now, and which of its nodes count.

Ray takes some 15 s to declare a node dead that crashed (14.6 s measured; it lets several health checks go by), and
until then offers the node's slots to whoever asks. So a node on which a rank was lost is asked itself, and left out
while it does not answer.
"""

from __future__ import annotations

import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ray
from ray._private import state as cluster_state  # what is free on each node: Ray's public call gives the sum only

_STEADY_S = 1.0  # slots that have been there for so long count: other jobs come and go
_ANSWER_S = 1.0  # for a node to accept a connection
_ASK_AGAIN_S = 10.0
_RETURN_S = 5.0  # for the slots of a placement group to be free again; measured 0.07 s
_PAUSE_S = 0.05


@dataclass(frozen=True)
class _Node:
    name: str
    address: str
    port: int


class RaySlots:
    """The slots of the cluster for ranks that need the resources `need` each, this job's own ranks counted as free."""

    def __init__(self, need: Mapping[str, float]) -> None:
        self.need = dict(need)
        self._held: Counter[str] = Counter()
        self._lost: dict[str, float] = {}  # node → when it was last asked (monotonic, s)
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self) -> int:
        """How many ranks may run now: the least of the last second. One node more counts late, one less at once."""
        now_s = time.monotonic()
        self._seen.append((now_s, sum(self._by_node().values())))
        while now_s - self._seen[0][0] > _STEADY_S:
            self._seen.popleft()
        return min(slots for _, slots in self._seen)

    def by_node(self) -> dict[str, int]:
        """How many ranks more each node could run at this moment, this job's own counted as free."""
        return self._by_node()

    @property
    def excluded(self) -> tuple[str, ...]:
        """Nodes that Ray still counts and that do not answer."""
        return tuple(sorted(self._lost))

    def hold(self, nodes: Iterable[str]) -> None:
        """Takes note of the nodes on which this job's ranks run, one for each rank."""
        self._held = Counter(nodes)

    def release(self) -> None:
        """Waits until what this job's ranks held is free again, as far as their nodes are there."""
        held, self._held = self._held, Counter()
        deadline_s = time.monotonic() + _RETURN_S
        while time.monotonic() < deadline_s:
            free = self._by_node()
            if all(free[node] >= ranks for node, ranks in held.items() if node in free):
                return
            time.sleep(_PAUSE_S)

    def is_lost(self, node: str) -> bool:
        """Whether `node` is gone: Ray says so, or it does not answer; in that case it counts no more."""
        found = next((known for known in _nodes() if known.name == node), None)
        if found is None:
            return True
        if _answers(found):
            return False
        self._lost[node] = time.monotonic()
        return True

    def _by_node(self) -> dict[str, int]:
        free: Mapping[str, Mapping[str, float]] = cluster_state.available_resources_per_node()
        nodes = {node.name: node for node in _nodes()}
        now_s = time.monotonic()
        for name, asked_s in list(self._lost.items()):
            if name not in nodes:  # Ray knows by now
                del self._lost[name]
            elif now_s - asked_s > _ASK_AGAIN_S:
                if _answers(nodes[name]):
                    del self._lost[name]
                else:
                    self._lost[name] = time.monotonic()
        return {name: self._fitting(free.get(name, {})) + self._held[name] for name in nodes if name not in self._lost}

    def _fitting(self, free: Mapping[str, float]) -> int:
        # Ray counts in ten-thousandths.
        return min(
            (int((free.get(resource, 0.0) + 1e-5) // amount) for resource, amount in self.need.items() if amount),
            default=1,  # what needs nothing fits everywhere
        )


def _nodes() -> list[_Node]:
    """The nodes that are there as far as Ray knows."""
    return [
        _Node(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerPort"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def _answers(node: _Node) -> bool:
    """Whether the node's manager accepts a connection."""
    try:
        with socket.create_connection((node.address, node.port), timeout=_ANSWER_S):
            return True
    except OSError:
        return False
