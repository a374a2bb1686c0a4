"""The scheduling policy, by simulation over a real pool of blocks: no model, no clock."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.serving.engine.fairness import ANSWER_WEIGHT, PROMPT_WEIGHT
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS, BlockPool, BlockTable, blocks_of, chain, root_key
from sihe.serving.engine.scheduler import Chunk, Scheduler, StepPlan

ROOT = root_key(b"model@1")


@dataclass
class Arrival:
    """A request of the simulation; `abort_after` steps in the system it is taken away. `text` numbers its prompt:
    prompts of one number are the same tokens as far as they go."""

    at_step: int
    prompt: int
    answer: int
    abort_after: int | None = None
    priority: int = 0
    tenant: str = ""
    text: int | None = None
    drafts: int = 0


@dataclass
class Trace:
    """What happened to one request."""

    chunks: list[Chunk] = field(default_factory=list)
    first_step: int | None = None
    token_steps: list[int] = field(default_factory=list)
    preemptions: int = 0
    ended_step: int | None = None


@dataclass
class Simulation:
    """Runs requests as the engine would. The text of an answer is drawn from `seed`; half of the drafts come true."""

    arrivals: list[Arrival]
    max_running: int = 8
    budget: int = 64
    blocks: int = 1000
    seed: int = 0
    plans: list[StepPlan] = field(default_factory=list)

    def run(self) -> list[Trace]:
        """Until everything has ended."""
        self.source = random.Random(self.seed)
        self.pool = BlockPool(self.blocks)
        self.scheduler = Scheduler(self.pool, max_running=self.max_running, token_budget=self.budget)
        self.traces = [Trace() for _ in self.arrivals]
        self.tokens = [self._prompt(id, arrival) for id, arrival in enumerate(self.arrivals)]
        self.tables = [BlockTable(self.pool, ROOT, chain(ROOT, tokens)) for tokens in self.tokens]
        self.computed = [0] * len(self.arrivals)
        self.step = 0
        while any(trace.ended_step is None for trace in self.traces):
            self._come_and_go()
            self._compute(self.scheduler.plan({id: arrival.drafts for id, arrival in enumerate(self.arrivals)}))
            self.step += 1
            assert self.step < 20_000, "the simulation does not end: somebody starves"
        assert (self.scheduler.num_running, self.scheduler.num_waiting, self.pool.num_used) == (0, 0, 0)
        return self.traces

    def _prompt(self, id: int, arrival: Arrival) -> list[int]:
        text = random.Random(f"own {id}" if arrival.text is None else f"text {arrival.text}")
        return [text.randrange(1000) for _ in range(arrival.prompt)]

    def _come_and_go(self) -> None:
        for id, arrival in enumerate(self.arrivals):
            if arrival.at_step == self.step:
                self.scheduler.add(
                    id, arrival.prompt, self.tables[id], priority=arrival.priority, tenant=arrival.tenant
                )
            elif arrival.abort_after is not None and self.step == arrival.at_step + arrival.abort_after:
                self._end(id)

    def _end(self, id: int) -> None:
        self.scheduler.remove(id)
        trace = self.traces[id]
        trace.ended_step = self.step if trace.ended_step is None else trace.ended_step

    def _compute(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        chunks = [*plan.decode, *plan.prefill]
        assert plan.num_tokens + sum(chunk.drafts for chunk in chunks) <= self.budget
        assert len({chunk.id for chunk in chunks}) == len(chunks)
        assert self.scheduler.num_running <= self.max_running
        for id in plan.preempted:
            self.computed[id] = 0
            self.traces[id].preemptions += 1
            assert self.tables[id].blocks == [] or id in plan.admitted
        held: dict[int, int] = {}  # a block with what nobody has computed yet belongs to one sequence alone
        for chunk in chunks:
            blocks = self.tables[chunk.id].blocks
            assert len(blocks) * BLOCK_TOKENS >= chunk.start + chunk.length + chunk.drafts
            for block in blocks[chunk.start // BLOCK_TOKENS :]:
                assert held.setdefault(block, chunk.id) == chunk.id
                assert self.pool.references(block) == 1
        for chunk in chunks:  # each goes on where it was, but for what the cache knows when it joins
            if chunk.id in plan.admitted:
                assert chunk.start % BLOCK_TOKENS == 0
            else:
                assert chunk.start == self.computed[chunk.id]
            self._advance(chunk)

    def _advance(self, chunk: Chunk) -> None:
        id, trace, tokens = chunk.id, self.traces[chunk.id], self.tokens[chunk.id]
        trace.chunks.append(chunk)
        trace.first_step = self.step if trace.first_step is None else trace.first_step
        assert chunk.length >= 1
        assert chunk.last == (chunk.start + chunk.length == len(tokens))
        self.computed[id] = chunk.start + chunk.length
        if chunk.last:
            accepted = sum(self.source.random() < 0.5 for _ in range(chunk.drafts))
            left = self.arrivals[id].answer - len(trace.token_steps)
            for _ in range(min(accepted + 1, left)):
                self._say(id)
            self.computed[id] = len(tokens) - 1
        self.scheduler.advance(id, computed=self.computed[id], length=len(tokens))
        if len(trace.token_steps) == self.arrivals[id].answer:
            self._end(id)

    def _say(self, id: int) -> None:
        tokens, keys = self.tokens[id], self.tables[id].keys
        tokens.append(self.source.randrange(3))
        self.traces[id].token_steps.append(self.step)
        if len(tokens) % BLOCK_TOKENS == 0:
            keys += chain(keys[-1] if keys else ROOT, tokens[-BLOCK_TOKENS:])


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        at_step=st.integers(0, 30),
        prompt=st.integers(1, 90),
        answer=st.integers(1, 40),
        abort_after=st.none() | st.integers(1, 25),
        priority=st.sampled_from([0, 0, 0, -1, 5]),
        tenant=st.sampled_from(["a", "b", "c"]),
        text=st.none() | st.integers(0, 1),
        drafts=st.sampled_from([0, 0, 3]),
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None)
@given(
    arrivals=ARRIVALS,
    max_running=st.integers(1, 6),
    spare=st.integers(1, 40),
    blocks=st.integers(9, 40),
    seed=st.integers(0, 9),
)
def test_every_schedule_keeps_the_promises(
    arrivals: list[Arrival], max_running: int, spare: int, blocks: int, seed: int
) -> None:
    """The pool holds the longest sequence alone (130 tokens), and often not much more."""
    simulation = Simulation(arrivals, max_running, max_running + spare, blocks, seed)
    for arrival, trace in zip(arrivals, simulation.run(), strict=True):
        if arrival.abort_after is None:
            assert len(trace.token_steps) == arrival.answer


@settings(deadline=None)
@given(arrivals=ARRIVALS, max_running=st.integers(1, 6), spare=st.integers(1, 40))
def test_with_memory_for_all_nobody_pauses_and_nobody_overtakes(
    arrivals: list[Arrival], max_running: int, spare: int
) -> None:
    alike = [Arrival(item.at_step, item.prompt, item.answer, item.abort_after) for item in arrivals]
    traces = Simulation(alike, max_running, max_running + spare).run()
    for trace in traces:
        assert trace.preemptions == 0
        if trace.token_steps:  # from its first token on one in every step, however long others' prompts are
            first = trace.token_steps[0]
            assert trace.token_steps == list(range(first, first + len(trace.token_steps)))
    order = sorted(range(len(alike)), key=lambda id: (alike[id].at_step, id))
    begun = [step for id in order if (step := traces[id].first_step) is not None]
    assert begun == sorted(begun)


def test_a_long_prompt_does_not_stall_a_running_answer() -> None:
    short, long = Arrival(0, prompt=4, answer=40), Arrival(2, prompt=1000, answer=2)
    simulation = Simulation([short, long], max_running=4, budget=68)
    traces = simulation.run()
    assert traces[0].token_steps == list(range(40))
    assert max(plan.num_tokens for plan in simulation.plans) == 68
    assert len(traces[1].chunks) == 16  # 1000 tokens beside one that decodes: 67 a step; then the second token


def test_short_prompts_are_read_together() -> None:
    simulation = Simulation([Arrival(0, 10, 1) for _ in range(4)], max_running=4, budget=40)
    simulation.run()
    assert [len(plan.prefill) for plan in simulation.plans] == [4]


def test_a_short_pool_preempts_the_latest_and_reads_it_again_from_the_cache() -> None:
    first, second = Arrival(0, prompt=64, answer=60), Arrival(0, prompt=64, answer=60)
    simulation = Simulation([first, second], max_running=2, budget=200, blocks=12)
    traces = simulation.run()
    assert (traces[0].preemptions, traces[1].preemptions) == (0, 1)
    assert traces[0].token_steps == list(range(60))
    again = next(chunk for chunk in traces[1].chunks[1:] if chunk.length > 1)
    assert again.start > 0  # part of what it had was still known
    assert again.last


def test_who_is_more_urgent_takes_the_place_of_who_is_less() -> None:
    slow = [Arrival(0, prompt=20, answer=50, priority=1) for _ in range(2)]
    urgent = Arrival(5, prompt=20, answer=5, priority=0)
    traces = Simulation([*slow, urgent], max_running=2, budget=100).run()
    assert traces[2].token_steps == list(range(5, 10))
    assert [trace.preemptions for trace in traces] == [0, 1, 0]
    same = [Arrival(item.at_step, item.prompt, item.answer) for item in (*slow, urgent)]
    assert Simulation(same, max_running=2, budget=100).run()[2].token_steps[0] >= 50


@pytest.mark.parametrize("wanted", [80, 150])
def test_who_gives_way_in_vain_is_not_read_meanwhile(wanted: int) -> None:
    """Urgent ones of 80 tokens find room when the slow one leaves; of 150 they do not, whoever leaves."""
    pool = BlockPool(16)
    scheduler = Scheduler(pool, max_running=4, token_budget=60)
    slow, first, second = (BlockTable(pool, ROOT, []) for _ in range(3))
    scheduler.add(0, 100, first, priority=0)
    scheduler.plan()
    scheduler.advance(0, computed=60, length=100)
    scheduler.add(1, 100, slow, priority=1)
    scheduler.plan()
    scheduler.advance(0, computed=100, length=101)
    scheduler.advance(1, computed=20, length=100)
    scheduler.add(2, wanted, second, priority=0)
    plan = scheduler.plan()
    assert plan.preempted == ((1,) if wanted == 80 else ())
    assert plan.admitted == ((2,) if wanted == 80 else ())
    assert [chunk.id for chunk in plan.prefill] == ([2] if wanted == 80 else [1])
    assert (len(slow.blocks) == 0) == (wanted == 80)


def test_prompts_that_begin_alike_are_read_once() -> None:
    """Eight at once, as the choices of one request: the first reads, the others wait for it and share its blocks."""
    arrivals = [Arrival(0, prompt=200, answer=3, text=1) for _ in range(8)]
    simulation = Simulation(arrivals, max_running=8, budget=100, blocks=40)
    traces = simulation.run()
    read = [sum(chunk.length for chunk in trace.chunks) for trace in traces]
    assert read == [202] + [8 + 2] * 7  # 200 tokens are 12 full blocks and 8 tokens; then two tokens of the answer
    assert simulation.pool.num_cached == 12
    # Whoever comes later finds them, too; and who asks for its own computation gets that.
    assert simulation.plans[0].hit_tokens == 0
    assert sum(plan.hit_tokens for plan in simulation.plans) == 7 * 192


def test_a_sequence_that_wants_its_own_computation_shares_nothing() -> None:
    pool = BlockPool(20)
    scheduler = Scheduler(pool, max_running=2, token_budget=100)
    keys = chain(ROOT, list(range(64)))
    for id, reuse in ((0, True), (1, False)):
        scheduler.add(id, 64, BlockTable(pool, ROOT, list(keys)), reuse=reuse)
    assert scheduler.plan().prefill == (Chunk(0, 0, 64, last=True), Chunk(1, 0, 36, last=False))


@pytest.mark.parametrize("weights", [(40, 10), (8, 60)])
def test_tenants_get_the_same_service_whatever_they_send(weights: tuple[int, int]) -> None:
    """One tenant floods with long answers, the other sends as it can; both always have something waiting.

    The bound of arXiv:2401.00588, section 4: twice the larger of a longest prompt and of what the whole batch holds.
    """
    prompt, answer = weights
    greedy = [Arrival(0, prompt * 2, answer * 2, tenant="greedy") for _ in range(120)]
    modest = [Arrival(0, prompt, answer, tenant="modest") for _ in range(240)]
    simulation = Simulation([*greedy, *modest], max_running=8, budget=64)
    simulation.run()
    service = {"greedy": 0.0, "modest": 0.0}
    bound = 2 * max(PROMPT_WEIGHT * prompt * 2, ANSWER_WEIGHT * 8 * (prompt + answer) * 2)
    both_wait = min(
        max(trace.first_step or 0 for trace in simulation.traces[:120]),
        max(trace.first_step or 0 for trace in simulation.traces[120:]),
    )
    for plan in simulation.plans[:both_wait]:
        for chunk in (*plan.decode, *plan.prefill):
            tenant = simulation.arrivals[chunk.id].tenant
            said = ANSWER_WEIGHT if chunk.last else 0
            read = min(chunk.length, max(0, simulation.arrivals[chunk.id].prompt - chunk.start))
            service[tenant] += PROMPT_WEIGHT * read + said
        assert abs(service["greedy"] - service["modest"]) <= bound
    assert min(service.values()) > 2 * bound  # the difference did not grow with time


def test_a_flood_does_not_delay_somebody_elses_single_request() -> None:
    flood = [Arrival(0, 50, 20, tenant="flood") for _ in range(200)]
    single = Arrival(40, 50, 5, tenant="single")
    traces = Simulation([*flood, single], max_running=8, budget=64).run()
    assert traces[200].first_step is not None
    assert traces[200].first_step <= 40 + 20  # the next place that comes free is its own
    assert max(trace.ended_step or 0 for trace in traces) > 400


def test_being_away_saves_up_no_claim() -> None:
    """A tenant that comes back is served next, but not before the others until it has caught up."""
    early = [Arrival(0, 20, 5, tenant="early") for _ in range(400)]
    late = [Arrival(150, 20, 5, tenant="late") for _ in range(200)]
    traces = Simulation([*early, *late], max_running=4, budget=40).run()
    begun = sorted(
        (trace.first_step or 0, id >= 400) for id, trace in enumerate(traces) if (trace.first_step or 0) > 160
    )
    window = [is_late for _, is_late in begun[:100]]
    assert 40 <= sum(window) <= 60


def test_a_long_prompt_of_one_tenant_does_not_close_the_door_to_another() -> None:
    long, short = Arrival(0, 3000, 1, tenant="long"), Arrival(1, 30, 3, tenant="short")
    traces = Simulation([long, short], max_running=4, budget=64).run()
    assert traces[1].token_steps[0] <= 3
    assert (traces[0].ended_step or 0) > 45


def test_drafts_take_only_what_is_free() -> None:
    pool = BlockPool(4)
    scheduler = Scheduler(pool, max_running=2, token_budget=20)
    tables = [BlockTable(pool, ROOT, []) for _ in range(2)]
    for id, table in enumerate(tables):
        scheduler.add(id, 10, table)
        scheduler.plan()
        scheduler.advance(id, computed=10, length=11)
    plan = scheduler.plan({0: 30, 1: 4})
    assert [chunk.drafts for chunk in plan.decode] == [18, 0]  # as far as the budget goes
    scheduler.advance(0, computed=14, length=15)
    scheduler.advance(1, computed=11, length=12)
    assert [len(table.blocks) for table in tables] == [1, 1]  # what was tried in vain is given back
    plan = scheduler.plan({0: 3, 1: 40})
    assert [chunk.drafts for chunk in plan.decode] == [3, 15]
    scheduler.remove(0)
    scheduler.remove(1)
    assert pool.num_used == 0


def test_an_aborted_request_frees_its_place_for_the_next_step() -> None:
    pool = BlockPool(4)
    scheduler = Scheduler(pool, max_running=1, token_budget=8)
    for id in (1, 2):
        scheduler.add(id, 3, BlockTable(pool, ROOT, []))
    scheduler.plan()
    scheduler.advance(1, computed=3, length=4)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    scheduler.remove(1)
    scheduler.remove(1)
    assert scheduler.plan() == StepPlan(prefill=(Chunk(2, 0, 3, last=True),), admitted=(2,))


def test_what_can_never_run_is_refused() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="none for prompts"):
        Scheduler(pool, max_running=8, token_budget=8)
    scheduler = Scheduler(pool, max_running=1, token_budget=2)
    assert not scheduler.plan()
    for length, message in ((0, "at least one token"), (33, "never fit 2 blocks")):
        with pytest.raises(ValueError, match=message):
            scheduler.add(1, length, BlockTable(pool, ROOT, []))
    assert blocks_of(32) == 2
