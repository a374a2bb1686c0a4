"""What the process of `quant.error_speed` runs: the engine's step on a CPU in each precision, and roundings compared.

O  outputs      I  inputs      G  weights that share a scale
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from sihe.apps.coach.errors import LabFailed
from sihe.apps.coach.labs.timing import best_seconds
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.serving.engine.compute.cpu.support import WeightKind
from sihe.serving.engine.compute.step import Feed, Step
from sihe.serving.engine.kv.blocks import blocks_of
from sihe.serving.engine.kv.storage import KvPages

_CONTEXT = 64  # tokens that each sequence has in its cache
_COPIED_BYTES = 256 * 2**20  # larger than any cache of a processor
_MATRIX = 1024


@torch.no_grad()
def costs(
    rank: int, world_size: int, *, layers: int, kinds: list[WeightKind], batches: list[int], outlier: float
) -> dict[str, Any]:
    """Tokens per second and bytes read for each precision, the memory's bandwidth, and errors of a product."""
    del rank, world_size
    if sys.platform != "linux":
        raise LabFailed("the engine's CPU kernels run on Linux only: run this lab there")
    found: dict[str, Any] = {"tokens_per_s": {}, "weight_bytes": {}, "errors": errors(outlier)}
    found["bandwidth_bytes_per_s"] = _bandwidth()
    for kind in kinds:
        found["tokens_per_s"][kind], found["weight_bytes"][kind] = _speed(kind, layers, batches)
    found["int4_bits"] = 32 * found["weight_bytes"]["int4"] / found["weight_bytes"]["float32"]
    return found


def _bandwidth() -> float:
    """Bytes per second of reading what no cache holds, by the fastest of a sum, a product and a copy."""
    matrix, vector = torch.ones(_COPIED_BYTES // 2**14, 2**12), torch.ones(2**12)
    target = torch.empty_like(matrix)
    seconds = (
        best_seconds(lambda: matrix.sum(), least_repeats=5),
        best_seconds(lambda: matrix @ vector, least_repeats=5),
        best_seconds(lambda: target.copy_(matrix), least_repeats=5) / 2,  # read once, written once
    )
    return matrix.nbytes / min(seconds)


def _speed(kind: WeightKind, layers: int, batches: list[int]) -> tuple[list[float], int]:
    """Tokens per second of one decoding step at each batch, and bytes of weights that it reads."""
    from sihe.serving.engine.compute.cpu.compute import CpuCompute

    torch.manual_seed(0)
    config = ModelConfig(4096, 768, layers, 12, 4, 64, 2048, 2 * _CONTEXT, tie_embeddings=False)
    model = Decoder(config).eval()
    each = blocks_of(_CONTEXT)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    pages = KvPages(config, num_blocks=each * max(batches), dtype=dtype)
    compute = CpuCompute(model, pages, kind, threads=torch.get_num_threads())
    try:
        rates = []
        for batch in batches:
            feeds = [Feed([7 + row], _CONTEXT - 1, range(row * each, (row + 1) * each)) for row in range(batch)]
            step = Step.of(feeds)
            rates.append(batch / best_seconds(lambda step=step: compute.forward(step)))  # type: ignore[misc]
        return rates, compute.weight_bytes
    finally:
        compute.close()


def errors(outlier: float) -> dict[str, float]:
    """Relative error of a product whose weights were rounded in several ways, with an outlying channel or without."""
    from sihe.serving.engine.compute.cpu.weights import KINDS, pack, unpack

    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(_MATRIX, _MATRIX, generator=generator)
    inputs = torch.randn(64, _MATRIX, generator=generator)
    spoilt_OI = weight_OI.clone()
    spoilt_OI[:, 0] *= outlier  # one input channel whose weights are large: it is in every row
    kinds: tuple[WeightKind, ...] = ("bfloat16", "int8", "int4")
    found: dict[str, float] = {}
    for kind in kinds:
        found[kind] = _error(weight_OI, unpack(pack(weight_OI, KINDS[kind]))[0], inputs)
    found["int4-row"] = _error(weight_OI, rounded(weight_OI, 4, _MATRIX), inputs)
    for kind in kinds[1:]:
        found[f"{kind}-outlier"] = _error(spoilt_OI, unpack(pack(spoilt_OI, KINDS[kind]))[0], inputs, skip=1)
    found["int8-tensor-outlier"] = _error(
        spoilt_OI, rounded(spoilt_OI.view(1, -1), 8, spoilt_OI.numel()).view_as(spoilt_OI), inputs, skip=1
    )
    return found


def rounded(weight_OI: Tensor, bits: int, group: int) -> Tensor:
    """The nearest that a symmetric code of `bits` bits can say, with one scale for `group` weights of a row."""
    groups_G = weight_OI.reshape(-1, group)
    most = 2 ** (bits - 1) - 1
    scales = groups_G.abs().amax(1, keepdim=True) / most
    return ((groups_G / scales).round().clamp(-most, most) * scales).view_as(weight_OI)


def _error(exact_OI: Tensor, changed_OI: Tensor, inputs: Tensor, *, skip: int = 0) -> float:
    """Norm of the difference of the products over the norm of the exact one; the first `skip` inputs left out."""
    exact = inputs[:, skip:] @ exact_OI[:, skip:].T
    return ((inputs[:, skip:] @ changed_OI[:, skip : exact_OI.shape[1]].T - exact).norm() / exact.norm()).item()
