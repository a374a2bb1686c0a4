"""A predictive model, served: requests wait in a queue, threads compute them in batches, and each gets its own rows.

The path of a request: `submit` (the caller's thread) → `BatchQueue` (the policy) → one backend call for the batch →
rows split back → future. An error stays with the request that causes it: a batch that raises is computed again one
request at a time, and only those that raise alone fail.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from sihe.core.clock import Clock, SystemClock
from sihe.core.errors import InternalError, UserError
from sihe.core.telemetry import logger
from sihe.serving.errors import EngineClosed, EngineDead, Expired, InferenceFailed, QueueFull
from sihe.serving.predictive.batching import Batch, BatchPolicy, BatchQueue, Item
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.ports import Backend, BatchStats, NoObserver, PredictorObserver
from sihe.serving.predictive.types import Array, InferenceRequest, InferenceResult, ModelDescription

_WARM_ROWS = 2  # enough to see whether outputs have a row for each row


@dataclass(frozen=True, slots=True)
class _Pending:
    item: Item
    request: InferenceRequest
    future: Future[InferenceResult]


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
        self._pending: dict[int, _Pending] = {}
        self._compute_s = 0.0  # moving mean of a batch
        self._closing = False
        self._abandon = False
        self._death: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"predictor {name} {index}", daemon=True)
            for index in range(config.instances)
        ]
        self._running = len(self._threads)
        atexit.register(self.close, drain=False)  # a daemon thread inside a library must not outlive the interpreter
        for thread in self._threads:
            thread.start()

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
        now_s = self._clock.monotonic_s()
        timeout_s = request.timeout_s
        if timeout_s is None and self.config.timeout_ms is not None:
            timeout_s = self.config.timeout_ms / 1000
        id = next(self._ids)
        item = Item(
            id=id,
            bucket=self._bucket(request, id),
            rows=_rows(request) if self.description.batched else self.config.max_batch_size,
            arrived_s=now_s,
            deadline_s=None if timeout_s is None else now_s + timeout_s,
            priority=request.priority,
        )
        future: Future[InferenceResult] = Future()
        with self._changed:
            self._check_open()
            self._check_queue()
            self._pending[id] = _Pending(item, request, future)
            self._queue.add(item)
            self._changed.notify()
            if item.deadline_s is not None:
                self._watch_deadline(item.deadline_s)
        future.add_done_callback(lambda done: self._forget(id) if done.cancelled() else None)
        return future

    def warm(self) -> None:
        """Answers one real request, so that the first user meets neither a cold library nor a broken model.

        A batched model is asked for two rows, and must give two of each output.
        """
        example = self._example
        if self.description.batched:
            example = {name: np.concatenate([array[:1]] * _WARM_ROWS) for name, array in example.items()}
        self.submit(InferenceRequest(example, self._all_outputs)).result()

    @property
    def version(self) -> str:
        """The version in `name` (`model@3`), as the protocol names it."""
        return self.name.rpartition("@")[2]

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return not self._closing and self._death is None

    @property
    def num_sequences(self) -> int:
        """Requests that wait or run."""
        return len(self._pending)

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more requests, ends the threads and frees the model. Safe to call again.

        With `drain` what waits is computed first, for at most `timeout_s`; what is left then, or at once without
        `drain`, ends with `EngineClosed`.
        """
        with self._changed:
            self._closing = True
            self._abandon |= not drain
            self._changed.notify_all()
            self._deadlines.notify()
        until_s = None if timeout_s is None else self._clock.monotonic_s() + timeout_s
        for thread in self._threads:
            thread.join(None if until_s is None else max(0.0, until_s - self._clock.monotonic_s()))
        with self._changed:
            self._abandon = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if self._alarm is not None:
            self._alarm.join()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def _bucket(self, request: InferenceRequest, id: int) -> object:
        if not self.description.batched:
            return id
        return tuple((name, array.shape[1:]) for name, array in sorted(request.inputs.items()))

    def _check_open(self) -> None:
        if self._death is not None:
            raise EngineDead(f"model {self.name} has stopped: {self._death}") from self._death
        if self._closing:
            raise EngineClosed(f"model {self.name} is closing and takes no new requests")

    def _check_queue(self) -> None:
        waiting = len(self._queue)
        if waiting >= self.config.max_waiting:
            self._observer.on_request("refused", None)
            batches = waiting / self.config.max_batch_size / self.config.instances
            raise QueueFull(waiting, retry_after_s=min(60.0, max(1.0, batches * self._compute_s)))

    def _forget(self, id: int) -> None:
        """The caller is gone: what still waits is not computed."""
        with self._changed:
            waited = self._queue.remove(id)
            if waited:
                self._pending.pop(id, None)
            self._changed.notify_all()
        if waited:
            self._observer.on_request("aborted", None)

    # ---- deadlines, while every computing thread is busy ------------------------------------------------------------

    def _watch_deadline(self, deadline_s: float) -> None:
        """Under the condition. The thread that watches is there from the first deadline on."""
        if deadline_s >= self._alarm_s:
            return
        self._alarm_s = deadline_s
        if self._alarm is None:
            self._alarm = threading.Thread(target=self._keep_deadlines, name=f"deadlines {self.name}", daemon=True)
            self._alarm.start()
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
                    if self._closing and earliest_s is None:
                        return
                    self._deadlines.wait(None if earliest_s is None else max(0.0, earliest_s - now_s))
            for pending in late:
                self._expire(pending)

    def _take_late(self, now_s: float) -> list[_Pending]:
        return [self._pending.pop(item.id) for item in self._queue.expire(now_s)]

    # ---- the computing threads --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as death:  # noqa: BLE001 - a dead thread must say so, whatever killed it
            self._log.error("predictor_died", error=repr(death), exc_info=death)
            with self._changed:
                self._death, self._closing, self._abandon = death, True, True
                self._changed.notify_all()
        with self._changed:
            self._running -= 1
            last = self._running == 0
        if last:
            self._end()

    def _turn(self) -> bool:
        """Waits for a batch and computes it; false when the threads are to end."""
        with self._changed:
            batch, expired = self._next()
            members = [self._pending[item.id] for item in batch.items] if batch else []
            if len(self._queue):
                self._changed.notify()  # another instance may find the next batch due
        for pending in expired:
            self._expire(pending)
        if members:
            self._compute(members)
        return bool(members or expired)

    def _next(self) -> tuple[Batch | None, list[_Pending]]:
        """Under the condition: blocks until a batch is due or deadlines have passed; nothing at all means the end."""
        while not self._abandon:
            now_s = self._clock.monotonic_s()
            late = self._take_late(now_s)
            # Nobody joins any more once it drains: what waits is due.
            batch = self._queue.take(float("inf") if self._closing else now_s, compute_s=self._compute_s)
            if batch or late or self._closing:
                return batch, late
            wake_s = self._queue.wake_s(compute_s=self._compute_s)
            self._changed.wait(None if wake_s is None else max(0.0, wake_s - now_s))
        return None, []

    def _compute(self, members: Sequence[_Pending]) -> None:
        running = [pending for pending in members if pending.future.set_running_or_notify_cancel()]
        started_s = self._clock.monotonic_s()
        if running:
            self._answer(running, started_s)
        with self._changed:
            for pending in members:
                self._pending.pop(pending.item.id, None)

    def _answer(self, members: Sequence[_Pending], began_s: float) -> None:
        """Computes them together; where that raises, each alone, so that only the culprits fail."""
        started_s = self._clock.monotonic_s()
        try:
            outputs = self._infer([pending.request for pending in members])
        except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to the requests in it
            if len(members) > 1:
                for pending in members:
                    self._answer([pending], began_s)
                return
            self._fail(members[0], error, began_s - members[0].item.arrived_s)
            return
        spent_s = self._clock.monotonic_s() - started_s
        rows = sum(_rows(pending.request) for pending in members) if self.description.batched else 1
        self._compute_s += 0.2 * (spent_s - self._compute_s) if self._compute_s else spent_s
        self._observer.on_batch(BatchStats(len(members), rows, spent_s, len(self._queue)))
        for pending, answer in zip(members, outputs, strict=True):
            queue_s = began_s - pending.item.arrived_s
            self._observer.on_request("ok", queue_s)
            pending.future.set_result(InferenceResult(answer, queue_s, spent_s, rows))

    def _infer(self, requests: Sequence[InferenceRequest]) -> list[dict[str, Array]]:
        """Each request's wanted outputs, from one call of the model (or several, for one request above the bound)."""
        backend = self._backend
        assert backend is not None, "freed only after the threads have ended"
        wanted = frozenset(name for request in requests for name in request.outputs)
        if not self.description.batched:
            (request,) = requests
            made = backend.run(request.inputs, wanted)
            return [{name: _made(made, name) for name in request.outputs}]
        names = requests[0].inputs
        inputs = {name: _joined([request.inputs[name] for request in requests]) for name in names}
        counts = [_rows(request) for request in requests]
        total, bound = sum(counts), self.config.max_batch_size
        parts = []
        for start in range(0, total, bound):
            rows = min(bound, total - start)
            part = backend.run({name: array[start : start + rows] for name, array in inputs.items()}, wanted)
            parts.append({name: _checked(part, name, rows) for name in wanted})
        joined = {name: _joined([part[name] for part in parts]) for name in wanted}
        answers, at = [], 0
        for request, rows in zip(requests, counts, strict=True):
            answers.append({name: joined[name][at : at + rows] for name in request.outputs})
            at += rows
        return answers

    def _fail(self, pending: _Pending, error: Exception, queue_s: float) -> None:
        if isinstance(error, UserError):
            self._observer.on_request("invalid", queue_s)
            pending.future.set_exception(error)
            return
        self._log.error("inference_failed", error=repr(error), exc_info=error)
        failure = InferenceFailed(f"the model failed on this request: {error}")
        failure.__cause__ = error
        self._observer.on_request("failed", queue_s)
        pending.future.set_exception(failure)

    def _expire(self, pending: _Pending) -> None:
        if not pending.future.set_running_or_notify_cancel():
            return
        self._observer.on_request("expired", None)
        waited_s = self._clock.monotonic_s() - pending.item.arrived_s
        pending.future.set_exception(Expired(waited_s))

    def _end(self) -> None:
        """The last thread's: tells who is left, and frees the model."""
        with self._changed:
            self._closing = True
            left, self._pending = list(self._pending.values()), {}
            for pending in left:
                self._queue.remove(pending.item.id)
            self._deadlines.notify()
        for pending in left:
            if not pending.future.done() and (
                pending.future.running() or pending.future.set_running_or_notify_cancel()
            ):
                self._observer.on_request("aborted", None)
                pending.future.set_exception(self._ending())
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()
        self._observer.on_close()
        atexit.unregister(self.close)

    def _ending(self) -> Exception:
        if self._death is None:
            return EngineClosed(f"model {self.name} was closed")
        error = EngineDead(f"model {self.name} has stopped: {self._death}")
        error.__cause__ = self._death
        return error


def _rows(request: InferenceRequest) -> int:
    return next(iter(request.inputs.values())).shape[0]


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _made(outputs: Mapping[str, Array], name: str) -> Array:
    if name not in outputs:
        raise InternalError(f"the model gave no output {name!r}: it gave {', '.join(outputs) or 'none'}")
    return outputs[name]


def _checked(outputs: Mapping[str, Array], name: str, rows: int) -> Array:
    array = _made(outputs, name)
    if array.ndim == 0 or array.shape[0] != rows:
        raise InternalError(
            f"for {rows} rows the model gave an output {name!r} of shape {list(array.shape)}: it does not treat rows "
            'apart, so describe it with  "batched": false'
        )
    return array
