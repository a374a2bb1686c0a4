"""A contender's own side: reads orders from its input and answers how many seconds each took.

It runs inside every peer's environment, so it imports nothing but the standard library. One order is one line of JSON
`{"batch", "prompt", "tokens", "seed"}`; the answer is `{"seconds", "cpu_seconds", "first"}`, `first` being what the
first sequence generated, or `{"error"}`. Whatever a library prints goes to the error stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Prompts = list[list[int]]
# Greedy answers of exactly `tokens` tokens to every prompt, nothing reused from an earlier call.
Generate = Callable[[Prompts, int], Sequence[Sequence[int]]]

VOCAB_SIZE = 32000
FIRST_TOKEN = 1000  # prompts keep clear of a tokenizer's special tokens


def prompts_of(batch: int, length: int, seed: int) -> Prompts:
    """Prompts that differ from each other and from those of every other seed: no prefix cache can hit."""
    draw = random.Random(f"{seed} {batch} {length}")
    return [[draw.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(length)] for _ in range(batch)]


def run(load: Callable[[Path, str, int], Generate]) -> None:
    """Loads (`folder`, precision and longest context come as arguments), says so, then answers orders until the end."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    folder, precision, context = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    try:
        generate = load(folder, precision, context)
    except BaseException as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        raise
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answers.write(json.dumps(_measure(generate, **order)) + "\n")
        except Exception as error:  # noqa: BLE001 - the one who ordered decides what it means
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")


def _end_with_parent() -> None:
    """A stopped process would not see that nobody orders anything any more: the kernel ends it (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h


def _measure(generate: Generate, *, batch: int, prompt: int, tokens: int, seed: int) -> dict[str, object]:
    prompts = prompts_of(batch, prompt, seed)
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    answers = generate(prompts, tokens)
    seconds, cpu_seconds = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    wrong = [len(answer) for answer in answers if len(answer) != tokens]
    if wrong or len(answers) != batch:
        raise ValueError(f"expected {batch} answers of {tokens} tokens, got {len(answers)}, of other lengths: {wrong}")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "first": [int(token) for token in answers[0][:16]]}
