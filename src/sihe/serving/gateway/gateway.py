"""The gateway: keeps every deployment on the version that its reference points at, and routes requests to it.

`deploy` and `remove` only write what is wanted into the records; the watcher of the process that serves (`start`) makes
it so, within one poll, or at once when the change came through this same gateway.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from sihe.core.errors import NotFound
from sihe.core.ids import check_name
from sihe.core.telemetry import logger
from sihe.core.tracking import ModelVersion
from sihe.core.workspace import Workspace
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.ports import EngineObserver
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import NotReady
from sihe.serving.gateway.replicas.config import Backend
from sihe.serving.gateway.replicas.ports import Load, Served
from sihe.serving.gateway.route import Route
from sihe.serving.gateway.store import REPORT_INTERVAL_S, DeploymentStore
from sihe.serving.gateway.types import Deployment, DeploymentStatus

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Gateway:
    """Deployments of one workspace. Without `start` it reads and writes what is wanted and serves nothing.

    `poll_interval_s` bounds how long a change made by another process goes unseen.
    """

    def __init__(
        self, workspace: Workspace, *, poll_interval_s: float = 0.5, registry: CollectorRegistry | None = None
    ) -> None:
        self.workspace = workspace
        self._poll_interval_s = poll_interval_s
        self._registry = registry
        self._log = logger("serving")
        self._store = DeploymentStore(workspace.records, workspace.clock)
        self._synchronising = threading.Lock()
        self._routes: dict[str, Route] = {}  # replaced whole when it changes, so that requests read it without a lock
        self._closing: list[threading.Thread] = []
        self._reported: dict[str, DeploymentStatus] = {}
        self._next_report_s = 0.0
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    # ---- what is wanted ---------------------------------------------------------------------------------------------

    def deploy(self, name: str, target: str, *, settings: EngineConfig | None = None) -> DeploymentStatus:
        """Makes `name` answer with the version behind `target` (`model@alias`, `model@3`, or `model`: its newest).

        Deploying again under the same name changes what it follows. Raises `NotFound` when nothing is behind `target`.
        """
        check_name("deployment", name)
        self.workspace.tracking.resolve(target)
        model, _, selector = target.partition("@")
        self._store.put(name, model, selector, settings or EngineConfig())
        self.notify()
        return self.status(name)

    def remove(self, name: str) -> None:
        """Forgets a deployment; the process that serves it drains and frees it. Raises `NotFound`."""
        self._store.remove(name)
        self.notify()

    def move_alias(self, model: str, alias: str, version: int) -> ModelVersion:
        """Points an alias at another version; every deployment that follows it swaps. Raises `NotFound`."""
        self.workspace.tracking.set_alias(model, alias, version)
        self.notify()
        return self.workspace.tracking.resolve(f"{model}@{alias}")

    def notify(self) -> None:
        """Something changed in this process: deployments are brought up to date now, not at the next poll."""
        if self._watcher is not None:
            self._synchronise()

    # ---- what is ----------------------------------------------------------------------------------------------------

    def list(self) -> list[DeploymentStatus]:
        """Every deployment, by name: as it is where this process serves it, else as last reported."""
        return [self._status(deployment) for deployment in self._store.all()]

    def status(self, name: str) -> DeploymentStatus:
        """One deployment. Raises `NotFound`."""
        return self._status(self._store.get(name))

    def served(self) -> tuple[DeploymentStatus, ...]:
        """What this process serves, from memory."""
        return tuple(route.status() for _, route in sorted(self._routes.items()))

    def wait_ready(self, name: str, *, timeout_s: float = 120.0) -> DeploymentStatus:
        """Blocks until `name` serves what is wanted. Raises what prevents it, or `Busy` after `timeout_s`."""
        self._route(name).wait_settled(timeout_s)
        return self.status(name)

    def generate(self, name: str, request: GenerationRequest) -> GenerationStream:
        """Starts a request on deployment `name`, on the version that serves at this moment, to its end.

        Raises `NotFound`, `NotReady`, and what the engine raises.
        """
        return self._route(name).generate(request)

    # ---- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to serve: loads what is deployed and follows it."""
        if self._watcher is not None:
            return
        _ = self.workspace.tracking.client  # opened once, before two threads could
        self._stop.clear()
        self._watcher = threading.Thread(target=self._watch, name="gateway watcher", daemon=True)
        self._synchronise()
        self._watcher.start()

    def close(self, *, drain: bool = True) -> None:
        """Stops serving and frees every model: after the running streams, or at once without `drain`."""
        if self._watcher is None:
            return
        self._stop.set()
        self._watcher.join()
        self._watcher = None
        with self._synchronising:
            routes, self._routes = list(self._routes.values()), {}
        for route in routes:
            route.close(drain=drain)
        for thread in self._closing:
            thread.join()

    def __enter__(self) -> Gateway:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    # ---- following --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_interval_s):
            self._synchronise()

    def _synchronise(self) -> None:
        """Makes the routes what the records want. A registry that does not answer changes nothing that serves."""
        with self._synchronising:
            try:
                wanted = {deployment.name: deployment for deployment in self._store.all()}
            except Exception as error:  # noqa: BLE001 - see above
                self._log.warning("records_poll_failed", error=repr(error))
                return
            for name in self._routes.keys() - wanted.keys():
                self._retire(name)
            for name, deployment in wanted.items():
                self._follow(name, deployment)
            self._report()

    def _follow(self, name: str, deployment: Deployment) -> None:
        route = self._routes.get(name)
        if route is None:
            route = Route(deployment, self._loader(name), clock=self.workspace.clock)
            self._routes = {**self._routes, name: route}
        try:
            route.aim(deployment, self.workspace.tracking.resolve(deployment.target))
        except Exception as error:  # noqa: BLE001 - what serves goes on; the status shows it
            self._log.warning("registry_poll_failed", deployment=name, error=repr(error))
            route.fault(deployment, str(error))

    def _retire(self, name: str) -> None:
        route = self._routes[name]
        self._routes = {key: value for key, value in self._routes.items() if key != name}
        self._closing = [thread for thread in self._closing if thread.is_alive()]
        self._closing.append(threading.Thread(target=route.close, name=f"close {name}", daemon=True))
        self._closing[-1].start()

    def _report(self) -> None:
        """Writes what changed, and everything now and then, so that other processes see that this one lives."""
        now_s = self.workspace.clock.monotonic_s()
        everything = now_s >= self._next_report_s
        for name, route in self._routes.items():
            status = route.status()
            if everything or self._reported.get(name) != status:
                try:
                    self._store.report(status)
                except Exception as error:  # noqa: BLE001 - a report that is lost is written again
                    self._log.warning("report_failed", deployment=name, error=repr(error))
                    return
                self._reported[name] = status
        if everything:
            self._next_report_s = now_s + REPORT_INTERVAL_S

    def _loader(self, name: str) -> Load:
        def load(version: ModelVersion, settings: EngineConfig, backend: Backend, observer: EngineObserver) -> Served:
            from prometheus_client import REGISTRY

            from sihe.serving.gateway.metrics import ReplicaMetrics, ServingMetrics
            from sihe.serving.gateway.replicas import hosts

            metrics = ReplicaMetrics(ServingMetrics.on(self._registry or REGISTRY), name, version.version)
            return hosts.load(self.workspace, version, settings, backend, hosts.Observers(metrics, observer))

        return load

    def _route(self, name: str) -> Route:
        route = self._routes.get(name)
        if route is not None:
            return route
        if self._watcher is None:
            raise NotReady(name, "this process does not serve: start the gateway")
        known = ", ".join(sorted(self._routes)) or "none"
        raise NotFound("deployment", name, hint=f"deployed are: {known}")

    def _status(self, deployment: Deployment) -> DeploymentStatus:
        route = self._routes.get(deployment.name)
        return route.status() if route is not None else self._store.reported(deployment.name)
