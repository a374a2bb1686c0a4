"""A server of OpenAI's protocol as an engine: one event loop reads every stream of it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any

import httpx

from sihe.core.errors import InternalError, SiheError
from sihe.core.telemetry import logger
from sihe.serving.engine.ports import EngineObserver, Outcome, RequestStats
from sihe.serving.engine.stream import GenerationStream, Relay, wake_readers
from sihe.serving.engine.types import GenerationEvent, GenerationRequest, Usage
from sihe.serving.errors import EngineClosed, ReplicaLost
from sihe.serving.gateway.replicas.openai import bodies

_CONNECT_S = 5.0
_SILENT_S = 600.0  # between two pieces of an answer: it may wait in the server's queue
_WARM_TOKENS = 4


class _Job:
    """One request on its way."""

    def __init__(self, stream: GenerationStream, on_done: Callable[[], None] | None) -> None:
        self.stream = stream
        self.on_done = on_done
        self.task: asyncio.Task[None] | None = None
        self.started_s = time.monotonic()
        self.first_s: float | None = None
        self.usage = Usage(0, 0)
        self.outcome: Outcome = "failed"


class OpenAiEngine:
    """A `ReplicaEngine` at `url` (its `/v1`). `release` is called once, when it has been closed or found dead."""

    def __init__(
        self,
        url: str,
        model: str,
        name: str,
        observer: EngineObserver,
        *,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._model = model
        self._observer = observer
        self._release = release
        self._log = logger("serving").bind(engine=name)
        self._ids = count()
        self._changed = threading.Condition()
        self._jobs: dict[int, _Job] = {}
        self._closing = False
        self._loss: str | None = None
        self._released = False
        self._loop = asyncio.new_event_loop()
        timeout = httpx.Timeout(_SILENT_S, connect=_CONNECT_S, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, follow_redirects=False)
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"streams {name}", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return not self._closing and self._loss is None

    @property
    def num_sequences(self) -> int:
        """Requests that wait or run."""
        return len(self._jobs)

    def warm(self) -> None:
        """Has the server answer one real request. Raises what prevents it."""
        request = GenerationRequest(prompt="1", max_tokens=_WARM_TOKENS, temperature=0)
        self.submit(request).result()

    def submit(
        self, request: GenerationRequest, *, on_done: Callable[[], None] | None = None, relay: Relay | None = None
    ) -> GenerationStream:
        """Starts a request. What the server says against it comes as the stream's error."""
        body = bodies.body_of(request, self._model)
        id = next(self._ids)
        job = _Job(GenerationStream(id, self.name, abort=self._abort, relay=relay), on_done)
        with self._changed:
            if self._loss is not None:
                raise ReplicaLost(self._loss)
            if self._closing:
                raise EngineClosed(f"engine {self.name} is closing and takes no new requests")
            self._jobs[id] = job
            # Under the lock: a close must not cancel it before there is a task, and then wait for all of it.
            self._loop.call_soon_threadsafe(self._begin, id, bodies.path_of(request), body)
        return job.stream

    def lose(self, how: str) -> None:
        """The server is gone: no request goes there any more."""
        with self._changed:
            is_news = self._loss is None and not self._closing
            self._loss = self._loss or f"the replica of {self.name} {how}"
        if is_news:
            self._log.warning("replica_lost", error=self._loss)
            self._observer.on_close()

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more requests; ends what has begun after at most `timeout_s`, or at once. Safe to call again."""
        with self._changed:
            first, self._closing = not self._closing, True
            if drain and self._loss is None:
                self._changed.wait_for(lambda: not self._jobs, timeout_s)
            left = list(self._jobs)
        for id in left:
            self._loop.call_soon_threadsafe(self._cancel, id)
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)
            released, self._released = self._released, True
        if released:
            return
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._release()
        if first and self._loss is None:
            self._observer.on_close()

    # ---- on the loop ------------------------------------------------------------------------------------------------

    def _begin(self, id: int, path: str, body: dict[str, Any]) -> None:
        job = self._jobs.get(id)
        if job is not None:
            job.task = self._loop.create_task(self._run(job, path, body))
            # Not in the task: one that is cancelled before its first step runs no line of its own.
            job.task.add_done_callback(lambda task: self._end(id, job, task))

    def _cancel(self, id: int) -> None:
        job = self._jobs.get(id)
        if job is not None and job.task is not None:
            job.task.cancel()

    def _abort(self, id: int) -> None:
        if id in self._jobs:
            self._loop.call_soon_threadsafe(self._cancel, id)

    async def _run(self, job: _Job, path: str, body: dict[str, Any]) -> None:
        try:
            await self._answer(job, path, body)
        except httpx.ConnectError as error:
            self.lose(f"does not accept connections ({error or type(error).__name__})")
            self._fail(job, ReplicaLost(str(self._loss)))
        except httpx.HTTPError as error:
            self._fail(job, ReplicaLost(f"the server of {self.name} broke off: {error or type(error).__name__}"))
        except SiheError as error:
            self._fail(job, error)
        except Exception as error:  # noqa: BLE001 - a server may say anything; it is this request's error
            self._fail(job, InternalError(f"the server of {self.name} speaks no OpenAI protocol: {error!r}"))

    async def _answer(self, job: _Job, path: str, body: dict[str, Any]) -> None:
        async with self._client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                data = await response.aread()
                retry_after = response.headers.get("retry-after")
                raise bodies.error_of(response.status_code, data, retry_after, name=self.name, waiting=len(self._jobs))
            last: GenerationEvent | None = None  # held until the usage behind it has come
            async for chunk in _chunks(response):
                if "error" in chunk:
                    raise ReplicaLost(f"the server of {self.name} broke off: {chunk['error']}")
                event = self._event(job, chunk)
                if event.finish_reason is not None:
                    last = event
                elif last is None and (event.text or event.logprobs or event.tool_calls):
                    self._deliver(job, event)
            if last is None:
                raise ReplicaLost(f"the server of {self.name} broke off in the middle of an answer")
            job.outcome = last.finish_reason or "stop"
            self._deliver(job, _with_usage(last, job.usage))

    def _event(self, job: _Job, chunk: dict[str, Any]) -> GenerationEvent:
        choice = bodies.choice_of(chunk)
        text, logprobs, calls = bodies.text_of(choice), bodies.logprobs_of(choice), bodies.tool_calls_of(choice)
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            job.usage = Usage(int(usage["prompt_tokens"]), int(usage["completion_tokens"]), int(cached))
        elif text or logprobs or calls:  # until the server says: a chunk is about a token
            tokens = max(1, len(logprobs))
            job.usage = Usage(job.usage.prompt_tokens, job.usage.completion_tokens + tokens)
        return GenerationEvent(text, (), job.usage, bodies.finish_of(choice), logprobs, calls)

    def _deliver(self, job: _Job, event: GenerationEvent) -> None:
        if job.first_s is None:
            job.first_s = time.monotonic()
        wake = job.stream.deliver(event)
        wake_readers([wake] if wake else [])

    def _fail(self, job: _Job, error: Exception) -> None:
        wake = job.stream.fail(error)
        wake_readers([wake] if wake else [])

    def _end(self, id: int, job: _Job, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            job.outcome = "aborted"
            self._fail(job, EngineClosed(f"engine {self.name} was closed"))
        with self._changed:
            self._jobs.pop(id, None)
            self._changed.notify_all()
        now_s, tokens = time.monotonic(), job.usage.completion_tokens
        first_s = job.first_s
        self._observer.on_request(
            RequestStats(
                outcome=job.outcome,
                prompt_tokens=job.usage.prompt_tokens,
                completion_tokens=tokens,
                cached_tokens=job.usage.cached_tokens,
                queue_s=None,
                ttft_s=None if first_s is None else first_s - job.started_s,
                tpot_s=None if first_s is None or tokens < 2 else (now_s - first_s) / (tokens - 1),
            )
        )
        if job.on_done is not None:
            job.on_done()


def _with_usage(event: GenerationEvent, usage: Usage) -> GenerationEvent:
    return GenerationEvent(event.text, event.token_ids, usage, event.finish_reason, event.logprobs, event.tool_calls)


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream of server-sent events."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield json.loads(data)
