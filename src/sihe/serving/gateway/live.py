"""A deployment as this process serves it: a route for each arm, and the way of a request through them.

A request gets the arm that its key draws. If that arm cannot serve, or fails before the first token, the stable one
answers: whoever tries a new version out, its trouble is not its callers'. The failure counts against the arm; the
answer of the stable one, which it did not draw, counts for none.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sihe.core.clock import Clock
from sihe.core.errors import Busy, NotFound, UserError
from sihe.core.ids import new_id
from sihe.core.telemetry import logger
from sihe.core.tracking import ModelVersion
from sihe.serving.deadlines import Deadline
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import DeadlineExceeded, NotReady
from sihe.serving.gateway.bystanders import Bystanders, Sample
from sihe.serving.gateway.replicas.adapters import FolderOf
from sihe.serving.gateway.replicas.ports import Load
from sihe.serving.gateway.route import Route
from sihe.serving.gateway.traffic.assignment import ranking
from sihe.serving.gateway.traffic.experiment import Experiment, Split
from sihe.serving.gateway.traffic.experiment_store import ExperimentStore
from sihe.serving.gateway.traffic.handover import Handover
from sihe.serving.gateway.traffic.membership import Membership
from sihe.serving.gateway.traffic.metrics import TrafficMetrics
from sihe.serving.gateway.traffic.outcome import Observation, Outcome
from sihe.serving.gateway.traffic.presence import Presence
from sihe.serving.gateway.traffic.pulse import ArmLoad, Pulse
from sihe.serving.gateway.traffic.request_log import RequestLog
from sihe.serving.gateway.traffic.rollout import Rollout, Sight
from sihe.serving.gateway.traffic.shadow import ShadowReport
from sihe.serving.gateway.traffic.types import SHADOW, STABLE, Sender, sticky_key
from sihe.serving.gateway.turn import Aside, Turn
from sihe.serving.gateway.types import Deployment, DeploymentState, DeploymentStatus
from sihe.serving.gateway.wants import Resolve, aim_of, arm_status, resolved, wants_of


@dataclass(frozen=True, slots=True)
class _Passage:
    """One request on one arm, from its start to its end."""

    sender: Sender
    key: str
    request: GenerationRequest
    arm: str
    until_s: float | None  # by the clock: an answer that changes its arm gets no more time for it
    counts: bool  # for its arm: not when another one failed it first
    experiment: Experiment
    sample: Sample


class LiveDeployment:
    """The routes of one deployment. `follow` is called by one thread, everything else by any."""

    def __init__(
        self,
        deployment: Deployment,
        load: Load,
        *,
        process: str,
        experiments: ExperimentStore,
        log: RequestLog,
        metrics: TrafficMetrics,
        presence: Presence,
        clock: Clock,
        adapter_folder: FolderOf = Path,
    ) -> None:
        self.name = deployment.name
        self._adapter_folder = adapter_folder
        self._load = load
        self._metrics = metrics
        self._presence = presence
        self._clock = clock
        self._log = logger("serving").bind(deployment=self.name)
        self._deployment = deployment
        # Before there are routes: where the records fail, none of them is left behind with its thread.
        self._membership = Membership(self.name, process, deployment.traffic.weights, store=experiments, clock=clock)
        # Replaced whole when they change, so that requests read them without a lock.
        self._routes: dict[str, Route] = {STABLE: self._new_route(deployment)}
        self._aims: dict[Route, tuple[object, ...]] = {}
        self._unready_since_s: dict[str, float] = {}
        self._bystanders = Bystanders(
            self.name,
            deployment.traffic,
            log=log,
            metrics=metrics,
            presence=presence,
            clock=clock,
            note_outcome=self.note_outcome,
        )
        self.pulse = Pulse(clock.monotonic_s())

    @property
    def stable(self) -> Route:
        """The route of what is deployed."""
        return self._routes[STABLE]

    @property
    def membership(self) -> Membership:
        """What its requests are measured by, and what the other processes have measured of the same."""
        return self._membership

    @property
    def routes(self) -> Mapping[str, Route]:
        """The routes by arm, the shadow's among them."""
        return self._routes

    @property
    def presence(self) -> Presence:
        """How many callers' requests are in hand."""
        return self._presence

    # ---- requests ---------------------------------------------------------------------------------------------------

    def generate(
        self, request: GenerationRequest, sender: Sender | None = None, *, timeout_s: float | None = None
    ) -> GenerationStream:
        """Starts a request on its arm, or on the stable one. Raises `NotReady`, and what the engine raises."""
        sender = sender or Sender(new_id("req"))
        experiment = self._membership.experiment
        key, arm = self._dealt(sender, request.tenant, experiment)
        passage = _Passage(
            sender,
            key,
            request,
            arm,
            None if timeout_s is None else self._clock.monotonic_s() + timeout_s,
            counts=True,
            experiment=experiment,
            sample=self._bystanders.sample(sender.request_id),
        )
        if passage.arm == STABLE:
            return self._on_stable(passage)
        route = self._routes.get(passage.arm)
        if route is None or not route.is_ready:
            return self._instead(passage)
        started_s = self._clock.monotonic_s()
        try:
            first = self._start(passage, route)
        except (NotReady, Busy):
            return self._instead(passage)
        except UserError as error:
            if isinstance(error, NotFound) and error.kind == "adapter":
                return self._instead(passage)  # the stable arm may have it
            raise
        except DeadlineExceeded:
            raise
        except Exception as error:  # noqa: BLE001 - an arm that raises what it should not has failed
            self._log.warning("arm_failed", arm=passage.arm, error=repr(error))
            self._count(passage, "", self._begin(passage), Outcome("failed", None, repr(error), 0, 0, None, 0.0))
            return self._instead(passage)
        self._watch(passage, first, started_s=started_s)
        handover = Handover(first, lambda: self._instead(passage))
        first.watch(handover.hear, instead=True)
        return handover.answer

    def turn(self, sender: Sender, *, tenant: str = "", version: int | None = None, weight: float = 1.0) -> Turn:
        """The way of a request to a model that does not generate: start it, and say how it has ended.

        Who names a `version` gets the arm that serves it, and what becomes of that counts for no arm. `weight` is how
        much work it is beside others.
        """
        experiment = self._membership.experiment
        key, arm = self._dealt(sender, tenant, experiment)
        if version is not None:
            arm = self._arm_of(version)
        name = feedback_name(sender.request_id, tenant)
        sample = self._bystanders.sample(sender.request_id)
        return Turn(
            self,
            experiment,
            arm,
            key,
            name=name,
            weight=weight,
            counts=version is None,
            clock=self._clock,
            bound=Deadline.of_deployment(self._deployment.replicas.timeout_s),
            hear=partial(self._bystanders.hear, sample, sender) if sample else None,
        )

    def aside(self, version: int | None = None) -> Turn:
        """The way of work that is no request to the model, such as asking what it takes: on the stable arm, or on the
        one that serves `version`. It is measured nowhere."""
        arm = STABLE if version is None else self._arm_of(version)
        unmeasured = Experiment(self.name, 0, Split({}, {}), self._clock.now())
        return Turn(Aside(self), unmeasured, arm, "", name="", weight=1.0, counts=False, clock=self._clock)

    def _arm_of(self, version: int) -> str:
        routes = self._routes.items()  # of one moment: they may be replaced while their states are asked for
        return next((arm for arm, route in routes if arm != SHADOW and route.status().version == version), STABLE)

    def _dealt(self, sender: Sender, tenant: str, experiment: Experiment) -> tuple[str, str]:
        """By what a sender is known, and the arm that it gets."""
        policy = self._deployment.traffic
        key = sticky_key(policy, sender, tenant) or sender.request_id
        order = ranking(experiment.split.weights, key, salt=f"{self.name}/{policy.salt}")
        return key, order[0] if order else STABLE

    def _on_stable(self, passage: _Passage) -> GenerationStream:
        while True:
            route = self.stable
            started_s = self._clock.monotonic_s()
            try:
                stream = self._start(passage, route)
            except NotReady:
                if route is self.stable:
                    raise
                continue  # the route was exchanged between the two lines: ask the new one
            self._watch(passage, stream, started_s=started_s)
            return stream

    def _instead(self, passage: _Passage) -> GenerationStream:
        """The stable arm answers for one that cannot."""
        self.note_rerouted(passage.arm)
        return self._on_stable(replace(passage, arm=STABLE, counts=False))

    def _start(self, passage: _Passage, route: Route) -> GenerationStream:
        self._presence.enter()
        try:
            left_s = None if passage.until_s is None else passage.until_s - self._clock.monotonic_s()
            stream = route.generate(passage.request, timeout_s=left_s)
        except BaseException:
            self._presence.leave()
            raise
        stream.arm = passage.arm
        return stream

    def _watch(self, passage: _Passage, stream: GenerationStream, *, started_s: float) -> None:
        cluster = self._begin(passage)

        def end(outcome: Outcome) -> None:
            try:
                self._count(passage, stream.served_by, cluster, outcome)
            except Exception as error:  # noqa: BLE001 - on an engine's thread: what is lost is a measurement
                self._log.error("measurement_lost", error=repr(error))
            finally:
                self._presence.leave()

        observe = Observation(
            self._clock,
            started_s,
            end,
            keeps_text=bool(passage.sample),
        )
        stream.watch(observe)

    def _begin(self, passage: _Passage) -> int:
        """Takes note that a request goes to its arm; the cluster that what is measured of it goes by."""
        name = feedback_name(passage.sender.request_id, passage.request.tenant)
        return passage.experiment.begin(name, passage.arm, passage.key)

    def _count(self, passage: _Passage, served_by: str, cluster: int, outcome: Outcome) -> None:
        if passage.counts:
            passage.experiment.record(passage.arm, outcome, cluster, passage.key)
        self.note_outcome(passage.arm, outcome)
        if passage.sample:
            self._bystanders.hear(passage.sample, passage.sender, passage.arm, served_by, passage.request, outcome)

    def note_outcome(self, arm: str, outcome: Outcome) -> None:
        """What became of a request on its arm, for those who watch."""
        self.pulse.record(arm, outcome)
        metrics, labels = self._metrics, (self.name, arm)
        metrics.requests.labels(*labels, outcome.ending).inc()
        if outcome.ending == "finished":
            metrics.latency.labels(*labels).observe(outcome.latency_s)
            if outcome.ttft_s is not None:
                metrics.ttft.labels(*labels).observe(outcome.ttft_s)

    def note_rerouted(self, arm: str) -> None:
        """The stable arm answers for `arm`."""
        self._metrics.rerouted.labels(self.name, arm).inc()

    # ---- following --------------------------------------------------------------------------------------------------

    def follow(
        self,
        deployment: Deployment,
        rollout: Rollout | None,
        resolve: Resolve,
        retire: Callable[[Route], None],
    ) -> None:
        """Makes the routes what is wanted; `retire` gets those that are wanted no more, to close them."""
        wants = wants_of(deployment, rollout)
        versions, faults = resolved(wants, resolve)
        routes = dict(self._routes)
        self._adopt(routes, wants, versions)
        for arm, want in wants.items():
            route = routes.get(arm)
            if route is None:
                route = routes[arm] = self._new_route(want)
            if arm in versions:
                route.aim(want, versions[arm])
                self._aims[route] = aim_of(want, versions[arm])
            else:
                self._log.warning("registry_poll_failed", arm=arm, error=faults[arm])
                route.fault(want, faults[arm])
        retired = [routes.pop(arm) for arm in list(routes) if arm not in wants]
        for route in retired:
            self._aims.pop(route, None)
        self._deployment = deployment
        self._routes = routes
        try:
            self._bystanders.follow(deployment.traffic, routes.get(SHADOW))
            self._note_readiness()
            self._measure(wants)
            self._sample()
        finally:  # what fails above must not leave them behind
            for route in retired:
                retire(route)

    def _new_route(self, want: Deployment) -> Route:
        return Route(want, self._load, clock=self._clock, adapter_folder=self._adapter_folder)

    def _adopt(
        self, routes: dict[str, Route], wants: Mapping[str, Deployment], versions: Mapping[str, ModelVersion]
    ) -> None:
        """Where what is wanted as stable serves already, as an arm that goes, that arm's route becomes the stable one.

        So a promoted canary answers everybody at once, and no third copy of a model is loaded.
        """
        if STABLE not in versions:
            return
        wanted = aim_of(wants[STABLE], versions[STABLE])
        if self._aims.get(routes[STABLE]) == wanted and routes[STABLE].is_ready:
            return
        for arm, route in routes.items():
            if arm not in wants and self._aims.get(route) == wanted and route.is_ready:
                routes[STABLE], routes[arm] = route, routes[STABLE]
                self._log.info("arm_adopted", arm=arm, version=versions[STABLE].version)
                return

    def _sample(self) -> None:
        now_s = self._clock.monotonic_s()
        if not self.pulse.is_due(now_s):
            return
        loads = {}
        for arm, route in self._routes.items():
            replicas = route.replicas()
            kv_used = sum(replica.kv_used for replica in replicas) / max(1, len(replicas))
            loads[arm] = ArmLoad(sum(replica.in_flight for replica in replicas), kv_used)
        self.pulse.tick(now_s, loads)

    def _note_readiness(self) -> None:
        now_s = self._clock.monotonic_s()
        for arm, route in self._routes.items():
            if route.is_ready:
                self._unready_since_s.pop(arm, None)
            else:
                self._unready_since_s.setdefault(arm, now_s)
        for arm in self._unready_since_s.keys() - self._routes.keys():
            del self._unready_since_s[arm]

    def _measure(self, wants: Mapping[str, Deployment]) -> None:
        """Lets what is measured from now on belong to the weights and versions that there are now."""
        weights = {arm: weight for arm, weight in self._deployment.traffic.weights.items() if arm in wants}
        weights[STABLE] = 1 - math.fsum(weight for arm, weight in weights.items() if arm != STABLE)
        weights = {arm: round(weight, 12) for arm, weight in weights.items()}
        self._membership.follow(weights, {arm: self._routes[arm].status().version for arm in weights})

    # ---- what is ----------------------------------------------------------------------------------------------------

    def status(self) -> DeploymentStatus:
        """What is, as far as this process knows."""
        weights = self._membership.experiment.split.weights
        arms = [
            arm_status(arm, route.status(), weights.get(arm, 0.0))
            for arm, route in sorted(self._routes.items(), key=lambda item: (item[0] != STABLE, item[0]))
        ]
        return replace(self.stable.status(), arms=tuple(arms) if len(arms) > 1 else ())

    def sight(self, rollout: Rollout) -> Sight | None:
        """What a rollout is judged by: the requests of all processes, those of the others as last stored; None while
        its step has not reached the routes of this one. Whether the canary can serve is what this process sees."""
        experiment, route = self._membership.experiment, self._routes.get(rollout.arm)
        if route is None or experiment.split.weights.get(rollout.arm) != rollout.weight:
            return None
        status = route.status()
        since_s = self._unready_since_s.get(rollout.arm)
        has_served = experiment.split.versions.get(rollout.arm) is not None
        return Sight(
            is_ready=since_s is None,
            unready_s=0.0 if since_s is None else self._clock.monotonic_s() - since_s,
            has_failed=status.state is DeploymentState.FAILED,
            fault=status.error,
            step_s=(self._clock.now() - experiment.started_at).total_seconds() if has_served else 0.0,
            stable=experiment.stats(STABLE),
            canary=experiment.stats(rollout.arm),
        )

    def shadow_report(self) -> ShadowReport | None:
        """What the shadow's copies have shown; None without a shadow."""
        return self._bystanders.report()

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Frees every route: after their streams have ended, for at most `timeout_s`, or at once without `drain`.

        The stable one goes last, as it answers for the others; the time is that of all together.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._bystanders.close()
        others = [route for arm, route in self._routes.items() if arm != STABLE]
        threads = [
            threading.Thread(target=route.close, kwargs={"drain": drain, "timeout_s": timeout_s}, name="close arm")
            for route in others
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
        self.stable.close(drain=drain, timeout_s=left_s)


def feedback_name(request_id: str, tenant: str) -> str:
    """Under which a request waits for feedback: clients choose ids, and a tenant must not reach another's."""
    return f"{tenant}/{request_id}"
