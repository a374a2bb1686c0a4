"""Peak memory of one training step of our decoder, predicted and measured, for three policies of recomputation.

Measured are the bytes that torch's allocator hands out, as its profiler records each allocation from before the model
is made: exact, and independent of the allocator's caches and of the interpreter. The step is a rank's own: float32
gradients in flat memory, AdamW with masters, and the house's own recomputation; *selective* is its policy `attention`.

Batches of 8 x 256 tokens in float32; a dense network of 13.8 M parameters and one of 100 M. Each figure comes from a
process of its own; memory does not vary, so that each is measured once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import TYPE_CHECKING

from benchmarks.harness import Claim, report

if TYPE_CHECKING:
    from sihe.cluster.planner.types import TransformerShape

BATCH, LENGTH = 8, 256
GOAL = 0.10
SHAPES = {
    "13.8 M": (6, 384, 6, 64, 1024, 8192),
    "100 M": (12, 768, 12, 64, 2048, 20480),
}
POLICIES = ("none", "selective", "full")


def main() -> None:
    """Measures and predicts every network under every policy; or, as a child of itself, measures one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--policy", choices=POLICIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape:
        print(json.dumps(measure(SHAPES[options.shape], options.policy)))
        return
    from sihe.cluster.planner.memory import predict_memory
    from sihe.cluster.planner.types import Layout

    claims = []
    print(f"{'':24} {'predicted':>12} {'measured':>12}   ratio")
    for name in SHAPES:
        for policy in POLICIES:
            layout = Layout(micro_batch=BATCH, precision="fp32", recompute=policy)
            predicted = predict_memory(shape_of(name), layout).total / 1e6
            measured = _in_a_process(name, policy) / 1e6
            ratio = predicted / measured
            print(f"{name + ', ' + policy:24} {predicted:9.1f} MB {measured:9.1f} MB   {ratio:.3f}")
            goal = f"within {GOAL:.0%} of the measured"
            title = f"peak memory of a step, {name}, recompute {policy}: predicted"
            claims.append(Claim(title, predicted, measured, ratio, "MB", goal, abs(ratio - 1) <= GOAL))
    report(__file__, claims)


def shape_of(name: str) -> TransformerShape:
    """The planner's value for one of the networks."""
    from sihe.cluster.planner.types import TransformerShape

    layers, hidden, heads, head_dim, ffn, vocab = SHAPES[name]
    return TransformerShape(name, layers, hidden, heads, heads, head_dim, ffn, vocab=vocab, sequence=LENGTH)


def measure(sizes: tuple[int, ...], policy: str) -> int:
    """The most bytes that were handed out at a time, over two steps: the first one's are those of every other."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from sihe.models.config import ModelConfig
    from sihe.models.decoder import Decoder
    from sihe.models.recompute import recompute
    from sihe.models.recompute_config import RecomputeConfig
    from sihe.training.gradients import GradientBuffer
    from sihe.training.optimizer import MasterOptimizer

    torch.set_num_threads(1)
    layers, hidden, heads, head_dim, ffn, vocab = sizes
    config = ModelConfig(vocab, hidden, layers, heads, heads, head_dim, ffn, LENGTH)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = Decoder(config)
        recompute(model.blocks, RecomputeConfig("attention" if policy == "selective" else policy))
        gradients = GradientBuffer(model.parameters())
        optimizer = MasterOptimizer(model)
        tokens = torch.randint(vocab, (BATCH, LENGTH + 1))
        for _ in range(2):
            gradients.zero_()
            nll, count = model.loss(tokens[:, :-1], tokens[:, 1:])
            (nll / count).backward()
            del nll
            optimizer.step(1e-4)
    events = profiler.profiler.kineto_results.events()
    allocations = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, size in allocations:
        held += size
        peak = max(peak, held)
    return peak


def _in_a_process(shape: str, policy: str) -> float:
    command = [sys.executable, "-m", "benchmarks.cluster.planner_memory", "--shape", shape, "--policy", policy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
