"""A predictive model, served: requests wait in a queue, threads compute them in batches, and each gets its own rows.

The path of a request: `submit` (the caller's thread) → `BatchQueue` (the policy) → one backend call for the batch →
rows split back → future. An error stays with the request that causes it: a batch that raises is computed again one
request at a time, and only those that raise alone fail. A request larger than a batch is computed in slices, between
which others have their turn.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path

import numpy as np

from sihe.core.clock import Clock, SystemClock
from sihe.core.errors import InvalidInput, UserError
from sihe.core.telemetry import logger
from sihe.serving.errors import Expired, InferenceFailed, QueueFull
from sihe.serving.lifetime import Lifetime
from sihe.serving.predictive.agreement import NEAR
from sihe.serving.predictive.batching import Batch, BatchPolicy, BatchQueue, Item
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.pending import Pending, joined, named, split
from sihe.serving.predictive.ports import Backend, BatchStats, NoObserver, PredictorObserver
from sihe.serving.predictive.types import Array, InferenceRequest, InferenceResult, ModelDescription

_LARGE_BYTES = 2**20  # of the inputs of a request, from which on it is asked how much memory they hold together
_MAX_WAITING_BYTES = 2**30


class Predictor:
    """One model, served. `submit` from any thread; `close` when done (or use it as a context manager).

    `name` is what answers were `served_by`; `example` is a request that the model can answer, for `warm`.
    """

    def __init__(
        self,
        backend: Backend,
        description: ModelDescription,
        config: PredictiveConfig,
        *,
        name: str,
        example: Mapping[str, Array],
        observer: PredictorObserver | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self.description = description
        self.config = config
        self._backend: Backend | None = backend
        self._example = example
        self._observer = observer or NoObserver()
        self._clock = clock or SystemClock()
        self._log = logger("serving").bind(predictor=name)
        self._ids = count()
        self._all_outputs = tuple(spec.name for spec in description.outputs)
        # Shared by callers and the computing threads, under the condition.
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._deadlines = threading.Condition(lock)
        self._alarm_s = float("inf")  # when the earliest deadline is looked at
        self._alarm: threading.Thread | None = None
        self._queue = BatchQueue(
            BatchPolicy(config.max_batch_size, config.max_delay_ms / 1000, adaptive=config.wait == "adaptive")
        )
        self._pending: dict[int, Pending] = {}
        self._compute_s = 0.0  # moving mean of a batch
        self._life = Lifetime(f"model {name}", self._changed)
        self._running = config.instances
        self._life.begin(
            [
                threading.Thread(target=self._run, name=f"predictor {name} {index}", daemon=True)
                for index in range(config.instances)
            ]
        )

    @classmethod
    def load(
        cls,
        model_folder: Path,
        config: PredictiveConfig | None = None,
        *,
        name: str | None = None,
        observer: PredictorObserver | None = None,
    ) -> Predictor:
        """The predictor of a model folder. Raises what is wrong with the folder."""
        from sihe.serving.predictive.folder import describe, example_of, open_backend

        config = config or PredictiveConfig()
        description = describe(model_folder)
        example = example_of(model_folder, description)
        backend = open_backend(model_folder, description, config)
        return cls(backend, description, config, name=name or model_folder.name, example=example, observer=observer)

    # ---- the caller's side ------------------------------------------------------------------------------------------

    def submit(self, request: InferenceRequest) -> Future[InferenceResult]:
        """Starts a request; its answer to come. Cancelling the future takes a waiting request out of the queue.

        The future raises `InferenceFailed`, `Expired`, or the model's `InvalidInput`. Raises `QueueFull`,
        `EngineClosed`, `EngineDead`.
        """
        timeout_s = request.timeout_s
        if timeout_s is None and self.config.timeout_ms is not None:
            timeout_s = self.config.timeout_ms / 1000
        id = next(self._ids)
        bound = self.config.max_batch_size
        rows = _rows(request) if self.description.batched else 1
        future: Future[InferenceResult] = Future()
        with self._changed:
            self._life.check_open()
            self._check_queue(request)
            now_s = self._clock.monotonic_s()  # in here, so that arrivals come in the order of their times
            item = Item(
                id=id,
                bucket=self._bucket(request, id),
                rows=min(rows, bound) if self.description.batched else bound,
                arrived_s=now_s,
                deadline_s=None if timeout_s is None else now_s + timeout_s,
                priority=request.priority,
            )
            self._pending[id] = Pending(item, request, future, rows, now_s, self.description.batched)
            self._queue.add(item)
            self._changed.notify()
            if item.deadline_s is not None:
                self._watch_deadline(item.deadline_s)
        future.add_done_callback(lambda done: self._forget(id) if done.cancelled() else None)
        return future

    def warm(self) -> None:
        """Answers real requests, so that the first user meets neither a cold library nor a broken model.

        A batched model is asked for two rows, and must give two of each output; and for the first of them alone, which
        must be answered as beside the other. Raises `InvalidInput` where it is not: rows of strangers would meet in a
        batch. Only outputs of floating-point numbers are looked at, and none of a model that answers at random.
        """
        if not self.description.batched:
            self._ask(self._example)
            return
        both = {name: np.concatenate([array[:1], array[-1:]]) for name, array in self._example.items()}
        first = {name: array[:1] for name, array in self._example.items()}
        together, alone, again = self._ask(both), self._ask(first), self._ask(first)
        for spec in self.description.outputs:
            near = NEAR.get(spec.datatype)
            if near is None or not _is_near(alone[spec.name], again[spec.name], near):
                continue
            if not _is_near(alone[spec.name], together[spec.name][:1], near):
                raise InvalidInput(
                    f"the model gives another {spec.name!r} for a row when another row is beside it: rows influence "
                    'each other, so describe it with  "batched": false'
                )

    def _ask(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return self.submit(InferenceRequest(inputs, self._all_outputs)).result().outputs

    @property
    def version(self) -> str:
        """The version in `name` (`model@3`), as the protocol names it."""
        return self.name.rpartition("@")[2]

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return self._life.is_open

    @property
    def num_sequences(self) -> int:
        """Requests that wait or run."""
        return len(self._pending)

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more requests, ends the threads and frees the model. Safe to call again.

        With `drain` what waits is computed first, for at most `timeout_s`; what is left then, or at once without
        `drain`, ends with `EngineClosed`.
        """
        self._life.close(drain=drain, timeout_s=timeout_s)

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def _bucket(self, request: InferenceRequest, id: int) -> object:
        if not self.description.batched:
            return id
        return tuple((name, array.shape[1:]) for name, array in sorted(request.inputs.items()))

    def _check_queue(self, request: InferenceRequest) -> None:
        """Under the condition. Raises `QueueFull` where too many wait, or large ones would fill the memory."""
        waiting, size_bytes = len(self._queue), _size_bytes(request)
        is_full = waiting >= self.config.max_waiting
        if size_bytes > _LARGE_BYTES and not is_full:
            held_bytes = sum(_size_bytes(pending.request) for pending in self._pending.values())
            is_full = waiting > 0 and held_bytes + size_bytes > _MAX_WAITING_BYTES
        if is_full:
            self._observer.on_request("refused", None)
            batches = waiting / self.config.max_batch_size / self.config.instances
            raise QueueFull(waiting, retry_after_s=min(60.0, max(1.0, batches * self._compute_s)))

    def _forget(self, id: int) -> None:
        """The caller is gone: what is not computed yet will not be."""
        with self._changed:
            self._queue.remove(id)
            self._pending.pop(id, None)
            self._changed.notify_all()
        self._observer.on_request("aborted", None)

    # ---- deadlines, while every computing thread is busy ------------------------------------------------------------

    def _watch_deadline(self, deadline_s: float) -> None:
        """Under the condition. The thread that watches is there from the first deadline on."""
        if deadline_s >= self._alarm_s:
            return
        self._alarm_s = deadline_s
        if self._alarm is None:
            self._alarm = threading.Thread(target=self._keep_deadlines, name=f"deadlines {self.name}", daemon=True)
            self._life.add(self._alarm)
        self._deadlines.notify()

    def _keep_deadlines(self) -> None:
        """Answers those who are too late, also while a long batch holds up the queue."""
        while True:
            with self._changed:
                now_s = self._clock.monotonic_s()
                late = self._take_late(now_s)
                earliest_s = self._queue.deadline_s()
                self._alarm_s = float("inf") if earliest_s is None else earliest_s
                if not late:
                    if self._life.is_closing and earliest_s is None:
                        return
                    self._deadlines.wait(_pause_s(earliest_s, now_s))
            for pending in late:
                self._expire(pending)

    def _take_late(self, now_s: float) -> list[Pending]:
        return [self._pending.pop(item.id) for item in self._queue.expire(now_s)]

    # ---- the computing threads --------------------------------------------------------------------------------------

    def _run(self) -> None:
        freed_s = -math.inf  # when this thread has ended its last batch
        try:
            while self._turn(freed_s):
                freed_s = self._clock.monotonic_s()
        except BaseException as death:  # noqa: BLE001 - a dead thread must say so, whatever killed it
            self._log.error("predictor_died", error=repr(death), exc_info=death)
            self._life.died(death)
        with self._changed:
            self._running -= 1
            last = self._running == 0
        if last:
            self._end()

    def _turn(self, freed_s: float) -> bool:
        """Waits for a batch and computes it; false when the threads are to end."""
        with self._changed:
            batch, expired = self._next(freed_s)
            members = [self._pending[item.id] for item in batch.items] if batch else []
            if len(self._queue):
                self._changed.notify()  # another instance may find the next batch due
        for pending in expired:
            self._expire(pending)
        if members:
            self._compute(members)
        return bool(members or expired)

    def _next(self, freed_s: float) -> tuple[Batch | None, list[Pending]]:
        """Under the condition: blocks until a batch is due or deadlines have passed; nothing at all means the end."""
        while not self._life.is_abandoned:
            now_s = self._clock.monotonic_s()
            late = self._take_late(now_s)
            # Nobody joins any more once it drains: what waits is due.
            until_s = math.inf if self._life.is_closing else now_s
            batch = self._queue.take(until_s, compute_s=self._compute_s, freed_s=freed_s)
            if batch or late or self._life.is_closing:
                return batch, late
            self._changed.wait(_pause_s(self._queue.wake_s(compute_s=self._compute_s, freed_s=freed_s), now_s))
        return None, []

    def _compute(self, members: Sequence[Pending]) -> None:
        # Only before its last slice does a request begin to run as far as its caller sees: until then it can be left.
        running = [
            pending
            for pending in members
            if (pending.future.set_running_or_notify_cancel() if pending.is_last_slice else not pending.future.done())
        ]
        if running:
            self._answer(running, self._clock.monotonic_s())
        with self._changed:
            now_s = self._clock.monotonic_s()
            for pending in members:
                id = pending.item.id
                if pending.is_computed or pending.future.done():
                    self._pending.pop(id, None)
                elif id in self._pending:  # else its caller has left it just now
                    self._queue.put_back(pending.next_slice(now_s))

    def _answer(self, members: Sequence[Pending], began_s: float) -> None:
        """Computes them together; where that raises, each alone, so that only the culprits fail."""
        started_s = self._clock.monotonic_s()
        for pending in members:
            if pending.began_s is None:
                pending.began_s = began_s
        try:
            outputs = self._infer(members)
        except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to the requests in it
            if len(members) > 1:
                for pending in members:
                    self._answer([pending], began_s)
                return
            self._fail(members[0], error)
            return
        spent_s = self._clock.monotonic_s() - started_s
        rows = sum(pending.slice_rows for pending in members)
        self._compute_s += 0.2 * (spent_s - self._compute_s) if self._compute_s else spent_s
        self._observer.on_batch(BatchStats(len(members), rows, spent_s, len(self._queue)))
        for pending, answer in zip(members, outputs, strict=True):
            pending.take(answer, spent_s)
            if pending.is_computed:
                self._deliver(pending, rows)

    def _deliver(self, pending: Pending, batch_rows: int) -> None:
        try:
            result = pending.result(batch_rows)
        except ValueError as error:  # outputs of its slices that do not fit together
            self._fail(pending, error)
            return
        self._observer.on_request("ok", pending.queue_s)
        pending.future.set_result(result)

    def _infer(self, members: Sequence[Pending]) -> list[dict[str, Array]]:
        """Each member's wanted outputs for its next slice, from one call of the model."""
        backend = self._backend
        assert backend is not None, "freed only after the threads have ended"
        wanted = frozenset(name for pending in members for name in pending.request.outputs)
        inputs = {name: joined([pending.inputs(name) for pending in members]) for name in members[0].request.inputs}
        made = backend.run(inputs, wanted)
        if self.description.batched:
            return split(made, members)
        (pending,) = members
        return [{name: named(made, name) for name in pending.request.outputs}]

    def _fail(self, pending: Pending, error: Exception) -> None:
        if not pending.future.running() and not pending.future.set_running_or_notify_cancel():
            return  # left between two slices
        if isinstance(error, UserError):
            self._observer.on_request("invalid", pending.queue_s)
            pending.future.set_exception(error)
            return
        self._log.error("inference_failed", error=repr(error), exc_info=error)
        failure = InferenceFailed(f"the model failed on this request: {error}")
        failure.__cause__ = error
        self._observer.on_request("failed", pending.queue_s)
        pending.future.set_exception(failure)

    def _expire(self, pending: Pending) -> None:
        if not pending.future.set_running_or_notify_cancel():
            return
        self._observer.on_request("expired", pending.queue_s)
        waited_s = self._clock.monotonic_s() - pending.arrived_s
        pending.future.set_exception(Expired(waited_s))

    def _end(self) -> None:
        """The last thread's: tells who is left, and frees the model."""
        with self._changed:
            self._life.is_closing = True
            left, self._pending = list(self._pending.values()), {}
            for pending in left:
                self._queue.remove(pending.item.id)
            self._deadlines.notify()
        for pending in left:
            if not pending.future.done() and (
                pending.future.running() or pending.future.set_running_or_notify_cancel()
            ):
                self._observer.on_request("aborted", None)
                pending.future.set_exception(self._life.ending())
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()
        self._observer.on_close()
        self._life.ended()


def _size_bytes(request: InferenceRequest) -> int:
    return sum(array.nbytes for array in request.inputs.values())


def _rows(request: InferenceRequest) -> int:
    return next(iter(request.inputs.values())).shape[0]


def _pause_s(until_s: float | None, now_s: float) -> float | None:
    """How long to wait; no longer than a lock can, whatever deadline somebody has sent."""
    return None if until_s is None else min(max(0.0, until_s - now_s), threading.TIMEOUT_MAX)


def _is_near(a: Array, b: Array, near: float) -> bool:
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=near, atol=near * 1e-2, equal_nan=True))
