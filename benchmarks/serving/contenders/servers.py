"""The servers that are measured over HTTP: ours (`sihe up`) and vLLM's, of which one at a time is awake."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.peers import HERE, python_of
from benchmarks.serving.contenders.pool import THREADS, ContenderFailed

MODEL = "bench"
CONTEXT = 2048
_START_TIMEOUT_S = 600.0


class Server:
    """A server in a process group of its own, asleep but within `awake`. `close` it when done."""

    def __init__(self, name: str, command: Sequence[str], *, port: int, log: Path, model: str = MODEL) -> None:
        self.name = name
        self.model = model
        self.url = f"http://127.0.0.1:{port}/v1"
        with log.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                list(command),
                cwd=HERE.parent,
                env=os.environ | _threads() | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            self._wait(log)
        except ContenderFailed:
            self.close()
            raise
        os.killpg(self._process.pid, signal.SIGSTOP)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """The server works within this block."""
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def close(self) -> None:
        """Ends it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait(self, log: Path) -> None:
        end_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                raise ContenderFailed(f"{self.name} ended while it started, see {log}")
            with (
                contextlib.suppress(OSError, urllib.error.URLError, ValueError),
                urllib.request.urlopen(f"{self.url}/models", timeout=5) as answer,
            ):
                if any(found["id"] == self.model for found in json.load(answer)["data"]):
                    return
            time.sleep(0.5)
        raise ContenderFailed(f"{self.name} was not ready within {_START_TIMEOUT_S:.0f} s, see {log}")


def ours(folder: Path, settings: Mapping[str, str | int], *, name: str, log: Path) -> Server:
    """`sihe up` with one deployment of the model in `folder`, in a home of its own that is made anew."""
    from sihe.core import settings as house
    from sihe.core.workspace import Workspace
    from sihe.serving.engine.config import EngineConfig
    from sihe.serving.gateway.gateway import Gateway

    home = folder.parent / f"home-{name.replace(' ', '-')}"
    shutil.rmtree(home, ignore_errors=True)
    with Workspace(house.load({"home": str(home)}, environ={}, directory=folder.parent)) as workspace:
        version = workspace.tracking.register_model(MODEL, folder)
        target = f"{MODEL}@{version.version}"
        Gateway(workspace).deploy(MODEL, target, settings=EngineConfig.from_mapping(dict(settings)))
    port = free_port()
    command = [sys.executable, "-m", "sihe", "--home", str(home), "up", "--port", str(port)]
    return Server(name, command, port=port, log=log)


def vllm(folder: Path, *, log: Path, precision: str = "bfloat16") -> Server:
    """`vllm serve` with its defaults, its prefix cache among them."""
    python = python_of("serving", "vllm")
    if python is None:
        raise ContenderFailed("vllm is not installed: make peers ROOM=serving")
    port = free_port()
    command = [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",  # `vllm serve` asks for a package called vllm, and this one is vllm-cpu
        "--model",
        str(folder),
        "--dtype",
        precision,
        "--max-model-len",
        str(CONTEXT),
        "--served-model-name",
        MODEL,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--disable-uvicorn-access-log",
    ]
    return Server(f"vllm {precision}", command, port=port, log=log)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _threads() -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(THREADS), "NUMBA_NUM_THREADS": str(THREADS)}
