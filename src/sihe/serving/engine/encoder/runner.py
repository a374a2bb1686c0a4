"""The model in memory: documents in, one row of numbers for each out. Used by one thread.

Documents lie side by side in one row without padding: every product runs over the tokens that there are and no others,
and only attention looks at each document alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sihe.core.errors import ConfigError, CorruptData
from sihe.core.telemetry import logger
from sihe.models.checkpoint import load_config, load_encoder, load_trunk
from sihe.models.config import ModelConfig
from sihe.models.encoder import Encoder
from sihe.models.errors import UnsupportedModel
from sihe.models.precision import native_bf16
from sihe.models.transformer import Transformer
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder.attention import DocumentAttention
from sihe.serving.engine.encoder.recipe import Recipe, is_sentence_transformer, read_recipe
from sihe.serving.engine.encoder.tails import EmbeddingTail, FirstTail, Layout, ScoreTail, Tail
from sihe.serving.engine.encoder.types import Document, Floats
from sihe.serving.engine.memory import available_bytes
from sihe.serving.errors import NoMemory

if TYPE_CHECKING:
    from sihe.serving.engine.encoder.quantised import ByteTrunk

_PROBE_LENGTHS = (6, 12, 24, 48) * 6  # of texts of random tokens, on which quantised answers are compared


def is_encoder(folder: Path) -> bool:
    """Whether a model folder is for vectors or scores, not for generating: an encoder, or it says so itself."""
    return is_sentence_transformer(folder) or load_config(folder).task != "next_token"


class EncoderRunner:
    """A trunk, what comes behind it, and the recipe that both follow."""

    def __init__(
        self,
        trunk: Transformer,
        tail: Tail,
        recipe: Recipe,
        *,
        max_context: int | None = None,
        in_bytes: ByteTrunk | None = None,
    ) -> None:
        self.trunk = trunk
        self.tail = tail
        self.recipe = recipe
        self.in_bytes = in_bytes
        limits = (trunk.config.max_positions, recipe.max_tokens, max_context)
        self.max_tokens = min(limit for limit in limits if limit is not None)

    @classmethod
    def load(cls, folder: Path, config: EngineConfig) -> EncoderRunner:
        """The model of `folder`. Raises what is wrong with it, or `NoMemory`, before anything is loaded."""
        if config.compile:
            raise ConfigError("compile = true is for models that generate: leave compile out", key="compile")
        recipe = read_recipe(folder)
        shape = load_config(recipe.folder)
        dtype = _dtype(recipe.folder, shape, config)
        available, needed = available_bytes(), shape.num_parameters * dtype.itemsize
        if needed > available:
            raise NoMemory(
                f"the model in {folder.name!r} as {dtype}",
                needed_bytes=needed,
                available_bytes=available,
                hint="free memory (another version may still be draining) or serve a smaller model",
            )
        trunk, tail = _scorer(recipe, shape, dtype) if shape.task == "scored" else _embedder(recipe, shape, dtype)
        runner = cls(trunk.eval().requires_grad_(False), tail, recipe, max_context=config.max_context)
        if config.dtype == "int8":
            runner.quantise()
        return runner

    def quantise(self) -> float | None:
        """Computes the products in bytes from now on, where that is faster here; the lowest cosine of its answers.

        It is taken between answers to texts of random tokens before and after; a reranker's are vectors of a pair's
        first token here, as its scores are single numbers. None where float32 is faster, or bytes are too far from it.
        """
        from sihe.serving.engine.encoder.quantised import LEAST_COSINE, ByteTrunk, is_faster, widen_worst

        assert isinstance(self.trunk, Encoder)
        in_bytes = ByteTrunk(self.trunk)
        log = logger("serving")
        if not is_faster(self.trunk, in_bytes):
            log.info("encoder_stays_float32", reason="products of bytes are slower on this machine")
            return None
        generator = torch.Generator().manual_seed(1)
        probes = [
            Document(torch.randint(self.trunk.config.vocab_size, (length,), generator=generator).tolist())
            for length in (min(length, self.max_tokens) for length in _PROBE_LENGTHS)
        ]
        skipped = [0] * len(probes)
        tail: Tail = FirstTail(self.trunk.config.hidden_size) if self.tail.capability == "rerank" else self.tail
        exact = torch.from_numpy(self._encode(probes, skipped, tail))

        def cosines() -> Floats:
            rough = torch.from_numpy(self._encode(probes, skipped, tail))
            values: Floats = torch.nn.functional.cosine_similarity(exact, rough).numpy()
            return values

        self.in_bytes = in_bytes
        lowest = widen_worst(in_bytes, cosines)
        if not lowest >= LEAST_COSINE:  # no number either
            self.in_bytes = None
            log.warning("encoder_stays_float32", reason="bytes are too far from it", lowest_cosine=round(lowest, 5))
            return None
        self.trunk.blocks = torch.nn.ModuleList()  # their weights are held in bytes now, but for those of wide parts
        in_bytes.settle()
        log.info("encoder_quantised", lowest_cosine=round(lowest, 5), float32_products=len(in_bytes.wide))
        return lowest

    def encode(self, documents: Sequence[Document], skipped: Sequence[int]) -> Floats:
        """A row for each document, in their order, [N, W]; `skipped` counts the tokens of each that are not pooled."""
        return self._encode(documents, skipped, self.tail)

    def _encode(self, documents: Sequence[Document], skipped: Sequence[int], tail: Tail) -> Floats:
        shape = self.trunk.config
        order = sorted(range(len(documents)), key=lambda index: len(documents[index].tokens))
        ordered = [documents[index] for index in order]
        lengths = [len(document.tokens) for document in ordered]
        with torch.inference_mode():
            tokens_1T = torch.tensor([[token for document in ordered for token in document.tokens]])
            positions_1T = torch.cat([torch.arange(length) for length in lengths])[None]
            types_1T = None
            if shape.layers.token_types > 1 and any(document.types is not None for document in ordered):
                types = [document.types or [0] * len(document.tokens) for document in ordered]
                types_1T = torch.tensor([[kind for of_one in types for kind in of_one]])
            attend = DocumentAttention(lengths, causal=shape.attention.causal, window=shape.attention.window)
            if self.in_bytes is not None:
                x_TD = self.in_bytes.hidden(tokens_1T, positions_1T, attend, types_1T)
            else:
                x_TD = self.trunk.hidden(tokens_1T, positions_1T, attend, types_BT=types_1T)[0]
            answer_NW = tail(x_TD, Layout.of(lengths, [skipped[index] for index in order]))
            rows_NW = torch.empty_like(answer_NW)
            rows_NW[torch.tensor(order)] = answer_NW
        values: Floats = rows_NW.numpy()
        return values


def _embedder(recipe: Recipe, shape: ModelConfig, dtype: torch.dtype) -> tuple[Transformer, Tail]:
    if shape.positions.kind in ("relative", "alibi"):
        raise UnsupportedModel("positions", shape.positions.kind, "an embedding model without biases on scores")
    return load_trunk(recipe.folder, dtype), EmbeddingTail(recipe, shape.hidden_size)


def _scorer(recipe: Recipe, shape: ModelConfig, dtype: torch.dtype) -> tuple[Encoder, Tail]:
    if shape.num_labels != 1:
        raise ConfigError(
            f"a model that reranks has one label, got {shape.num_labels}: this one classifies", key="num_labels"
        )
    model = load_encoder(recipe.folder, dtype)
    return model, ScoreTail(model)


def _dtype(folder: Path, shape: ModelConfig, config: EngineConfig) -> torch.dtype:
    """The one asked for; "auto" is that of the checkpoint where this processor multiplies it no slower than float32."""
    match config.dtype:
        case "auto":
            stored = json.loads((folder / "config.json").read_bytes())
            is_bf16 = (stored.get("dtype") or stored.get("torch_dtype")) == "bfloat16"
            return torch.bfloat16 if is_bf16 and native_bf16() else torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "float32":
            return torch.float32
        case "int8" if _can_quantise(shape):
            return torch.float32  # quantised once it is loaded
    raise ConfigError(
        f"dtype {config.dtype!r} is not for this model: int8 is for BERT and its kin, and int4 for models that "
        "generate; choose float32 or bfloat16",
        key="dtype",
    )


def _can_quantise(shape: ModelConfig) -> bool:
    from sihe.serving.engine.encoder.quantised import can_quantise  # compiles kernels: only who asks for it waits

    return can_quantise(shape)


def check_vocabulary(folder: Path, tokens: int, known: int) -> None:
    """Raises `CorruptData` where the tokenizer has more tokens than the model."""
    if tokens > known:
        raise CorruptData(
            folder / "tokenizer.json",
            f"it has {tokens} tokens and the model knows {known}",
            hint="these are the files of two different models",
        )
