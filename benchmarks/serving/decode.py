"""Tokens per second of the engine beside `transformers.generate`: the same weights, prompts and greedy answers.

The whole engine is timed (scheduling, sampling, text, streams), not only the model. Decoding is the time of the answers
less that of one-token answers to the same prompts; prefill is the latter.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models

from benchmarks.harness import Claim, alternate, at_least, print_table, report
from sihe.models.checkpoint import save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.types import GenerationRequest

SHAPE = ModelConfig(  # 124.7 M parameters, 100.1 M of them outside the embedding
    vocab_size=32000,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=2048,
    max_positions=2048,
    tie_embeddings=False,
)


def model_folder(folder: Path) -> Path:
    """Random weights, and a tokenizer that knows one word: prompts are token ids."""
    torch.manual_seed(0)
    save_model(Decoder(SHAPE), folder)
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def prompts_of(batch: int, length: int) -> list[tuple[int, ...]]:
    """Prompts that differ from each other."""
    return [tuple((17 * row + 31 * at) % SHAPE.vocab_size for at in range(length)) for row in range(batch)]


def ours(engine: Engine, prompts: list[tuple[int, ...]], tokens: int) -> float:
    """Seconds until every answer has its `tokens`."""
    start = time.perf_counter()
    streams = [engine.submit(GenerationRequest(prompt=prompt, max_tokens=tokens, temperature=0)) for prompt in prompts]
    assert all(stream.result().usage.completion_tokens == tokens for stream in streams)
    return time.perf_counter() - start


def theirs(model: Any, prompts: list[tuple[int, ...]], tokens: int) -> float:
    """The same by `generate`."""
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode():
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    assert whole.shape[1] == len(prompts[0]) + tokens
    return time.perf_counter() - start


def compare(dtype: str, batch: int, length: int, tokens: int, engine: Engine, model: Any) -> list[Claim]:
    """Prints the tokens a second of both, and makes the claims about them."""
    prompts = prompts_of(batch, length)
    runs: dict[str, Callable[[int], float]] = {
        "sihe": lambda count: ours(engine, prompts, count),
        "transformers": lambda count: theirs(model, prompts, count),
    }
    for run in runs.values():
        run(2)
    firsts: dict[str, float] = {}

    def prefill(name: str) -> float:
        firsts[name] = runs[name](1)
        return batch * length / firsts[name]

    def decode(name: str) -> float:
        return batch * (tokens - 1) / (runs[name](tokens) - firsts[name])

    claims = []
    for phase, measure in (("prefill", prefill), ("decode", decode)):
        speed = alternate({name: partial(measure, name) for name in runs})
        print_table(speed, unit="tokens/s", baseline="transformers")
        mine, peer = (statistics.median(speed[name]) for name in ("sihe", "transformers"))
        claims.append(
            at_least(f"{phase}, {dtype}, batch {batch}, prompt {length}", mine, peer, unit="tokens/s", ratio=1.0)
        )
    return claims


def main() -> None:
    """Both dtypes, batches 1, 8 and 32."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    chosen = parser.parse_args()
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as home:
        folder = model_folder(Path(home) / "model")
        for dtype in chosen.dtypes:
            reference = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            reference.generation_config.eos_token_id = None
            with Engine.load(folder, EngineConfig(dtype=dtype, max_context=chosen.prompt + chosen.tokens)) as engine:
                for batch in chosen.batches:
                    print(f"\n{dtype}, batch {batch}")
                    claims += compare(dtype, batch, chosen.prompt, chosen.tokens, engine, reference)
    report(__file__, claims)


if __name__ == "__main__":
    main()
