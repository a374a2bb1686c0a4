"""/v1/completions and /v1/chat/completions over HTTP.

The event loop only parses, waits and writes: tokenising and compiling constraints run on the thread pool, and
generating on the engine's own thread. A client that goes away aborts its generation; one that reads slowly delays
nobody, and one that does not read at all is let go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from sihe.core.ids import new_id
from sihe.core.telemetry import logger
from sihe.serving.bodies import read_body, request_id
from sihe.serving.choices import Choices
from sihe.serving.chunks import DONE, Answer, Kind, error_chunk, total
from sihe.serving.deadlines import Deadline, deadline_of
from sihe.serving.engine.seeds import fork_seed
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import Generation, GenerationRequest, Usage
from sihe.serving.errors import NotReady, StreamClosed
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.traffic.types import Sender
from sihe.serving.guarded import guarded, judge_prompts
from sihe.serving.ports import ContentGuard, GuardContext
from sihe.serving.protocol import ChatRequest, CompletionRequest, error_body, parse
from sihe.serving.tenants.access import Admission
from sihe.serving.tenants.http import access_of, caller_of
from sihe.serving.tenants.metering import start

VERSION_HEADER = "x-sihe-model-version"
ARM_HEADER = "x-sihe-arm"
SESSION_HEADER = "x-sihe-session"
REQUEST_HEADER = "x-request-id"
SEND_TIMEOUT_S = 60.0  # a client that takes nothing for so long is gone
_CLIENT_GONE = 499  # nginx's status for it; nobody reads the answer
_VERSION_TRIES = 4  # a request begins anew where its answers came from two versions: a swap lies between, and is rare
_log = logger("serving")
_Body = CompletionRequest | ChatRequest


def add_generation(routes: APIRouter, gateway: Gateway, guard: ContentGuard | None = None) -> None:
    """Adds the two routes. The application installs the errors' form; a `guard` judges prompts and answers."""

    @routes.post("/v1/completions", tags=["openai"], openapi_extra=_schema(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Completes prompts."""
        deadline = deadline_of(request.headers)
        body = parse(CompletionRequest, await read_body(request))
        return await _generate(request, gateway, guard, body, "text_completion", deadline)

    @routes.post("/v1/chat/completions", tags=["openai"], openapi_extra=_schema(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answers a conversation."""
        deadline = deadline_of(request.headers)
        body = parse(ChatRequest, await read_body(request))
        return await _generate(request, gateway, guard, body, "chat.completion", deadline)


async def _generate(
    request: Request,
    gateway: Gateway,
    guard: ContentGuard | None,
    body: _Body,
    kind: Kind,
    deadline: Deadline | None,
) -> Response:
    wanted = body.to_generations()
    context = GuardContext(caller_of(request).tenant.name, body.deployment)
    watch: asyncio.Task[None] | None = None
    choices = Choices(())
    began = False
    try:
        for tries_left in reversed(range(_VERSION_TRIES)):
            admission, streams = await run_in_threadpool(
                _start, request, gateway, body, wanted, guard, context, deadline
            )
            choices = Choices([guarded(stream, guard, context) for stream in streams])
            if watch is not None:
                watch.cancel()
            watch = asyncio.create_task(_close_when_gone(request.receive, choices))
            # An error before the first token still gets its own status.
            await choices.begin()
            if len(choices.served_by) == 1:
                break
            choices.close()
            if not tries_left:
                raise NotReady(body.model, "its version changes again and again")
        (served_by,) = choices.served_by
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        answer = Answer(kind, new_id(prefix), int(time.time()), body.model, served_by)
        headers = {
            REQUEST_HEADER: request_id(request),
            VERSION_HEADER: served_by,
            **({ARM_HEADER: choices.streams[0].arm} if choices.streams[0].arm else {}),
            **admission.headers,
        }
        if body.stream:
            began = True
            return _EventStream(_chunks(choices, answer, body, len(wanted)), choices, watch, headers)
        found = await choices.whole()
        content = answer.whole(_best(found, body), total(_by_prompt([item.usage for item in found], len(wanted))))
        return Response(content, media_type="application/json", headers=headers)
    except StreamClosed:
        return Response(status_code=_CLIENT_GONE)
    finally:
        if not began:
            if watch is not None:
                watch.cancel()
            choices.close()


def _start(
    request: Request,
    gateway: Gateway,
    body: _Body,
    wanted: list[GenerationRequest],
    guard: ContentGuard | None,
    context: GuardContext,
    deadline: Deadline | None,
) -> tuple[Admission, list[GenerationStream]]:
    """Begins every answer to every prompt, all or none; all of them are one request to the gateway."""
    count = body.num_candidates
    sender = Sender(request_id(request), body.user or request.headers.get(SESSION_HEADER))

    def begin(one: GenerationRequest) -> list[GenerationStream]:
        streams: list[GenerationStream] = []
        try:
            for index in range(count):
                seed = None if one.seed is None else fork_seed(one.seed, index)
                left_s = None if deadline is None else deadline.left_s()
                own = replace(one, seed=seed) if index else one
                streams.append(gateway.generate(body.deployment, own, sender, timeout_s=left_s))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    def judge() -> None:
        if guard is not None:
            judge_prompts(guard, wanted, context)

    return start(access_of(request), caller_of(request), body.deployment, wanted, begin, answers=count, judge=judge)


def _by_prompt(usages: list[Usage], prompts: int) -> list[list[Usage]]:
    count = len(usages) // prompts
    return [usages[at : at + count] for at in range(0, len(usages), count)]


def _best(found: list[Generation], body: _Body) -> list[Generation]:
    """Of the answers to each prompt those with the highest mean log-probability a token, if there are more than asked
    for."""
    wanted, count = body.num_choices, body.num_candidates
    if wanted == count:
        return found
    kept = []
    for at in range(0, len(found), count):
        kept += sorted(found[at : at + count], key=_mean_logprob, reverse=True)[:wanted]
    return kept if body.logprobs is not None else [replace(item, logprobs=()) for item in kept]


def _mean_logprob(generation: Generation) -> float:
    own = generation.logprobs[len(generation.logprobs) - len(generation.token_ids) :]  # without an echoed prompt's
    return sum(item.logprob or 0.0 for item in own) / max(1, len(own))


async def _chunks(choices: Choices, answer: Answer, body: _Body, prompts: int) -> AsyncIterator[bytes]:
    """The server-sent events of one answer."""
    usages = [Usage(0, 0)] * len(choices.streams)
    begun: set[int] = set()
    left = len(choices.streams)
    try:
        async for index, event in choices.events():
            data = answer.event(event, index)
            if index not in begun:
                begun.add(index)
                data = answer.first(index) + data
            if data:
                yield data
            usages[index] = event.usage
            left -= event.finish_reason is not None
    except Exception as error:  # noqa: BLE001 - the status has been sent: the error becomes an event
        _log.warning("stream_failed", error=repr(error))
        yield error_chunk(error_body(error)[1])
        return
    if not left:
        yield (answer.usage(total(_by_prompt(usages, prompts))) if body.include_usage else b"") + DONE


async def _close_when_gone(receive: Receive, choices: Choices) -> None:
    """Aborts the generation when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        continue
    choices.close()


class _EventStream(Response):
    """Sends chunks as they come, each in one write; ends the generation however the sending ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        choices: Choices,
        watch: asyncio.Task[None] | None,
        headers: Mapping[str, str],
    ) -> None:
        self._chunks = chunks
        self._choices = choices
        self._watch = watch
        self.status_code = 200
        self.background = None
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the stream to its end, the client's disconnect, or an error of the connection.

        The server's buffer is bounded: where the client does not read, a send waits, and events join meanwhile.
        """
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self._chunks:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            _log.warning("reader_gone", timeout_s=SEND_TIMEOUT_S)
            raise
        finally:
            if self._watch is not None:
                self._watch.cancel()
            self._choices.close()


def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    """What the API's schema says of a body that is read by hand."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
