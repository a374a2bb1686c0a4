"""What the next step computes, and who holds which memory. Pure policy: no tensors, no threads, no clock.

A sequence is a row of known tokens (its prompt, then its answer so far), of which the first `computed` have their keys
and values in the cache. A step brings sequences forward; whoever reaches its last known token is given the next one.
One budget of tokens a step is shared:

1. Every sequence that lacks one token decodes. A long prompt can therefore never stall another sequence's next token
   by more than one step, and a step's length is bounded by the budget.
2. What remains reads prompts in chunks, shorter ones where the model is slow and somebody decodes (`pace`): of the
   sequences in the batch and of those that wait, whoever's tenant has had least service first, then whoever came first
   (`fairness`).
3. Where no prompt is read, decoding sequences may try drafts of further tokens (`speculation`).

(Mixing decode with chunks of prefill: Agrawal et al., "Sarathi-Serve", OSDI 2024, arXiv:2403.02310.)

**Memory.** A sequence joins when the pool has blocks for all of its tokens beside what those in the batch still have to
read. As answers grow, the pool may run out all the same: then whoever ranks last (highest `priority` number, then
latest arrival) gives its blocks back and waits in front of the queue, to read its tokens once more, mostly from the
cache. Whoever ranks first is never taken from, so somebody always comes to an end; and since a sequence is only taken
in if it fits alone, everybody does. A sequence whose number is lower joins by taking from those with a higher one.

**Shared beginnings.** Sequences that begin with the same tokens hold the same blocks. One whose next block is being
computed by a sequence that ranks before it waits for that, instead of computing the same beside it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sihe.serving.engine.fairness import ANSWER_WEIGHT, PROMPT_WEIGHT, FairQueue, Place, ServiceCounters
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS, BlockPool, BlockTable, blocks_of

_MAX_DEFERRED = 64  # sequences that are passed over in one step, at most


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of a sequence from position `start`, then up to `drafts` tries of further ones.

    After the `last` of its tokens that are known the next one is sampled.
    """

    id: int
    start: int
    length: int
    last: bool
    drafts: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes; `decode` and `prefill` are told apart by what lacked, one token or more."""

    decode: tuple[Chunk, ...] = ()
    prefill: tuple[Chunk, ...] = ()
    admitted: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    hit_tokens: int = 0  # of those that were admitted, found in the cache

    @property
    def num_tokens(self) -> int:
        """Tokens that the step feeds to the model, drafts not counted."""
        return len(self.decode) + sum(chunk.length for chunk in self.prefill)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


@dataclass(slots=True, eq=False)
class _Entry:
    place: Place
    table: BlockTable
    reuses: bool
    prompt: int  # tokens that it came with
    length: int  # tokens that are known
    computed: int = 0
    charged: int = 0  # tokens of the prompt that its tenant has been charged for, or was given from the cache
    is_reading: bool = False  # in the batch and not yet at its last token

    @property
    def pending(self) -> int:
        return self.length - self.computed


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    budget: int
    decode: dict[int, Chunk] = field(default_factory=dict)
    prefill: dict[int, Chunk] = field(default_factory=dict)
    admitted: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    hit_tokens: int = 0

    def drop(self, id: int) -> None:
        for chunks in (self.decode, self.prefill):
            chunk = chunks.pop(id, None)
            if chunk is not None:
                self.budget += chunk.length


class Scheduler:
    """Holds what waits and what runs, gives it blocks of `pool`, and plans steps over it.

    `plan` hands out blocks and may take them from others; `advance` says what a step has brought a sequence. In between
    nothing else is called but `remove`, by which sequences leave: finished, failed or aborted, waiting or running.
    """

    def __init__(self, pool: BlockPool, *, max_running: int, token_budget: int) -> None:
        if token_budget <= max_running:
            raise ValueError(
                f"a budget of {token_budget} tokens leaves none for prompts beside {max_running} that decode"
            )
        self.pool = pool
        self.max_running = max_running
        self.token_budget = token_budget
        self.num_preemptions = 0
        self._counters = ServiceCounters()
        self._queue = FairQueue(self._counters)
        self._entries: dict[int, _Entry] = {}
        self._running: list[_Entry] = []  # by rank
        self._promised: dict[bytes, _Entry] = {}  # keys of blocks that a running sequence is about to compute
        self._arrivals = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks: new ones, and those that were preempted."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    def decoding(self) -> list[int]:
        """The sequences that lack one token: they decode in the next step, unless memory runs out."""
        return [entry.place.id for entry in self._running if entry.pending == 1]

    def add(
        self, id: int, length: int, table: BlockTable, *, priority: int = 0, tenant: str = "", reuse: bool = True
    ) -> None:
        """Queues a sequence of `length` known tokens (at least 1) that will live in `table`.

        Without `reuse` it computes all of its tokens itself. The caller sees to it that the longest it can become fits
        the pool.
        """
        if length < 1:
            raise ValueError(f"a sequence has at least one token, got {length}")
        if blocks_of(length) > self.pool.num_blocks:
            raise ValueError(f"{length} tokens never fit {self.pool.num_blocks} blocks of {BLOCK_TOKENS}")
        place = Place(id, tenant, priority, self._arrivals)
        self._arrivals += 1
        self._entries[id] = _Entry(place, table, reuse, prompt=length, length=length)
        self._queue.add(place)

    def remove(self, id: int) -> None:
        """Forgets a sequence and gives its blocks back. Unknown ids are no error."""
        entry = self._entries.pop(id, None)
        if entry is None:
            return
        if not self._queue.remove(id):
            self._leave_batch(entry)

    def advance(self, id: int, *, computed: int, length: int) -> None:
        """A step has been computed: the first `computed` tokens are in the cache, and `length` are known now."""
        entry = self._entries[id]
        if length > entry.length:
            self._counters.charge(entry.place.tenant, ANSWER_WEIGHT * (length - entry.length))
        entry.computed, entry.length = computed, length
        entry.table.publish(computed)
        entry.table.trim(length)
        if entry.is_reading and entry.pending <= 1:
            self._end_reading(entry)

    def plan(self, drafts: Mapping[int, int] | None = None, prompt_tokens: int | None = None) -> StepPlan:
        """The next step; empty (false) when there is nothing to do.

        `drafts` are tries that a sequence would like. Beside those that decode `prompt_tokens` of prompts are read at
        most.
        """
        draft = _Draft(self.token_budget)
        at = 0
        while at < len(self._running):  # whoever is preempted meanwhile goes from the end
            entry = self._running[at]
            if entry.pending == 1 and self._fit(entry, entry.length, draft):
                draft.decode[entry.place.id] = Chunk(entry.place.id, entry.computed, 1, last=True)
                draft.budget -= 1
            at += 1
        kept = 0 if prompt_tokens is None or not draft.decode else max(0, draft.budget - prompt_tokens)
        draft.budget -= kept
        self._plan_prefill(draft)
        draft.budget += kept
        if drafts and not draft.prefill:  # a step that reads a prompt is bound by arithmetic: tries would cost
            self._plan_drafts(draft, drafts)
        if self._entries and not (draft.decode or draft.prefill):
            raise RuntimeError("sequences wait and none can go on: the scheduler's accounts are wrong")
        return StepPlan(
            tuple(draft.decode.values()),
            tuple(draft.prefill.values()),
            tuple(draft.admitted),
            tuple(draft.preempted),
            draft.hit_tokens,
        )

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def _plan_prefill(self, draft: _Draft) -> None:
        """Shares the rest of the budget out among those that read and those that wait."""
        reading = {entry.place.id: entry for entry in self._running if entry.pending > 1}
        deferred: set[int] = set()
        is_open = self._may_admit() and not draft.preempted  # what was just taken is for those in the batch
        while draft.budget > 0:
            for id in draft.preempted:
                reading.pop(id, None)
            waiting = self._next_waiting(deferred) if is_open else None
            entry = min(reading.values(), key=self._turn, default=None)
            if waiting is not None and (entry is None or self._goes_before(waiting, entry)):
                if not self._admit(waiting, draft):
                    is_open = False
                    continue
                entry = waiting
            elif entry is None:
                return
            else:
                del reading[entry.place.id]
            is_open &= self._read(entry, draft)

    def _may_admit(self) -> bool:
        """Whether a place in the batch is free, or can be taken from somebody with a higher number."""
        first = self._queue.first_priority()
        if first is None or len(self._running) < self.max_running:
            return first is not None
        return first < self._running[-1].place.priority

    def _next_waiting(self, deferred: set[int]) -> _Entry | None:
        """Who is to join next. Put into `deferred` are those whose beginning somebody else is computing."""
        for place in self._queue.in_order():
            if place.id in deferred:
                continue
            entry = self._entries[place.id]
            if not self._is_being_computed(entry):
                return entry
            deferred.add(place.id)
            if len(deferred) == _MAX_DEFERRED:
                break
        return None

    def _read(self, entry: _Entry, draft: _Draft) -> bool:
        """Plans a chunk of a sequence in the batch, if there are blocks for it; whether nobody lost theirs for it."""
        before = len(draft.preempted)
        length = min(draft.budget, entry.pending)
        end = entry.computed + length
        if not self._fit(entry, end, draft):
            return False
        draft.prefill[entry.place.id] = Chunk(entry.place.id, entry.computed, length, last=end == entry.length)
        draft.budget -= length
        fresh = min(end, entry.prompt) - entry.charged
        if fresh > 0:
            self._counters.charge(entry.place.tenant, PROMPT_WEIGHT * fresh)
            entry.charged += fresh
        return len(draft.preempted) == before

    def _turn(self, entry: _Entry) -> tuple[int, float, int]:
        place = entry.place
        return (place.priority, self._counters.served(place.tenant), place.arrival)

    def _goes_before(self, waiting: _Entry, reading: _Entry) -> bool:
        if self._queue.is_preempted(waiting.place.id):
            return waiting.place.priority <= reading.place.priority
        return self._turn(waiting) < self._turn(reading)

    def _is_being_computed(self, waiting: _Entry) -> bool:
        """Whether the first block that `waiting` would have to compute is on its way."""
        keys = self._reusable(waiting)
        found = len(self.pool.find(keys))
        if found == len(keys):
            return False
        other = self._promised.get(keys[found])
        return other is not None and other.place.rank < waiting.place.rank

    def _admit(self, waiting: _Entry, draft: _Draft) -> bool:
        """Lets a sequence join if there is room, or room can be made among those with a higher number."""
        while True:
            blocks = self.pool.find(self._reusable(waiting))
            # What others in the batch still read is theirs, and each may soon begin another block.
            owed = sum(other.table.missing(other.length) + 1 for other in self._running)
            needed = blocks_of(waiting.length) - len(blocks) + self.pool.num_unheld(blocks)
            if len(self._running) < self.max_running and needed + owed <= self.pool.num_available:
                break
            if not self._may_be_made(waiting, needed):
                return False
            self._preempt(self._running[-1], draft)
        place = waiting.place
        self._counters.begin(place.tenant)  # it still waits, for its tokens to be read: before it leaves the queue
        self._queue.remove(place.id)
        waiting.is_reading = True
        waiting.computed = waiting.table.reuse(blocks)
        waiting.charged = max(waiting.charged, min(waiting.computed, waiting.prompt))
        insort(self._running, waiting, key=_rank)
        for key in waiting.table.keys[len(blocks) :]:
            self._promised.setdefault(key, waiting)
        draft.admitted.append(place.id)
        draft.hit_tokens += waiting.computed
        return True

    def _may_be_made(self, waiting: _Entry, blocks: int) -> bool:
        """Whether `waiting` could join if everybody with a higher number left, as far as can be told beforehand."""
        others = [entry for entry in self._running if entry.place.priority <= waiting.place.priority]
        if len(others) in (len(self._running), self.max_running):
            return False
        owed = sum(other.table.missing(other.length) + 1 for other in others)
        freed = sum(len(entry.table.blocks) for entry in self._running[len(others) :])  # less where blocks are shared
        return blocks + owed <= self.pool.num_available + freed

    def _reusable(self, entry: _Entry) -> list[bytes]:
        """Keys of the blocks that may be found: not the one with the last token, whose output is wanted."""
        return [] if not entry.reuses else entry.table.keys[: (entry.length - 1) // BLOCK_TOKENS]

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _fit(self, entry: _Entry, tokens: int, draft: _Draft) -> bool:
        """Gives a sequence blocks for `tokens`, taking them from those that rank behind it; false: it has to wait."""
        while entry.table.missing(tokens) > self.pool.num_available:
            worst = self._running[-1]
            if worst is entry:
                return False
            self._preempt(worst, draft)
        entry.table.grow(tokens)
        return True

    def _preempt(self, entry: _Entry, draft: _Draft) -> None:
        self._queue.put_back(entry.place)
        self._leave_batch(entry)
        entry.computed = 0
        draft.drop(entry.place.id)
        draft.preempted.append(entry.place.id)
        self.num_preemptions += 1

    def _leave_batch(self, entry: _Entry) -> None:
        self._running.remove(entry)
        for key in entry.table.keys:
            if self._promised.get(key) is entry:
                del self._promised[key]
        entry.table.clear()
        if entry.is_reading:
            self._end_reading(entry)

    def _end_reading(self, entry: _Entry) -> None:
        entry.is_reading = False
        self._counters.end(entry.place.tenant)

    # ---- drafts -----------------------------------------------------------------------------------------------------

    def _plan_drafts(self, draft: _Draft, wanted: Mapping[int, int]) -> None:
        """Lets those that decode try further tokens, as far as budget and blocks go that nobody holds."""
        for id, chunk in draft.decode.items():
            entry = self._entries[id]
            room = (len(entry.table.blocks) + self.pool.num_available) * BLOCK_TOKENS - entry.length
            drafts = min(wanted.get(id, 0), draft.budget, room)
            if drafts > 0:
                entry.table.grow(entry.length + drafts)
                draft.decode[id] = replace(chunk, drafts=drafts)
                draft.budget -= drafts


def _rank(entry: _Entry) -> tuple[int, int]:
    return entry.place.rank
