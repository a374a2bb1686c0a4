"""The gateway: keeps every deployment on the version that its reference points at, and routes requests to it.

`deploy` and `remove` only write what is wanted into the records; the watcher of the process that serves (`start`) makes
it so, within one poll, or at once when the change came through this same gateway.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from sihe.core.errors import NotFound
from sihe.core.ids import check_name, new_id
from sihe.core.telemetry import logger
from sihe.core.tracking import ModelVersion
from sihe.core.workspace import Workspace
from sihe.serving.engine.ports import EngineObserver
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import NotReady
from sihe.serving.gateway.adapters import AdapterControl
from sihe.serving.gateway.control import TrafficControl
from sihe.serving.gateway.live import LiveDeployment
from sihe.serving.gateway.replicas.config import Backend, OpenAiBackend, ReplicaConfig
from sihe.serving.gateway.replicas.ports import Load, Served
from sihe.serving.gateway.rollouts import RolloutControl
from sihe.serving.gateway.route import Route
from sihe.serving.gateway.settings import ModelSettings, check_kind, settings_for
from sihe.serving.gateway.store import REPORT_INTERVAL_S, DeploymentStore
from sihe.serving.gateway.traffic.experiment_store import ExperimentStore
from sihe.serving.gateway.traffic.presence import Presence
from sihe.serving.gateway.traffic.request_log import RequestLog
from sihe.serving.gateway.traffic.rollout import Move, Rollout, RolloutState, decide
from sihe.serving.gateway.traffic.types import MAX_KEEP_DAYS, Sender
from sihe.serving.gateway.turn import Turn
from sihe.serving.gateway.types import Deployment, DeploymentStatus

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


_HALT_S = 5.0  # for each thread, at the interpreter's end


class _Close(Protocol):
    """Frees a deployment or a route; a second call may leave it less time than the first."""

    def __call__(self, *, drain: bool = True, timeout_s: float | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class _Closing:
    """What is being freed in the background."""

    close: _Close
    thread: threading.Thread


class Gateway:
    """Deployments of one workspace. Without `start` it reads and writes what is wanted and serves nothing.

    `traffic` deals requests out between versions, `rollouts` brings new ones in, and `adapters` stand beside them.
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
        self._process = new_id("srv")  # by which the records know it; another one with each start
        self.traffic = TrafficControl(
            workspace,
            self._store,
            live=lambda name: self._live.get(name),
            process=lambda: self._process,
            notify=self.notify,
        )
        self.rollouts = RolloutControl(workspace, self._store, notify=self.notify)
        self.adapters = AdapterControl(workspace, self._store, live=self._served, notify=self.notify)
        self._experiments = ExperimentStore(workspace.records, workspace.clock)
        self._request_log: RequestLog | None = None
        self._presence = Presence()
        # Replaced whole when it changes, so that requests read it without a lock.
        self._live: dict[str, LiveDeployment] = {}
        self._notes: dict[str, str] = {}  # what rollouts wait for
        self._unreadable: dict[str, str] = {}  # deployments whose record could not be read at the last look, and why
        self._closing: list[_Closing] = []
        self._reported: dict[str, DeploymentStatus] = {}
        self._next_report_s = 0.0
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    # ---- what is wanted ---------------------------------------------------------------------------------------------

    def deploy(
        self,
        name: str,
        target: str,
        *,
        settings: ModelSettings | Mapping[str, Any] | None = None,
        replicas: ReplicaConfig | None = None,
    ) -> DeploymentStatus:
        """Makes `name` answer with the version behind `target` (`model@alias`, `model@3`, or `model`: its newest).

        Deploying again under the same name changes what it follows, and leaves its other arms as they are. `settings`
        given as a mapping are read as the model's kind has them. Raises `NotFound` when nothing is behind `target`, and
        `ConfigError` for a backend where `serving.backend_hosts` allows none.
        """
        check_name("deployment", name)
        if replicas is not None and isinstance(replicas.backend, OpenAiBackend) and replicas.backend.url is not None:
            from sihe.serving.gateway.replicas.openai.places import BackendPlaces

            BackendPlaces(self.workspace.settings.serving.backend_hosts).check(replicas.backend.url)
        version = self.workspace.tracking.resolve(target)
        model, _, selector = target.partition("@")
        wanted = settings_for(version, settings)
        self.adapters.check_places(name, wanted)
        self._store.put(name, model, selector, wanted, replicas=replicas)
        self.notify()
        return self.status(name)

    def remove(self, name: str) -> None:
        """Forgets a deployment; the process that serves it drains and frees it. Raises `NotFound`."""
        self._store.remove(name)
        self.notify()
        self.adapters.forget(name)

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
        """Every deployment, by name, as all processes that serve it see it: this one now, others as last reported.

        One whose record cannot be read, as a newer version wrote it, has that as its error.
        """
        live = {name: self._live_status(one) for name, one in self._live.items()}
        return self._store.all_reported(live, process=self._process)

    def status(self, name: str) -> DeploymentStatus:
        """One deployment, the same. Raises `NotFound`."""
        live = self._live.get(name)
        status = self._live_status(live) if live is not None else None
        return self._store.reported(name, status, process=self._process)

    def served(self) -> tuple[DeploymentStatus, ...]:
        """What this process serves, from memory."""
        return tuple(self._live_status(live) for _, live in sorted(self._live.items()))

    def wait_ready(self, name: str, *, timeout_s: float = 120.0) -> DeploymentStatus:
        """Blocks until this process serves what is wanted of `name`; what it serves then, whatever others do.

        Raises what prevents it, or `Busy` after `timeout_s`.
        """
        self.route(name).wait_settled(timeout_s)
        live = self._live.get(name)
        return self._live_status(live) if live is not None else self.status(name)

    def generate(
        self,
        name: str,
        request: GenerationRequest,
        sender: Sender | None = None,
        *,
        timeout_s: float | None = None,
    ) -> GenerationStream:
        """Starts a request on deployment `name`, on the arm that its sender draws, to its end within `timeout_s`.

        Until the first event the arm and the version may change, where the first one fails; the stream then says so.
        Raises `NotFound`, `NotReady`, and what the engine raises.
        """
        return self._served(name).generate(request, sender, timeout_s=timeout_s)

    def turn(
        self,
        name: str,
        *,
        request_id: str | None = None,
        session: str | None = None,
        tenant: str = "",
        version: int | None = None,
        weight: float = 1.0,
    ) -> Turn:
        """The way of a request to deployment `name`, whose model does not generate, through its arms and replicas.

        `session` says by what its sender is known again; `version` asks for the arm that serves it, and `weight` is how
        much work it is beside others. Raises `NotFound`, `NotReady`.
        """
        sender = Sender(request_id or new_id("req"), session)
        return self._served(name).turn(sender, tenant=tenant, version=version, weight=weight)

    def aside(self, name: str, *, version: int | None = None) -> Turn:
        """The way of work that is no request to a model of deployment `name`, such as asking what it takes; of its
        stable `version`, or the one that is named. It is measured nowhere. Raises `NotFound`, `NotReady`."""
        return self._served(name).aside(version)

    def route(self, name: str) -> Route:
        """The replicas of the stable version of deployment `name`. Raises `NotFound`, `NotReady`."""
        return self._served(name).stable

    # ---- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to serve: loads what is deployed and follows it."""
        if self._watcher is not None:
            return
        _ = self.workspace.tracking.client  # opened once, before two threads could
        self._process = new_id("srv")  # what the one before has measured and stored stays its own
        self._reported = {}
        self._next_report_s = 0.0
        self._stop.clear()
        self._request_log = RequestLog(self.workspace.path("lake"), on_fate=self._note_records)
        self._watcher = threading.Thread(target=self._watch, name="gateway watcher", daemon=True)
        self._synchronise()
        self._watcher.start()
        atexit.register(self._halt)

    @property
    def is_serving(self) -> bool:
        """Whether this process follows what is deployed and takes requests."""
        return self._watcher is not None

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Stops serving and frees every model: after the running streams, which have `timeout_s` (then those that are
        left end with an error), or at once without `drain`."""
        if self._watcher is None:
            return
        atexit.unregister(self._halt)
        self._stop.set()
        self._watcher.join()
        self._watcher = None
        with self._synchronising:
            deployments, self._live = list(self._live.values()), {}
        # All at once: the time that there is is the same for each. What closes already has no more of it than the rest.
        leaving = [one for one in self._closing if one.thread.is_alive()]
        closes = [*(live.close for live in deployments), *(one.close for one in leaving)]
        threads = [
            threading.Thread(target=close, kwargs={"drain": drain, "timeout_s": timeout_s}, name="close")
            for close in closes
        ]
        for thread in threads:
            thread.start()
        for thread in (*threads, *(one.thread for one in leaving)):
            thread.join()
        for live in deployments:
            self._save(live)
        self._withdraw()
        if self._request_log is not None:
            self._request_log.close()

    def _withdraw(self) -> None:
        """Says to others that this process serves nothing more; where it cannot, its reports grow old."""
        try:
            self._store.withdraw(self._process)
        except Exception as error:  # noqa: BLE001 - see above
            self._log.warning("reports_not_withdrawn", error=repr(error))

    def _halt(self) -> None:
        """At the interpreter's end, where nobody has closed it: models free themselves, and threads that follow must
        not replace them, or be killed while they write to the log (which is fatal: bugs.python.org/issue42717)."""
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join(_HALT_S)
        for live in self._live.values():
            for route in live.routes.values():
                route.halt(_HALT_S)

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
            if self._stop.is_set():
                return  # it was closed while this waited: nothing may be loaded any more
            faults: dict[str, Exception] = {}
            try:
                found = self._store.all(faults.__setitem__)
                rollouts = self.rollouts.active(faults.__setitem__)
            except Exception as error:  # noqa: BLE001 - see above
                self._log.warning("records_poll_failed", error=repr(error))
                return
            self._note_unreadable(faults)
            wanted = {deployment.name: deployment for deployment in found if deployment.name not in faults}
            for name in self._live.keys() - wanted.keys() - faults.keys():  # what cannot be read is not wanted less
                self._retire(name)
            for name, deployment in wanted.items():
                try:
                    self._update(deployment, rollouts.get(name))
                except Exception as error:  # noqa: BLE001 - one deployment's trouble; the next poll tries again
                    self._log.error("deployment_not_followed", deployment=name, error=repr(error), exc_info=error)
            self._tidy_log(wanted, faults)
            self._report()

    def _note_unreadable(self, faults: Mapping[str, Exception]) -> None:
        for name, error in faults.items():
            if self._unreadable.get(name) != str(error):  # once, and not at every look
                self._log.error("deployment_unreadable", deployment=name, error=str(error))
        self._unreadable = {name: str(error) for name, error in faults.items()}

    def _tidy_log(self, wanted: Mapping[str, Deployment], faults: Mapping[str, Exception]) -> None:
        """Lets logged requests go whose time is over. How long an unreadable deployment keeps its own is unknown."""
        assert self._request_log is not None
        keep_days = {name: deployment.traffic.logs.keep_days for name, deployment in wanted.items()}
        self._request_log.tidy(dict.fromkeys(faults, MAX_KEEP_DAYS) | keep_days, self.workspace.clock.now())

    def _update(self, deployment: Deployment, rollout: Rollout | None) -> None:
        live = self._follow(deployment, rollout)
        if rollout is None:
            self._notes.pop(live.name, None)  # it may have been ended by hand, or by another process
        elif self._roll(live, rollout):
            self._follow(self._store.get(live.name), self.rollouts.find(live.name))

    def _follow(self, deployment: Deployment, rollout: Rollout | None) -> LiveDeployment:
        name = deployment.name
        live = self._live.get(name)
        if live is None:
            live = self._new_live(deployment)
            self._live = {**self._live, name: live}
        live.follow(
            deployment, rollout, self.workspace.tracking.resolve, lambda route: self._close_later(route.close, name)
        )
        return live

    def _new_live(self, deployment: Deployment) -> LiveDeployment:
        from prometheus_client import REGISTRY

        from sihe.serving.gateway.traffic.metrics import TrafficMetrics

        assert self._request_log is not None
        return LiveDeployment(
            deployment,
            self._loader(deployment.name),
            process=self._process,
            experiments=self._experiments,
            log=self._request_log,
            metrics=TrafficMetrics.on(self._registry or REGISTRY),
            presence=self._presence,
            clock=self.workspace.clock,
            adapter_folder=self.adapters.folder_of,
        )

    def _roll(self, live: LiveDeployment, rollout: Rollout) -> bool:
        """Moves a rollout on where it is time to; whether it has moved. What fails is tried again at the next poll."""
        self._notes.pop(live.name, None)
        try:
            if rollout.state is RolloutState.PROMOTING:
                self.rollouts.finish(rollout)
                return True
            sight = live.sight(rollout)
            if sight is None:
                return False
            decision = decide(rollout, sight)
            if decision.move is Move.HOLD:
                self._notes[live.name] = decision.reason
                return False
            self._log.info("rollout_moves", deployment=live.name, move=decision.move.value, reason=decision.reason)
            if decision.move is Move.ADVANCE:
                self.rollouts.advance(rollout, step=rollout.step + 1, reason=decision.reason)
            elif decision.move is Move.ROLL_BACK:
                self.rollouts.advance(rollout, state=RolloutState.ROLLED_BACK, reason=decision.reason)
            else:
                promoting = self.rollouts.advance(rollout, state=RolloutState.PROMOTING, reason=decision.reason)
                self.rollouts.finish(promoting)
        except Exception as error:  # noqa: BLE001 - see above
            self._log.warning("rollout_not_moved", deployment=live.name, error=repr(error))
            return False
        return True

    def _retire(self, name: str) -> None:
        live = self._live[name]
        self._live = {key: value for key, value in self._live.items() if key != name}
        self._notes.pop(name, None)
        self._reported.pop(name, None)  # of its name there may be another one soon
        self._close_later(live.close, name)

    def _close_later(self, close: _Close, name: str) -> None:
        self._closing = [one for one in self._closing if one.thread.is_alive()]
        thread = threading.Thread(target=close, name=f"close {name}", daemon=True)
        self._closing.append(_Closing(close, thread))
        thread.start()

    def _report(self) -> None:
        """Writes what changed, and everything now and then, so that other processes see that this one lives."""
        now_s = self.workspace.clock.monotonic_s()
        everything = now_s >= self._next_report_s
        for name, live in self._live.items():
            status = self._live_status(live)
            if everything:
                self._save(live)
            if everything or self._reported.get(name) != status:
                try:
                    self._store.report(status, live.shadow_report(), process=self._process)
                except Exception as error:  # noqa: BLE001 - a report that is lost is written again
                    self._log.warning("report_failed", deployment=name, error=repr(error))
                    return
                self._reported[name] = status
        if everything:
            self._next_report_s = now_s + REPORT_INTERVAL_S

    def _loader(self, name: str) -> Load:
        def load(version: ModelVersion, settings: ModelSettings, backend: Backend, observer: EngineObserver) -> Served:
            from prometheus_client import REGISTRY

            from sihe.serving.gateway.metrics import ReplicaMetrics, ServingMetrics
            from sihe.serving.gateway.replicas import hosts
            from sihe.serving.predictive.config import PredictiveConfig
            from sihe.serving.predictive.metrics import PredictiveMetrics, PredictorMetrics

            registry = self._registry or REGISTRY
            check_kind(version, settings)
            if isinstance(settings, PredictiveConfig):
                watch = PredictorMetrics(PredictiveMetrics.on(registry), name, version.version, observer.on_close)
                return hosts.load_predictor(self.workspace, version, settings, backend, watch)
            metrics = ReplicaMetrics(ServingMetrics.on(registry), name, version.version)
            return hosts.load(self.workspace, version, settings, backend, hosts.Observers(metrics, observer))

        return load

    def _save(self, live: LiveDeployment) -> None:
        try:
            live.membership.save()
        except Exception as error:  # noqa: BLE001 - it is saved again
            self._log.warning("measurements_not_saved", deployment=live.name, error=repr(error))

    def _note_records(self, fate: str, number: int) -> None:
        from prometheus_client import REGISTRY

        from sihe.serving.gateway.traffic.metrics import TrafficMetrics

        TrafficMetrics.on(self._registry or REGISTRY).records.labels(fate).inc(number)

    def _served(self, name: str) -> LiveDeployment:
        live = self._live.get(name)
        if live is not None:
            return live
        if self._watcher is None:
            raise NotReady(name, "this process does not serve: start the gateway")
        known = ", ".join(sorted(self._live)) or "none"
        raise NotFound("deployment", name, hint=f"deployed are: {known}")

    def _live_status(self, live: LiveDeployment) -> DeploymentStatus:
        status = live.status()
        error = status.error or self._unreadable.get(live.name)
        return replace(status, error=error, rollout_note=self._notes.get(live.name, ""))
