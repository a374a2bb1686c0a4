"""Trying several tokens at once: proposals of what comes next, and what of them the model confirms.

A decoding step reads all weights to compute one token a sequence. As long as reading is what takes the time, computing
a few more tokens in the same step is nearly free, and whatever the model would have said anyway is then known at once.
Proposals come from the text itself (`PromptLookup`) or from a small model (`draft`); the answer's distribution is that
of the model alone, whatever is proposed:

* A token that was *found*, not drawn, is kept as long as the model's own choice at its place, drawn as ever from the
  request's seed, is the same token. So greedy and seeded answers are the same tokens with and without proposals. That
  keeps a token x with probability p(x), as rejection sampling would for a proposal that is certain of itself.
* A token that was *drawn* from probabilities q is kept with probability min(1, p(x) / q(x)), and else replaced by one
  drawn from max(0, p - q), normalised (Leviathan, Kalman & Matias 2023, arXiv:2211.17192, algorithm 1). That keeps more
  of them than any other exact rule; it is used where no seed asks for the same answer again.

How many tokens to try is weighed for each sequence (`Pace`): more while they are kept and steps get no longer by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from sihe.core.telemetry import logger
from sihe.serving.engine.prompt_index import PromptIndex
from sihe.serving.engine.sampler import Draw, Sampled, probabilities, score
from sihe.serving.engine.seeds import fork_seed, uniform

if TYPE_CHECKING:
    from torch import Tensor

    from sihe.core.clock import Clock
    from sihe.serving.engine.sequence import Sequence

_PRIOR = 0.6  # share of proposals that is taken to be kept before anything is known
_PRIOR_WEIGHT = 2.0  # proposals that the prior counts for
_MEMORY = 0.9  # weight of what was known of a sequence's proposals, each time something new is
_PROBE_EVERY = 32  # steps after which a sequence whose proposals did not pay is tried again
_DRAFTING, _ACCEPTING = 0x5EED_D2AF, 0x5EED_ACCE  # streams of random numbers beside that of the answer


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next; with the probabilities [k, V] that each was drawn from, if it was drawn."""

    tokens: tuple[int, ...] = ()
    probabilities: Tensor | None = None


NOTHING = Proposal()


class Proposer(Protocol):
    """Where proposals come from. Used by the engine's thread."""

    def available(self, sequence: Sequence, most: int) -> int:
        """How many tokens can be proposed for `sequence`, at most `most`; costs next to nothing."""
        ...

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> list[Proposal]:
        """A proposal for each sequence, of at most as many tokens as said."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has left the engine."""
        ...

    def close(self) -> None:
        """The engine has ended."""
        ...


class PromptLookup:
    """Proposes what followed the last tokens when they came before, in prompt or answer."""

    def available(self, sequence: Sequence, most: int) -> int:
        """As many as followed."""
        return len(self._index(sequence).next(most))

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> list[Proposal]:
        """What `available` has counted."""
        return [Proposal(self._index(sequence).next(most)) for sequence, most in wanted]

    def forget(self, sequence: Sequence) -> None:
        """The index goes with its sequence."""
        sequence.index = None

    def close(self) -> None:
        """Nothing to end."""

    def _index(self, sequence: Sequence) -> PromptIndex:
        if sequence.index is None:
            sequence.index = PromptIndex(sequence.prompt)
        index = sequence.index
        if len(index) < sequence.length:
            index.extend(sequence.tokens(len(index), sequence.length))
        return index


# ---- what is kept ----------------------------------------------------------------------------------------------------


def drafting(draw: Draw) -> Draw:
    """How a token is drawn for a proposal that `verify` will judge: by random numbers of its own."""
    return Draw(
        temperature=draw.temperature,
        top_k=draw.top_k,
        top_p=draw.top_p,
        seed=fork_seed(draw.seed, _DRAFTING),
        position=draw.position,
        min_p=draw.min_p,
        history=draw.history,
        drafted=draw.drafted,
        bias=draw.bias,
        banned=draw.banned,
        mask=draw.mask,
    )


def agree(chosen: Items[Sampled], drafted: Items[int]) -> tuple[Sampled, ...]:
    """Of the model's own choices at each place, those that are reached: up to the first that was proposed otherwise."""
    for place, token in enumerate(drafted):
        if chosen[place].token != token or not chosen[place].is_finite:
            return tuple(chosen[: place + 1])
    return tuple(chosen)


def verify(logits_KV: Tensor, draws: Items[Draw], proposal: Proposal) -> tuple[Sampled, ...]:
    """The tokens that the answer goes on with: proposals that are kept, then one that is drawn anew.

    `logits_KV` are of the place of each proposed token and of the one after the last, and `draws` say how the model
    chooses there.
    """
    q_KV = proposal.probabilities
    assert q_KV is not None, "only what was drawn is verified"
    if not bool(torch.isfinite(logits_KV.max(-1).values).all()):
        return (Sampled(0, is_finite=False),)
    p_KV = probabilities(logits_KV, draws)
    tokens: list[int] = []
    for place, token in enumerate(proposal.tokens):
        draw = draws[place]
        p, q = float(p_KV[place, token]), float(q_KV[place, token])
        if uniform(fork_seed(draw.seed, _ACCEPTING), draw.position) * q < p:
            tokens.append(token)
            continue
        rest_V = (p_KV[place] - q_KV[place]).clamp_min_(0.0)
        tokens.append(_draw(rest_V if float(rest_V.sum()) > 0 else p_KV[place], draw))
        break
    else:
        tokens.append(_draw(p_KV[len(tokens)], draws[len(tokens)]))
    return tuple(_reported(logits_KV, draws, tokens))


def _draw(weights_V: Tensor, draw: Draw) -> int:
    ends_V = weights_V.cumsum(-1)
    found = int(torch.searchsorted(ends_V, uniform(draw.seed, draw.position) * ends_V[-1], right=True))
    return min(found, int(weights_V.nonzero()[-1]))


def _reported(logits_KV: Tensor, draws: Items[Draw], tokens: Items[int]) -> list[Sampled]:
    top = draws[0].logprobs
    if top is None:
        return [Sampled(token, is_finite=True) for token in tokens]
    scored = score(logits_KV[: len(tokens)], tokens, top)
    return [Sampled(item.token, is_finite=True, logprob=item.logprob, top=item.top) for item in scored]


# ---- how many to try -------------------------------------------------------------------------------------------------


class StepTimes:
    """How long a step takes by the number of its tokens: a line through what was measured, the latest most."""

    def __init__(self, memory: float = 0.98) -> None:
        self._memory = memory
        self._weight = self._tokens = self._seconds = 0.0
        self._spread = self._slant = 0.0  # weighted sums of squares about the means

    def add(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` took `seconds`. (Weighted Welford: West 1979, doi:10.1145/359146.359153.)"""
        self._weight = self._weight * self._memory + 1
        self._spread *= self._memory
        self._slant *= self._memory
        off_tokens, off_seconds = tokens - self._tokens, seconds - self._seconds
        self._tokens += off_tokens / self._weight
        self._seconds += off_seconds / self._weight
        self._spread += off_tokens * (tokens - self._tokens)
        self._slant += off_tokens * (seconds - self._seconds)

    @property
    def per_token_s(self) -> float:
        """What one more token adds; 0 as long as all steps were alike."""
        return max(0.0, self._slant / self._spread) if self._spread > 1e-12 else 0.0

    def step_s(self, tokens: int) -> float:
        """What a step of `tokens` takes; 0 before the first."""
        return max(0.0, self._seconds + self.per_token_s * (tokens - self._tokens))


def worthwhile(acceptance: float, most: int, price: float) -> int:
    """How many tokens to try when each is kept with probability `acceptance`, if those before it are.

    `price` is what a token costs in a step as a share of what the step brings: 0 where one more costs no time, 1 where
    twice the tokens take twice the time. The j-th token is worth trying while `acceptance ** j` exceeds it.
    """
    if most < 1 or acceptance <= price:
        return 0
    if acceptance >= 1 or price <= 0:
        return most
    return min(most, int(math.log(price) / math.log(acceptance) - 1e-9))


@dataclass(slots=True)
class Kept:
    """How a sequence's proposals fared, the latest most."""

    kept: float = 0.0
    lost: float = 0.0
    idle_steps: int = 0

    def share(self, prior: float) -> float:
        """The probability with which a token is kept, if those before it are."""
        return (self.kept + prior * _PRIOR_WEIGHT) / (self.kept + self.lost + _PRIOR_WEIGHT)

    def add(self, proposed: int, kept: int) -> None:
        """Of `proposed` tokens the first `kept` were kept; the next one was looked at and not kept."""
        self.kept = self.kept * _MEMORY + kept
        self.lost = self.lost * _MEMORY + (1 if kept < proposed else 0)


class Pace:
    """Weighs for each sequence how many tokens to try, by how its proposals fare and by how long steps take."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._times = StepTimes()
        self._all = Kept()
        self._drafting_s = 0.0  # what proposing one more token takes, for all sequences together

    def tries(self, kept: Kept, batch: int) -> int:
        """How many tokens to try for one of `batch` sequences."""
        step_s = self._times.step_s(batch)
        price = (self._times.per_token_s * batch + self._drafting_s) / step_s if step_s > 0 else 0.0
        tries = worthwhile(kept.share(self._all.share(_PRIOR)), self.most, price)
        kept.idle_steps = 0 if tries else kept.idle_steps + 1
        if kept.idle_steps >= _PROBE_EVERY and price < 1:
            kept.idle_steps = 0
            return 1
        return tries

    def add_step(self, tokens: int, seconds: float) -> None:
        """A step in which every sequence decoded fed `tokens`, drafts among them, and took `seconds`."""
        self._times.add(tokens, seconds)

    def add_drafting(self, rounds: int, seconds: float) -> None:
        """Proposing took `seconds` for up to `rounds` tokens a sequence."""
        self._drafting_s += 0.1 * (seconds / max(1, rounds) - self._drafting_s)

    def add_outcome(self, kept: Kept, proposed: int, accepted: int) -> None:
        """Of a sequence's `proposed` tokens the first `accepted` were kept."""
        kept.add(proposed, accepted)
        self._all.add(proposed, accepted)


class Speculation:
    """The proposals of one engine. An error of the proposer ends speculation, and no request."""

    def __init__(self, proposer: Proposer, *, most: int, clock: Clock) -> None:
        self._proposer = proposer
        self._pace = Pace(most)
        self._clock = clock
        self._log = logger("serving")
        self._kept: dict[int, Kept] = {}
        self._is_on = True

    def tries(self, sequence: Sequence, batch: int) -> int:
        """How many tokens to try for one of `batch` sequences that decode."""
        if not self._is_on:
            return 0
        kept = self._kept.setdefault(sequence.stream.id, Kept())
        most = min(self._pace.tries(kept, batch), sequence.remaining - 1)
        return self._proposer.available(sequence, most) if most > 0 else 0

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> dict[int, Proposal]:
        """Proposals by the sequences' ids, of at most as many tokens as said."""
        if not (wanted and self._is_on):
            return {}
        started_s = self._clock.monotonic_s()
        try:
            proposals = self._proposer.propose(wanted)
        except Exception as error:  # noqa: BLE001 - proposals are an extra: the answers do not depend on them
            self._log.error("speculation_failed", error=repr(error), exc_info=error)
            self._is_on = False
            return {}
        rounds = max(len(proposal.tokens) for proposal in proposals)
        self._pace.add_drafting(rounds, self._clock.monotonic_s() - started_s)
        return {sequence.stream.id: item for (sequence, _), item in zip(wanted, proposals, strict=True) if item.tokens}

    def add_step(self, tokens: int, seconds: float) -> None:
        """A step in which every sequence decoded fed `tokens`, drafts among them, and took `seconds`."""
        self._pace.add_step(tokens, seconds)

    def add_outcome(self, sequence: Sequence, proposed: int, accepted: int) -> None:
        """Of the `proposed` tokens of `sequence` the first `accepted` were kept."""
        kept = self._kept.get(sequence.stream.id)
        if kept is not None:
            self._pace.add_outcome(kept, proposed, accepted)

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has left the engine."""
        self._kept.pop(sequence.stream.id, None)
        self._proposer.forget(sequence)

    def close(self) -> None:
        """The engine has ended."""
        self._proposer.close()
