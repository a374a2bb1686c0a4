"""What runs on a node: an actor that holds one engine.

What the engine says is collected and taken by one long poll, whatever the number of streams: while a batch is on its
way, the next one gathers, and a token never waits for a call of its own. The poll is woken once a step.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
import threading
from dataclasses import dataclass, field
from getpass import getuser
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sihe.core.errors import ConfigError, NotFound
from sihe.core.storage import ObjectStore
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.ports import RequestStats, StepStats
from sihe.serving.engine.stream import GenerationStream, Wake, wake_readers
from sihe.serving.engine.types import GenerationEvent, GenerationRequest, join_events
from sihe.serving.errors import EngineClosed
from sihe.serving.gateway.replicas.carried import Carried
from sihe.version import __version__

if TYPE_CHECKING:
    from sihe.serving.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a version's files are: the URL of the object store, and their prefix in it."""

    store: str
    prefix: str

    def fetch(self) -> Path:
        """A folder of this node with the files. Raises `NotFound`, `Unreachable`, `ConfigError`."""
        key = sha256(f"{self.store}/{self.prefix}".encode()).hexdigest()[:24]
        cache = _own_folder() / key
        try:
            return ObjectStore(self.store).get_tree(self.prefix, cache)
        except NotFound as error:
            hint = "a node of the cluster does not see it: set objects.url to a store that all nodes reach, such as S3"
            raise NotFound("object", f"{self.store}/{self.prefix}", hint=hint) from error


def _own_folder() -> Path:
    """Where this node keeps models. Nobody else may have made it: who can write there chooses the weights."""
    folder = Path(tempfile.gettempdir()) / f"sihe-models-{getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{folder} on this node belongs to somebody else: remove it, or set TMPDIR there")
    folder.chmod(0o700)
    return folder


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Where an actor runs."""

    node: str
    address: str
    version: str
    """Sihe's version there."""
    pid: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What has happened since the last poll, in order. The engine `is_over` when nothing more will come."""

    events: list[tuple[int, GenerationEvent | Carried]]
    done: list[int]
    step: StepStats | None
    requests: list[RequestStats]
    is_over: bool


@dataclass(slots=True)
class _Outbox:
    """What the engine's thread puts in and the poll takes out."""

    events: list[tuple[int, GenerationEvent | Carried]] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    step: StepStats | None = None
    requests: list[RequestStats] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.events or self.done)


@dataclass(slots=True)
class _Open:
    """A request in the engine. It is done when it has left the engine *and* nothing more is to be said of it: the
    engine lets go of a request just before it says its last word."""

    stream: GenerationStream | None = None
    has_left: bool = False
    is_told: bool = False

    @property
    def is_done(self) -> bool:
        return self.has_left and self.is_told


class EngineActor:
    """One engine on a node of the cluster. Its methods run on one event loop; what blocks runs beside it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outbox = _Outbox()
        self._poll: Wake | None = None
        self._is_over = False
        self._engine: Engine | None = None
        self._open: dict[int, _Open] = {}

    async def node(self) -> NodeInfo:
        """Where this actor runs."""
        import ray

        return NodeInfo(
            ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), __version__, os.getpid()
        )

    async def load(self, files: ModelFiles, settings: dict[str, Any], name: str) -> Carried | None:
        """Brings the model into memory; what prevents it."""
        from sihe.serving.engine.engine import Engine

        def load() -> Engine:
            return Engine.load(files.fetch(), EngineConfig.from_mapping(settings), name=name, observer=self)

        try:
            self._engine = await asyncio.to_thread(load)
        except Exception as error:  # noqa: BLE001 - it is for the other side to judge
            return Carried.of(error)
        return None

    async def warm(self) -> Carried | None:
        """Answers one real request; what prevents it."""
        try:
            await asyncio.to_thread(self._loaded().warm)
        except Exception as error:  # noqa: BLE001 - it is for the other side to judge
            return Carried.of(error)
        return None

    async def submit(self, id: int, request: GenerationRequest) -> Carried | None:
        """Starts a request under the other side's `id`; what is wrong with it."""

        def relay(said: GenerationEvent | BaseException) -> Wake | None:
            return self._put(id, said)

        def submit() -> None:
            stream = self._loaded().submit(request, on_done=lambda: self._left(id), relay=relay)
            with self._lock:
                if id in self._open:
                    self._open[id].stream = stream

        with self._lock:
            self._open[id] = _Open()
        try:
            await asyncio.to_thread(submit)
        except Exception as error:  # noqa: BLE001 - it is for the other side to judge
            with self._lock:
                self._open.pop(id, None)
            return Carried.of(error)
        return None

    async def abort(self, id: int) -> None:
        """Ends a request that nobody reads."""
        with self._lock:
            entry = self._open.get(id)
            if entry is not None:
                entry.is_told = True
                self._note_done(id, entry)
        if entry is not None and entry.stream is not None:
            entry.stream.close()

    async def poll(self, wait_s: float) -> Batch:
        """What has happened: as soon as something has, or after `wait_s`."""
        loop = asyncio.get_running_loop()
        with self._lock:
            waiter = None if self._outbox or self._is_over else loop.create_future()
            self._poll = (loop, waiter) if waiter is not None else None
        if waiter is not None:
            await asyncio.wait([waiter], timeout=wait_s)
        with self._lock:
            outbox, self._outbox, self._poll = self._outbox, _Outbox(), None
            is_over = self._is_over
        return Batch(_joined(outbox.events), outbox.done, outbox.step, outbox.requests, is_over)

    async def close(self, drain: bool, timeout_s: float | None) -> None:
        """Ends the engine, after what it has begun or at once."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close, drain=drain, timeout_s=timeout_s)

    # ---- on the engine's thread (and as its observer) ---------------------------------------------------------------

    def on_step(self, stats: StepStats) -> None:
        """Keeps the newest."""
        with self._lock:
            self._outbox.step = stats

    def on_request(self, stats: RequestStats) -> None:
        """Keeps each."""
        with self._lock:
            self._outbox.requests.append(stats)

    def on_close(self) -> None:
        """The engine has ended, on purpose or not: all that it had to say is in the outbox."""
        with self._lock:
            self._is_over = True
            wake, self._poll = self._poll, None
        wake_readers([wake] if wake else [])

    def _put(self, id: int, said: GenerationEvent | BaseException) -> Wake | None:
        is_last = isinstance(said, BaseException) or said.finish_reason is not None
        with self._lock:
            self._outbox.events.append((id, Carried.of(said) if isinstance(said, BaseException) else said))
            entry = self._open.get(id)
            if entry is not None and is_last:
                entry.is_told = True
                self._note_done(id, entry)
            wake, self._poll = self._poll, None
        return wake

    def _left(self, id: int) -> None:
        with self._lock:
            entry = self._open.get(id)
            if entry is not None:
                entry.has_left = True
                self._note_done(id, entry)
            wake, self._poll = (self._poll, None) if self._outbox else (None, self._poll)
        wake_readers([wake] if wake else [])

    def _note_done(self, id: int, entry: _Open) -> None:
        if entry.is_done:
            self._outbox.done.append(id)
            del self._open[id]

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise EngineClosed("the actor has no engine (yet)")
        return self._engine


def _joined(said: list[tuple[int, GenerationEvent | Carried]]) -> list[tuple[int, GenerationEvent | Carried]]:
    """The same with each stream's events as one."""
    by_stream: dict[int, list[GenerationEvent]] = {}
    errors: list[tuple[int, GenerationEvent | Carried]] = []
    for id, item in said:
        if isinstance(item, Carried):
            errors.append((id, item))
        else:
            by_stream.setdefault(id, []).append(item)
    return [*((id, join_events(events)) for id, events in by_stream.items()), *errors]
