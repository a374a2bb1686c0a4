"""Which sequences take part in the next step. Pure policy: no tensors, no threads, no clock.

One token budget a step is shared by decoding and by reading prompts:

1. Every sequence whose prompt has been read decodes one token. A long prompt can therefore never stall another
   sequence's next token by more than one step, and a step's length is bounded by the budget.
2. What remains of the budget reads prompts in chunks, in order of arrival: first of the sequences that already have a
   slot, then of waiting ones while slots are free. Nobody overtakes, so nobody starves.

(The idea of mixing decode with chunks of prefill: Agrawal et al., "Sarathi-Serve", OSDI 2024, arXiv:2403.02310.)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of a prompt from `start`. After the `last` chunk the first token of the answer is sampled."""

    id: int
    start: int
    length: int
    last: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. `admitted` are those of the `prefill` that have just left the queue."""

    decode: tuple[int, ...] = ()
    prefill: tuple[Chunk, ...] = ()
    admitted: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the step feeds to the model."""
        return len(self.decode) + sum(chunk.length for chunk in self.prefill)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


@dataclass(slots=True)
class _Entry:
    id: int
    prompt_tokens: int
    read: int = 0  # prompt tokens whose keys and values are in the cache


class Scheduler:
    """Holds what waits and what runs, and plans steps over it.

    `plan` changes nothing; `commit` records that a plan is carried out. Sequences leave by `remove`, whether they
    finished, failed or were aborted, waiting or running.
    """

    def __init__(self, *, slots: int, token_budget: int) -> None:
        if token_budget <= slots:
            raise ValueError(f"a budget of {token_budget} tokens leaves none for prompts beside {slots} decoding slots")
        self.slots = slots
        self.token_budget = token_budget
        self._waiting: deque[_Entry] = deque()
        self._running: dict[int, _Entry] = {}  # in order of admission, which is the order of arrival

    @property
    def num_waiting(self) -> int:
        """Sequences that have no slot yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    def add(self, id: int, prompt_tokens: int) -> None:
        """Queues a sequence whose prompt has `prompt_tokens` (at least 1)."""
        if prompt_tokens < 1:
            raise ValueError(f"a prompt has at least one token, got {prompt_tokens}")
        self._waiting.append(_Entry(id, prompt_tokens))

    def remove(self, id: int) -> None:
        """Forgets a sequence; its slot is free for the next plan. Unknown ids are no error."""
        if self._running.pop(id, None) is None:
            self._waiting = deque(entry for entry in self._waiting if entry.id != id)

    def plan(self) -> StepPlan:
        """The next step; empty (false) when there is nothing to do."""
        decode = tuple(entry.id for entry in self._running.values() if entry.read == entry.prompt_tokens)
        budget = self.token_budget - len(decode)
        free_slots = self.slots - len(self._running)
        chunks: list[Chunk] = []
        admitted: list[int] = []
        for entry in self._running.values():
            if budget > 0 and entry.read < entry.prompt_tokens:
                chunks.append(_next_chunk(entry, budget))
                budget -= chunks[-1].length
        for entry in self._waiting:
            if budget <= 0 or len(admitted) == free_slots:
                break
            chunks.append(_next_chunk(entry, budget))
            budget -= chunks[-1].length
            admitted.append(entry.id)
        return StepPlan(decode, tuple(chunks), tuple(admitted))

    def commit(self, plan: StepPlan) -> None:
        """Records that `plan`, the latest one, was computed."""
        for id in plan.admitted:
            entry = self._waiting.popleft()
            if entry.id != id:
                raise ValueError(f"a plan is committed before anything else changes: {id} is not first in the queue")
            self._running[id] = entry
        for chunk in plan.prefill:
            self._running[chunk.id].read += chunk.length


def _next_chunk(entry: _Entry, budget: int) -> Chunk:
    length = min(budget, entry.prompt_tokens - entry.read)
    return Chunk(entry.id, entry.read, length, last=entry.read + length == entry.prompt_tokens)
