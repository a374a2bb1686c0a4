"""Lab `batch.continuous`: who is in a step, on the engine's own scheduler: places, pauses, memory, turns."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text
from sihe.serving.engine.kv.blocks import BlockPool, BlockTable, blocks_of, root_key
from sihe.serving.engine.scheduler import Scheduler, StepPlan

PLACES = 32
MEAN_ANSWER = 200
BUDGETS = (128, 256, 512, 1024, 2048, 4096)
MEMORIES = (100, 50, 30, 20)  # per cent of what all would take
# Llama-3-8B in bf16 (arXiv 2407.21783, table 3) on an H100 (data sheet: 3.35 TB/s) with 400 useful TFLOP/s, assumed.
READ_S = 16.06e9 / 3.35e12
TOKEN_S = 2 * 8.03e9 / 400e12
_CROWD = 64  # requests that share a pool
_CROWD_PROMPT = 200
_CROWD_ANSWER = 400
_FLOOD = 100  # prompts of one tenant, before another's single request
_FLOOD_PROMPT = 2000
_ROOT = root_key(b"lab")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a replay; a token of its answer is said at the end of each step that it decodes in."""

    prompt: int
    answer: int
    arrives_s: float = 0.0
    tenant: str = ""


@dataclass(slots=True)
class Replay:
    """What the scheduler did with some requests; times run from each one's arrival."""

    steps: int = 0
    said: int = 0
    preemptions: int = 0
    first_s: dict[int, float] = field(default_factory=dict)
    pause_s: dict[int, float] = field(default_factory=dict)
    """By request, the longest time between two tokens of its answer."""


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Replays four situations; nothing is timed, so every run gives the same numbers."""
    del limit_s  # a few seconds
    budget, prompt, memory = (int(parameters[key]) for key in ("budget", "prompt", "memory"))
    answers = {"geometric": geometric(1024, MEAN_ANSWER), "uniform": uniform(1024, MEAN_ANSWER)}
    full = {kind: occupancy(lengths) for kind, lengths in answers.items()}
    pauses = {size: pause(size, prompt) for size in sorted({*BUDGETS, budget, PLACES + prompt})}
    crowds = {percent: crowded(percent) for percent in sorted({*MEMORIES, memory}, reverse=True)}
    roomy, tight = crowds[100], crowds[memory]
    values = {
        "places-formula": 100 / sum(1 / n for n in range(1, PLACES + 1)),
        "places-static": 100 * full["geometric"][0],
        "places-continuous": 100 * full["geometric"][1],
        "fewer-steps": full["geometric"][1] / full["geometric"][0],
        "uniform-static": 100 * full["uniform"][0],
        "uniform-continuous": 100 * full["uniform"][1],
        "pause-whole": 1e3 * pauses[PLACES + prompt][0],
        "pause-chunked": 1e3 * pauses[budget][0],
        "first-whole": 1e3 * pauses[PLACES + prompt][1],
        "first-chunked": 1e3 * pauses[budget][1],
        "free-tokens": READ_S / TOKEN_S,
        "preemptions": tight.preemptions,
        "more-steps": 100 * (tight.steps / roomy.steps - 1),
        "wait-queue": flooded(by_turns=False),
        "wait-turns": flooded(by_turns=True),
    }
    return Measurement(values=values, tables=(_pauses(pauses), _memory(crowds, roomy)), series=_series(pauses))


def replay(
    requests: Sequence[Request], *, places: int, budget: int, step_s: Callable[[int], float], blocks: int | None = None
) -> Replay:
    """Lets the scheduler work through `requests`, with `step_s` seconds for a step of so many tokens.

    Nothing is found in the cache. Without a number of `blocks` there are enough for all at once.
    """
    # One more for each, which the scheduler keeps for those that run.
    wanted = sum(blocks_of(request.prompt + request.answer) + 1 for request in requests)
    pool = BlockPool(wanted if blocks is None else blocks)
    scheduler = Scheduler(pool, max_running=places, token_budget=budget)
    known = [request.prompt for request in requests]
    newest: dict[int, float] = {}  # when a request has said its newest token
    coming = sorted(range(len(requests)), key=lambda id: requests[id].arrives_s)[::-1]  # the next one last
    found, now_s = Replay(), 0.0
    while coming or scheduler.num_running or scheduler.num_waiting:
        while coming and requests[coming[-1]].arrives_s <= now_s:
            id = coming.pop()
            table = BlockTable(pool, _ROOT, [])
            scheduler.add(id, known[id], table, tenant=requests[id].tenant, reuse=False)
        plan = scheduler.plan()
        if not plan:
            now_s = requests[coming[-1]].arrives_s
            continue
        found.steps += 1
        now_s += step_s(plan.num_tokens)
        _compute(plan, scheduler, requests, known)
        for id in (chunk.id for chunk in (*plan.decode, *plan.prefill) if chunk.last):
            found.said += 1
            if id in newest:
                found.pause_s[id] = max(found.pause_s.get(id, 0.0), now_s - newest[id])
            else:
                found.first_s[id] = now_s - requests[id].arrives_s
            newest[id] = now_s
    found.preemptions = scheduler.num_preemptions
    return found


def _compute(plan: StepPlan, scheduler: Scheduler, requests: Sequence[Request], known: list[int]) -> None:
    """What the engine tells the scheduler after a step."""
    for chunk in (*plan.decode, *plan.prefill):
        known[chunk.id] += chunk.last
        if known[chunk.id] == requests[chunk.id].prompt + requests[chunk.id].answer:
            scheduler.remove(chunk.id)
        else:
            scheduler.advance(chunk.id, computed=chunk.start + chunk.length, length=known[chunk.id])


def geometric(number: int, mean: float) -> list[int]:
    """Lengths of which any token may be the last with the same chance."""
    draws = random.Random(0)
    return [max(1, math.ceil(draws.expovariate(1 / mean))) for _ in range(number)]


def uniform(number: int, mean: int) -> list[int]:
    """Lengths from 1 to twice the mean."""
    draws = random.Random(0)
    return [draws.randint(1, 2 * mean) for _ in range(number)]


def occupancy(answers: Sequence[int]) -> tuple[float, float]:
    """The share of places that work, when batches wait for their longest and when each step is formed anew."""
    static = sum(max(answers[at : at + PLACES]) for at in range(0, len(answers), PLACES))
    requests = [Request(1, answer) for answer in answers]
    steps = replay(requests, places=PLACES, budget=BUDGETS[2], step_s=lambda _: 1.0).steps
    return sum(answers) / (PLACES * static), sum(answers) / (PLACES * steps)


def seconds_of(tokens: int) -> float:
    """A step on the device of the lab: the weights are read once, or the products take longer. Caches are left out."""
    return max(READ_S, TOKEN_S * tokens)


def pause(budget: int, prompt: int) -> tuple[float, float]:
    """A long prompt comes to 31 that decode: the longest pause of theirs, and the time to its first token."""
    others = [Request(64, 400) for _ in range(PLACES - 1)]
    late = Request(prompt, 2, arrives_s=0.5)
    found = replay([*others, late], places=PLACES, budget=budget, step_s=seconds_of)
    return max(found.pause_s[id] for id in range(len(others))), found.first_s[len(others)]


def crowded(percent: int) -> Replay:
    """64 requests at once, in so much of the memory that all of them would take to their end."""
    answers = geometric(_CROWD, _CROWD_ANSWER)
    whole = sum(blocks_of(_CROWD_PROMPT + answer) + 1 for answer in answers)
    requests = [Request(_CROWD_PROMPT, answer) for answer in answers]
    blocks = max(whole * percent // 100, blocks_of(_CROWD_PROMPT + max(answers)))
    return replay(requests, places=_CROWD, budget=BUDGETS[2], step_s=lambda _: 1.0, blocks=blocks)


def flooded(*, by_turns: bool) -> float:
    """Seconds to the first token of one short prompt behind a flood, of the same tenant or of one of its own."""
    flood = [Request(_FLOOD_PROMPT, 50, tenant="flood") for _ in range(_FLOOD)]
    single = Request(100, 2, arrives_s=0.1, tenant="other" if by_turns else "flood")
    found = replay([*flood, single], places=PLACES, budget=BUDGETS[2], step_s=seconds_of)
    return found.first_s[_FLOOD]


def _memory(crowds: Mapping[int, Replay], roomy: Replay) -> Table:
    return Table(
        key="memory",
        title=Text(zh="64 个请求同时到来，显存不够", en="64 requests at once, and too little memory"),
        columns=(
            Column(label=Text(zh="显存，占全部所需之比", en="Memory, of what all would take"), unit="%"),
            Column(label=Text(zh="抢占次数", en="Preemptions"), provenance="modelled"),
            Column(label=Text(zh="步数", en="Steps"), provenance="modelled"),
            Column(label=Text(zh="多花的步数", en="More steps"), unit="%", provenance="modelled"),
        ),
        rows=tuple(
            (percent, found.preemptions, found.steps, round(100 * (found.steps / roomy.steps - 1), 1))
            for percent, found in crowds.items()
        ),
    )


def _pauses(pauses: Mapping[int, tuple[float, float]]) -> Table:
    return Table(
        key="pauses",
        title=Text(
            zh="长提示到来：别人的停顿与它自己的首词元",
            en="A long prompt comes: the others' pause and its own first token",
        ),
        columns=(
            Column(label=Text(zh="每步预算", en="Budget of a step"), unit="tokens"),
            Column(label=Text(zh="最长停顿", en="Longest pause"), unit="ms", provenance="modelled"),
            Column(label=Text(zh="首词元", en="First token"), unit="ms", provenance="modelled"),
        ),
        rows=tuple(
            (budget, round(1e3 * longest, 1), round(1e3 * first)) for budget, (longest, first) in pauses.items()
        ),
    )


def _series(pauses: Mapping[int, tuple[float, float]]) -> tuple[Series, ...]:
    labels = (
        Text(zh="别人的最长停顿", en="The others' longest pause"),
        Text(zh="长提示的首词元", en="Its first token"),
    )
    return tuple(
        Series(
            key=key,
            chart="budget",
            label=labels[place],
            x=Axis(label=Text(zh="每步预算", en="Budget of a step"), unit="tokens", log=True),
            y=Axis(label=Text(zh="时间", en="Time"), unit="ms", log=True),
            provenance="modelled",
            points=tuple((float(budget), 1e3 * found[place]) for budget, found in pauses.items()),
        )
        for place, key in enumerate(("pause", "first"))
    )
