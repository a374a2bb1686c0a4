"""How long a call takes and how much memory it needs, for the processes that measure."""

from __future__ import annotations

import time
from collections.abc import Callable

_SHORTEST_SAMPLE_S = 0.15
_MOST_REPEATS = 50


def best_seconds(call: Callable[[], object], *, least_repeats: int = 3) -> float:
    """Seconds of the fastest of several calls: what the machine can do when nothing else disturbs it."""
    taken: list[float] = []
    while len(taken) < least_repeats or (sum(taken) < _SHORTEST_SAMPLE_S and len(taken) < _MOST_REPEATS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that torch's CPU allocator held for `call` at one time, over what it held before.

    Exact, unlike the resident size of a process: every allocation and release is in the profile.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        call()
    held = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
