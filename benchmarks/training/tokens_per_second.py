"""Training tokens/s of one process: our step beside a plain `transformers` loop on a model of the same size.

    ours     sihe's TrainStep as a rank runs it: weights in the precision, float32 masters and gradient sums
    llama    LlamaForCausalLM of the same shape, weight for weight, as its users train it: autocast, fused AdamW
    gpt2     GPT2LMHeadModel of the same depth, width and vocabulary
    trainer, lightning    that Llama under other trainers (`peer_trainers.py`), where `make peers ROOM=training` was run

13.8 M parameters: 6 layers, width 384, 6 heads, vocabulary 8192, tied; batches of 8 x 256 random tokens; clipping in
all. Each figure comes from a process of its own. bfloat16 is measured where the processor has instructions for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import alternate, at_least, print_table, report

LAYERS, WIDTH, HEADS, FEED_FORWARD, VOCABULARY = 6, 384, 6, 1024, 8192
BATCH, LENGTH = 8, 256
LEARNING_RATE = 1e-4
GOAL = 1.1  # beside a plain loop
GOAL_BESIDE_TRAINERS = 1.25
GOAL_SHARE = 0.55
PEERS = Path(__file__).parents[1] / "peers" / ".venv-training" / "bin" / "python"
TRAINERS = ("trainer", "lightning")
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FEED_FORWARD,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "use_cache": False,
}


def main() -> None:
    """Measures every contender in turn, or, as a child of itself, one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of one repeat")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time, not the clock: for a busy machine; one thread"
    )
    parser.add_argument("--contender", choices=sorted(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu_time:
        options.threads = 1  # threads that wait for each other burn processor time
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.contender:
        print(json.dumps(measure(options.contender, options.precision, options.steps, options.threads, clock)))
        return

    from sihe.models.config import ModelConfig
    from sihe.models.precision import has_bf16

    config = ModelConfig(VOCABULARY, WIDTH, LAYERS, HEADS, HEADS, WIDTH // HEADS, FEED_FORWARD, LENGTH)
    claims = []
    for precision in ("bf16", "fp32"):
        if precision == "bf16" and not has_bf16():
            print("bf16 is not measured: this processor has no bfloat16 matrix instructions\n")
            continue

        def contender(name: str, precision: str = precision) -> Callable[[], float]:
            arguments = ["--contender", name, "--precision", precision]
            arguments += ["--steps", str(options.steps), "--threads", str(options.threads)]
            arguments += ["--cpu-time"] if options.cpu_time else []
            return lambda: _in_a_process(arguments)

        contenders = {name: contender(name) for name in CONTENDERS}
        if precision == "fp32":
            del contenders["gemm_fp32"]
        if options.cpu_time:
            pass  # the trainers are timed by the clock
        elif PEERS.exists():
            for name in TRAINERS:
                contenders[name] = _peer(name, precision, options.steps, options.threads)
        else:
            print(f"{' and '.join(TRAINERS)} are not measured: run  make peers ROOM=training  first\n")
        figures = alternate(contenders, repeats=options.repeats)
        peaks = {name: max(figures.pop(name)) for name in PEAKS if name in figures}
        peak = max(peaks.values())
        timed = "processor time" if options.cpu_time else "wall clock"
        print(f"{precision}: {config.num_parameters / 1e6:.1f} M parameters, {options.threads} threads, {timed}")
        print_table(figures, unit="tokens/s", baseline="llama")
        middle = {name: statistics.median(values) for name, values in figures.items()}
        share = middle["ours"] * config.flops_per_token(LENGTH) / 1e9 / peak
        products = ", ".join(f"{name} {figure:.0f}" for name, figure in peaks.items())
        print(f"ours spends {share:.0%} of the best matrix product of this run (GFLOP/s: {products})\n")
        claims += [
            at_least(
                f"training, {precision}, {options.threads} threads, {timed}, beside transformers {name}",
                middle["ours"],
                middle[name],
                unit="tokens/s",
                ratio=GOAL_BESIDE_TRAINERS if name in TRAINERS else GOAL,
            )
            for name in middle
            if name != "ours"
        ]
        claims.append(
            at_least(
                f"training, {precision}, {options.threads} threads, {timed}, FLOP/s beside the best matrix product",
                share * peak,
                peak,
                unit="GFLOP/s",
                ratio=GOAL_SHARE,
            )
        )
    report(__file__, claims)


def measure(contender: str, precision: str, steps: int, threads: int, clock: Callable[[], float]) -> float:
    """Tokens/s (of `gemm`: GFLOP/s) of one contender in this process: the median of `steps` after two warm ones."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    step, work = CONTENDERS[contender](dtype)
    seconds = []
    for _ in range(2 + steps):
        started = clock()
        step()
        seconds.append(clock() - started)
    return work / statistics.median(seconds[2:])


def _ours(dtype: object) -> tuple[Callable[[], object], float]:
    import numpy as np
    import torch

    from sihe.models.config import ModelConfig
    from sihe.models.decoder import Decoder
    from sihe.training.optimizer import MasterOptimizer
    from sihe.training.parallel.apply import ParallelModel
    from sihe.training.ranks import Ranks
    from sihe.training.schedule import CosineSchedule
    from sihe.training.step import TrainStep
    from sihe.training.worker import prepare_process

    prepare_process()
    assert isinstance(dtype, torch.dtype)
    shape = ModelConfig(VOCABULARY, WIDTH, LAYERS, HEADS, HEADS, WIDTH // HEADS, FEED_FORWARD, LENGTH)
    model = ParallelModel(Decoder(shape), dtype=dtype)
    optimizer = MasterOptimizer(model.held)
    step = TrainStep(model, optimizer, CosineSchedule(LEARNING_RATE, 0, 1000), Ranks(), micro_batch=BATCH)
    batch = np.random.default_rng(0).integers(VOCABULARY, size=(BATCH, LENGTH + 1))
    return lambda: step(0, batch), BATCH * LENGTH


def _llama(dtype: object) -> tuple[Callable[[], object], float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _plain_loop(LlamaForCausalLM(LlamaConfig(**LLAMA)), dtype)


def _gpt2(dtype: object) -> tuple[Callable[[], object], float]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,  # ours has no dropout: the peer is spared the work as well
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return _plain_loop(GPT2LMHeadModel(config), dtype)


def _plain_loop(model: object, dtype: object) -> tuple[Callable[[], object], float]:
    import torch

    assert isinstance(model, torch.nn.Module)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, BATCH * LENGTH


def _gemm(dtype: object) -> tuple[Callable[[], object], float]:
    import torch

    assert isinstance(dtype, torch.dtype)
    size = 2048
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return lambda: a @ b, 2 * size**3 / 1e9


def _peer(name: str, precision: str, steps: int, threads: int) -> Callable[[], float]:
    asked = {"contender": name, "precision": precision, "steps": steps, "threads": threads}
    asked |= {"model": LLAMA, "batch": BATCH, "length": LENGTH}
    return lambda: _figure([str(PEERS), str(Path(__file__).with_name("peer_trainers.py")), json.dumps(asked)])


def _in_a_process(arguments: list[str]) -> float:
    return _figure([sys.executable, "-m", "benchmarks.training.tokens_per_second", *arguments])


def _figure(command: list[str]) -> float:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def _gemm_fp32(_dtype: object) -> tuple[Callable[[], object], float]:
    import torch

    return _gemm(torch.float32)


PEAKS = {"gemm": _gemm, "gemm_fp32": _gemm_fp32}  # the product of the format, and the other that ours may choose
CONTENDERS = {"ours": _ours, "llama": _llama, "gpt2": _gpt2, **PEAKS}


if __name__ == "__main__":
    main()
