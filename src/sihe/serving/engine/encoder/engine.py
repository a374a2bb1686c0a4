"""The encoder: one thread that takes texts in, computes them in batches, and answers a request when its last is done.

The path of a request: `submit` (the caller's thread: tokens, limits, a job) → inbox → `FairQueue` → `EncoderRunner` →
job. Texts of all requests share the batches; an error stays with the request whose text causes it: a batch that raises
is computed again one text at a time.

In float32 a text's vector is the same alone and in any batch to within 1e-5: the library's matrix product may sum in
another order for another number of rows. In int8 it is the same bit for bit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from sihe.core.clock import Clock, SystemClock
from sihe.core.telemetry import logger
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder.batches import FairQueue, Place
from sihe.serving.engine.encoder.job import EncodeJob
from sihe.serving.engine.encoder.runner import EncoderRunner, check_vocabulary
from sihe.serving.engine.encoder.tokens import EncoderTokenizer
from sihe.serving.engine.encoder.types import (
    Capability,
    Document,
    EmbeddingRequest,
    Encoded,
    Floats,
    RerankRequest,
    invalid,
)
from sihe.serving.engine.ports import EngineObserver, NoObserver, Outcome, RequestStats, StepStats
from sihe.serving.errors import EncodingFailed, InputTooLong, QueueFull, WrongCapability
from sihe.serving.lifetime import Lifetime

EncodeRequest = EmbeddingRequest | RerankRequest
_CHARACTERS = 100  # of one token at most, as far as a text is looked at: real ones have 1 to 20


@dataclass(slots=True)
class _Request:
    """A request inside the encoder."""

    job: EncodeJob
    documents: Sequence[Document]
    parameter: str
    skipped: Sequence[int]  # tokens of each text that are not pooled
    dimensions: int | None
    tenant: str
    values: Floats
    remaining: int
    submitted_s: float
    on_done: Callable[[], None] | None
    begun_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(document.tokens) for document in self.documents)


class EncoderEngine:
    """Runs one embedding or reranking model. `submit` and `close` may be called from any thread."""

    def __init__(
        self,
        runner: EncoderRunner,
        tokenizer: EncoderTokenizer,
        config: EngineConfig | None = None,
        *,
        name: str = "encoder",
        observer: EngineObserver | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.name = name
        self.capability: Capability = runner.tail.capability
        self.width = runner.tail.width
        self.max_tokens = runner.max_tokens
        self.recipe = runner.recipe
        self._vocab_size = runner.trunk.config.vocab_size
        self._runner: EncoderRunner | None = runner
        self._observer = observer or NoObserver()
        self._clock = clock or SystemClock()
        self._log = logger("serving").bind(engine=name)
        self._queue = FairQueue()
        self._ids = count()
        self._mean_request_s = 1.0
        # Shared with callers, under the condition; everything else belongs to the encoder's thread.
        self._life = Lifetime(f"encoder {name}")
        self._changed = self._life.changed
        self._inbox: deque[tuple[int, _Request | None]] = deque()  # None: abort
        self._requests: dict[int, _Request] = {}
        self._life.begin([threading.Thread(target=self._run, name=f"encoder {name}", daemon=True)])

    @classmethod
    def load(
        cls,
        model_folder: Path,
        config: EngineConfig | None = None,
        *,
        name: str | None = None,
        observer: EngineObserver | None = None,
    ) -> EncoderEngine:
        """The encoder of a model folder. Raises what is wrong with the folder, or `NoMemory`."""
        config = config or EngineConfig()
        runner = EncoderRunner.load(model_folder, config)
        folder = runner.recipe.folder
        holder = folder if (folder / "tokenizer.json").is_file() else model_folder
        tokenizer = EncoderTokenizer.load(holder, lower_case=runner.recipe.lower_case)
        check_vocabulary(holder, tokenizer.vocab_size, runner.trunk.config.vocab_size)
        return cls(runner, tokenizer, config, name=name or model_folder.name, observer=observer)

    # ---- the caller's side ------------------------------------------------------------------------------------------

    def submit(self, request: EncodeRequest, *, on_done: Callable[[], None] | None = None) -> EncodeJob:
        """Starts a request; its job. `on_done` is called once, on the encoder's thread, when it has left.

        Raises `WrongCapability`, `InvalidRequest`, `InputTooLong`, `QueueFull`, `EngineClosed`, `EngineDead`.
        """
        with self._changed:
            self._check_room()  # before the work of tokenising, which a full engine would do in vain
        id = next(self._ids)
        found = self._read(request, EncodeJob(id, self._abort), on_done)
        with self._changed:
            self._check_room()
            self._requests[id] = found
            self._inbox.append((id, found))
            self._changed.notify()
        return found.job

    def warm(self) -> None:
        """Answers one real request, so that the first user meets neither a cold engine nor a broken model."""
        if self.capability == "rerank":
            self.submit(RerankRequest("a", ("b",))).result()
        else:
            self.submit(EmbeddingRequest(((0,),))).result()  # a token that every vocabulary has

    @property
    def is_alive(self) -> bool:
        """Whether the encoder takes requests."""
        return self._life.is_open

    @property
    def num_sequences(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more requests, ends the thread and frees the model. Safe to call again.

        With `drain` what has begun is finished first, for at most `timeout_s`; what is left then, or at once without
        `drain`, ends with `EngineClosed`.
        """
        self._life.close(drain=drain, timeout_s=timeout_s)

    def __enter__(self) -> EncoderEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def _read(self, request: EncodeRequest, job: EncodeJob, on_done: Callable[[], None] | None) -> _Request:
        if isinstance(request, RerankRequest):
            self._check_capability("rerank")
            documents = self._pairs(request)
            parameter, skipped, dimensions = "documents", [0] * len(documents), None
        else:
            self._check_capability("embeddings")
            if request.dimensions is not None and request.dimensions > self.width:
                reason = f"is at most {self.width}, the width of the model's vectors, got {request.dimensions}"
                raise invalid("dimensions", None, reason)
            prompt = self._prompt(request)
            documents = self._documents(request, prompt)
            of_prompt = self.tokenizer.prefix_length(prompt) if prompt and not self.recipe.pools_prompt else 0
            # Token ids are taken as they are: no prompt stands before them.
            skipped = [of_prompt if isinstance(item, str) else 0 for item in request.inputs]
            parameter, dimensions = "input", request.dimensions
        for index, document in enumerate(documents):
            if len(document.tokens) <= skipped[index]:
                raise invalid(parameter, index, "has no tokens: write something")
            if len(document.tokens) > self.max_tokens:
                raise InputTooLong(parameter, index, limit=self.max_tokens, actual=len(document.tokens))
        return _Request(
            job=job,
            documents=documents,
            parameter=parameter,
            skipped=skipped,
            dimensions=dimensions,
            tenant=request.tenant,
            values=np.empty((len(documents), self.width), np.float32),
            remaining=len(documents),
            submitted_s=self._clock.monotonic_s(),
            on_done=on_done,
        )

    def _pairs(self, request: RerankRequest) -> list[Document]:
        """The query is tokenised with each document, so one that is too long is found before that is done."""
        self._check_length("query", None, request.query)
        (query,) = self.tokenizer.texts([request.query], "query")
        if len(query.tokens) > self.max_tokens:
            raise InputTooLong("query", None, limit=self.max_tokens, actual=len(query.tokens))
        limit, texts = request.max_document_tokens, request.documents
        if limit is not None:
            most = min(limit, self.max_tokens) * _CHARACTERS
            texts = tuple(text[:most] for text in texts)
        for index, text in enumerate(texts):
            self._check_length("documents", index, text)
        return self.tokenizer.pairs(request.query, texts, limit)

    def _check_length(self, parameter: str, index: int | None, text: str) -> None:
        """Refuses what is longer than any text that fits: tokenising it would take more time and memory than all else.

        Raises `InvalidRequest`.
        """
        most = self.max_tokens * _CHARACTERS
        if len(text) > most:
            reason = f"has {len(text)} characters, and the model reads {self.max_tokens} tokens: at most {most}"
            raise invalid(parameter, index, reason)

    def _prompt(self, request: EmbeddingRequest) -> str:
        prompts = self.recipe.prompts
        name = request.prompt or self.recipe.default_prompt
        if name is None:
            return ""
        if name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            raise invalid("prompt_name", None, f"is one of the model's prompts ({known}), got {name!r}")
        return prompts[name]

    def _documents(self, request: EmbeddingRequest, prompt: str) -> list[Document]:
        for index, item in enumerate(request.inputs):
            if isinstance(item, str):
                self._check_length("input", index, item)
        texts = [prompt + item for item in request.inputs if isinstance(item, str)]
        encoded = iter(self.tokenizer.texts(texts, "input") if texts else ())
        documents = []
        for index, item in enumerate(request.inputs):
            if isinstance(item, str):
                documents.append(next(encoded))
                continue
            for token in item:
                if not 0 <= token < self._vocab_size:
                    raise invalid("input", index, f"has token ids of 0 to {self._vocab_size - 1}, got {token!r}")
            documents.append(Document(list(item)))
        return documents

    def _check_capability(self, wanted: Capability) -> None:
        if wanted != self.capability:
            raise WrongCapability(self.name, wanted=wanted, has=self.capability)

    def _check_room(self) -> None:
        """Under the condition. Raises unless the encoder takes one more request."""
        self._life.check_open()
        waiting = len(self._requests)
        if waiting >= self.config.max_waiting:
            raise QueueFull(waiting, retry_after_s=min(60.0, max(1.0, self._mean_request_s)))

    def _abort(self, id: int) -> None:
        with self._changed:
            if id in self._requests:
                self._inbox.append((id, None))
                self._changed.notify()

    # ---- the encoder's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step()
        except BaseException as death:  # noqa: BLE001 - a dead thread must say so, whatever killed it
            self._log.error("encoder_died", error=repr(death), exc_info=death)
            self._life.died(death)
        finally:
            with self._changed:
                self._life.is_closing = True
                left = list(self._requests)
            for id in left:
                self._fail(id, self._life.ending())
            self._runner = None
            self._observer.on_close()
            self._life.ended()

    def _take_inbox(self) -> bool:
        """Waits for work and takes in what has come; false when the encoder is to end."""
        with self._changed:
            while not (self._inbox or self._requests or self._life.is_closing):
                self._changed.wait()
            if self._life.is_abandoned:
                return False
            arrived = list(self._inbox)
            self._inbox.clear()
        for id, request in arrived:
            if request is None:
                self._leave(id, "aborted")
            elif id in self._requests:
                self._queue.add(id, [len(document.tokens) for document in request.documents], request.tenant)
        return bool(self._requests) or not self._life.is_closing

    def _step(self) -> None:
        places = self._queue.take(self.config.token_budget)
        if not places:
            return
        started_s = self._clock.monotonic_s()
        for place in places:
            request = self._requests[place.request]
            if request.begun_s is None:
                request.begun_s = started_s
        tokens = sum(len(self._document(place).tokens) for place in places)
        self._compute(places)
        self._observer.on_step(
            StepStats(
                duration_s=self._clock.monotonic_s() - started_s,
                decode_tokens=0,
                prefill_tokens=tokens,
                running=len({place.request for place in places}),
                waiting=len(self._queue),
                kv_used_tokens=0,
                kv_capacity_tokens=1,
            )
        )

    def _document(self, place: Place) -> Document:
        return self._requests[place.request].documents[place.index]

    def _compute(self, places: Sequence[Place]) -> None:
        """Computes a batch; where it raises, again each text alone, so that only the culprits' requests fail."""
        assert self._runner is not None
        requests = [self._requests[place.request] for place in places]
        try:
            rows = self._runner.encode(
                [self._document(place) for place in places],
                [request.skipped[place.index] for request, place in zip(requests, places, strict=True)],
            )
        except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to the texts in it
            if len(places) > 1:
                for place in places:
                    if place.request in self._requests:
                        self._compute([place])
                return
            self._log.error("encoding_failed", error=repr(error), exc_info=error)
            failure = EncodingFailed(requests[0].parameter, places[0].index, str(error))
            failure.__cause__ = error
            self._fail(places[0].request, failure)
            return
        is_finite = [bool(np.isfinite(row).all()) for row in rows]
        for place, request, row, finite in zip(places, requests, rows, is_finite, strict=True):
            if not finite:
                reason = "the model's output is not finite: its weights hold NaN or infinity"
                self._fail(place.request, EncodingFailed(request.parameter, place.index, reason))
                continue
            request.values[place.index] = row
            request.remaining -= 1
            if request.remaining == 0 and self._leave(place.request, "stop") is not None:
                values = shortened(request.values, request.dimensions)
                request.job.deliver(Encoded(values, request.num_tokens, self.name))

    def _fail(self, id: int, error: BaseException) -> None:
        """Ends one request with an error."""
        request = self._leave(id, "failed")
        if request is not None:
            request.job.fail(error)

    def _leave(self, id: int, outcome: Outcome) -> _Request | None:
        """Frees everything that a request holds."""
        with self._changed:
            request = self._requests.pop(id, None)
        if request is None:
            return None
        self._queue.remove(id)
        now_s = self._clock.monotonic_s()
        self._mean_request_s += 0.1 * (now_s - request.submitted_s - self._mean_request_s)
        self._observer.on_request(
            RequestStats(
                outcome=outcome,
                prompt_tokens=request.num_tokens,
                completion_tokens=0,
                cached_tokens=0,
                queue_s=None if request.begun_s is None else request.begun_s - request.submitted_s,
                ttft_s=None,
                tpot_s=None,
            )
        )
        if request.on_done is not None:
            request.on_done()
        return request


def shortened(values: Floats, dimensions: int | None) -> Floats:
    """The first `dimensions` numbers of each row, back to length 1; all of them as they are without it."""
    if dimensions is None or dimensions == values.shape[1]:
        return values
    cut = values[:, :dimensions]
    length = np.linalg.norm(cut, axis=1, keepdims=True)
    shorter: Floats = (cut / np.where(length > 0, length, 1.0)).astype(np.float32)
    return shorter
