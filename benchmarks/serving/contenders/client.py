"""An open-loop client of OpenAI's completions: it sends when a request is due, however many are still under way.

Written on asyncio's streams, since it shares the processors with the server that it measures: a line of a stream costs
it some microseconds. The same client measures every server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.serving.contenders.workload import Arrival, Query

_LIMIT = 2**20


@dataclass(frozen=True)
class Outcome:
    """What became of one request; times are seconds. `error` is empty where every token came."""

    late_s: float
    ttft_s: float
    tpot_s: float
    tokens: int
    error: str = ""


async def send_all(
    url: str, model: str, arrivals: Sequence[Arrival], *, timeout_s: float, streamed: bool = True
) -> list[Outcome]:
    """Sends each when it is due and waits for all; `timeout_s` bounds each from when it is sent.

    An answer that is not `streamed` comes in one piece, so its first token comes with its last.
    """
    started_s = time.perf_counter()

    async def one(arrival: Arrival) -> Outcome:
        due_s = started_s + arrival.at_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        sent_s = time.perf_counter()
        try:
            outcome = await asyncio.wait_for(_ask(url, model, arrival.query, streamed), timeout_s)
        except (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError) as error:
            return Outcome(sent_s - due_s, 0.0, 0.0, 0, f"{type(error).__name__}: {error}")
        first_s, last_s, tokens = outcome
        # From when it was due, not from when this process came to send it: a late client hides no waiting.
        return Outcome(sent_s - due_s, first_s - due_s, (last_s - first_s) / max(1, tokens - 1), tokens)

    return list(await asyncio.gather(*(one(arrival) for arrival in arrivals)))


async def _ask(url: str, model: str, query: Query, streamed: bool) -> tuple[float, float, int]:
    """When the first and the last token came, and how many. Raises `ValueError` for an answer that is none."""
    target = urlsplit(url)
    wanted = {"model": model, "prompt": query.prompt, "max_tokens": query.tokens, "temperature": 0, "ignore_eos": True}
    if streamed:
        wanted |= {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(wanted).encode()
    reader, writer = await asyncio.open_connection(target.hostname, target.port, limit=_LIMIT)
    try:
        head = (
            f"POST {target.path}/completions HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = (await reader.readline()).decode()
        if " 200 " not in status:
            raise ValueError(f"{status.strip()}: {(await reader.read(2000)).decode(errors='replace')[-300:]}")
        first_s, last_s, usage = await (_events(reader) if streamed else _whole(reader))
    finally:
        writer.close()
    if usage.get("completion_tokens") != query.tokens:
        raise ValueError(f"expected {query.tokens} tokens, got {usage}")
    return first_s, last_s, query.tokens


async def _events(reader: asyncio.StreamReader) -> tuple[float, float, dict[str, int]]:
    first_s = last_s = 0.0
    usage: dict[str, int] = {}
    while line := await reader.readline():
        # Every event is one line here; the lengths of HTTP's chunks lie between them.
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            break
        now_s = time.perf_counter()
        if b'"choices":[]' in line:
            usage = json.loads(line[6:])["usage"]
            continue
        if b'"error"' in line[:24]:
            raise ValueError(line.decode(errors="replace")[:300])
        first_s, last_s = first_s or now_s, now_s
    return first_s, last_s, usage


async def _whole(reader: asyncio.StreamReader) -> tuple[float, float, dict[str, int]]:
    answer = await reader.read()
    now_s = time.perf_counter()
    return now_s, now_s, json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])["usage"]
