"""/v1/embeddings and /v1/rerank over HTTP.

A request waits on a thread of its own for its replica, which may be another one when the first is lost; tokenising and
writing the answer happen there too, so that the event loop only parses and waits. A client that goes away takes its
texts out of the queue.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request, Response

from sihe.core.ids import new_id
from sihe.serving.encoding_protocol import EmbeddingsBody, RerankBody
from sihe.serving.engine.encoder.types import EmbeddingRequest, Encoded, RerankRequest
from sihe.serving.errors import StreamClosed, WrongCapability
from sihe.serving.protocol import parse
from sihe.serving.tenants import estimate
from sihe.serving.tenants.http import admit
from sihe.serving.tenants.usage import Outcome, Tally

if TYPE_CHECKING:
    from sihe.serving.engine.encoder.job import EncodeJob
    from sihe.serving.engine.encoder.ports import Encoder
    from sihe.serving.gateway.gateway import Gateway

VERSION_HEADER = "x-sihe-model-version"
_CLIENT_GONE = 499  # nginx's status for it; nobody reads the answer
_MAX_WAITING = 256  # threads; made when needed, and idle while they wait
ReadBody = Callable[[Request], Awaitable[bytes]]


def add_encoding(routes: APIRouter, gateway: Gateway, read_body: ReadBody) -> None:
    """Adds the two routes. The application installs the errors' form."""
    threads = ThreadPoolExecutor(_MAX_WAITING, thread_name_prefix="encoding")

    @routes.post("/v1/embeddings", tags=["openai"], openapi_extra=_schema(EmbeddingsBody))
    async def create_embeddings(request: Request) -> Response:
        """Turns texts into vectors."""
        body = parse(EmbeddingsBody, await read_body(request))
        return await _answered(request, gateway, threads, body, body.answer)

    @routes.post("/v1/rerank", tags=["rerank"], openapi_extra=_schema(RerankBody))
    async def rerank(request: Request) -> Response:
        """Scores documents against a query, the best first."""
        body = parse(RerankBody, await read_body(request))
        return await _answered(request, gateway, threads, body, lambda encoded: body.answer(new_id("rerank"), encoded))


class Ticket:
    """One request to an encoder, which another thread may close at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._job: EncodeJob | None = None
        self._closed = False

    def run(self, encoder: Encoder, request: EmbeddingRequest | RerankRequest) -> Encoded:
        """The answer. Blocks. Raises what the encoder raises, and `StreamClosed` once closed."""
        job = encoder.submit(request)
        with self._lock:
            self._job, closed = job, self._closed
        with job:
            if closed:
                job.close()
            return job.result()

    def close(self) -> None:
        """Takes the request back. Safe to call again."""
        with self._lock:
            self._closed, job = True, self._job
        if job is not None:
            job.close()


def encode(gateway: Gateway, name: str, request: EmbeddingRequest | RerankRequest, ticket: Ticket) -> Encoded:
    """What deployment `name` makes of a request. Blocks. Raises `NotFound`, `NotReady`, `WrongCapability`, and what is
    wrong with the request."""
    wanted = "rerank" if isinstance(request, RerankRequest) else "embeddings"

    def work(served: object) -> Encoded:
        has = getattr(served, "capability", "generation")
        if has != wanted:
            raise WrongCapability(name, wanted=wanted, has=has)
        return ticket.run(cast("Encoder", served), request)

    return gateway.route(name).call(work, weight=float(_tokens(request)))


async def _answered(
    request: Request,
    gateway: Gateway,
    threads: ThreadPoolExecutor,
    body: EmbeddingsBody | RerankBody,
    write: Callable[[Encoded], bytes],
) -> Response:
    wanted = body.to_request("")
    admission = await admit(request, body.model, prompt_tokens=_tokens(wanted))
    ticket, tally = Ticket(), None
    outcome: Outcome = "failed"

    def work() -> tuple[Encoded, bytes]:
        encoded = encode(gateway, body.model, body.to_request(admission.caller.tenant.name), ticket)
        return encoded, write(encoded)

    watch = asyncio.create_task(_close_when_gone(request, ticket))
    try:
        encoded, content = await asyncio.get_running_loop().run_in_executor(threads, work)
        tally, outcome = Tally(requests=1, prompt_tokens=encoded.num_tokens), "completed"
        headers = {**admission.headers, VERSION_HEADER: encoded.served_by}
        return Response(content, media_type="application/json", headers=headers)
    except StreamClosed:
        outcome = "aborted"
        return Response(status_code=_CLIENT_GONE)
    finally:
        watch.cancel()
        ticket.close()
        admission.finish(tally, outcome)


async def _close_when_gone(request: Request, ticket: Ticket) -> None:
    """Takes the request back when the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
    ticket.close()


def _tokens(request: EmbeddingRequest | RerankRequest) -> int:
    """About how many it costs, told before it is tokenised."""
    if isinstance(request, RerankRequest):
        query = estimate.of_text(request.query)
        return sum(query + estimate.of_text(document) for document in request.documents)
    return sum(estimate.of_text(item) if isinstance(item, str) else len(item) for item in request.inputs)


def _schema(kind: type[EmbeddingsBody] | type[RerankBody]) -> dict[str, Any]:
    """What the API's schema says of a body that is read by hand."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
