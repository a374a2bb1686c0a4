"""vLLM's build for CPUs, compiled (its default) and without its prefix cache, in one process."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.serving.contenders.worker import Generate, Prompts, run


def load(folder: Path, precision: str, context: int) -> Generate:
    """An `LLM` of the precision."""
    # Two gigabytes hold 32 sequences of 2,048 positions; without a process of its own the engine starts at once.
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(folder),
        dtype=precision,
        max_model_len=context,
        max_num_seqs=64,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )

    def generate(prompts: Prompts, tokens: int) -> list[list[int]]:
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


if __name__ == "__main__":
    run(load)
