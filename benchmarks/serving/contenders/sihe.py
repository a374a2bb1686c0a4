"""Our engine: the whole of it (scheduler, sampler, text, streams), not only the model."""

from __future__ import annotations

from pathlib import Path

from benchmarks.serving.contenders.worker import Generate, Prompts, run


def load(folder: Path, precision: str, context: int) -> Generate:
    """An engine of the precision, its cache in memory from the start, as the peers' are.

    Its prefix cache is on, as always, and finds nothing: prompts are random.
    """
    from sihe.serving.engine.config import EngineConfig
    from sihe.serving.engine.engine import Engine
    from sihe.serving.engine.types import GenerationRequest

    config = EngineConfig.from_mapping({"dtype": precision, "max_context": context, "reserve_cache": True})
    engine = Engine.load(folder, config)

    def generate(prompts: Prompts, tokens: int) -> list[tuple[int, ...]]:
        streams = [
            engine.submit(GenerationRequest(prompt=tuple(prompt), max_tokens=tokens, temperature=0, ignore_eos=True))
            for prompt in prompts
        ]
        return [stream.result().token_ids for stream in streams]

    return generate


if __name__ == "__main__":
    run(load)
