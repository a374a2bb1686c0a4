"""Stage 4: the server as a process of its own, a streamed completion, and versions swapped under load."""

from __future__ import annotations

import ctypes
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sihe.cli.demo.journal import Figures
from sihe.cli.demo.pretraining import MODEL
from sihe.cli.demo.stage import Walk
from sihe.core.errors import InternalError, Unreachable

DEPLOYMENT, ALIAS = "demo", "production"
PROMPT = "import os\n\n\ndef "
STREAMS, MOVES = 8, 6


def serve(walk: Walk) -> Figures:
    """Deploys the early version, streams from it, then moves the alias to and fro under concurrent streams."""
    early, final = (
        int(str(walk.figure("evaluation", "early_version"))),
        int(str(walk.figure("evaluation", "final_version"))),
    )
    walk.workspace.tracking.set_alias(MODEL, ALIAS, early)
    with _server(walk) as url, _client(url) as client:
        _post(client, "/api/deployments", {"name": DEPLOYMENT, "target": f"{MODEL}@{ALIAS}"})
        _wait_for(client, early)
        walk.screen.detail(f"deployment {DEPLOYMENT!r} serves version {early} at {url}/v1")
        first = _stream(client, max_tokens=64)
        _move(client, final)
        _wait_for(client, final)
        walk.screen.detail(f"version {final} continues {PROMPT.strip()!r}:")
        second = _stream(client, max_tokens=64, show=walk)
        load = _Load(url)
        with load:
            for number in range(MOVES):
                target = early if number % 2 == 0 else final
                _move(client, target)
                _wait_for(client, target)
                load.wait_for_answer_from(target)
                walk.screen.progress(f"{number + 1}/{MOVES} swaps, {len(load.answers)} answers")
    if load.failures:
        raise InternalError(f"{len(load.failures)} requests failed during the swaps: {load.failures[0]}")
    mixed = sum(answer.version is None for answer in load.answers)
    if mixed:
        raise InternalError(f"{mixed} answers came from two versions")
    by_version = {version: sum(answer.version == version for answer in load.answers) for version in (early, final)}
    walk.screen.detail(
        f"{MOVES} swaps under {STREAMS} streams: {len(load.answers)} answers, none failed, each from one version "
        f"({', '.join(f'version {version}: {count}' for version, count in by_version.items())})"
    )
    return {
        "ttft_ms": 1000 * second.ttft_s,
        "tokens_per_s": second.tokens / max(second.seconds - second.ttft_s, 1e-9),
        "text": second.text,
        "early_text": first.text,
        "answers": len(load.answers),
        "failed": 0,
        "swaps": MOVES,
        "streams": STREAMS,
        "load_tokens_per_s": load.tokens_per_s,
        "load_ttft_ms": 1000 * statistics.median(answer.ttft_s for answer in load.answers),
    }


@dataclass
class _Answer:
    """One streamed completion."""

    text: str = ""
    versions: set[str] = field(default_factory=set)
    tokens: int = 0
    ttft_s: float = 0.0
    seconds: float = 0.0

    @property
    def version(self) -> int | None:
        """The model version that it names; `None` when it names none, or two."""
        return int(next(iter(self.versions)).rpartition("@")[2]) if len(self.versions) == 1 else None


class _Load:
    """Streams that ask again and again until the block ends."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(STREAMS)]
        self.answers: list[_Answer] = []
        self.failures: list[str] = []
        self.tokens_per_s = 0.0

    def __enter__(self) -> _Load:
        self._started_s = time.perf_counter()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        seconds = time.perf_counter() - self._started_s
        self.tokens_per_s = sum(answer.tokens for answer in self.answers) / seconds

    def wait_for_answer_from(self, version: int) -> None:
        """Until one more answer has come from `version`, so that every swap is seen by a caller."""
        known, deadline = len(self.answers), time.monotonic() + 60
        while not any(answer.version == version for answer in self.answers[known:]):
            if self.failures or time.monotonic() > deadline:
                reason = self.failures[0] if self.failures else "a time-out"
                raise Unreachable(self._url, f"no answer from version {version} after its swap: {reason}")
            time.sleep(0.02)

    def _ask(self) -> None:
        with _client(self._url) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(_stream(client, max_tokens=24))
                except Exception as error:  # noqa: BLE001 - any failure is what this counts
                    self.failures.append(repr(error))
                    return


@contextmanager
def _server(walk: Walk) -> Iterator[str]:
    """`sihe up` on a free port; it dies with this process, however that ends."""
    log = walk.workspace.path("demo", "server.log")
    command = [sys.executable, "-m", "sihe", "--home", str(walk.workspace.home), "up", "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=_die_with_parent
        )
    try:
        yield _address(process, str(log))
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[str], log: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("console"):
            return line.split()[1]
    raise Unreachable("the demo's server", f"it ended with code {process.wait()}, see {log}")


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _client(url: str) -> Any:
    import httpx

    return httpx.Client(base_url=url, timeout=120)


def _post(client: Any, path: str, body: dict[str, Any]) -> None:
    response = client.post(path, json=body)
    if response.status_code >= 400:
        raise InternalError(f"POST {path} answered {response.status_code}: {response.text[:300]}")


def _move(client: Any, version: int) -> None:
    _post(client, f"/api/models/{MODEL}/aliases/{ALIAS}", {"version": version})


def _wait_for(client: Any, version: int) -> None:
    """Until the deployment answers with `version`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = next(item for item in client.get("/api/deployments").json() if item["name"] == DEPLOYMENT)
        if found["version"] == version:
            return
        if found["error"]:
            raise InternalError(f"deployment {DEPLOYMENT!r}: {found['error']}")
        time.sleep(0.05)
    raise InternalError(f"deployment {DEPLOYMENT!r} did not reach version {version} within a minute")


def _stream(client: Any, *, max_tokens: int, show: Walk | None = None) -> _Answer:
    """One completion, streamed as any OpenAI client reads it."""
    body = {"model": DEPLOYMENT, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0.8, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "seed": 1}
    answer, started = _Answer(), time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise InternalError(f"the server answered {response.status_code}: {response.read()[:300]!r}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise InternalError(f"the stream ended with {chunk['error']}")
            answer.versions.add(chunk["system_fingerprint"])
            if chunk.get("usage"):
                answer.tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                if choice["text"] and not answer.text:
                    answer.ttft_s = time.perf_counter() - started
                answer.text += choice["text"]
                if show is not None:
                    show.screen.write(choice["text"])
    answer.seconds = time.perf_counter() - started
    if show is not None:
        show.screen.write("\n")
    return answer
