"""Our engine: the whole of it (scheduler, sampler, text, streams), not only the model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from benchmarks.serving.contenders.worker import Generate, Prompts, run


def load(folder: Path, precision: str, context: int) -> Generate:
    """An engine of the precision, its prefix cache off."""
    from sihe.serving.engine.config import EngineConfig
    from sihe.serving.engine.engine import Engine
    from sihe.serving.engine.types import GenerationRequest

    settings: dict[str, object] = {"dtype": precision, "max_context": context}
    if any(field.name == "prefix_cache" for field in fields(EngineConfig)):
        settings["prefix_cache"] = False
    config = EngineConfig.from_mapping(settings)
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
