"""Texts for tiny encoders, and how to ask for their vectors."""

from __future__ import annotations

from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder.engine import EncoderEngine
from sihe.serving.engine.encoder.types import EmbeddingRequest, Floats

TEXTS = [
    "the quick fox",
    "a dog",
    "pack my box with five dozen jugs, quick quick quick",
    "zebras",
    "the lazy dog jumps over the lazy dog and the lazy fox",
    "how daft",
]
SETTINGS = EngineConfig(token_budget=40, max_batch_size=4)


def embed(
    engine: EncoderEngine, *texts: str | tuple[int, ...], dimensions: int | None = None, prompt: str | None = None
) -> Floats:
    """The vectors of some texts."""
    return engine.submit(EmbeddingRequest(texts, dimensions=dimensions, prompt=prompt)).result(30).values
