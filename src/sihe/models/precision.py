"""Which number format this machine multiplies fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

_SIZE = 512  # a square product of 0.27 GFLOP: a few milliseconds on one core
_TRIES = 5
_AMX = "_is_amx_tile_supported"


@cache
def native_bf16(device: str = "cpu") -> bool:
    """Whether matrix products in bfloat16 run in hardware on `device`, and no slower than in float32.

    Without the hardware they are emulated, and many times slower. With AVX512-BF16 it depends on the processor, so the
    two are timed once: a Xeon with these instructions but without AMX did 168 GFLOP/s in bfloat16 and 306 in float32
    (2048 x 2048, two cores).
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu" and has_bf16():
        return _has(_AMX) or _product_s(torch.bfloat16) <= _product_s(torch.float32)
    return False


def has_bf16() -> bool:
    """Whether this processor has instructions for products in bfloat16, however fast."""
    return _has(_AMX) or _has("_is_avx512_bf16_supported")


def fastest_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the hardware has it, else float32."""
    return torch.bfloat16 if native_bf16(device) else torch.float32


def _has(probe: str) -> bool:
    ask: Callable[[], bool] = getattr(torch.cpu, probe, lambda: False)
    return ask()


def _product_s(dtype: torch.dtype) -> float:
    """Seconds of one product: the least of several, so that what else the machine does is left out."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    seconds = []
    for _ in range(1 + _TRIES):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
