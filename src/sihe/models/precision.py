"""Which number format this machine multiplies fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

_SIZE = 512  # a square product of 0.27 GFLOP: a few milliseconds on one core
_TRIES = 10
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
        return _has(_AMX) or _is_bf16_faster()
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


def _is_bf16_faster() -> bool:
    """Whether a product takes less time in bfloat16 than in float32, on one thread.

    The two differ by a factor of about two, either way. Each is timed by turns and counts by its best try, so that what
    else the machine does decides nothing: the processes of a run must come to the same answer.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            _product_s(dtype)  # the first call chooses its kernel
        seconds = [(_product_s(torch.bfloat16), _product_s(torch.float32)) for _ in range(_TRIES)]
    finally:
        torch.set_num_threads(threads)
    bf16_s, fp32_s = (min(each) for each in zip(*seconds, strict=True))
    return bf16_s < fp32_s


def _product_s(dtype: torch.dtype) -> float:
    """Seconds of one product."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    started = time.perf_counter()
    a @ a
    return time.perf_counter() - started
