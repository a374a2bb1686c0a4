"""The model in memory with its cache: turns the tokens of one step into logits."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sihe.core.errors import ConfigError, CorruptData, InternalError, NotFound
from sihe.models.checkpoint import load_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.lora import Lora
from sihe.models.precision import has_bf16
from sihe.serving.engine.compute.compiled import check_compiler
from sihe.serving.engine.compute.cpu.support import WeightKind, is_supported
from sihe.serving.engine.compute.paged import TorchCompute
from sihe.serving.engine.compute.step import Compute, Feed, Step
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.kv.storage import KvPages, blocks_within
from sihe.serving.engine.memory import available_bytes
from sihe.serving.errors import NoMemory

_KV_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}


class ModelRunner:
    """A model and the pages of its sequences: tokens in, logits out. Used by one thread."""

    def __init__(
        self, config: ModelConfig, compute: Compute, pages: KvPages, *, context: int, model: Decoder | None = None
    ) -> None:
        self.config = config
        self._model = model
        self.context = context  # tokens of the longest sequence
        self._compute = compute
        self._pages = pages

    @classmethod
    def load(cls, folder: Path, config: EngineConfig, *, keep_model: bool = False) -> ModelRunner:
        """The model of `folder`, its cache as large as `config` and memory allow. `NoMemory` comes before loading.

        With `keep_model` its weights can be changed: see `model` and `refresh`.
        """
        model_config, stored = _read_config(folder)
        device = _device(config)
        on_kernels = device.type == "cpu" and sys.platform == "linux" and is_supported(model_config)
        kind = _weights(config, stored, on_kernels)
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        kv_dtype = dtype if config.kv_dtype == "auto" else _KV_DTYPES[config.kv_dtype]
        if kv_dtype == torch.int8 and not on_kernels:
            raise ConfigError(_needs_kernels("kv_dtype", "int8"), key="kv_dtype")
        if config.compile:
            _check_compile(device, on_kernels)
        context = min(config.max_context or model_config.max_positions, model_config.max_positions)
        available = available_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
        weights = model_config.num_parameters * dtype.itemsize  # what is packed smaller is read in this dtype first
        if weights > available:
            raise NoMemory(
                f"the model in {folder.name!r} as {kind}",
                needed_bytes=weights,
                available_bytes=available,
                hint="free memory (another version may still be draining) or serve a smaller model",
            )
        num_blocks = blocks_within(
            model_config,
            sequences=config.max_batch_size,
            context=context,
            dtype=kv_dtype,
            budget_bytes=config.kv_cache_bytes or max((available - weights) // 4, 0),
        )
        model = load_model(folder, dtype=dtype).eval().requires_grad_(False)
        pages = KvPages(
            model_config, num_blocks=num_blocks, dtype=kv_dtype, device=device, is_resident=config.reserve_cache
        )
        compute: Compute
        if on_kernels:
            from sihe.serving.engine.compute.cpu.compute import CpuCompute

            compute = CpuCompute(
                model, pages, kind, threads=config.threads, keep=keep_model, max_adapters=config.max_adapters
            )
        else:
            compute = TorchCompute(model.to(device), pages, compile=config.compile)
        return cls(model_config, compute, pages, context=context, model=model if keep_model else None)

    @property
    def model(self) -> Decoder:
        """The decoder whose weights are served, of a runner that was told to keep it."""
        if self._model is None:
            raise InternalError("this runner did not keep its model: load it with keep_model=True")
        return self._model

    def refresh(self) -> None:
        """Serves the weights that `model` has now. Nothing may run meanwhile, and cached keys and values are stale."""
        self._compute.refresh(self.model)

    def set_adapter(self, number: int, lora: Lora | None) -> None:
        """Puts an adapter (see `adapters.read_adapter`) in its place, or takes it out; between two steps."""
        self._compute.set_adapter(number, lora)

    def close(self) -> None:
        """Ends what computes; the runner is not used again."""
        self._compute.close()

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


def _device(config: EngineConfig) -> torch.device:
    """Where the model runs. Raises `ConfigError` for a GPU that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda' needs a GPU that torch sees; use 'auto' or 'cpu'", key="device")
    is_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if is_gpu else "cpu")


def _weights(config: EngineConfig, stored: WeightKind, on_kernels: bool) -> WeightKind:
    """What the weights become in memory. Raises `ConfigError` for what only the kernels have."""
    if config.dtype in ("int8", "int4"):
        if not on_kernels:
            raise ConfigError(_needs_kernels("dtype", config.dtype), key="dtype")
        return config.dtype
    if config.dtype == "auto":
        # Our kernels widen bfloat16 in registers; torch emulates it, where the processor lacks it, many times slower.
        is_slow = stored == "bfloat16" and not on_kernels and not has_bf16()
        return "float32" if is_slow else stored
    return config.dtype


def _needs_kernels(setting: str, value: str) -> str:
    return (
        f"{setting} = {value!r} is for the architectures that run on a CPU's own kernels; take bfloat16 or float32 here"
    )


def _check_compile(device: torch.device, on_kernels: bool) -> None:
    """Raises `ConfigError` where `compile` has no effect, or the compiler does not work."""
    if on_kernels:
        raise ConfigError(
            "compile = true is for models that torch computes, and this one runs on the CPU's own kernels, which are "
            "compiled: leave compile out",
            key="compile",
        )
    check_compiler(device)


def _read_config(folder: Path) -> tuple[ModelConfig, WeightKind]:
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
