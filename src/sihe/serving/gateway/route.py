"""A deployment's live side: the replica that gets new requests, and the thread that brings in the next one.

A swap in five moves: load the wanted version beside the serving one, warm it, flip the route, drain the old one, free
it. If loading or warming fails, or another version is wanted by then, the serving one was never touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sihe.core.clock import Clock
from sihe.core.errors import Busy, TransientError
from sihe.core.telemetry import logger
from sihe.core.tracking import ModelVersion
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import EngineClosed, EngineDead, NoMemory, NotReady
from sihe.serving.gateway.replica import Replica
from sihe.serving.gateway.types import Deployment, DeploymentState, DeploymentStatus

if TYPE_CHECKING:
    from sihe.serving.engine.engine import Engine

Loader = Callable[[ModelVersion, EngineConfig], "Engine"]
_MAX_DRAINING = 2  # old versions kept in memory for their last streams before the next one may load
_RETRY_S = (1.0, 2.0, 5.0, 15.0, 60.0)  # between attempts to load what may fit or arrive later


@dataclass(frozen=True, slots=True)
class _Wish:
    version: ModelVersion
    settings: EngineConfig

    def is_met_by(self, other: Replica | _Wish | None) -> bool:
        """Whether `other` is the same version with the same settings (aliases may differ)."""
        return other is not None and (other.version.key, other.settings) == (self.version.key, self.settings)


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

    def __init__(self, deployment: Deployment, load: Loader, *, clock: Clock) -> None:
        self.name = deployment.name
        self._deployment = deployment
        self._load = load
        self._clock = clock
        self._log = logger("serving").bind(deployment=self.name)
        self._changed = threading.Condition()
        self._wish: _Wish | None = None
        self._serving: Replica | None = None
        self._incoming: Replica | None = None
        self._draining: list[Replica] = []
        self._failure: _Failure | None = None
        self._fault: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"route {self.name}", daemon=True)
        self._thread.start()

    def aim(self, deployment: Deployment, version: ModelVersion) -> None:
        """Says which version is wanted now, with which settings."""
        with self._changed:
            self._deployment = deployment
            self._wish = _Wish(version, deployment.settings)
            self._fault = None
            self._changed.notify_all()

    def fault(self, deployment: Deployment, message: str) -> None:
        """Shows that what is wanted could not be found out. What serves goes on."""
        with self._changed:
            self._deployment = deployment
            self._fault = message

    def generate(self, request: GenerationRequest) -> GenerationStream:
        """Starts a request on the replica that serves at this moment. Raises `NotReady`, and what the engine raises."""
        while True:
            replica = self._serving
            if replica is None:
                raise NotReady(self.name, self._reason())
            try:
                return replica.generate(request)
            except EngineClosed:
                if replica is self._serving:  # else the route was flipped between the two lines: ask the new one
                    raise NotReady(self.name, "its engine is closed") from None
            except EngineDead as error:
                with self._changed:
                    self._changed.notify_all()  # bring in another
                raise NotReady(self.name, str(error)) from error

    @property
    def is_ready(self) -> bool:
        """Whether a replica would take a request at this moment. Asked for every request: takes no lock."""
        serving = self._serving
        return serving is not None and serving.is_serving

    def status(self) -> DeploymentStatus:
        """What is, as far as this process knows."""
        with self._changed:
            serving = self._serving if self._serving and self._serving.is_serving else None
            failed = self._failed()
            state = DeploymentState.PENDING
            if serving is not None:
                state = DeploymentState.READY
            elif failed is not None or (self._wish is None and self._fault is not None):
                state = DeploymentState.FAILED
            replicas = [replica for replica in (self._serving, self._incoming, *self._draining) if replica]
            return DeploymentStatus(
                name=self.name,
                target=self._deployment.target,
                state=state,
                version=serving.version.version if serving else None,
                wanted=self._wish.version.version if self._wish else None,
                error=str(failed.error) if failed else self._fault,
                replicas=tuple(replica.status() for replica in replicas),
                updated_at=self._deployment.updated_at,
                reported_at=None,
            )

    def wait_settled(self, timeout_s: float) -> None:
        """Blocks until what is wanted serves. Raises the error that prevents it, or `Busy` after `timeout_s`."""

        def settled() -> bool:
            return self._closing or self._is_met() or (self._failed() is not None and self._incoming is None)

        with self._changed:
            if not self._changed.wait_for(settled, timeout_s):
                raise Busy(f"deployment {self.name!r} was not ready within {timeout_s:.0f} s: {self._reason()}")
            if self._closing:
                raise NotReady(self.name, "it was removed")
            failed = self._failed()
            if failed is not None and not self._is_met():
                raise failed.error

    def close(self, *, drain: bool = True) -> None:
        """Stops following, and frees every replica: after their streams have ended, or at once without `drain`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            serving, self._serving = self._serving, None
            draining = list(self._draining)
        if serving is not None:
            serving.retire(drain=drain)
        if not drain:
            for replica in draining:
                replica.abandon()
        with self._changed:
            self._changed.wait_for(lambda: not self._draining)

    # ---- the route's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing and not self._has_work():
                    self._changed.wait(self._wait_s())
                wish = self._wish
                if self._closing or wish is None:
                    return
                replica = self._incoming = Replica(wish.version, wish.settings, self._notify)
            self._bring_in(wish, replica)

    def _bring_in(self, wish: _Wish, replica: Replica) -> None:
        self._log.info("version_loading", version=wish.version.version)
        try:
            replica.load(self._load)
            if self._still_wanted(wish):
                replica.warm()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a version, the one that serves goes on
            self._log.warning("version_failed", version=wish.version.version, error=repr(error))
            self._drop(replica, _failure(wish, error, self._failure, self._clock.monotonic_s()))
            return
        with self._changed:
            if not self._still_wanted(wish):
                flipped, old = False, None
            else:
                replica.open()
                flipped, old = True, self._serving
                self._serving, self._incoming, self._failure = replica, None, None
                if old is not None:
                    self._draining.append(old)
                self._changed.notify_all()
        if not flipped:
            self._drop(replica, None)
            return
        self._log.info("version_ready", version=wish.version.version)
        if old is not None:
            threading.Thread(target=self._drain, args=(old,), name=f"drain {self.name}", daemon=True).start()

    def _drop(self, replica: Replica, failure: _Failure | None) -> None:
        replica.retire(drain=False)
        with self._changed:
            self._incoming = None
            self._failure = failure
            self._changed.notify_all()

    def _drain(self, replica: Replica) -> None:
        try:
            replica.retire()
        finally:
            with self._changed:
                self._draining.remove(replica)
                self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _still_wanted(self, wish: _Wish) -> bool:
        with self._changed:
            return not self._closing and wish.is_met_by(self._wish)

    def _is_met(self) -> bool:
        """Whether what is wanted serves, its engine alive."""
        serving = self._serving
        return serving is not None and serving.is_serving and self._wish is not None and self._wish.is_met_by(serving)

    def _has_work(self) -> bool:
        if self._wish is None or self._is_met() or len(self._draining) >= _MAX_DRAINING:
            return False
        failed = self._failed()
        return failed is None or (failed.retry_at_s is not None and self._clock.monotonic_s() >= failed.retry_at_s)

    def _wait_s(self) -> float | None:
        failed = self._failed()
        if failed is None or failed.retry_at_s is None or len(self._draining) >= _MAX_DRAINING:
            return None
        return max(0.01, failed.retry_at_s - self._clock.monotonic_s())

    def _failed(self) -> _Failure | None:
        """The failure of what is wanted now; one of another version no longer matters."""
        return self._failure if self._failure and self._failure.wish.is_met_by(self._wish) else None

    def _reason(self) -> str:
        failed = self._failed()
        if failed is not None:
            return str(failed.error)
        return self._fault or ("its model is loading" if self._wish else "it has just been created")


def _failure(wish: _Wish, error: Exception, former: _Failure | None, now_s: float) -> _Failure:
    """What failed, and when to try again: soon for what may pass, never for a version that is broken."""
    attempts = 1 + (former.attempts if former and wish.is_met_by(former.wish) else 0)
    may_pass = isinstance(error, TransientError | NoMemory | OSError) and not isinstance(error, FileNotFoundError)
    wait_s = _RETRY_S[min(attempts, len(_RETRY_S)) - 1]
    return _Failure(wish, error, attempts, now_s + wait_s if may_pass else None)
