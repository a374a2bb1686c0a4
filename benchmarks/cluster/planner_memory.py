"""Peak memory of a training step of our decoder on each rank, predicted and measured.

Measured are the bytes that torch's allocator hands out, as its profiler records each allocation from before the model
is made: exact, and independent of the allocator's caches and of the interpreter. What is measured is the trainer's own
step: float32 gradients in flat memory, AdamW with masters, the house's own recomputation (*selective* is its policy
`attention`) and plans of parallelism. It is the larger peak of two steps.

One rank: a dense network of 13.8 M parameters and one of 100 M, under three policies of recomputation, 8 samples of 256
tokens in float32. Plans: the first network, and one with four experts, on 2 and 4 processes; a claim is about the rank
whose measured peak is highest, and the table shows every rank. Every rank builds the whole model before it drops what
is not its own; where that needs more than the step does, the table says so.

Memory does not vary, so that each figure is measured once, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Claim, report

if TYPE_CHECKING:
    from sihe.cluster.planner.types import Layout, TransformerShape

LENGTH = 256
GOAL = 0.10
SHAPES = {
    "13.8 M": (6, 384, 6, 64, 1024, 8192, 0),
    "100 M": (12, 768, 12, 64, 2048, 20480, 0),
    "experts": (6, 384, 6, 64, 512, 8192, 4),
}
"""Layers, hidden, heads, head dim, width of the feed-forward layer or of an expert, vocabulary, experts."""


@dataclass(frozen=True)
class Case:
    """A network, how it is spread, and its portions of a step."""

    shape: str
    micro_batch: int
    recompute: str = "none"
    plan: dict[str, Any] | None = None
    accumulated: int = 1
    precision: str = "fp32"

    @property
    def title(self) -> str:
        """In a few words."""
        axes = " ".join(f"{key}={value}" for key, value in (self.plan or {}).items())
        extra = ", accumulated" if self.accumulated > 1 else ""
        precision = f", {self.precision}" if self.precision != "fp32" else ""
        return f"{self.shape}, {axes or 'one rank'}, recompute {self.recompute}{extra}{precision}"


_FLOW = {"pp": 2, "microbatches": 4}
CASES = (
    *(Case(shape, 8, policy) for shape in ("13.8 M", "100 M") for policy in ("none", "selective", "full")),
    Case("13.8 M", 8, precision="bf16"),
    Case("13.8 M", 4, plan={"dp": 2}),
    *(Case("13.8 M", 4, plan={"shard": 2, "zero": stage}) for stage in (1, 2, 3)),
    Case("13.8 M", 4, plan={"shard": 2, "zero": 3}, accumulated=2),
    Case("13.8 M", 4, plan={"shard": 2, "zero": 2}, precision="bf16"),
    Case("13.8 M", 4, plan={"shard": 2, "zero": 3}, precision="bf16"),
    Case("13.8 M", 4, "full", plan={"shard": 2, "zero": 3}),
    Case("13.8 M", 8, plan={"tp": 2}),
    Case("13.8 M", 8, plan={"cp": 2}),
    Case("13.8 M", 2, plan=_FLOW),
    Case("13.8 M", 2, "full", plan=_FLOW),
    Case("13.8 M", 2, plan={**_FLOW, "schedule": "gpipe"}),
    Case("13.8 M", 2, plan={**_FLOW, "schedule": "interleaved-1f1b", "stages_per_rank": 2}),
    Case("13.8 M", 2, plan={**_FLOW, "schedule": "zbv", "stages_per_rank": 2}),
    Case("experts", 4),
    Case("experts", 4, plan={"dp": 2, "ep": 2}),
    Case("experts", 4, plan={"shard": 2, "zero": 3, "ep": 2}),
    Case("13.8 M", 2, plan={"shard": 4, "zero": 3}),
    Case("13.8 M", 4, plan={"dp": 2, "tp": 2}),
    Case("13.8 M", 2, plan={"pp": 4, "microbatches": 8}),
    Case("13.8 M", 4, plan={"shard": 2, "zero": 3, "tp": 2}),
    Case("13.8 M", 2, plan={**_FLOW, "shard": 2, "zero": 3}),
    Case("13.8 M", 2, plan={**_FLOW, "tp": 2}),
)


def main() -> None:
    """Measures and predicts every case; or, as a child of itself, is one rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Cases with this in their title; nothing is written.")
    parser.add_argument("--rank", nargs=3, metavar=("CASE", "RANK", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        case, rank, folder = options.rank
        print(json.dumps(be_rank(Case(**json.loads(case)), int(rank), folder)))
        return
    claims = []
    print(f"{'MB on each rank':64} {'predicted':>16} {'measured':>16}  error  built with")
    for case in (case for case in CASES if options.only in case.title):
        from sihe.cluster.planner.memory import predict_ranks

        measured = measure(case)
        layout = layout_of(case, widened=bool(measured[0]["widened"]))
        predicted = [estimate.total for estimate in predict_ranks(shape_of(case.shape), layout)]
        tensor_and_data = len(measured) // len(predicted)
        for rank, found in enumerate(measured):
            said, peak = predicted[rank // tensor_and_data] / 1e6, found["step"] / 1e6
            built = f"{found['build'] / 1e6:.1f}" + (" (more)" if found["build"] > found["step"] else "")
            name = case.title if rank == 0 else ""
            print(f"{name:58} {rank:5} {said:16.1f} {peak:16.1f}  {said / peak - 1:+.1%}  {built}", flush=True)
        said, peak = max(predicted) / 1e6, max(found["step"] for found in measured) / 1e6
        goal = f"within {GOAL:.0%} of the measured"
        title = f"peak memory of a step on the fullest rank, {case.title}: predicted"
        claims.append(Claim(title, said, peak, said / peak, "MB", goal, abs(said / peak - 1) <= GOAL))
    if not options.only:
        report(__file__, claims)


def shape_of(name: str) -> TransformerShape:
    """The planner's value for one of the networks."""
    from sihe.cluster.planner.types import TransformerShape

    layers, hidden, heads, head_dim, ffn, vocab, experts = SHAPES[name]
    chosen = 2 if experts else 0
    return TransformerShape(
        *(name, layers, hidden, heads, heads, head_dim, ffn, vocab, LENGTH), experts=experts, experts_per_token=chosen
    )


def layout_of(case: Case, *, widened: bool = False) -> Layout:
    """The planner's value for how a case is spread; `widened` as the processor multiplies."""
    from sihe.cluster.planner.types import Layout

    return Layout(
        micro_batch=case.micro_batch,
        precision=case.precision,  # type: ignore[arg-type]  # checked when made
        recompute=case.recompute,  # type: ignore[arg-type]  # checked when made
        widened=widened,
        **{"microbatches": case.accumulated} | (case.plan or {}),
    )


def measure(case: Case) -> list[dict[str, int]]:
    """Of each rank the peak of its steps, and of what came before them, in bytes."""
    world = layout_of(case).world_size
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.cluster.planner_memory", "--rank", json.dumps(asdict(case))]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), folder],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        answers = [rank.communicate() for rank in ranks]
    for rank, (_, words) in zip(ranks, answers, strict=True):
        if rank.returncode:
            raise SystemExit(f"{case.title} failed:\n{words}")
    return [json.loads(said.splitlines()[-1]) for said, _ in answers]


def be_rank(case: Case, rank: int, folder: str) -> dict[str, int]:
    """Takes two steps of `case` as one of its ranks; the peaks before them and in them."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile, record_function

    from sihe.models.config import ModelConfig
    from sihe.models.decoder import Decoder
    from sihe.models.products import factor_dtype
    from sihe.models.recompute_config import RecomputeConfig
    from sihe.training.export import DTYPES
    from sihe.training.optimizer import MasterOptimizer
    from sihe.training.parallel.apply import ParallelModel
    from sihe.training.parallel.mesh import ParallelMesh
    from sihe.training.parallel.plan import ParallelPlan
    from sihe.training.ranks import Ranks
    from sihe.training.schedule import ScheduleConfig
    from sihe.training.step import TrainStep

    torch.set_num_threads(1)
    plan = ParallelPlan(**(case.plan or {}))
    world, ranks, mesh = plan.world_size, Ranks(), None
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
        ranks, mesh = Ranks(rank, world, 600.0), ParallelMesh(plan)
    layers, hidden, heads, head_dim, ffn, vocab, experts = SHAPES[case.shape]
    mixture: dict[str, Any] = {"num_experts": experts, "experts_per_token": 2, "expert_intermediate_size": ffn}
    config = ModelConfig(
        *(vocab, hidden, layers, heads, heads, head_dim, ffn, LENGTH),
        **(mixture | {"router_balance": "none"} if experts else {}),
    )
    policy = {"selective": "attention"}.get(case.recompute, case.recompute)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        parallel = ParallelModel(
            Decoder(config),
            mesh,
            dtype=DTYPES[case.precision],
            recomputed=RecomputeConfig(policy),  # type: ignore[arg-type]  # checked when made
        )
        optimizer = MasterOptimizer(parallel.held, mesh=mesh)
        schedule = ScheduleConfig(peak_lr=1e-4, warmup_steps=0, total_steps=2, kind="constant")
        step = TrainStep(parallel, optimizer, schedule, ranks, micro_batch=case.micro_batch)
        samples = case.micro_batch * case.accumulated * plan.microbatches
        batch = torch.randint(vocab, (samples, LENGTH + 1)).numpy()
        with record_function("steps begin"):
            pass
        for number in range(2):
            step(number, batch)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    events = sorted(_flat(profiler.profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns)
    is_widened = factor_dtype(torch.empty(0, dtype=DTYPES[case.precision])) is not DTYPES[case.precision]
    lent, peaks, part = Lent(), {"build": 0, "step": 0, "widened": int(is_widened)}, "build"
    for event in events:
        part = "step" if event.name == "steps begin" else part
        if event.name == "[memory]":
            lent.change(event.typed[1].ptr, event.typed[1].alloc_size)
            peaks[part] = max(peaks[part], lent.size_bytes)
    return peaks


class Lent:
    """The memory that the allocator has handed out, by address.

    Gloo's threads give memory back unrecorded: it counts until its addresses are handed out again, which is an upper
    bound.
    """

    def __init__(self) -> None:
        self.size_bytes = 0
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def change(self, address: int, size: int) -> None:
        """Memory is handed out (positive sizes), or given back."""
        if size > 0:
            place = bisect_left(self._starts, address)
            while place < len(self._starts) and self._starts[place] < address + size:
                self._give_back(place)
            if place and self._starts[place - 1] + self._sizes[self._starts[place - 1]] > address:
                self._give_back(place - 1)
            insort(self._starts, address)
            self._sizes[address] = size
            self.size_bytes += size
        elif address in self._sizes:
            self._give_back(bisect_left(self._starts, address))

    def _give_back(self, place: int) -> None:
        self.size_bytes -= self._sizes.pop(self._starts.pop(place))


def _flat(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _flat(event.children)


if __name__ == "__main__":
    main()
