"""Lab `plan.search`: which layout of a model fits a cluster and how long a step takes, beside published tables.

Everything here is computed by the planner; nothing runs. What others have measured stands beside it, as cited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sihe.apps.coach.labs.types import Column, Measurement, Table
from sihe.apps.coach.schema import Text
from sihe.cluster.planner import presets
from sihe.cluster.planner.memory import activation_bytes, own_widths, state_bytes
from sihe.cluster.planner.pipeline import bubble
from sihe.cluster.planner.search import USABLE_MEMORY, Found, search_layouts
from sihe.cluster.planner.step import StepEstimate, estimate_step
from sihe.cluster.planner.types import Layout

_CLUSTER = "a100-80g"
_MODELS = {7: "llama-7b", 70: "llama-70b"}
_RUNNERS_UP = 4

# GPT-175B of arXiv 2205.05198: layout of table 3; seconds of an iteration, table 5; GiB of activations, figure 1.
_PAPER_MODEL = "gpt-175b"
_PAPER_LAYOUT = Layout(
    tp=8,
    pp=8,
    stages_per_rank=3,
    schedule="interleaved-1f1b",
    microbatches=64,
    recompute="selective",
    precision="fp16",
)
_PAPER_SECONDS = 13.75
_PAPER_GIB = 12.3515625


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:  # noqa: ARG001  # computed, not run
    """Searches the layouts of a model on a cluster of A100, and predicts a published run."""
    shape = presets.model(_MODELS[int(parameters["billions"])])
    cluster = presets.cluster(_CLUSTER, int(parameters["devices"]))
    found = search_layouts(shape, cluster, global_batch=int(parameters["global-batch"]), runners_up=_RUNNERS_UP)
    best = found.best
    paper = presets.model(_PAPER_MODEL)
    published = estimate_step(paper, _PAPER_LAYOUT, presets.a100(_PAPER_LAYOUT.pp))
    states = state_bytes(shape.parameters, 0, 1, own_widths(Layout()))
    values = {
        "states-whole": states.total / 1e9,
        "usable": cluster.memory_bytes * USABLE_MEMORY / 1e9,
        "considered": found.considered,
        "fitting-share": 1 - found.too_large / found.considered,
        "best-memory": best.memory.total / 1e9,
        "best-activations": best.memory.activations / 1e9,
        "best-seconds": best.seconds,
        "best-exposed": best.communication_s / best.seconds,
        "best-bubble": best.bubble_s / best.seconds,
        "best-mfu": best.mfu,
        "paper-bubble": bubble(_PAPER_LAYOUT),
        "paper-bubble-plain": bubble(replace(_PAPER_LAYOUT, schedule="1f1b", stages_per_rank=1)),
        "paper-seconds-modelled": published.seconds,
        "paper-seconds": _PAPER_SECONDS,
        "paper-activations-modelled": activation_bytes(paper, _PAPER_LAYOUT) / 2**30,
        "paper-activations": _PAPER_GIB,
    }
    return Measurement(values=values, tables=(_layouts(found), _parts(best)))


def _layouts(found: Found) -> Table:
    entries = [(found.best, "-"), *((rejected.estimate, rejected.reason) for rejected in found.runners_up)]
    return Table(
        key="layouts",
        title=Text(zh="最快的布局，以及其他布局输在哪里", en="The fastest layout, and where others lost"),
        columns=(
            Column(label=Text(zh="布局", en="Layout")),
            Column(label=Text(zh="显存", en="Memory"), unit="GB", provenance="modelled"),
            Column(label=Text(zh="一步", en="Step"), unit="s", provenance="modelled"),
            Column(label=Text(zh="与最快的相比", en="Beside the fastest")),
        ),
        rows=tuple(
            (str(estimate.layout), round(estimate.memory.total / 1e9, 1), round(estimate.seconds, 3), reason)
            for estimate, reason in entries
        ),
    )


def _parts(best: StepEstimate) -> Table:
    return Table(
        key="parts",
        title=Text(zh="最快的布局，一步的时间去了哪里", en="The fastest layout: where the seconds of a step go"),
        columns=(
            Column(label=Text(zh="部分", en="Part")),
            Column(label=Text(zh="时间", en="Time"), unit="s", provenance="modelled"),
            Column(label=Text(zh="占比", en="Share"), provenance="modelled"),
        ),
        rows=tuple(
            (part, round(seconds, 4), round(seconds / best.seconds, 4)) for part, seconds in best.parts().items()
        ),
    )
