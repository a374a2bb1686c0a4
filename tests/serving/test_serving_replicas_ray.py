"""Replicas as actors on three nodes: what they answer, and what is lost when one of them, or its node, is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from sihe.core import settings
from sihe.core.errors import SiheError
from sihe.core.workspace import Workspace
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import ReplicaLost
from sihe.serving.gateway.replicas import hosts
from sihe.serving.gateway.replicas.config import RayBackend, ReplicaConfig
from sihe.serving.gateway.route import Route
from sihe.serving.gateway.types import Deployment, ReplicaState
from support.ray_cluster import RayNodes, ray_nodes
from support.tiny_models import tiny_config, tiny_model

pytestmark = pytest.mark.ray
SETTINGS = EngineConfig(max_batch_size=4, token_budget=32, kv_cache_bytes=20_000_000)
SHORT, LONG = 60, 2000  # tokens of most answers, and of those of two clients, which run when something is killed


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(3) as running:
        yield running


@pytest.fixture(scope="module")
def route(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Route]:
    """Three replicas, one on each node."""
    home = tmp_path_factory.mktemp("home")
    model_folder = tiny_model(home / "model", config=tiny_config(eos=False, max_positions=4096))
    flags = {"home": str(home), "cluster.ray_address": nodes.address}
    with Workspace(settings.load(flags, environ={}, directory=home)) as workspace:
        version = workspace.tracking.register_model("tiny", model_folder)
        wanted = ReplicaConfig(min_replicas=3, max_replicas=3, backend=RayBackend(cpus=1), wait_s=120.0)
        now = workspace.clock.now()
        deployment = Deployment("ray", "tiny", "1", SETTINGS, now, now, replicas=wanted)
        route = Route(deployment, partial(hosts.load, workspace), clock=workspace.clock)
        route.aim(deployment, version)
        yield route
        route.close(drain=False)


@dataclass
class Tally:
    """What became of the requests that were sent."""

    sent: int = 0
    completed: int = 0
    broken_before: list[Exception] = field(default_factory=list)
    broken_after: list[Exception] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Load:
    """Clients that send one request after another, until told to stop."""

    def __init__(self, route: Route, clients: int) -> None:
        self.tally = Tally()
        self._route = route
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        """Returns when so many more requests have completed."""
        until = self.tally.completed + more
        deadline_s = time.monotonic() + 60
        while self.tally.completed < until:
            assert time.monotonic() < deadline_s, self.tally

    def _run(self, number: int) -> None:
        tally, sent, tokens = self.tally, 0, LONG if number < 2 else SHORT
        while not self._stop.is_set():
            sent += 1
            request = GenerationRequest(prompt=(5, 6, number, sent % 300), max_tokens=tokens, temperature=0)
            begun = False
            with tally.lock:
                tally.sent += 1
            try:
                with self._route.generate(request) as stream:
                    for event in stream:
                        begun = True
                        whole = event.usage.completion_tokens
                assert whole == tokens
                with tally.lock:
                    tally.completed += 1
            except Exception as error:
                with tally.lock:
                    (tally.broken_after if begun else tally.broken_before).append(error)


def ready(route: Route) -> list[int]:
    return [replica.id for replica in route.replicas() if replica.is_serving]


def wait_until(route: Route, count: int, without: set[int], limit_s: float = 120.0) -> float:
    """Seconds until `count` replicas are READY and none of them is one of `without`."""
    started_s = time.monotonic()
    with route._changed:
        done = route._changed.wait_for(
            lambda: len(ready(route)) == count and not without & set(ready(route)), timeout=limit_s
        )
    assert done, route.status()
    return time.monotonic() - started_s


def test_replicas_and_nodes_are_killed_under_load(nodes: RayNodes, route: Route) -> None:
    route.wait_settled(200)
    engines = [replica.held() for replica in route.replicas()]
    assert len({engine.where.node for engine in engines}) == 3  # type: ignore[attr-defined]
    back_s: dict[str, list[float]] = {"replica": [], "node": []}
    with Load(route, clients=8) as load:
        load.wait_for(20)
        for _ in range(2):
            victim = route.replicas()[0]
            os.kill(victim.held().where.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            back_s["replica"].append(wait_until(route, 3, {victim.id}))
            load.wait_for(20)
        victim = route.replicas()[0]
        node = victim.held().where.node  # type: ignore[attr-defined]
        nodes.crash(node)
        wait_until(route, 2, {victim.id})
        load.wait_for(20)
        nodes.add()
        back_s["node"].append(wait_until(route, 3, {victim.id}))
        load.wait_for(20)
    tally = load.tally
    numbers = {
        "sent": tally.sent,
        "completed": tally.completed,
        "ended before the first token": [repr(error) for error in tally.broken_before],
        "ended after it": Counter(type(error).__name__ for error in tally.broken_after),
        "seconds until three replicas served again": back_s,
    }
    if "RAY_TEST_NUMBERS" in os.environ:
        Path(os.environ["RAY_TEST_NUMBERS"]).write_text(json.dumps(numbers, indent=1))
    assert tally.broken_before == [], numbers
    assert tally.broken_after, "some were in the middle of an answer"
    assert all(isinstance(error, ReplicaLost) for error in tally.broken_after), numbers
    assert tally.sent == tally.completed + len(tally.broken_after)
    assert [replica.state for replica in route.replicas() if replica.is_serving] == [ReplicaState.READY] * 3


def test_errors_arrive_as_themselves(route: Route) -> None:
    route.wait_settled(200)
    with pytest.raises(SiheError, match="4096 tokens"):
        route.generate(GenerationRequest(prompt=(5,) * 5000))
    with pytest.raises(SiheError, match="319"):
        route.generate(GenerationRequest(prompt=(10_000,)))
