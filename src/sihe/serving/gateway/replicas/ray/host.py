"""Puts engines on the nodes of a Ray cluster: chooses a node, starts the actor, loads the model there.

An actor is not restarted by Ray: its streams would be lost all the same, and the route brings in another replica, on
whatever node has room. Model files come to the node from the object store.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from sihe.cluster.errors import NodeUnfit
from sihe.cluster.launchers.ray.connection import connected
from sihe.core.telemetry import logger
from sihe.core.tracking import ModelVersion
from sihe.core.workspace import Workspace
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.ports import EngineObserver
from sihe.serving.errors import NoRoom, ReplicaLost
from sihe.serving.gateway.replicas.carried import Carried
from sihe.serving.gateway.replicas.config import RayBackend
from sihe.serving.gateway.replicas.ray.actor import EngineActor, ModelFiles, NodeInfo
from sihe.version import __version__

_ACTOR_S = 120.0  # for a worker process to start and import Sihe; a few seconds on an idle machine
_CONCURRENCY = 1000  # calls of one actor at once: it is asynchronous


class _Connections:
    """This process's connection to a cluster, kept while an engine there is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._users = 0
        self.placing = threading.Lock()  # one actor at a time chooses a node
        self.placed: Counter[str] = Counter()  # node → actors that start there and that Ray may not count yet

    def take(self, address: str) -> None:
        with self._lock:
            if self._users == 0:
                self._open.enter_context(connected(address))
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._open.close()


_connections = _Connections()


def load(
    workspace: Workspace, version: ModelVersion, settings: EngineConfig, backend: RayBackend, observer: EngineObserver
) -> Any:
    """An engine of `version` in an actor. Raises what is wrong with the version, `NoRoom`, `NodeUnfit`, `MissingExtra`,
    `Unreachable`."""
    objects = workspace.objects
    files = ModelFiles(objects.url, objects.name_of(version.source))
    name = f"{version.name}@{version.version}"
    if settings.threads is None:  # an actor sees every processor of its node, and has so many
        settings = replace(settings, threads=max(1, int(backend.cpus)))
    _connections.take(workspace.settings.cluster.ray_address)
    try:
        return _start(files, settings, backend, name, observer)
    except BaseException:
        _connections.release()
        raise


def _start(files: ModelFiles, settings: EngineConfig, backend: RayBackend, name: str, observer: EngineObserver) -> Any:
    import ray

    from sihe.cluster.launchers.ray.slots import RaySlots
    from sihe.serving.gateway.replicas.ray.engine import RayEngine

    need = {"CPU": backend.cpus, "GPU": backend.gpus, **dict(backend.resources)}
    slots = RaySlots(need)
    with _connections.placing:
        node = _chosen(slots, backend, name)
        _connections.placed[node] += 1
        actor = _actor(backend, node)
    begun_s = time.monotonic()
    try:
        where: NodeInfo = _answer(actor.node.remote(), name)
        started_s = time.monotonic()
        if where.version != __version__:
            raise NodeUnfit(where.address, f"it has Sihe {where.version}, this machine has {__version__}")
        failure: Carried | None = _answer(actor.load.remote(files, settings.to_mapping(), name), name, limit_s=None)
        if failure is not None:
            raise failure.unpack()
        took = {"start_s": round(started_s - begun_s, 1), "load_s": round(time.monotonic() - started_s, 1)}
        logger("serving").info("replica_loaded", engine=name, node=where.address, **took)
    except BaseException:
        ray.kill(actor)
        raise
    finally:
        with _connections.placing:
            _connections.placed -= Counter([node])  # forgets it at 0
    return RayEngine(actor, where, name, observer, is_lost=slots.is_lost, release=_connections.release)


def _actor(backend: RayBackend, node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return (
        ray.remote(EngineActor)
        .options(
            num_cpus=backend.cpus,
            num_gpus=backend.gpus,
            resources=dict(backend.resources),
            max_concurrency=_CONCURRENCY,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote()
    )


def _chosen(slots: Any, backend: RayBackend, name: str) -> str:
    """The node for one replica more: where most is free, or, to pack, where least is. Raises `NoRoom`."""
    free = {node: count - _connections.placed[node] for node, count in slots.by_node().items()}
    # Ray goes on offering a node that crashed for some seconds: one that does not answer is left out.
    there = {node: count for node, count in free.items() if count > 0 and not slots.is_lost(node)}
    if not there:
        needed = ", ".join(f"{amount:g} {resource}" for resource, amount in slots.need.items() if amount)
        raise NoRoom(name, needed=f"{needed or 'a node'} on one node", there=f"none free on {len(free)} nodes")
    pick = max if backend.placement == "spread" else min
    return pick(sorted(there), key=lambda node: there[node])


def _answer(reference: Any, name: str, *, limit_s: float | None = _ACTOR_S) -> Any:
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    try:
        return ray.get(reference, timeout=limit_s)
    except GetTimeoutError as error:
        raise NoRoom(name, needed="a process on a node", there=f"none that started within {limit_s:g} s") from error
    except RayTaskError as error:
        raise NodeUnfit(None, str(error.cause)) from error
    except RayActorError as error:
        if "creation task" in str(error):
            raise NodeUnfit(None, str(error).strip().splitlines()[-1]) from error
        raise ReplicaLost(f"the process of {name} died while it loaded") from error
