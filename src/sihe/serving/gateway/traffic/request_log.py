"""A sample of requests and answers in a table of the lake, for evaluation; written beside their path, never in it.

Which requests are logged follows from their id alone, so that every process and every repetition chooses the same. A
record is put into a buffer of fixed length; a thread writes the buffer out in batches. When the disk is full, or the
buffer is, records are dropped and counted, and serving goes on. The same thread removes what has been kept for long
enough (`retention`).

Text is kept only where the deployment's policy says so. Otherwise a record has its length and a keyed hash, by which
equal texts are found equal, and which nobody without the home's key can guess texts by. Of models that do not generate
the text is the JSON of inputs and outputs, cut where they are large.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sihe.core.errors import NotFound
from sihe.core.files import write_file
from sihe.core.telemetry import logger
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.exchange import Answer, Question, Written
from sihe.serving.gateway.traffic import retention
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.wording import size_of, wording_of

if TYPE_CHECKING:
    import pyarrow as pa

    from sihe.data.lake.table import LakeTable

TABLE = "serving_requests"
KEY_FILE = "request-log.key"
_MAX_BUFFERED = 10_000
_MAX_BUFFERED_CHARACTERS = 64 * 2**20
_BATCH = 2_000
_EVERY_S = 15.0  # each batch is a commit and a file: fewer, larger ones read faster
# The table's log quotes the smallest and largest value of each column, which no removal of rows reaches: not of texts.
# And it forgets its entries after a week, as the rows of old versions are purged anyway.
_PROPERTIES = {
    "delta.dataSkippingStatsColumns": "time,deployment,arm,version",
    "delta.logRetentionDuration": "interval 7 days",
}
Fate = Literal["written", "dropped"]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One row. Times are seconds; `prompt` and `answer` are null unless the policy keeps text.

    Of a model that does not generate (`kind` is `infer`, `embeddings` or `rerank`) `prompt` and `answer` are JSON of
    what went in and came out, and the two lengths count characters of texts and bytes of tensors.
    A shadow's answer is a row of its own, with the request's id, the arm `shadow`, and how far it agreed.
    """

    time: datetime
    request_id: str
    deployment: str
    arm: str
    version: str
    tenant: str
    session: str
    kind: str
    prompt_tokens: int
    completion_tokens: int
    prompt_characters: int
    prompt_hash: str
    prompt: str | None
    answer_characters: int
    answer_hash: str
    answer: str | None
    temperature: float | None
    max_tokens: int | None
    ending: str
    finish_reason: str | None
    error: str | None
    ttft_s: float | None
    latency_s: float
    agreement: float | None


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A request that has ended, before its text is hashed or kept: that is the writer's work."""

    time: datetime
    request_id: str
    deployment: str
    arm: str
    version: str
    session: str | None
    request: GenerationRequest | Question
    outcome: Outcome
    keeps_text: bool
    agreement: float | None = None
    answer: Answer | None = None  # of a model that does not generate; others have it in their outcome

    @property
    def size(self) -> int:
        """About how many characters, or bytes, it holds."""
        return size_of(self.request, self.outcome, self.answer)


@dataclass(frozen=True, slots=True)
class _Tidying:
    keep_days: Mapping[str, int]
    now: datetime


class RequestLog:
    """Buffers records and writes them to the table `serving_requests` of the lake in `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        on_fate: Callable[[Fate, int], None] = lambda _fate, _number: None,
        every_s: float = _EVERY_S,
        max_buffered: int = _MAX_BUFFERED,
    ) -> None:
        self._folder = folder
        self._on_fate = on_fate
        self._every_s = every_s
        self._max_buffered = max_buffered
        self._log = logger("serving")
        self._changed = threading.Condition()
        self._buffer: deque[LogEntry] = deque()
        self._characters = 0
        self._key: bytes | None = None
        self._closing = False
        self._flushes = 0
        self._tidying: _Tidying | None = None
        self._tidied: datetime | None = None
        self._thread: threading.Thread | None = None

    def offer(self, entry: LogEntry) -> None:
        """Takes an entry, or drops it when the buffer is full. Returns at once."""
        size = entry.size
        with self._changed:
            fits = len(self._buffer) < self._max_buffered and self._characters + size <= _MAX_BUFFERED_CHARACTERS
            if fits and not self._closing:
                self._buffer.append(entry)
                self._characters += size
                self._begin()
                if self._is_due():
                    self._changed.notify_all()
                return
        self._on_fate("dropped", 1)

    def tidy(self, keep_days: Mapping[str, int], now: datetime) -> None:
        """Removes what has been kept long enough, by each deployment's `keep_days`; at most once an hour. Returns at
        once."""
        if self._tidied is not None and timedelta(0) <= now - self._tidied < retention.EVERY:
            return
        self._tidied = now
        if not (self._folder / TABLE / "_delta_log").is_dir():
            return  # nothing was ever logged here
        with self._changed:
            if not self._closing:
                self._tidying = _Tidying(dict(keep_days), now)
                self._begin()
                self._changed.notify_all()

    def flush(self) -> None:
        """Blocks until what was offered before is written, or dropped, and a `tidy` before is done."""
        with self._changed:
            if self._thread is None:
                return
            self._flushes += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._flushes == 0 or (not self._buffer and self._closing))

    def close(self) -> None:
        """Writes what is left and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _begin(self) -> None:
        """Under the condition: the thread is there from the first work on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
            self._thread.start()

    # ---- the writer's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._is_due, self._every_s)
                batch, self._buffer = list(self._buffer), deque()
                self._characters = 0
                tidying, self._tidying = self._tidying, None
                last, flushes = self._closing, self._flushes
            if batch:
                self._write(batch)
            if tidying is not None and not last:
                self._tidy(tidying)
            with self._changed:
                self._flushes -= flushes
                self._changed.notify_all()
                if last:
                    return

    def _is_due(self) -> bool:
        is_large = len(self._buffer) >= _BATCH or self._characters >= _MAX_BUFFERED_CHARACTERS // 2
        return self._closing or self._flushes > 0 or self._tidying is not None or is_large

    def _write(self, batch: list[LogEntry]) -> None:
        try:
            from sihe.data.lake.lake import Lake

            if self._key is None:
                self._key = _home_key(self._folder.parent / KEY_FILE)
            records = [record for entry in batch if (record := self._recorded(entry, self._key)) is not None]
            Lake(self._folder).table(TABLE).append(_table(records), properties=_PROPERTIES)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the lake, requests are answered
            self._log.warning("request_log_dropped", records=len(batch), error=repr(error))
            self._on_fate("dropped", len(batch))
        else:
            self._on_fate("written", len(records))
            if len(records) < len(batch):
                self._on_fate("dropped", len(batch) - len(records))

    def _recorded(self, entry: LogEntry, key: bytes) -> RequestRecord | None:
        try:
            return _record(entry, key)
        except Exception as error:  # noqa: BLE001 - what cannot be written down takes no others with it
            self._log.warning("request_not_recorded", request=entry.request_id, error=repr(error))
            return None

    def _tidy(self, tidying: _Tidying) -> None:
        try:
            if retention.remove_expired(self._folder, TABLE, tidying.keep_days, tidying.now):
                self._log.info("request_log_tidied", until=tidying.now.isoformat())
        except Exception as error:  # noqa: BLE001 - as above; it is tried again in an hour
            self._log.warning("request_log_not_tidied", error=repr(error))


def _record(entry: LogEntry, key: bytes) -> RequestRecord:
    outcome, said = entry.outcome, wording_of(entry.request, entry.outcome, entry.answer)
    return RequestRecord(
        time=entry.time,
        request_id=entry.request_id,
        deployment=entry.deployment,
        arm=entry.arm,
        version=entry.version,
        tenant=entry.request.tenant,
        session=_hash(Written.of(entry.session).whole, key) if entry.session else "",
        kind=said.kind,
        prompt_tokens=outcome.prompt_tokens,
        completion_tokens=outcome.completion_tokens,
        prompt_characters=said.prompt.size,
        prompt_hash=_hash(said.prompt.whole, key),
        prompt=_storable(said.prompt.text) if entry.keeps_text else None,
        answer_characters=said.answer.size,
        answer_hash=_hash(said.answer.whole, key),
        answer=_storable(said.answer.text) if entry.keeps_text else None,
        temperature=said.temperature,
        max_tokens=said.max_tokens,
        ending=outcome.ending,
        finish_reason=outcome.finish_reason,
        error=_storable(outcome.error[:500]) if outcome.error else None,
        ttft_s=outcome.ttft_s,
        latency_s=outcome.latency_s,
        agreement=entry.agreement,
    )


def _hash(whole: Sequence[bytes], key: bytes) -> str:
    """What stands for a text that is not kept."""
    found = hashlib.blake2b(key=key, digest_size=16)
    for part in whole:
        found.update(part)
    return found.hexdigest()


def _storable(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON may bring and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def read(
    folder: Path, *, deployment: str | None = None, arm: str | None = None, limit: int | None = 100
) -> list[RequestRecord]:
    """Logged requests, newest first; none where nothing was logged yet.

    With a limit only the times of all rows are read, and the rest of those that are shown: a table that has grown for
    months holds more text than there is memory.
    """
    import pyarrow.compute as pc

    from sihe.data.lake.lake import Lake

    conditions = [
        f"{column} = {retention.quoted(value)}"
        for column, value in (("deployment", deployment), ("arm", arm))
        if value is not None
    ]
    table: LakeTable = Lake(folder).table(TABLE)
    try:
        if limit is not None:
            times = table.read(columns=["time"], where=" AND ".join(conditions) or None)["time"]
            if len(times) > limit:
                oldest = pc.select_k_unstable(times, limit, [("", "descending")])[-1].as_py()
                conditions.append(f"time >= {retention.moment(times[oldest].as_py())}")
        rows = table.read(where=" AND ".join(conditions) or None)
    except NotFound:
        return []
    order = pc.sort_indices(rows, sort_keys=[("time", "descending"), ("request_id", "descending")])
    found: pa.Table = rows.take(order[:limit] if limit is not None else order)
    names = [item.name for item in fields(RequestRecord)]
    return [RequestRecord(**{name: row[name] for name in names}) for row in found.to_pylist()]


def _table(batch: list[RequestRecord]) -> pa.Table:
    import pyarrow as pa

    kinds: dict[str, Any] = {
        "datetime": pa.timestamp("us", tz="UTC"),
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
    }
    schema = pa.schema([(item.name, kinds[str(item.type).removesuffix(" | None")]) for item in fields(RequestRecord)])
    columns = {name: [getattr(record, name) for record in batch] for name in schema.names}
    return pa.table(columns, schema=schema)


def _home_key(path: Path) -> bytes:
    """The key of this home's hashes, made when it is first needed."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        write_file(path, os.urandom(32))
        return path.read_bytes()
