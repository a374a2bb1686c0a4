"""The endpoint that writes answers: OpenAI's protocol, and everything that a server can do wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sihe.apps.rag.endpoint import ChatEndpoint
from sihe.apps.rag.ports import Message
from sihe.core.errors import ConfigError, Unauthorized, Unreachable


class _Handler(BaseHTTPRequestHandler):
    status, body = 200, b""
    seen: list[tuple[str, str | None, dict[str, Any]]]

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.seen.append((self.path, self.headers.get("Authorization"), json.loads(self.rfile.read(length))))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[type[_Handler], str]]:
    handler = type("Handler", (_Handler,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield handler, f"http://127.0.0.1:{listening.server_port}/v1/"
        listening.shutdown()
        thread.join()


def test_the_endpoint_speaks_openais_protocol(server: tuple[type[_Handler], str]) -> None:
    handler, url = server
    handler.body = json.dumps({"choices": [{"message": {"content": "hello"}}]}).encode()
    endpoint = ChatEndpoint(url, "m", api_key="k")
    assert endpoint.complete([Message("user", "问")], max_tokens=7) == "hello"
    path, key, body = handler.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    assert body["messages"] == [{"role": "user", "content": "问"}]
    assert (body["model"], body["max_tokens"]) == ("m", 7)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (401, b"", Unauthorized),
        (404, b"no such model", ConfigError),
        (500, b"", Unreachable),
        (429, b"", Unreachable),
        (200, b"<html>", Unreachable),
        (200, b'{"choices": []}', Unreachable),
        (200, b"[]", Unreachable),
    ],
)
def test_what_an_endpoint_can_do_wrong(
    server: tuple[type[_Handler], str], status: int, body: bytes, error: type[Exception]
) -> None:
    handler, url = server
    handler.status, handler.body = status, body
    with pytest.raises(error):
        ChatEndpoint(url, "m").complete([Message("user", "q")], max_tokens=7)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "nonsense", "http://"])
def test_an_address_that_does_not_answer(url: str) -> None:
    with pytest.raises((Unreachable, ConfigError)):
        ChatEndpoint(url, "m", timeout_s=2).complete([Message("user", "q")], max_tokens=7)
