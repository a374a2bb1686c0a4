"""The model in memory with its cache: turns the tokens of one step into logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sihe.core.errors import CorruptData, NotFound
from sihe.models.checkpoint import load_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.precision import has_bf16
from sihe.serving.engine.compute.paged import TorchCompute
from sihe.serving.engine.compute.step import Compute, Feed, Step
from sihe.serving.engine.config import DType, EngineConfig
from sihe.serving.engine.kv.storage import KvPages, blocks_within
from sihe.serving.engine.memory import available_bytes
from sihe.serving.errors import NoMemory

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ModelRunner:
    """A model and the pages of its sequences: tokens in, logits out. Used by one thread."""

    def __init__(self, model: Decoder, compute: Compute, pages: KvPages, *, context: int) -> None:
        self.model = model
        self.config = model.config
        self.context = context  # tokens of the longest sequence
        self._compute = compute
        self._pages = pages

    @classmethod
    def load(cls, folder: Path, config: EngineConfig) -> ModelRunner:
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
        return cls(model, TorchCompute(model, pages), pages, context=context)

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
