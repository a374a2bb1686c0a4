"""llama.cpp with its flash attention, which reads prompts faster here and decodes slower than without."""

from __future__ import annotations

from functools import partial

from benchmarks.serving.contenders.llama import load
from benchmarks.serving.contenders.worker import run

if __name__ == "__main__":
    run(partial(load, flash=True))
