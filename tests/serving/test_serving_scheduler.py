"""The scheduling policy, by simulation: no model, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.serving.engine.scheduler import Chunk, Scheduler, StepPlan


@dataclass
class Arrival:
    """A request of the simulation; `abort_after` steps in the system it is taken away."""

    at_step: int
    prompt: int
    answer: int
    abort_after: int | None = None


@dataclass
class Trace:
    """What happened to one request."""

    chunks: list[Chunk] = field(default_factory=list)
    first_chunk_step: int | None = None
    decode_steps: list[int] = field(default_factory=list)
    tokens: int = 0
    ended_step: int | None = None


def simulate(arrivals: list[Arrival], *, slots: int, budget: int) -> tuple[list[Trace], list[StepPlan]]:
    """Runs until everything has ended, as the engine would."""
    scheduler = Scheduler(slots=slots, token_budget=budget)
    traces = [Trace() for _ in arrivals]
    plans: list[StepPlan] = []
    step = 0
    while any(trace.ended_step is None for trace in traces):
        for id, arrival in enumerate(arrivals):
            if arrival.at_step == step:
                scheduler.add(id, arrival.prompt)
            elif arrival.abort_after is not None and step == arrival.at_step + arrival.abort_after:
                scheduler.remove(id)
                traces[id].ended_step = traces[id].ended_step if traces[id].ended_step is not None else step
        plan = scheduler.plan()
        assert plan == scheduler.plan(), "planning changes nothing"
        scheduler.commit(plan)
        plans.append(plan)
        for chunk in plan.prefill:
            trace = traces[chunk.id]
            trace.chunks.append(chunk)
            trace.first_chunk_step = step if trace.first_chunk_step is None else trace.first_chunk_step
        for id in [*plan.decode, *(chunk.id for chunk in plan.prefill if chunk.last)]:
            traces[id].decode_steps.append(step)
            traces[id].tokens += 1
            if traces[id].tokens == arrivals[id].answer:
                scheduler.remove(id)
                traces[id].ended_step = step
        assert scheduler.num_running <= slots
        step += 1
        assert step < 20_000, "the simulation does not end: somebody starves"
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    return traces, plans


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        at_step=st.integers(0, 30),
        prompt=st.integers(1, 90),
        answer=st.integers(1, 20),
        abort_after=st.none() | st.integers(1, 25),
    ),
    min_size=1,
    max_size=25,
)


@given(arrivals=ARRIVALS, slots=st.integers(1, 6), spare=st.integers(1, 40))
def test_every_schedule_keeps_the_promises(arrivals: list[Arrival], slots: int, spare: int) -> None:
    budget = slots + spare
    traces, plans = simulate(arrivals, slots=slots, budget=budget)
    assert all(plan.num_tokens <= budget for plan in plans)
    for arrival, trace in zip(arrivals, traces, strict=True):
        read = 0
        for chunk in trace.chunks:  # the chunks are the prompt, in order, without gap or overlap
            assert chunk.start == read
            assert chunk.length >= 1
            read += chunk.length
            assert chunk.last == (read == arrival.prompt)
        # From its first token on, a sequence gets one in every step, however long others' prompts are.
        if trace.decode_steps:
            first = trace.decode_steps[0]
            assert trace.decode_steps == list(range(first, first + trace.tokens))
        if arrival.abort_after is None:
            assert trace.tokens == arrival.answer
    # First come, first read: nobody overtakes.
    order = sorted(range(len(arrivals)), key=lambda id: (arrivals[id].at_step, id))
    begun = [step for id in order if (step := traces[id].first_chunk_step) is not None]
    assert begun == sorted(begun)


def test_a_long_prompt_does_not_stall_a_running_answer() -> None:
    short, long = Arrival(0, prompt=4, answer=40), Arrival(2, prompt=1000, answer=2)
    traces, plans = simulate([short, long], slots=4, budget=68)
    assert traces[0].decode_steps == list(range(40))
    assert max(plan.num_tokens for plan in plans) == 68
    assert len(traces[1].chunks) == 15  # 1000 tokens beside one that decodes: 67 a step


def test_short_prompts_are_read_together() -> None:
    traces, plans = simulate([Arrival(0, 10, 1) for _ in range(4)], slots=4, budget=40)
    assert [len(plan.prefill) for plan in plans] == [4]
    assert all(trace.tokens == 1 for trace in traces)


def test_an_aborted_request_frees_its_slot_for_the_next_step() -> None:
    scheduler = Scheduler(slots=1, token_budget=8)
    scheduler.add(1, 3)
    scheduler.add(2, 3)
    scheduler.commit(scheduler.plan())
    assert scheduler.num_waiting == 1
    scheduler.remove(1)
    assert scheduler.plan() == StepPlan(prefill=(Chunk(2, 0, 3, last=True),), admitted=(2,))


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert not Scheduler(slots=1, token_budget=2).plan()


def test_a_budget_that_starves_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="none for prompts"):
        Scheduler(slots=8, token_budget=8)
