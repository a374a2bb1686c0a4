"""The pipeline's idle time, and how many micro-batches a rank has begun and not finished."""

from __future__ import annotations

from sihe.cluster.planner.types import Layout


def bubble(layout: Layout) -> float:
    """Idle share of a rank's time, of stages that all take equally long, forward one part and backward two.

    (p - 1) / (v m + p - 1) for p ranks with v stages each and m micro-batches (Narayanan et al. 2021, arXiv 2104.04473,
    section 2.2, which counts it relative to the busy time). Zero-bubble schedules put the gradients of weights, a third
    of the work, where ranks would wait: ZB-H1 leaves a third of the bubble (Qi et al. 2023, arXiv 2401.10241, table 2;
    the interleaved one is counted alike), ZB-V none when its parts are even (arXiv 2405.15362). DualPipe-V, which
    orders the same stages in the same V, is counted as ZB-V.
    """
    if layout.pp == 1:
        return 0.0
    idle, busy = float(layout.pp - 1), float(layout.stages_per_rank * layout.microbatches)
    if layout.schedule == "interleaved-zero-bubble":
        idle /= 3
    elif layout.schedule in ("zbv", "dualpipe-v"):
        idle = 0.0
    return idle / (busy + idle)


def in_flight(layout: Layout) -> float:
    """Micro-batches' worth of a rank's own layers that the fullest rank keeps activations of.

    GPipe keeps all; 1F1B as many as there are ranks; interleaving 1 + (p - 1) / (p v) times that (Korthikanti et al.
    2022, arXiv 2205.05198, section 4.2.3); ZB-V as many as 1F1B (Qi et al. 2024, arXiv 2405.15362); DualPipe-V one
    more (DeepSeek-V3, arXiv 2412.19437, table 2).
    """
    ranks, most = layout.pp, float(layout.microbatches)
    if ranks == 1:
        return 1.0
    if layout.schedule == "gpipe":
        return most
    if layout.schedule.startswith("interleaved"):
        return min(most, ranks * (1 + (ranks - 1) / (ranks * layout.stages_per_rank)))
    return min(most, ranks + (1 if layout.schedule == "dualpipe-v" else 0))
