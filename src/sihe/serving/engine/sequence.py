"""A request inside the engine: what it asks for, what it has said so far, and what its next token does to its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sihe.serving.engine.adapters import AdapterPlace
from sihe.serving.engine.answer import Answer
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS, BlockTable, chain
from sihe.serving.engine.ports import Outcome, RequestStats
from sihe.serving.engine.prompt_index import PromptIndex
from sihe.serving.engine.sampler import Scored
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationRequest, Usage


@dataclass(slots=True)
class Sequence:
    """One answer in the making. Belongs to the engine's thread once it is queued.

    Its tokens are the prompt's, then the answer's; `table` says in which blocks their keys and values are.
    """

    request: GenerationRequest
    prompt: list[int]
    answer: Answer
    stream: GenerationStream
    on_done: Callable[[], None] | None
    submitted_s: float
    table: BlockTable
    adapter: AdapterPlace
    output: list[int] = field(default_factory=list)
    scored: list[Scored] = field(
        default_factory=list
    )  # the prompt's tokens from the second on, where they are asked for
    index: PromptIndex | None = None  # where its tokens came before, if proposals are looked up
    cached_tokens: int = 0  # of the prompt, found in the cache
    admitted_s: float | None = None
    first_token_s: float | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens that the answer may still get."""
        return self.answer.max_tokens - len(self.output)

    @property
    def usage(self) -> Usage:
        """What the request has cost so far."""
        return Usage(len(self.prompt), len(self.output), self.cached_tokens)

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens `start` to `end`, of prompt and answer in one."""
        size = len(self.prompt)
        if start >= size:
            return self.output[start - size : end - size]
        return self.prompt[start:end] if end <= size else self.prompt[start:] + self.output[: end - size]

    def append(self, token: int) -> None:
        """The answer goes on with `token`; where that fills a block, the block gets its key."""
        self.output.append(token)
        length = self.length
        if length % BLOCK_TOKENS == 0:
            keys = self.table.keys
            keys += chain(keys[-1] if keys else self.table.root, self.tokens(length - BLOCK_TOKENS, length))

    def stats(self, outcome: Outcome, now_s: float) -> RequestStats:
        """What the request has cost, when it ends at `now_s`."""
        begun_s, first_s, tokens = self.admitted_s, self.first_token_s, len(self.output)
        return RequestStats(
            outcome=outcome,
            prompt_tokens=len(self.prompt),
            completion_tokens=tokens,
            cached_tokens=self.cached_tokens,
            queue_s=None if begun_s is None else begun_s - self.submitted_s,
            ttft_s=None if first_s is None else first_s - self.submitted_s,
            tpot_s=None if first_s is None or tokens < 2 else (now_s - first_s) / (tokens - 1),
        )
