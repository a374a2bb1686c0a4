"""The model in memory with its cache: turns the tokens of one step into the sampled next ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sihe.core.errors import CorruptData, NotFound
from sihe.models.checkpoint import load_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.precision import has_bf16
from sihe.serving.engine.attention import DecodeRow, PrefillRow, StepAttention
from sihe.serving.engine.compute.paged import TorchCompute
from sihe.serving.engine.compute.step import Compute, Feed, Step
from sihe.serving.engine.config import DType, EngineConfig
from sihe.serving.engine.kv.storage import KvPages, blocks_within
from sihe.serving.engine.kv_cache import KvCache, bytes_per_slot, slots_within
from sihe.serving.engine.memory import available_bytes
from sihe.serving.engine.sampler import Draw, Sampled, sample
from sihe.serving.errors import NoMemory

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Work:
    """What one sequence does in a step: feeds `tokens` from position `start`, then samples if it has a `draw`."""

    slot: int
    tokens: Sequence[int]
    start: int
    draw: Draw | None

    @property
    def is_decode(self) -> bool:
        """Whether this is the one token of a sequence that decodes (a chunk of one token computes the same)."""
        return len(self.tokens) == 1 and self.draw is not None


class ModelRunner:
    """A decoder and the cache of its sequences. Used by one thread."""

    def __init__(self, model: Decoder, cache: KvCache) -> None:
        self.model = model
        self.cache = cache

    @classmethod
    def load(cls, folder: Path, config: EngineConfig) -> ModelRunner:
        """The model of `folder`, its cache as large as `config` and memory allow. `NoMemory` comes before loading."""
        model_config, stored = _read_config(folder)
        if config.dtype == "auto" and stored == "bfloat16" and not has_bf16():
            stored = "float32"  # emulated bf16 is many times slower
        dtype = _DTYPES[stored if config.dtype == "auto" else config.dtype]
        capacity = min(config.max_context or model_config.max_positions, model_config.max_positions)
        available = available_bytes()
        weights = model_config.num_parameters * dtype.itemsize
        if weights > available:
            raise NoMemory(
                f"the model in {folder.name!r} as {dtype}",
                needed_bytes=weights,
                available_bytes=available,
                hint="free memory (another version may still be draining) or serve a smaller model",
            )
        slots = slots_within(
            model_config,
            wanted=config.max_batch_size,
            capacity=capacity,
            dtype=dtype,
            budget_bytes=config.kv_cache_bytes or max((available - weights) // 4, 0),
        )
        model = load_model(folder, dtype=dtype).eval().requires_grad_(False)
        return cls(model, KvCache(model_config, slots=slots, capacity=capacity, dtype=dtype))

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes that the cache may come to use."""
        cache = self.cache
        return cache.slots * bytes_per_slot(self.model.config, cache.capacity, cache.keys[0].dtype)

    def step(self, work: Sequence[Work]) -> list[Sampled | None]:
        """Feeds the step's tokens in one pass; for each item of `work` its sampled token, or None if it draws none.

        Positions are rewritten from their start, so a step that raised can be run again, whole or in parts.
        """
        decode = sorted((item for item in work if item.is_decode), key=lambda item: item.slot)
        prefill = [item for item in work if not item.is_decode]
        ordered = [*decode, *prefill]
        with torch.inference_mode():
            attend = StepAttention(
                self.cache,
                [DecodeRow(item.slot, item.start) for item in decode],
                [PrefillRow(item.slot, item.start, len(item.tokens)) for item in prefill],
            )
            tokens_1T = torch.tensor([[token for item in ordered for token in item.tokens]])
            positions_1T = torch.tensor([[item.start + at for item in ordered for at in range(len(item.tokens))]])
            x_1TD = self.model.hidden(tokens_1T, positions_1T, attend)
            last, drawing, at = [], [], 0
            for item in ordered:
                at += len(item.tokens)
                if item.draw is not None:
                    last.append(at - 1)
                    drawing.append(item)
            if not drawing:
                return [None] * len(work)
            logits_BV = self.model.logits(x_1TD[0, last])
            sampled = sample(logits_BV, [item.draw for item in drawing if item.draw is not None])
        by_slot = {item.slot: chosen for item, chosen in zip(drawing, sampled, strict=True)}
        return [by_slot.get(item.slot) for item in work]


class Runner:
    """A model and the pages of its sequences: tokens in, logits out. Used by one thread."""

    def __init__(self, config: ModelConfig, compute: Compute, pages: KvPages, *, context: int) -> None:
        self.config = config
        self.context = context  # tokens of the longest sequence
        self._compute = compute
        self._pages = pages

    @classmethod
    def load(cls, folder: Path, config: EngineConfig) -> Runner:
        """The model of `folder`, its cache as large as `config` and memory allow. `NoMemory` comes before loading."""
        model_config, stored = _read_config(folder)
        if config.dtype == "auto" and stored == "bfloat16" and not has_bf16():
            stored = "float32"  # emulated bf16 is many times slower
        dtype = _DTYPES[stored if config.dtype == "auto" else config.dtype]
        context = min(config.max_context or model_config.max_positions, model_config.max_positions)
        available = available_bytes()
        weights = model_config.num_parameters * dtype.itemsize
        if weights > available:
            raise NoMemory(
                f"the model in {folder.name!r} as {dtype}",
                needed_bytes=weights,
                available_bytes=available,
                hint="free memory (another version may still be draining) or serve a smaller model",
            )
        num_blocks = blocks_within(
            model_config,
            sequences=config.max_batch_size,
            context=context,
            dtype=dtype,
            budget_bytes=config.kv_cache_bytes or max((available - weights) // 4, 0),
        )
        model = load_model(folder, dtype=dtype).eval().requires_grad_(False)
        pages = KvPages(model_config, num_blocks=num_blocks, dtype=dtype)
        return cls(model_config, TorchCompute(model, pages), pages, context=context)

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache; they are numbered from 0."""
        return self._pages.num_blocks

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers."""
        return self._pages.bytes_per_block

    def forward(self, feeds: Sequence[Feed]) -> Tensor:
        """Logits of the last `num_logits` tokens of each feed, float32 [O, V], in order; good until the next call.

        Positions are written from their start, so a step that raised can be run again, whole or in parts.
        """
        return self._compute.forward(Step.of(feeds))

    def copy_block(self, source: int, target: int) -> None:
        """Makes block `target` hold what `source` does."""
        self._pages.copy(source, target)


def _read_config(folder: Path) -> tuple[ModelConfig, DType]:
    """The model's shape, and the dtype that its weights were saved in."""
    path = folder / "config.json"
    if not path.is_file():
        raise NotFound("file", str(path), hint="a model folder holds config.json, model.safetensors and tokenizer.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        config = ModelConfig.from_hf(raw)
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptData(path, str(error)) from error
    stored = raw.get("dtype") or raw.get("torch_dtype")
    return config, "bfloat16" if stored == "bfloat16" else "float32"
