"""Starts servers of OpenAI's protocol, or finds the one that runs, and waits until they answer.

A server that is started here ends with this process: it watches its parent, and is ended by its process group.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from sihe.core.errors import ConfigError, Unreachable
from sihe.core.tracking import ModelVersion
from sihe.core.workspace import Workspace
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.ports import EngineObserver
from sihe.serving.gateway.replicas.config import OpenAiBackend
from sihe.serving.gateway.replicas.openai.engine import OpenAiEngine
from sihe.serving.gateway.replicas.openai.places import BackendPlaces

_ASK_S = 0.25
_ANSWER_S = 3.0
_GRACE_S = 10.0
_TAIL = 2000  # characters of a server's log that its failure shows
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def load(
    workspace: Workspace,
    version: ModelVersion,
    settings: EngineConfig,
    backend: OpenAiBackend,
    observer: EngineObserver,
) -> OpenAiEngine:
    """A server of `version`, which answers. `settings` are an engine's of this house: the server has its own.

    Raises `ConfigError` for a command that cannot be run or ends and for a URL that the settings do not allow,
    `Unreachable` for a server that does not answer.
    """
    name = f"{version.name}@{version.version}"
    if settings != EngineConfig():
        raise ConfigError(
            "engine settings do not reach a server behind OpenAI's protocol: write them into backend.command",
            key="settings",
        )
    if backend.url is not None:
        BackendPlaces(workspace.settings.serving.backend_hosts).check(backend.url)
        url = backend.url.rstrip("/")
        _wait(url, None, _ANSWER_S)
        return OpenAiEngine(url, backend.model or name, name, observer)
    server = _Server(backend, workspace.tracking.download(version), name, workspace.path("serving", "servers"))
    try:
        _wait(server.url, server, backend.start_s)
        engine = OpenAiEngine(server.url, name, name, observer, release=server.end)
    except BaseException:
        server.end()
        raise
    server.on_exit(lambda code: engine.lose(f"ended with exit code {code}"))
    return engine


class _Server:
    """A server's process, in a session of its own."""

    def __init__(self, backend: OpenAiBackend, model: Path, name: str, logs: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        values = {"model": str(model), "port": str(port), "name": name}
        try:
            command = [part.format_map(values) for part in shlex.split(backend.command or "")]
        except (KeyError, ValueError, IndexError) as error:
            raise ConfigError(
                f"backend.command knows {{model}}, {{port}} and {{name}}, got {backend.command!r}",
                key="backend.command",
            ) from error
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"{name.replace('@', '-')}-{port}.log"
        self._process = self._start(command)

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.poll()

    def failure(self) -> ConfigError:
        """Why it ended, as far as its log says."""
        said = self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
        return ConfigError(
            f"the server ended with exit code {self.exit_code} (log: {self._log}): {said or 'it said nothing'}",
            key="backend.command",
        )

    def on_exit(self, call: Callable[[int], None]) -> None:
        """Calls `call` with the exit code when the process ends."""
        threading.Thread(target=lambda: call(self._process.wait()), name="server exit", daemon=True).start()

    def end(self) -> None:
        """Ends the process and all that it has started."""
        for signum, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
            try:
                os.killpg(self._process.pid, signum)
                self._process.wait(wait_s)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        started: list[subprocess.Popen[bytes] | Exception] = []
        ready = threading.Event()

        def keep() -> None:
            # The kernel tells a child of its parent's death when the *thread* ends that started it: this one stays.
            try:
                with self._log.open("wb") as log:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                    )
            except Exception as error:  # noqa: BLE001 - a command may be wrong in many ways; who waits is to hear of it
                started.append(error)
                ready.set()
                return
            started.append(process)
            ready.set()
            process.wait()

        threading.Thread(target=keep, name="server keeper", daemon=True).start()
        ready.wait()
        (outcome,) = started
        if isinstance(outcome, Exception):
            raise ConfigError(f"backend.command cannot be run: {outcome}", key="backend.command") from outcome
        return outcome


def _wait(url: str, server: _Server | None, limit_s: float) -> None:
    """Returns when the server lists its models. Raises `ConfigError`, `Unreachable`."""
    deadline_s = time.monotonic() + limit_s
    while True:
        if server is not None and server.exit_code is not None:
            raise server.failure()
        try:
            # A redirect is no answer: it could lead where the settings allow no backend.
            httpx.get(f"{url}/models", timeout=_ANSWER_S, follow_redirects=False).raise_for_status()
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
        else:
            return
        if time.monotonic() > deadline_s:
            raise Unreachable(url, f"no models within {limit_s:g} s ({reason})")
        time.sleep(_ASK_S)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
