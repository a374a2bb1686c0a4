"""Proposals of a small model that knows the same tokens: it has a cache of its own, and catches up when it is asked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sihe.core.errors import ConfigError
from sihe.serving.engine.compute.step import Feed
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS, BlockPool, BlockTable
from sihe.serving.engine.sampler import Draw, probabilities, sample
from sihe.serving.engine.speculation import PromptLookup, Proposal, Proposer, drafting

if TYPE_CHECKING:
    from torch import Tensor

    from sihe.serving.engine.config import EngineConfig
    from sihe.serving.engine.runner import ModelRunner
    from sihe.serving.engine.sequence import Sequence
    from sihe.serving.engine.tokenizer import ModelTokenizer


@dataclass(slots=True)
class _Tail:
    """What the draft model has computed of one sequence: its first `known` tokens, then `guesses` of its own."""

    table: BlockTable
    known: int = 0
    guesses: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Try:
    """One sequence's proposal in the making."""

    sequence: Sequence
    tail: _Tail
    most: int
    is_drawn: bool
    tokens: list[int] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    def draw(self) -> Draw:
        draw = self.sequence.answer.draws(self.tokens)[-1]
        return drafting(draw) if self.is_drawn else draw


class DraftModel:
    """Proposes what a small model would say.

    Where a request has a seed, or is greedy, it says what it would with the request's own random numbers, so that it
    often agrees with the large one (a coupling: arXiv:2408.07978); else it draws, and the proposal carries what from.

    `budget` bounds the tokens that are read to catch up in one step: who needs more waits for its proposals.
    """

    def __init__(self, runner: ModelRunner, *, vocab_size: int, budget: int) -> None:
        self._runner = runner
        self._vocab_size = vocab_size
        self._budget = budget
        self._pool = BlockPool(runner.num_blocks)
        self._tails: OrderedDict[int, _Tail] = OrderedDict()  # the one that was asked for longest ago comes first

    @property
    def num_used_blocks(self) -> int:
        """Blocks of the draft model's cache that sequences hold."""
        return self._pool.num_used

    def available(self, sequence: Sequence, most: int) -> int:
        """As many as fit its context."""
        context = min(self._runner.context, self._runner.num_blocks * BLOCK_TOKENS)
        return max(0, min(most, context - sequence.length))

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> list[Proposal]:
        """What the small model says next, token by token for all sequences together."""
        tries = self._catch_up(wanted)
        feeds = [self._pending(item) for item in tries.values()]
        going = list(tries.values())
        while going:
            logits_BV = self._fitted(self._runner.forward(feeds))
            self._choose(going, logits_BV)
            going = [item for item in going if len(item.tokens) < item.most]
            feeds = [self._guess(item) for item in going]
        return [self._proposal(tries.get(sequence.stream.id)) for sequence, _ in wanted]

    def forget(self, sequence: Sequence) -> None:
        """Its blocks are free."""
        tail = self._tails.pop(sequence.stream.id, None)
        if tail is not None:
            tail.table.clear()

    def close(self) -> None:
        """Ends the small model."""
        self._runner.close()

    # ---- catching up ------------------------------------------------------------------------------------------------

    def _catch_up(self, wanted: Items[tuple[Sequence, int]]) -> dict[int, _Try]:
        """Those that can be proposed for now; the others are brought nearer, within the budget."""
        tries: dict[int, _Try] = {}
        behind: list[Feed] = []
        budget = self._budget
        asked = {sequence.stream.id for sequence, _ in wanted}
        tails = [(self._tail(sequence), sequence, most) for sequence, most in wanted]
        for tail, sequence, most in sorted(tails, key=_missing):  # a long prompt delays nobody who is near
            missing = sequence.length - tail.known
            if most < 1 or budget < 1 or not self._room(tail, sequence.length + most - 1, asked):
                continue
            if missing <= budget:
                is_drawn = sequence.request.seed is None and not sequence.request.is_greedy
                tries[sequence.stream.id] = _Try(sequence, tail, most, is_drawn)
                budget -= missing
                continue
            tokens = sequence.tokens(tail.known, tail.known + budget)
            behind.append(Feed(tokens, tail.known, tail.table.blocks, num_logits=0))
            tail.known += budget
            budget = 0
        if behind:
            self._runner.forward(behind)
        return tries

    def _tail(self, sequence: Sequence) -> _Tail:
        """What is known of a sequence: of its own guesses those that came true."""
        id = sequence.stream.id
        tail = self._tails.get(id)
        if tail is None:
            tail = self._tails[id] = _Tail(BlockTable(self._pool, b"", []))
        self._tails.move_to_end(id)
        came = sequence.tokens(tail.known, min(tail.known + len(tail.guesses), sequence.length))
        for guess, token in zip(tail.guesses, came, strict=False):
            if guess != token:
                break
            tail.known += 1
        tail.known = min(tail.known, sequence.length - 1)  # the last one is fed again: what follows it is wanted
        tail.guesses.clear()
        return tail

    def _room(self, tail: _Tail, tokens: int, asked: set[int]) -> bool:
        """Blocks for `tokens`, taken from those that were not asked for if need be."""
        for id in list(self._tails):
            if tail.table.missing(tokens) <= self._pool.num_available:
                break
            if id not in asked:
                self._tails.pop(id).table.clear()
        if tail.table.missing(tokens) > self._pool.num_available:
            return False
        tail.table.grow(tokens)
        return True

    # ---- proposing --------------------------------------------------------------------------------------------------

    def _pending(self, item: _Try) -> Feed:
        tail, sequence = item.tail, item.sequence
        feed = Feed(sequence.tokens(tail.known, sequence.length), tail.known, tail.table.blocks)
        tail.known = sequence.length
        return feed

    def _guess(self, item: _Try) -> Feed:
        tail = item.tail
        tail.guesses.append(item.tokens[-1])
        return Feed(item.tokens[-1:], tail.known + len(tail.guesses) - 1, tail.table.blocks)

    def _choose(self, going: Items[_Try], logits_BV: Tensor) -> None:
        draws = [item.draw() for item in going]
        for item, chosen in zip(going, sample(logits_BV, draws), strict=True):
            item.tokens.append(chosen.token)
            if not chosen.is_finite:
                raise ValueError("the draft model's output is not finite: its weights hold NaN or infinity")
        drawn = [row for row, item in enumerate(going) if item.is_drawn]
        if drawn:
            rows_BV = probabilities(logits_BV[drawn], [draws[row] for row in drawn])
            for row, probabilities_V in zip(drawn, rows_BV, strict=True):
                going[row].probabilities.append(probabilities_V)

    def _fitted(self, logits_BV: Tensor) -> Tensor:
        """As wide as the large model's: a vocabulary may be padded, by more in one than in the other."""
        padding = self._vocab_size - logits_BV.shape[1]
        if padding > 0:
            return torch.nn.functional.pad(logits_BV, (0, padding), value=-torch.inf)
        return logits_BV[:, : self._vocab_size]

    def _proposal(self, item: _Try | None) -> Proposal:
        if item is None:
            return Proposal()
        return Proposal(tuple(item.tokens), torch.stack(item.probabilities) if item.is_drawn else None)


def _missing(item: tuple[_Tail, Sequence, int]) -> int:
    tail, sequence, _ = item
    return sequence.length - tail.known


def load_proposer(config: EngineConfig, tokenizer: ModelTokenizer, runner: ModelRunner) -> Proposer | None:
    """What `config` asks for beside the model of `runner`: None, a look-up, or the draft model with its own cache.

    Raises what is wrong with the draft model's folder, `NoMemory`, or `ConfigError` where it knows other tokens.
    """
    if config.speculation == "ngram":
        return PromptLookup()
    if config.speculation == "none":
        return None
    from sihe.serving.engine.runner import ModelRunner
    from sihe.serving.engine.tokenizer import ModelTokenizer

    folder = Path(config.draft_model or "")
    if not tokenizer.has_tokens_of(ModelTokenizer.load(folder)):
        raise ConfigError(
            f"the draft model in {folder.name!r} has other tokens than the model: take one of the same family",
            key="draft_model",
        )
    alone = replace(config, speculation="none", draft_model=None, max_context=None, compile=False)
    small = ModelRunner.load(folder, alone)
    return DraftModel(small, vocab_size=runner.config.vocab_size, budget=config.token_budget)
