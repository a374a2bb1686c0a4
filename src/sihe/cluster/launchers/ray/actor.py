"""What runs on a node beside each rank: an actor that starts the rank as its child, watches it and ends it.

The rank is a process of its own, not the actor: so it can be killed, stopped and asked for its stacks as on one
machine, its output goes to files, and the actor answers while the rank hangs. The rank dies with its actor, and the
actor with whoever supervises. Imports nothing heavy: torch is loaded only for the store that rank 0's actor hosts.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sihe.cluster.heartbeats import HEARTBEATS_FILE, HeartbeatBoard, Pulse
from sihe.cluster.launchers import stacks
from sihe.cluster.launchers.rank import LAUNCHER_PID
from sihe.cluster.launchers.ray.interface import interface_of
from sihe.version import __version__

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not listed in its stub

_BACKLOG = 4096  # ranks that connect to the store before torch has been imported
_LAST_S = 5.0  # for a process that was SIGKILLed to be gone


@dataclass(frozen=True)
class Place:
    """Where an actor runs, and what it found there."""

    node: str
    """Ray's identifier of the node."""
    address: str
    token: str | None
    """What the node reads in the file that every node must see; `None` when there is no such file."""
    version: str
    """Sihe's version on the node."""
    devices: tuple[str, ...]
    """Accelerators that Ray gave to this actor."""
    interface: str | None
    """The network interface that has the address, where it can be told."""


@dataclass(frozen=True)
class RankFiles:
    """Where a rank's output, errors and stacks go, on the storage that all nodes share."""

    output: Path
    log: Path
    stacks: Path


@dataclass(frozen=True)
class Look:
    """How a rank is: its exit code (`None` while it runs), its heartbeat and its process."""

    code: int | None
    pulse: Pulse
    is_stopped: bool
    state: str


class RankActor:
    """Starts, watches and ends one rank. Its methods run in threads: one that waits keeps no other from running."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_over = False
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self._scratch = tempfile.TemporaryDirectory(prefix="sihe-rank-")
        self._store: TCPStore | None = None
        self._rank = 0

    def place(self, token: Path) -> Place:
        """Where this actor runs; `token` is a file that its node must see."""
        import ray

        context = ray.get_runtime_context()
        text = None
        with suppress(OSError):
            text = token.read_text(encoding="utf-8")
        devices = tuple(context.get_accelerator_ids()["GPU"])
        address = ray.util.get_node_ip_address()
        return Place(context.get_node_id(), address, text, __version__, devices, interface_of(address))

    def open_store(self, address: str) -> int:
        """Opens the key-value store on which the ranks of this attempt meet, at this node's `address`; its port.

        The port is taken at once, and ranks may connect; they are answered when torch is there.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family, backlog=_BACKLOG)
        port: int = listener.getsockname()[1]
        threading.Thread(target=self._host_store, args=(listener, address, port), daemon=True).start()
        return port

    def begin(self, arguments: tuple[str, ...], env: dict[str, str], files: RankFiles) -> int:
        """Starts the rank; its process. `env` comes on top of the node's own variables. Raises `OSError`."""
        with self._lock:
            if self._is_over:
                raise InterruptedError("the rank was to end before it began")
            return self._begin(arguments, env, files)

    def look(self, wait_s: float) -> Look:
        """How the rank is after `wait_s` seconds, or as soon as it has ended."""
        self._ended.wait(wait_s)
        process = self._begun()
        pulse = self._board.read()[self._rank]
        return Look(process.returncode, pulse, stacks.is_stopped(process.pid), stacks.state_of(process.pid))

    def want_leave(self, wanted: bool) -> None:
        """Asks the rank to leave after the next checkpoint, or takes that back."""
        self._board.want_leave(wanted)

    def show_stacks(self) -> None:
        """Appends the state of the rank's process and, where it can answer, its stacks to its file."""
        stacks.collect({self._rank: self._begun().pid}, lambda _rank: self._files.stacks, time.sleep)

    def end(self, signum: int, grace_s: float) -> None:
        """Ends the rank, with `signum` and after `grace_s` with SIGKILL, and whatever it has started."""
        with self._lock:
            self._is_over = True
        if self._process is not None:
            if not self._ended.is_set():
                self._signal(signum)
            if not self._ended.wait(grace_s):
                self._signal(signal.SIGKILL)
                self._ended.wait(_LAST_S)
            self._signal(signal.SIGKILL)  # children of the rank
        self._scratch.cleanup()

    def _begin(self, arguments: tuple[str, ...], env: dict[str, str], files: RankFiles) -> int:
        beats = Path(self._scratch.name) / "heartbeats"
        self._rank, self._files = int(env["RANK"]), files
        self._board = HeartbeatBoard(beats, int(env["WORLD_SIZE"]))
        env = {**os.environ, **env, LAUNCHER_PID: str(os.getpid()), HEARTBEATS_FILE: str(beats)}
        started: Future[subprocess.Popen[bytes]] = Future()
        # The kernel tells a child of its parent's death when the *thread* ends that started it: this one outlives it.
        threading.Thread(target=self._keep, args=([sys.executable, *arguments], env, started), daemon=True).start()
        self._process = started.result()
        return self._process.pid

    def _begun(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "a rank is looked at after it began"
        return self._process

    def _signal(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._begun().pid, signum)

    def _keep(self, command: list[str], env: dict[str, str], started: Future[subprocess.Popen[bytes]]) -> None:
        try:
            with self._files.output.open("wb") as output, self._files.log.open("wb") as log:
                process = subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=log, start_new_session=True
                )
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(process)
        process.wait()
        self._ended.set()

    def _host_store(self, listener: socket.socket, address: str, port: int) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not listed in its stub

        self._store = TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
