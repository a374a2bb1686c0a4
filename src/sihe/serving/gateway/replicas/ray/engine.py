"""An engine in an actor, as this process sees it: a thread polls it, and tells a late answer from a lost node."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from sihe.core.telemetry import logger
from sihe.serving.engine.ports import EngineObserver
from sihe.serving.engine.stream import GenerationStream, Relay, wake_readers
from sihe.serving.engine.types import GenerationEvent, GenerationRequest
from sihe.serving.errors import EngineClosed, ReplicaLost
from sihe.serving.gateway.replicas.carried import Carried
from sihe.serving.gateway.replicas.ray.actor import Batch, NodeInfo

_POLL_S = 1.0  # after which an actor that has nothing to say answers all the same
_OVERDUE_S = 2.0  # an answer that takes so much longer: the node is asked whether it is there
_SILENT_S = 30.0  # after which an actor whose node answers, and that does not answer itself, is given up
_SUBMIT_S = 60.0
_CLOSE_S = 10.0  # for an actor to end, on top of what its streams may take


class RayEngine:
    """A `ReplicaEngine` in an actor. `is_lost` says whether a node is gone; `release` is called once, at the end."""

    def __init__(
        self,
        actor: Any,
        where: NodeInfo,
        name: str,
        observer: EngineObserver,
        *,
        is_lost: Callable[[str], bool],
        release: Callable[[], None],
    ) -> None:
        self.name = name
        self.where = where
        self._actor = actor
        self._observer = observer
        self._is_lost = is_lost
        self._release = release
        self._log = logger("serving").bind(engine=name, node=where.address)
        self._ids = count()
        self._lock = threading.Lock()
        self._closed = threading.Lock()
        self._streams: dict[int, tuple[GenerationStream, Callable[[], None] | None]] = {}
        self._closing = False
        self._loss: ReplicaLost | None = None
        self._released = False
        self._thread = threading.Thread(target=self._run, name=f"poll {name}", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return self._loss is None and not self._closing and self._thread.is_alive()

    @property
    def num_sequences(self) -> int:
        """Requests that wait or run."""
        return len(self._streams)

    def warm(self) -> None:
        """Has the actor answer one real request. Raises what prevents it."""
        self._check(self._ask(self._actor.warm.remote(), None))

    def submit(
        self, request: GenerationRequest, *, on_done: Callable[[], None] | None = None, relay: Relay | None = None
    ) -> GenerationStream:
        """Starts a request. Raises what the engine raises, and `ReplicaLost`."""
        id = next(self._ids)
        stream = GenerationStream(id, self.name, abort=self._abort, relay=relay)
        with self._lock:
            if self._loss is not None:
                raise ReplicaLost(str(self._loss))
            if self._closing:
                raise EngineClosed(f"engine {self.name} is closing and takes no new requests")
            self._streams[id] = (stream, on_done)
        try:
            self._check(self._ask(self._actor.submit.remote(id, request), _SUBMIT_S))
        except BaseException:
            with self._lock:
                is_told = self._streams.pop(id, None) is None
            if not is_told:
                raise
        return stream  # which has said it, where the replica was lost meanwhile

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more requests, ends the actor and frees its place. Safe to call again."""
        if not drain and not self._released and self._loss is None:
            with suppress(RayError):  # ends the patience of a call in another thread
                self._actor.close.remote(False, None)
        with self._closed:  # a second call waits for the first, and finds nothing to do
            if not self._released:
                self._close(drain, timeout_s)

    def _close(self, drain: bool, timeout_s: float | None) -> None:
        with self._lock:
            self._closing = True
        if self._loss is None:
            with suppress(RayError, ReplicaLost):
                limit_s = None if drain and timeout_s is None else _CLOSE_S + (timeout_s or 0.0 if drain else 0.0)
                self._ask(self._actor.close.remote(drain, timeout_s), limit_s)
        self._thread.join(_CLOSE_S)
        self._lose("was closed", EngineClosed)
        try:
            ray.kill(self._actor)
            self._thread.join()
        finally:  # the connection is given back also where the cluster has gone
            self._released = True
            self._release()

    # ---- the poll ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._loss is None:
                batch: Batch = self._ask(self._actor.poll.remote(_POLL_S), _SILENT_S)
                self._take(batch)
                if batch.is_over:
                    break
        except ReplicaLost as error:
            self._log.warning("replica_lost", error=str(error))
        finally:
            self._lose("has ended", EngineClosed if self._closing else ReplicaLost)
            self._observer.on_close()

    def _take(self, batch: Batch) -> None:
        wakes = []
        for id, said in batch.events:
            with self._lock:
                stream = self._streams.get(id, (None, None))[0]
            if stream is not None:
                wake = stream.deliver(said) if isinstance(said, GenerationEvent) else stream.fail(said.unpack())
                wakes += [wake] if wake else []
        wake_readers(wakes)
        for id in batch.done:
            self._done(id)
        if batch.step is not None:
            self._observer.on_step(batch.step)
        for stats in batch.requests:
            self._observer.on_request(stats)

    def _done(self, id: int) -> None:
        with self._lock:
            _, on_done = self._streams.pop(id, (None, None))
        if on_done is not None:
            on_done()

    def _abort(self, id: int) -> None:
        if self._loss is None:
            with suppress(RayError):
                self._actor.abort.remote(id)

    def _ask(self, reference: Any, limit_s: float | None) -> Any:
        """What the actor answers. Raises `ReplicaLost` when it, or its node, is gone or silent."""
        started_s = time.monotonic()
        while True:
            try:
                return ray.get(reference, timeout=_POLL_S + _OVERDUE_S)
            except GetTimeoutError:
                waited_s = time.monotonic() - started_s
                if self._loss is not None:
                    raise ReplicaLost(str(self._loss)) from None
                if self._is_lost(self.where.node):
                    raise self._lose(f"was lost with its node {self.where.address}") from None
                if limit_s is not None and waited_s > limit_s:
                    raise self._lose(f"does not answer, on node {self.where.address}") from None
            except RayActorError as error:
                how = "with its node" if self._is_lost(self.where.node) else "when its process died, on node"
                raise self._lose(f"was lost {how} {self.where.address}") from error
            except RayError as error:
                raise self._lose(f"cannot be asked, on node {self.where.address}: {error}") from error

    def _lose(self, how: str, kind: type[EngineClosed] | type[ReplicaLost] = ReplicaLost) -> ReplicaLost:
        """Ends every stream; the error to raise."""
        with self._lock:
            if self._loss is None:
                self._loss = ReplicaLost(f"the replica of {self.name} {how}")
            loss = self._loss
            left, self._streams = list(self._streams.values()), {}
        error: EngineClosed | ReplicaLost = EngineClosed(str(loss)) if kind is EngineClosed else loss
        wakes = [stream.fail(error) for stream, _ in left]
        wake_readers([wake for wake in wakes if wake])
        for _, on_done in left:
            if on_done is not None:
                on_done()
        return ReplicaLost(str(loss))

    @staticmethod
    def _check(answer: Carried | None) -> None:
        if answer is not None:
            raise answer.unpack()
