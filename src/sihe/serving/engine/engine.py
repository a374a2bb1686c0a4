"""The engine: one thread that takes requests in, steps the model over all that run, and hands text out.

The path of a request: `submit` (the caller's thread: tokens, limits, a stream) → inbox → `Scheduler` → `work.compute`
(model and sampler) → decoder and stop filter → stream. A request joins and leaves the batch between any two steps.

An error stays with the request that causes it: a step that raises is run again one sequence at a time, and only those
that raise alone fail. What goes wrong outside of a request ends the engine, and every reader and later caller is told.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path

from sihe.core.clock import Clock, SystemClock
from sihe.core.errors import CorruptData, InvalidInput, SiheError
from sihe.core.telemetry import logger
from sihe.serving.engine.adapters import AdapterPlace, AdapterShelf, EngineAdapters
from sihe.serving.engine.answer import Answer
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.draft import load_proposer
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS, BlockPool, BlockTable, chain, root_key
from sihe.serving.engine.memory import collect_garbage_once
from sihe.serving.engine.pace import Pace
from sihe.serving.engine.ports import EngineObserver, NoObserver, Outcome, StepStats
from sihe.serving.engine.prompt_index import PromptIndex
from sihe.serving.engine.runner import ModelRunner
from sihe.serving.engine.scheduler import Scheduler, StepPlan
from sihe.serving.engine.sequence import Sequence
from sihe.serving.engine.speculation import NOTHING, Proposal, Proposer, Speculation
from sihe.serving.engine.stream import GenerationStream, Relay, Wake, wake_readers
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.engine.work import Result, Work, compute, take
from sihe.serving.errors import ContextTooLong, EngineClosed, GenerationFailed, QueueFull
from sihe.serving.lifetime import Lifetime

_WARM_TOKENS = 4


class Engine:
    """One model, served. `submit` from any thread; `close` when done (or use it as a context manager).

    `name` is what every stream says it was `served_by`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: ModelTokenizer,
        config: EngineConfig,
        *,
        name: str,
        proposer: Proposer | None = None,
        observer: EngineObserver | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.tokenizer = tokenizer
        self.context_tokens = min(runner.context, runner.num_blocks * BLOCK_TOKENS)
        self._runner: ModelRunner | None = runner
        self._vocab_size = runner.config.vocab_size
        self._observer = observer or NoObserver()
        self._clock = clock or SystemClock()
        self._log = logger("serving").bind(engine=name)
        self._pool = BlockPool(runner.num_blocks)
        self._scheduler = Scheduler(self._pool, max_running=config.max_batch_size, token_budget=config.token_budget)
        self._pace = Pace(config.target_step_s)
        self._secret = secrets.token_bytes(16)  # goes into the keys of blocks: nobody can compute them elsewhere
        self._speculation = (
            None if proposer is None else Speculation(proposer, most=config.draft_tokens, clock=self._clock)
        )
        self._shelf = AdapterShelf(config.max_adapters)
        self.adapters = EngineAdapters(self._shelf, runner.config, self._do_between_steps)
        self._ids = count()
        self._mean_request_s = 1.0
        # Shared with callers, under the condition; everything else belongs to the engine's thread.
        self._life = Lifetime(f"engine {name}")
        self._changed = self._life.changed
        self._between: deque[Callable[[], None]] = deque()  # to be done between two steps
        self._inbox: deque[tuple[int, Sequence | None]] = deque()  # None: abort
        self._sequences: dict[int, Sequence] = {}
        self._life.begin([threading.Thread(target=self._run, name=f"engine {name}", daemon=True)])

    @classmethod
    def load(
        cls,
        model_folder: Path,
        config: EngineConfig | None = None,
        *,
        name: str | None = None,
        observer: EngineObserver | None = None,
    ) -> Engine:
        """The engine of a model folder. Raises what is wrong with the folder, or `NoMemory`."""
        config = config or EngineConfig()
        tokenizer = ModelTokenizer.load(model_folder)
        runner = ModelRunner.load(model_folder, config)
        if tokenizer.vocab_size > runner.config.vocab_size:
            raise CorruptData(
                model_folder / "tokenizer.json",
                f"it has {tokenizer.vocab_size} tokens and the model knows {runner.config.vocab_size}",
                hint="these are the files of two different models",
            )
        proposer = load_proposer(config, tokenizer, runner)
        engine = cls(runner, tokenizer, config, name=name or model_folder.name, proposer=proposer, observer=observer)
        try:
            for adapter in config.adapters:
                adapter_name, _, folder = adapter.partition("=")
                engine.adapters.load(adapter_name, Path(folder))
        except BaseException:
            engine.close(drain=False)
            raise
        collect_garbage_once()
        return engine

    # ---- the caller's side ------------------------------------------------------------------------------------------

    def submit(
        self, request: GenerationRequest, *, on_done: Callable[[], None] | None = None, relay: Relay | None = None
    ) -> GenerationStream:
        """Starts a request; its stream. `on_done` is called once, on the engine's thread, when it has left the engine.

        With a `relay` what the engine says goes there, on the engine's thread.

        Raises `ContextTooLong`, `InvalidInput`, `NotFound` for an adapter, `QueueFull`, `EngineClosed`, `EngineDead`.
        """
        adapter = self._shelf.hold(request.adapter)
        try:
            return self._submit(request, adapter, on_done, relay)
        except BaseException:
            self._shelf.release(adapter)
            raise

    def _submit(
        self,
        request: GenerationRequest,
        adapter: AdapterPlace,
        on_done: Callable[[], None] | None,
        relay: Relay | None,
    ) -> GenerationStream:
        prompt = self._tokens(request)
        room = self.context_tokens - len(prompt)
        if room < (0 if request.max_tokens == 0 else 1):
            raise ContextTooLong(limit=self.context_tokens, actual=len(prompt))
        id = next(self._ids)
        answer = Answer(
            request,
            prompt,
            self.tokenizer,
            max_tokens=room if request.max_tokens is None else min(room, request.max_tokens),
            seed=secrets.randbits(64) if request.seed is None else request.seed,
            vocab_size=self._vocab_size,
        )
        sequence = Sequence(
            request=request,
            prompt=prompt,
            answer=answer,
            stream=GenerationStream(id, self.name, abort=self._abort, relay=relay),
            on_done=on_done,
            submitted_s=self._clock.monotonic_s(),
            table=self._table(request, prompt, adapter),
            adapter=adapter,
            index=PromptIndex(prompt) if self.config.speculation == "ngram" else None,
        )
        with self._changed:
            self._life.check_open()
            self._check_queue()
            self._sequences[id] = sequence
            self._inbox.append((id, sequence))
            self._changed.notify()
        return sequence.stream

    def warm(self) -> None:
        """Answers a real request, so that the first user meets neither a cold engine nor a broken model.

        Its tokens are drawn, not the likeliest: what draws them may have to be compiled. So may be the model, for one
        token and for more: then another prompt fills a step, as a compiler goes by the sizes that it sees first.
        """
        lengths = (min(self.config.token_budget, self.context_tokens - 1), 1) if self.config.compile else (1,)
        for length in lengths:
            prompt = (0,) * length  # a token that every vocabulary has
            self.submit(
                GenerationRequest(prompt=prompt, max_tokens=_WARM_TOKENS, temperature=1, ignore_eos=True)
            ).result()

    def forget_prefixes(self) -> None:
        """What was computed until now is found by no later request: to be called when the weights have changed."""
        self._secret = secrets.token_bytes(16)

    @property
    def is_alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._life.is_open

    @property
    def num_sequences(self) -> int:
        """Requests that wait or run."""
        return len(self._sequences)

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more requests, ends the thread and frees the model. Safe to call again.

        With `drain` what has begun is finished first, for at most `timeout_s`; what is left then, or at once without
        `drain`, ends with `EngineClosed`.
        """
        self._life.close(drain=drain, timeout_s=timeout_s)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def _tokens(self, request: GenerationRequest) -> list[int]:
        if request.messages is not None:
            prompt = self.tokenizer.encode_chat(request, limit=self.context_tokens)
        elif isinstance(request.prompt, str):
            prompt = self.tokenizer.encode(request.prompt, limit=self.context_tokens)
        else:
            prompt = list(request.prompt or ())
            for token in prompt:
                if not 0 <= token < self._vocab_size:
                    raise InvalidInput(f"a prompt's token ids go from 0 to {self._vocab_size - 1}, got {token!r}")
        if not prompt:
            raise InvalidInput("the prompt has no tokens: write something")
        return prompt

    def _table(self, request: GenerationRequest, prompt: list[int], adapter: AdapterPlace) -> BlockTable:
        """Where the sequence will live, with the keys of its prompt's blocks, hashed on the caller's thread."""
        scope = (self.name.encode(), adapter.key, request.cache_salt.encode())
        root = root_key(self._secret, *scope)
        return BlockTable(self._pool, root, chain(root, prompt))

    def _check_queue(self) -> None:
        waiting = len(self._inbox) + self._scheduler.num_waiting
        free = self._scheduler.max_running - self._scheduler.num_running
        if waiting >= self.config.max_waiting + free:
            rounds = waiting / self._scheduler.max_running
            raise QueueFull(waiting, retry_after_s=min(60.0, max(1.0, rounds * self._mean_request_s)))

    def _do_between_steps(self, task: Callable[[ModelRunner], None]) -> None:
        """Runs `task` on the engine's thread while no step runs; raises what it raises, and `EngineClosed`."""
        done, failures = threading.Event(), list[BaseException]()

        def run() -> None:
            try:
                if self._runner is None:
                    raise EngineClosed(f"engine {self.name} was closed")
                task(self._runner)
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                failures.append(error)
            done.set()

        with self._changed:
            self._life.check_open()
            self._between.append(run)
            self._changed.notify()
        done.wait()
        if failures:
            raise failures[0]

    def _abort(self, id: int) -> None:
        with self._changed:
            if id in self._sequences:
                self._inbox.append((id, None))
                self._changed.notify()

    # ---- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step()
        except BaseException as death:  # noqa: BLE001 - a dead thread must say so, whatever killed it
            self._log.error("engine_died", error=repr(death), exc_info=death)
            self._life.died(death)
        finally:
            with self._changed:
                self._life.is_closing = True
                left = list(self._sequences)
            for id in left:
                self._fail(id, self._life.ending())
            if self._runner is not None:
                self._runner.close()
            if self._speculation is not None:
                self._speculation.close()
            self._runner = None
            while self._between:
                self._between.popleft()()
            self._observer.on_close()
            self._life.ended()

    def _take_inbox(self) -> bool:
        """Waits for work and takes in what has come; false when the engine is to end."""
        with self._changed:
            while not (self._inbox or self._sequences or self._between or self._life.is_closing):
                self._changed.wait()
            tasks = [self._between.popleft() for _ in range(len(self._between))]
            abandon = self._life.is_abandoned
            arrived = list(self._inbox)
            self._inbox.clear()
        for task in tasks:
            task()
        if abandon:
            return False
        for id, sequence in arrived:
            if sequence is None:
                self._leave(id, "aborted")
            elif id in self._sequences:
                request = sequence.request
                self._scheduler.add(
                    id,
                    len(sequence.prompt),
                    sequence.table,
                    priority=request.priority,
                    tenant=request.tenant,
                    reuse=not request.needs_prompt_logits,
                )
        return bool(self._sequences) or not self._life.is_closing

    def _step(self) -> None:
        plan = self._scheduler.plan(self._drafts(), self._pace.tokens)
        if not plan:
            return
        started_s = self._clock.monotonic_s()
        self._note_admitted(plan, started_s)
        proposals = self._propose(plan)
        works = self._works(plan, proposals)
        begun_s = self._clock.monotonic_s()
        wakes: list[Wake] = []
        accepted = self._compute(works, wakes)
        wake_readers(wakes)
        step_s, prompt_tokens = self._clock.monotonic_s() - begun_s, plan.num_tokens - len(plan.decode)
        self._pace.add_step(prompt_tokens, step_s)
        drafted = sum(len(proposal.tokens) for proposal in proposals.values())
        if self._speculation is not None and not plan.prefill:
            self._speculation.add_step(plan.num_tokens + drafted, step_s)
        pool = self._pool
        self._observer.on_step(
            StepStats(
                duration_s=self._clock.monotonic_s() - started_s,
                decode_tokens=len(plan.decode),
                prefill_tokens=prompt_tokens,
                running=self._scheduler.num_running,
                waiting=self._scheduler.num_waiting,
                kv_used_tokens=pool.num_used * BLOCK_TOKENS,
                kv_capacity_tokens=pool.num_blocks * BLOCK_TOKENS,
                kv_cached_tokens=pool.num_cached * BLOCK_TOKENS,
                hit_tokens=plan.hit_tokens,
                preempted=len(plan.preempted),
                drafted_tokens=drafted,
                accepted_tokens=accepted,
            )
        )

    def _drafts(self) -> dict[int, int]:
        """How many tokens each sequence that decodes would try."""
        if self._speculation is None:
            return {}
        decoding = self._scheduler.decoding()
        return {id: self._speculation.tries(self._sequences[id], len(decoding)) for id in decoding}

    def _propose(self, plan: StepPlan) -> dict[int, Proposal]:
        if self._speculation is None:
            return {}
        return self._speculation.propose(
            [(self._sequences[chunk.id], chunk.drafts) for chunk in plan.decode if chunk.drafts]
        )

    def _works(self, plan: StepPlan, proposals: dict[int, Proposal]) -> dict[int, Work]:
        works: dict[int, Work] = {}
        for chunk in (*plan.decode, *plan.prefill):
            try:
                works[chunk.id] = Work.of(self._sequences[chunk.id], chunk, proposals.get(chunk.id, NOTHING))
            except Exception as error:  # noqa: BLE001 - what a request asks for is its own trouble
                self._fail(chunk.id, self._failure(error))
        return works

    def _note_admitted(self, plan: StepPlan, now_s: float) -> None:
        if not plan.admitted:
            return
        starts = {chunk.id: chunk.start for chunk in plan.prefill}
        for id in plan.admitted:
            sequence = self._sequences[id]
            if sequence.admitted_s is None and id in starts:
                sequence.admitted_s = now_s
                sequence.cached_tokens = starts[id]

    def _compute(self, works: dict[int, Work], wakes: list[Wake]) -> int:
        """Runs the step; where it raises, again for each sequence alone, so that only the culprits fail.

        Returns how many of the proposed tokens were accepted.
        """
        if not works:
            return 0
        assert self._runner is not None
        try:
            results = compute(self._runner, list(works.values()))
        except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to the requests in it
            if len(works) > 1:
                return sum(self._compute({id: work}, wakes) for id, work in works.items())
            for id in works:
                self._fail(id, self._failure(error))
            return 0
        accepted = 0
        for work, result in zip(works.values(), results, strict=True):
            if work.proposal.tokens and self._speculation is not None:
                kept = len(result.sampled) - 1
                accepted += kept
                self._speculation.add_outcome(self._sequences[work.chunk.id], len(work.proposal.tokens), kept)
            wake = self._accept(work, result)
            if wake is not None:
                wakes.append(wake)
        return accepted

    def _accept(self, work: Work, result: Result) -> Wake | None:
        """Takes what a step has brought into the answer and tells the reader."""
        id, end = work.chunk.id, work.chunk.start + work.chunk.length
        sequence = self._sequences[id]
        try:
            event = take(sequence, work, result, self.tokenizer)
        except Exception as error:  # noqa: BLE001 - the answer of one request; the batch goes on
            self._fail(id, error if isinstance(error, SiheError) else self._failure(error))
            return None
        if sequence.first_token_s is None and event is not None:
            sequence.first_token_s = self._clock.monotonic_s()
        # The last token that was accepted is known and not computed.
        self._scheduler.advance(id, computed=end if event is None else sequence.length - 1, length=sequence.length)
        if event is None:
            return None
        if event.finish_reason is not None:
            self._leave(id, event.finish_reason)
        return sequence.stream.deliver(event)

    def _failure(self, error: Exception) -> GenerationFailed:
        self._log.error("generation_failed", error=repr(error), exc_info=error)
        failure = GenerationFailed(f"the model failed on this request: {error}")
        failure.__cause__ = error
        return failure

    def _fail(self, id: int, error: BaseException) -> None:
        """Ends one request with an error."""
        sequence = self._leave(id, "failed")
        if sequence is not None:
            wake = sequence.stream.fail(error)
            wake_readers([wake] if wake else [])

    def _leave(self, id: int, outcome: Outcome) -> Sequence | None:
        """Frees everything that a request holds."""
        with self._changed:
            sequence = self._sequences.pop(id, None)
        if sequence is None:
            return None
        self._scheduler.remove(id)
        self._shelf.release(sequence.adapter)
        if self._speculation is not None:
            self._speculation.forget(sequence)
        now_s = self._clock.monotonic_s()
        self._mean_request_s += 0.1 * (now_s - sequence.submitted_s - self._mean_request_s)
        self._observer.on_request(sequence.stats(outcome, now_s))
        if sequence.on_done is not None:
            sequence.on_done()
        return sequence
