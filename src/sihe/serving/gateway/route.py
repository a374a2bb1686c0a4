"""A deployment's live side: the replicas that get its requests, and the thread that decides which there are.

A swap in five moves: load the wanted version beside the serving one, warm it, flip the route, drain the old one, free
it. If loading or warming fails, or another version is wanted by then, the serving one was never touched. With several
replicas `replicas.replacement` says which move comes next, and `replicas.autoscaler` how many there shall be.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from sihe.core.clock import Clock
from sihe.core.errors import Busy, TransientError
from sihe.core.telemetry import logger
from sihe.core.tracking import ModelVersion
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import EngineClosed, NoMemory, NoRoom, NotReady
from sihe.serving.gateway.replicas.adapters import Adapters, FolderOf, bring_up_to_date
from sihe.serving.gateway.replicas.autoscaler import Observation, decide, initial
from sihe.serving.gateway.replicas.config import Backend
from sihe.serving.gateway.replicas.dispatcher import Dispatcher
from sihe.serving.gateway.replicas.lease import Lease
from sihe.serving.gateway.replicas.ports import Load
from sihe.serving.gateway.replicas.replacement import Member, Moves, Stage, next_moves
from sihe.serving.gateway.replicas.replica import Replica
from sihe.serving.gateway.settings import ModelSettings
from sihe.serving.gateway.types import Deployment, DeploymentState, DeploymentStatus, ReplicaState

_RETRY_S = (1.0, 2.0, 5.0, 15.0, 60.0)  # between attempts to load what may fit or arrive later
_ROOM_S = 2.0
_JOIN_S = 5.0
_TICK_S = 1.0  # between looks at an elastic deployment's load
_FILLED = 0.75  # of `max_batch_size`: the usual target for requests in hand, which leaves room for those that come
_LOADS_AT_ONCE = {"local": 1, "openai": 1, "ray": 8}  # on one machine each load must see what the one before took


@dataclass(frozen=True, slots=True)
class _Wish:
    version: ModelVersion
    settings: ModelSettings
    backend: Backend
    adapters: Adapters = ()
    """They come and go without a new replica: only what failed with them depends on them."""

    def is_met_by(self, other: Replica | _Wish | None) -> bool:
        """Whether `other` is the same version with the same settings (aliases may differ)."""
        return other is not None and (other.version.key, other.settings, other.backend) == (
            self.version.key,
            self.settings,
            self.backend,
        )


@dataclass(frozen=True, slots=True)
class _Failure:
    wish: _Wish
    error: Exception
    attempts: int
    retry_at_s: float | None  # None: the same version would fail again


class Route:
    """Serves the newest wish that could be met. Thread-safe.

    Wishes that come while a version loads replace each other: only the last one counts when it is done.
    """

    def __init__(self, deployment: Deployment, load: Load, *, clock: Clock, adapter_folder: FolderOf = Path) -> None:
        self.name = deployment.name
        self._adapter_folder = adapter_folder
        self._deployment = deployment
        self._load = load
        self._clock = clock
        self._log = logger("serving").bind(deployment=self.name)
        self._changed = threading.Condition()
        self._wish: _Wish | None = None
        self._replicas: tuple[Replica, ...] = ()  # all that are not GONE; replaced whole
        self._ids = count()
        self._scaling = initial(deployment.replicas)
        self._next_look_s = 0.0
        self._failure: _Failure | None = None
        self._room_is_short = False
        self._has_served = False
        self._proven: _Wish | None = None  # what was wanted when a replica was last opened
        self._fault: str | None = None
        self._closing = False
        self._left_behind: set[Replica] = set()  # what loaded when a `close` had no time left
        self._renewals: list[threading.Thread] = []
        self._requests = Dispatcher(
            self.name, deployment.replicas, clock=clock, why_none=self._why_none, on_change=self._notify
        )
        self._thread = threading.Thread(target=self._run, name=f"route {self.name}", daemon=True)
        self._thread.start()

    def aim(self, deployment: Deployment, version: ModelVersion) -> None:
        """Says which version is wanted now, with which settings and how many replicas."""
        wish = _Wish(version, deployment.settings, deployment.replicas.backend, deployment.adapters)
        with self._changed:
            if deployment.replicas != self._deployment.replicas:
                self._requests.configure(deployment.replicas)
                self._scaling = initial(deployment.replicas)
            elif self._wish is not None and not wish.is_met_by(self._wish) and self._scaling.wanted == 0:
                self._scaling = initial(deployment.replicas)  # a version is shown to work before it may sleep
            if not wish.is_met_by(self._wish):
                self._room_is_short = False
            gone = [item[0] for item in self._deployment.adapters if item not in deployment.adapters]
            is_other = self._deployment.adapters != deployment.adapters
            self._deployment = deployment
            self._wish = wish
            self._fault = None
            self._renewals = [thread for thread in self._renewals if thread.is_alive()]
            for replica in self._replicas if is_other else ():
                arguments = (replica, gone)
                renewal = threading.Thread(target=self._renew_adapters, args=arguments, name="adapters", daemon=True)
                self._renewals.append(renewal)
                renewal.start()
            self._changed.notify_all()

    def fault(self, deployment: Deployment, message: str) -> None:
        """Shows that what is wanted could not be found out. What serves goes on."""
        with self._changed:
            self._deployment = deployment
            self._fault = message

    # ---- requests ---------------------------------------------------------------------------------------------------

    def generate(self, request: GenerationRequest, *, timeout_s: float | None = None) -> GenerationStream:
        """Starts a request on one of the replicas; within `timeout_s` it is answered, or ends with an error.

        Raises `NotReady`, `QueueFull`, and what is wrong with the request.
        """
        return self._requests.generate(request, timeout_s=timeout_s)

    def lease(
        self,
        *,
        weight: float = 1.0,
        avoid: frozenset[int] = frozenset(),
        block: bool = True,
        until_s: float | None = None,
    ) -> Lease:
        """A replica, other than those to `avoid`, for a request that ends the lease when it has ended.

        With `block` the thread waits for one that is on its way, at most until `until_s` on the system's monotonic
        clock. Raises `NotReady`.
        """
        replica = self._requests.obtain(work=weight, avoid=avoid, block=block, until_s=until_s)
        return Lease(replica, weight, self._clock, self._note_lost)

    @property
    def max_attempts(self) -> int:
        """Replicas that a request is tried on."""
        return self._deployment.replicas.max_attempts

    @property
    def is_ready(self) -> bool:
        """Whether a replica would take a request at this moment, or comes for one. Asked for every request: takes no
        lock."""
        return any(replica.is_serving for replica in self._replicas) or self._is_asleep()

    @property
    def capability(self) -> str | None:
        """What its version is for: generation, embeddings, rerank, …; None while nothing is loaded."""
        return next((replica.capability for replica in self._replicas if replica.capability), None)

    # ---- what is ----------------------------------------------------------------------------------------------------

    def replicas(self) -> tuple[Replica, ...]:
        """Every replica that holds memory, in the order in which they came."""
        return self._replicas

    def status(self) -> DeploymentStatus:
        """What is, as far as this process knows."""
        with self._changed:
            serving = self._answering()
            failed = self._failed()
            state = DeploymentState.PENDING
            if serving is not None or self._is_asleep():
                state = DeploymentState.READY
            elif failed is not None or (self._wish is None and self._fault is not None):
                state = DeploymentState.FAILED
            wanted = self._wish.version.version if self._wish else None
            order = {ReplicaState.READY: 0, ReplicaState.LOADING: 1, ReplicaState.WARMING: 1}
            return DeploymentStatus(
                name=self.name,
                target=self._deployment.target,
                state=state,
                version=serving.version.version if serving else wanted if self._is_asleep() else None,
                wanted=wanted,
                error=str(failed.error) if failed else self._fault,
                replicas=tuple(
                    replica.status() for replica in sorted(self._replicas, key=lambda one: order.get(one.state, 2))
                ),
                updated_at=self._deployment.updated_at,
                reported_at=None,
            )

    def wait_settled(self, timeout_s: float) -> None:
        """Blocks until what is wanted serves. Raises the error that prevents it, or `Busy` after `timeout_s`."""

        def settled() -> bool:
            return self._closing or self._is_met() or (self._failed() is not None and not self._is_loading())

        with self._changed:
            if not self._changed.wait_for(settled, timeout_s):
                raise Busy(f"deployment {self.name!r} was not ready within {timeout_s:.0f} s: {self._reason()}")
            if self._closing:
                raise NotReady(self.name, "it was removed")
            failed = self._failed()
            if failed is not None and not self._is_met():
                raise failed.error

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Stops following, and frees every replica: after their streams have ended, for at most `timeout_s`, or at once
        without `drain`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._requests.stop()
        with self._changed:
            # A model that loads cannot be stopped. Who has no time leaves it to its thread, which frees it at the end.
            self._changed.wait_for(lambda: not self._is_loading(), timeout_s)
            self._left_behind = {replica for replica in self._replicas if self._member(replica).stage == "loading"}
            left = [replica for replica in self._replicas if replica not in self._left_behind]
            for replica in left:
                if replica.state not in (ReplicaState.DRAINING, ReplicaState.GONE):
                    self._retire(replica, drain=drain, timeout_s=timeout_s)
            if not self._changed.wait_for(lambda: not self._holds(left), timeout_s if drain else 0):
                for replica in self._holds(left):
                    threading.Thread(target=replica.abandon, daemon=True).start()
            self._changed.wait_for(lambda: not self._holds(left))
        for renewal in self._renewals:  # its replica is closed: it ends with that
            renewal.join(_JOIN_S)
        self._requests.close()

    def halt(self, timeout_s: float) -> None:
        """Stops following, at the interpreter's end: frees nothing, and waits for its own threads for a while each."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_loading(), timeout_s)
        self._thread.join(timeout_s)

    # ---- the route's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing and not (moves := self._moves()):
                    self._changed.wait(self._wait_s())
                if self._closing:
                    return
                self._make(moves)

    def _moves(self) -> Moves:
        """The next moves; first what the load asks for is found out."""
        if self._wish is None:
            return Moves()
        self._look()
        failed = self._failed()
        retry = failed is None or (failed.retry_at_s is not None and self._clock.monotonic_s() >= failed.retry_at_s)
        return next_moves(
            [self._member(replica) for replica in self._replicas],
            wanted=self._scaling.wanted,
            minimum=self._deployment.replicas.min_replicas,
            loads_at_once=_LOADS_AT_ONCE[self._wish.backend.kind],
            # At the interpreter's end models are freed, which nobody has closed: they are not lost, to be replaced.
            may_load=retry and threading.main_thread().is_alive(),
            has_room=not self._room_is_short,
        )

    def _make(self, moves: Moves) -> None:
        by_id = {replica.id: replica for replica in self._replicas}
        assert self._wish is not None
        for id in moves.open:
            by_id[id].open()
            self._log.info("version_ready", version=by_id[id].version.version)
        for id in moves.drain:
            by_id[id].begin_drain()
        # The flip: one assignment, after which new requests see the new replicas only.
        self._requests.open_to([replica for replica in self._replicas if replica.is_serving])
        for id in (*moves.drain, *moves.discard):
            self._retire(by_id[id], drain=id in moves.drain)
        if moves.open:
            self._has_served, self._proven, self._failure = True, self._wish, None
        for _ in range(moves.load):
            replica = Replica(
                self._wish.version, self._wish.settings, self._wish.backend, self._notify, id=next(self._ids)
            )
            self._replicas = (*self._replicas, replica)
            arguments = (self._wish, replica)
            threading.Thread(target=self._bring_in, args=arguments, name=f"load {self.name}", daemon=True).start()
        self._room_is_short &= not self._is_met()
        self._changed.notify_all()

    def _bring_in(self, wish: _Wish, replica: Replica) -> None:
        self._log.info("version_loading", version=wish.version.version)
        try:
            replica.load(self._load)
            bring_up_to_date(replica, self._adapters, self._adapter_folder)
            if self._still_wanted(wish):
                replica.warm()
                with self._changed:
                    if replica not in self._left_behind:
                        return
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a version, the one that serves goes on
            if replica not in self._left_behind:
                self._log.warning("version_failed", version=wish.version.version, error=repr(error))
            self._remove(replica, _failure(wish, error, self._failure, self._clock.monotonic_s()))
            return
        self._remove(replica, None)

    def _adapters(self) -> Adapters:
        return self._deployment.adapters

    def _renew_adapters(self, replica: Replica, gone: Collection[str]) -> None:
        """Brings a change of adapters to a replica; one that loads still finds it when it is there."""
        try:
            bring_up_to_date(replica, self._adapters, self._adapter_folder, gone=gone)
        except EngineClosed:
            return
        except Exception as error:  # noqa: BLE001 - the others of the replica go on, and requests that name it say so
            self._log.error("adapters_not_renewed", replica=replica.id, error=repr(error))

    def _note_lost(self, replica: Replica, error: BaseException) -> None:
        self._log.warning("replica_failed", replica=replica.id, version=replica.version.version, error=repr(error))
        self._notify()  # another is brought in

    def _remove(self, replica: Replica, failure: _Failure | None) -> None:
        """Frees a replica that never served."""
        try:
            replica.retire(drain=False)
        except Exception as error:  # noqa: BLE001 - it must not stay in the list as one that loads for ever
            self._log.error("replica_not_freed", replica=replica.id, error=repr(error), exc_info=error)
        with self._changed:
            self._replicas = tuple(other for other in self._replicas if other is not replica)
            if failure is not None:
                self._failure = failure
                self._room_is_short |= isinstance(failure.error, NoMemory | NoRoom) and failure.wish.is_met_by(
                    self._wish
                )
            self._changed.notify_all()
        if failure is not None and failure.retry_at_s is None and not self.is_ready:
            self._requests.give_up_waiting(NotReady(self.name, str(failure.error)))

    def _retire(self, replica: Replica, *, drain: bool, timeout_s: float | None = None) -> None:
        def retire() -> None:
            try:
                replica.retire(drain=drain, timeout_s=timeout_s)
            except Exception as error:  # noqa: BLE001 - nobody waits for it here; what it held may not be free
                self._log.error("replica_not_freed", replica=replica.id, error=repr(error), exc_info=error)
            finally:
                with self._changed:
                    self._replicas = tuple(other for other in self._replicas if other is not replica)
                    if self._room_is_short and self._failure is not None and self._failure.retry_at_s is not None:
                        self._failure = _retried_now(self._failure, self._clock.monotonic_s())  # there is more room now
                    self._changed.notify_all()

        if replica.state is not ReplicaState.DRAINING:
            replica.begin_drain()
        threading.Thread(target=retire, name=f"drain {self.name}", daemon=True).start()

    def _look(self) -> None:
        """Takes the load into account: once a second where the number of replicas may change."""
        config = self._deployment.replicas
        now_s = self._clock.monotonic_s()
        wakes = self._requests.num_waiting > 0 and self._scaling.wanted == 0
        if not (wakes or (config.is_elastic and now_s >= self._next_look_s)):
            return
        if self._wish is None or not self._wish.is_met_by(self._proven):
            return  # a version is shown to work before its number follows the load
        self._next_look_s = now_s + _TICK_S
        there = [replica for replica in self._replicas if self._wish.is_met_by(replica)]
        ready = [replica for replica in self._replicas if replica.is_serving]
        seen = Observation(
            now_s=now_s,
            ready=len(ready),
            coming=sum(replica.state in (ReplicaState.LOADING, ReplicaState.WARMING) for replica in there),
            in_hand=sum(replica.in_flight for replica in ready) + self._requests.num_waiting,
            kv_used=sum(replica.kv_used for replica in ready) / max(1, len(ready)),
            ttft_s=self._requests.ttft_s(),
            last_request_s=self._requests.last_request_s or self._opened_s(),
        )
        target = config.scaling.target_in_flight or max(1.0, _FILLED * self._wish.settings.max_batch_size)
        former, self._scaling = self._scaling.wanted, decide(config, target, self._scaling, seen)
        if self._scaling.wanted != former:
            self._log.info("replicas_wanted", former=former, wanted=self._scaling.wanted, in_hand=seen.in_hand)

    # ---- under the condition ----------------------------------------------------------------------------------------

    def _opened_s(self) -> float | None:
        return self._scaling.watched_s  # a new deployment is idle from when it is first looked at

    def _member(self, replica: Replica) -> Member:
        stage: Stage = "loading"
        if replica.state in (ReplicaState.DRAINING, ReplicaState.GONE):  # GONE: its thread is about to forget it
            stage = "draining"
        elif replica.state is ReplicaState.READY or replica.is_warm:
            stage = "dead" if not replica.is_alive else "ready" if replica.state is ReplicaState.READY else "warm"
        return Member(
            replica.id,
            self._wish is not None and self._wish.is_met_by(replica),
            stage,
            replica.in_flight,
        )

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _still_wanted(self, wish: _Wish) -> bool:
        with self._changed:
            return not self._closing and wish.is_met_by(self._wish)

    def _answering(self) -> Replica | None:
        """A replica that serves: of the wanted version if there is one."""
        serving = [replica for replica in self._replicas if replica.is_serving]
        current = [replica for replica in serving if self._wish is not None and self._wish.is_met_by(replica)]
        return next(iter(current or serving), None)

    def _is_met(self) -> bool:
        """Whether what is wanted serves, alive and alone."""
        serving = [replica for replica in self._replicas if replica.is_serving]
        if self._wish is None or not all(self._wish.is_met_by(replica) for replica in serving):
            return False
        return self._is_asleep() or len(serving) >= max(
            1, min(self._scaling.wanted, self._deployment.replicas.min_replicas)
        )

    def _is_asleep(self) -> bool:
        """Whether there is no replica because there was no request: one comes with the next."""
        return self._has_served and self._scaling.wanted == 0 and self._failed() is None

    def _holds(self, replicas: Sequence[Replica]) -> list[Replica]:
        """Those of `replicas` that are not gone yet."""
        return [replica for replica in replicas if replica in self._replicas]

    def _is_loading(self) -> bool:
        return any(self._member(replica).stage == "loading" for replica in self._replicas)

    def _wait_s(self) -> float | None:
        waits = []
        failed = self._failed()
        now_s = self._clock.monotonic_s()
        if failed is not None and failed.retry_at_s is not None and now_s < failed.retry_at_s:
            waits.append(failed.retry_at_s - now_s)
        if self._deployment.replicas.is_elastic and self._wish is not None:
            waits.append(self._next_look_s - now_s)
        return max(0.05, min(waits)) if waits else None

    def _failed(self) -> _Failure | None:
        """The failure of what is wanted now; one of another version no longer matters."""
        failure, wish = self._failure, self._wish
        is_its = failure and wish and failure.wish.is_met_by(wish) and failure.wish.adapters == wish.adapters
        return failure if is_its else None

    def _why_none(self) -> NotReady | None:
        """Why a request is refused while there is no replica; None when one is on its way and it may wait."""
        failed = self._failed()
        is_coming = self._has_served and self._wish is not None and not self._closing
        if is_coming and (failed is None or failed.retry_at_s is not None):
            return None
        return NotReady(self.name, self._reason())

    def _reason(self) -> str:
        failed = self._failed()
        if failed is not None:
            return str(failed.error)
        return self._fault or ("its model is loading" if self._wish else "it has just been created")


def _retried_now(failure: _Failure, now_s: float) -> _Failure:
    return _Failure(failure.wish, failure.error, failure.attempts, now_s)


def _failure(wish: _Wish, error: Exception, former: _Failure | None, now_s: float) -> _Failure:
    """What failed, and when to try again: soon for what may pass, never for a version that is broken."""
    # That there was no room says nothing of what failed when there was some: such a failure is the first of its kind.
    is_alike = former is not None and isinstance(former.error, NoRoom) == isinstance(error, NoRoom)
    attempts = 1 + (former.attempts if former and is_alike and wish.is_met_by(former.wish) else 0)
    may_pass = isinstance(error, TransientError | NoMemory | OSError) and not isinstance(error, FileNotFoundError)
    wait_s = _RETRY_S[min(attempts, len(_RETRY_S)) - 1]
    if isinstance(error, NoRoom):  # to ask whether a node has come costs little
        wait_s = min(wait_s, _ROOM_S)
    return _Failure(wish, error, attempts, now_s + wait_s if may_pass else None)
