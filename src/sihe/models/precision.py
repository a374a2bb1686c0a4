"""Which number format this machine multiplies fast."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


@cache
def native_bf16(device: str = "cpu") -> bool:
    """Whether matrix products in bfloat16 run in hardware on `device`.

    Without it they are emulated, and many times slower than in float32: train and serve in float32 there.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return any(probe() for probe in _cpu_probes())
    return False


def fastest_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the hardware has it, else float32."""
    return torch.bfloat16 if native_bf16(device) else torch.float32


def _cpu_probes() -> list[Callable[[], bool]]:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return [getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)]
