"""One step of several sequences: what is fed to the model, and which tokens its logits lead to."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from sihe.serving.engine.compute.step import Feed
from sihe.serving.engine.sampler import Draw, Sampled, Scored, sample, score
from sihe.serving.engine.scheduler import Chunk
from sihe.serving.engine.sequence import Sequence
from sihe.serving.engine.speculation import NOTHING, Proposal, agree, verify
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.tools import ToolCallDelta, join_deltas
from sihe.serving.engine.types import FinishReason, GenerationEvent, TokenLogprob
from sihe.serving.errors import GenerationFailed


class Forward(Protocol):
    """What a step needs of a runner."""

    def forward(self, feeds: Items[Feed]) -> Tensor:
        """Logits of the last `num_logits` tokens of each feed, float32 [O, V]."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """What one sequence does in a step.

    The logits of the first tokens of `feed` for which they are wanted score `targets` (the tokens of the prompt that
    follow them), and those of the last ones are drawn from, by `draws`: one for the next token, and one for each that
    comes after a token of `proposal`.
    """

    chunk: Chunk
    feed: Feed
    draws: tuple[Draw, ...] = ()
    targets: tuple[int, ...] = ()
    top: int = 0  # likeliest tokens that are reported beside each target
    proposal: Proposal = NOTHING

    @property
    def is_verified(self) -> bool:
        """Whether its proposal was drawn, and is judged by what it was drawn from."""
        return self.proposal.probabilities is not None

    @classmethod
    def of(cls, sequence: Sequence, chunk: Chunk, proposal: Proposal = NOTHING) -> Work:
        """The work that `chunk` plans for `sequence`, with the tokens that are proposed to come next."""
        end = chunk.start + chunk.length
        draws = sequence.answer.draws(proposal.tokens) if chunk.last and sequence.remaining > 0 else ()
        targets: tuple[int, ...] = ()
        wanted = len(draws)
        if sequence.request.needs_prompt_logits and chunk.start < len(sequence.prompt) - 1:
            targets = tuple(sequence.prompt[chunk.start + 1 : end + 1])
            wanted = chunk.length
        tokens = [*sequence.tokens(chunk.start, end), *proposal.tokens]
        feed = Feed(tokens, chunk.start, sequence.table.blocks, num_logits=wanted, adapter=sequence.adapter.number)
        return cls(chunk, feed, draws, targets, sequence.request.logprobs or 0, proposal)


@dataclass(frozen=True, slots=True)
class Result:
    """What a step has brought a sequence: the tokens that its answer goes on with, and its prompt's scores."""

    sampled: tuple[Sampled, ...] = ()
    scored: tuple[Scored, ...] = ()


def compute(runner: Forward, works: Items[Work]) -> list[Result]:
    """Feeds the step's tokens in one pass. Positions are rewritten from their start: it can be computed again."""
    logits_OV = runner.forward([work.feed for work in works])
    ends = list(accumulate(work.feed.num_logits for work in works))
    chosen = iter(_choose(logits_OV, works, ends))
    results: list[Result] = []
    for work, end in zip(works, ends, strict=True):
        first = end - work.feed.num_logits
        scored = score(logits_OV[first : first + len(work.targets)], work.targets, work.top) if work.targets else ()
        if work.is_verified:
            sampled = verify(logits_OV[end - len(work.draws) : end], work.draws, work.proposal)
        else:
            sampled = agree([next(chosen) for _ in work.draws], work.proposal.tokens)
        results.append(Result(sampled, tuple(scored)))
    return results


def _choose(logits_OV: Tensor, works: Items[Work], ends: Items[int]) -> list[Sampled]:
    """The model's own choice for each draw of those whose proposals are compared with it: one pass for all."""
    rows: list[int] = []
    draws: list[Draw] = []
    for work, end in zip(works, ends, strict=True):
        if not work.is_verified:
            rows.extend(range(end - len(work.draws), end))
            draws.extend(work.draws)
    if not draws:
        return []
    if len(rows) == len(logits_OV):
        return sample(logits_OV, draws)
    return sample(logits_OV[torch.tensor(rows, device=logits_OV.device)], draws)


def take(sequence: Sequence, work: Work, result: Result, tokenizer: ModelTokenizer) -> GenerationEvent | None:
    """Takes what a step has brought into the answer of `sequence`; None while its prompt is still being read.

    Raises `GenerationFailed` where the model's output means nothing, and what the answer itself has failed with.
    """
    if work.targets:
        start = work.chunk.start
        sequence.scored[start : start + len(result.scored)] = result.scored
    if not result.sampled and not (work.chunk.last and sequence.remaining == 0):
        return None
    known = sequence.length
    text, calls = "", list[ToolCallDelta]()
    reason: FinishReason | None = None if result.sampled else "length"
    logprobs: list[TokenLogprob] = []
    if not sequence.output:
        text, echoed = sequence.answer.echo(sequence.prompt, sequence.scored)
        logprobs += echoed
    for sampled in result.sampled:
        if not sampled.is_finite:
            raise GenerationFailed("the model's output is not finite: its weights hold NaN or infinity")
        sequence.append(sampled.token)
        said = sequence.answer.read(sampled.token)
        text, reason = text + said.text, said.reason
        calls += said.calls
        if sampled.logprob is not None:
            logprobs.append(tokenizer.spell(sampled.token, sampled.logprob, sampled.top))
        if reason is not None:
            break
    if sequence.answer.failure is not None:
        raise sequence.answer.failure
    return GenerationEvent(
        text=text,
        token_ids=tuple(sequence.tokens(known, sequence.length)),
        usage=sequence.usage,
        finish_reason=reason,
        logprobs=tuple(logprobs),
        tool_calls=join_deltas(calls),
    )
