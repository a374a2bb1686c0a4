"""/v1/embeddings and /v1/rerank over HTTP.

The event loop only parses and waits: tokenising and writing the answer happen on threads, and computing on the
encoder's own. A request whose replica is lost goes to another one. A client that goes away takes its texts out of the
queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request, Response

from sihe.core.ids import new_id
from sihe.serving.bodies import request_id
from sihe.serving.deadlines import Deadline, deadline_of
from sihe.serving.disconnect import CLIENT_GONE, in_time
from sihe.serving.encoding_protocol import EmbeddingsBody, RerankBody
from sihe.serving.engine.encoder.exchange import Encoding, EncodingAnswer
from sihe.serving.engine.encoder.types import EmbeddingRequest, Encoded, RerankRequest
from sihe.serving.errors import StreamClosed, WrongCapability
from sihe.serving.generation_api import ARM_HEADER, REQUEST_HEADER, SESSION_HEADER, VERSION_HEADER
from sihe.serving.protocol import parse
from sihe.serving.tenants import estimate
from sihe.serving.tenants.http import admit
from sihe.serving.tenants.usage import Outcome, Tally

if TYPE_CHECKING:
    from sihe.serving.engine.encoder.job import EncodeJob
    from sihe.serving.engine.encoder.ports import Encoder
    from sihe.serving.gateway.gateway import Gateway
    from sihe.serving.gateway.turn import Turn

_THREADS = 32  # that tokenise, write answers, and wait for replicas that are on their way (of these, at most 24)
ReadBody = Callable[[Request], Awaitable[bytes]]


def add_encoding(routes: APIRouter, gateway: Gateway, read_body: ReadBody) -> None:
    """Adds the two routes. The application installs the errors' form."""
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="encoding")

    @routes.post("/v1/embeddings", tags=["openai"], openapi_extra=_schema(EmbeddingsBody))
    async def create_embeddings(request: Request) -> Response:
        """Turns texts into vectors."""
        deadline = deadline_of(request.headers)
        body = parse(EmbeddingsBody, await read_body(request))
        return await _answered(request, gateway, threads, body, body.answer, deadline)

    @routes.post("/v1/rerank", tags=["rerank"], openapi_extra=_schema(RerankBody))
    async def rerank(request: Request) -> Response:
        """Scores documents against a query, the best first."""
        deadline = deadline_of(request.headers)
        body = parse(RerankBody, await read_body(request))
        write = partial(body.answer, new_id("rerank"))
        return await _answered(request, gateway, threads, body, write, deadline)


async def _answered(
    request: Request,
    gateway: Gateway,
    threads: ThreadPoolExecutor,
    body: EmbeddingsBody | RerankBody,
    write: Callable[[Encoded], bytes],
    deadline: Deadline | None,
) -> Response:
    cost = _tokens(body.to_request(""))
    admission = await admit(request, body.model, prompt_tokens=cost)
    tally: Tally | None = None
    outcome: Outcome = "failed"
    try:
        tenant = admission.caller.tenant.name
        id, session = request_id(request), body.user or request.headers.get(SESSION_HEADER)
        turn = gateway.turn(body.model, request_id=id, session=session, tenant=tenant, weight=float(cost))
        turn.deadline = deadline
        encoded = await _encoded(request, threads, turn, body.model, body.to_request(tenant))
        tally, outcome = Tally(requests=1, prompt_tokens=encoded.num_tokens), "completed"
        content = await asyncio.get_running_loop().run_in_executor(threads, write, encoded)
        named = {REQUEST_HEADER: id, VERSION_HEADER: encoded.served_by, ARM_HEADER: turn.arm}
        return Response(content, media_type="application/json", headers={**admission.headers, **named})
    except StreamClosed:
        outcome = "aborted"
        return Response(status_code=CLIENT_GONE)
    finally:
        admission.finish(tally, outcome)


async def _encoded(
    request: Request,
    threads: ThreadPoolExecutor,
    turn: Turn,
    name: str,
    wanted: EmbeddingRequest | RerankRequest,
) -> Encoded:
    """What the deployment makes of a request. Raises `StreamClosed` when the client has gone, and `DeadlineExceeded`:
    then what has not been computed is not any more."""
    question = Encoding(wanted)
    capability = question.kind

    def begin(served: object) -> EncodeJob:
        if turn.earliest is not None:
            turn.earliest.left_s(is_whole=True)
        has = getattr(served, "capability", "generation")
        if has != capability:
            raise WrongCapability(name, wanted=capability, has=has)
        turn.question = question
        return cast("Encoder", served).submit(wanted)

    try:
        while True:
            job = await asyncio.get_running_loop().run_in_executor(threads, turn.start, begin)
            with job:
                try:
                    encoded = await in_time(request.receive, asyncio.ensure_future(job.result_async()), turn.earliest)
                except StreamClosed:
                    raise
                except Exception as error:
                    if turn.failed(error):
                        continue
                    raise turn.shown(error) from error
            turn.finished(EncodingAnswer(encoded, capability))
            return encoded
    finally:
        turn.left()


def _tokens(request: EmbeddingRequest | RerankRequest) -> int:
    """About how many it costs, told before it is tokenised."""
    if isinstance(request, RerankRequest):
        query = estimate.of_text(request.query)
        return sum(query + estimate.of_text(document) for document in request.documents)
    return sum(estimate.of_text(item) if isinstance(item, str) else len(item) for item in request.inputs)


def _schema(kind: type[EmbeddingsBody] | type[RerankBody]) -> dict[str, Any]:
    """What the API's schema says of a body that is read by hand."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
