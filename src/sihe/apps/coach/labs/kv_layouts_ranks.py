"""What the process of `kv.layouts` runs: the engine's step over one cache that is laid out in several ways.

A model that is nearly all attention decodes one token of each sequence, layer by layer, so that what is gathered can
be gathered a layer at a time. All of it on one thread: neither a kernel nor a copy has more cores than the other.

T tokens of the step (one of each sequence), V vocabulary, B blocks of a sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sihe.apps.coach.errors import LabFailed
from sihe.apps.coach.labs.kv_layouts import GROUP, HEAD_DIM, KV_HEADS, LAYERS, LAYOUTS
from sihe.apps.coach.labs.timing import best_seconds
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.serving.engine.compute.paged import TorchCompute
from sihe.serving.engine.compute.step import Compute, Feed, Step
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS, blocks_of
from sihe.serving.engine.kv.storage import KvPages

_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_HIDDEN = 32  # so narrow that products with weights hardly count
_ROUNDS = 3
_LEAST_S = 1e-6  # a difference of two times that were disturbed
Call = Callable[[], Tensor]


@torch.inference_mode()
def costs(
    rank: int, world_size: int, *, lengths: list[int], batches: list[int], item_bytes: int, prefix: int
) -> dict[str, Any]:
    """Seconds of a decoding step's attention by layout, batch and length, and how far the layouts are apart."""
    del rank, world_size
    if sys.platform != "linux":
        raise LabFailed("the engine's CPU kernels run on Linux only: run this lab there")
    cache = Cache(max(lengths), max(batches), item_bytes)
    found: dict[str, Any] = {"seconds": {}, "differing": 0, "difference": 0.0}
    try:
        for batch in batches:
            times: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
            for length in lengths:
                calls = {layout: cache.step(layout, batch, length) for layout in LAYOUTS}
                outs = {layout: call() for layout, call in calls.items()}
                found["differing"] += int((outs["gathered"] != outs["pages"]).sum())
                # The new one first: max keeps its first argument where that is no number, and it shall be seen.
                found["difference"] = max((outs["torch"] - outs["pages"]).abs().max().item(), found["difference"])
                for layout, seconds in zip(LAYOUTS, _attention_s(cache, batch, calls), strict=True):
                    times[layout].append(seconds)
            found["seconds"][str(batch)] = times
        batch, length = max(batches), max(lengths)
        shares = {"own": 0, "shared": min(prefix, length - 1)}
        both = {name: cache.step("pages", batch, length, shared=shared) for name, shared in shares.items()}
        found["own_s"], found["shared_s"] = _attention_s(cache, batch, both)
    finally:
        cache.close()
    return found


def _attention_s(cache: Cache, batch: int, calls: dict[str, Call]) -> list[float]:
    """Seconds that each call reads its cache for: all of it but what a step takes whose sequences have one token each.

    In turns, each the fastest of several rounds.
    """
    bare = [cache.step(layout, batch, 1) for layout in ("pages", "torch")]
    rounds = [[best_seconds(call) for call in (*bare, *calls.values())] for _ in range(_ROUNDS)]
    kernels_s, torch_s, *times = (min(taken) for taken in zip(*rounds, strict=True))
    rests = (torch_s if name == "torch" else kernels_s for name in calls)
    return [max(taken - rest, _LEAST_S) for taken, rest in zip(times, rests, strict=True)]


class Cache:
    """Pages with keys and values for `batch` sequences of `longest` tokens, and the ways to attend over them.

    Each layer is a model of its own with pages of its own; what enters it is the same token each time, so that the
    step writes what lies there already.
    """

    def __init__(self, longest: int, batch: int, item_bytes: int) -> None:
        self._each = blocks_of(longest)
        heads, blocks, dtype = KV_HEADS * GROUP, batch * self._each, _DTYPES[item_bytes]
        config = ModelConfig(_HIDDEN, _HIDDEN, 1, heads, KV_HEADS, HEAD_DIM, _HIDDEN, longest)
        torch.manual_seed(0)
        self._model = Decoder(config).eval().requires_grad_(False)
        for weight in self._model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 * weight.shape[1] ** -0.5)  # wide: some tokens are looked at more than others
        self._layers = [KvPages(config, num_blocks=blocks, dtype=dtype) for _ in range(LAYERS)]
        self._copy = KvPages(config, num_blocks=blocks, dtype=dtype)
        self._layers[0].keys.normal_()
        self._layers[0].values.normal_()
        for pages in self._layers[1:]:
            pages.keys.copy_(self._layers[0].keys)
            pages.values.copy_(self._layers[0].values)
        self._order = torch.randperm(blocks)
        self._computes: list[Compute] = [self._kernels(pages) for pages in self._layers]
        self._over_copy = self._kernels(self._copy)

    def step(self, layout: str, batch: int, length: int, *, shared: int = 0) -> Call:
        """A step of all layers for one token of `batch` sequences of `length` tokens; it gives the last logits [T, V].

        `slab`: the blocks of a sequence lie one behind the other. `pages`: they lie anywhere, and are read where they
        are. `gathered`: they lie anywhere, and are copied into one piece first. `torch`: the same, by the engine's way
        of computing where it has no kernels. The full blocks of the first `shared` tokens are the same for all.
        """
        table_TB = self.table(batch, length, is_slab=layout == "slab", shared=shared)
        if layout == "gathered":
            return self._gathered(table_TB, length)
        step, computes = _step(table_TB, length), self._computes
        if layout == "torch":
            computes = [TorchCompute(self._model, pages) for pages in self._layers]

        def in_place() -> Tensor:
            for compute in computes:
                logits_TV = compute.forward(step)
            return logits_TV.clone()

        return in_place

    def table(self, batch: int, length: int, *, is_slab: bool, shared: int = 0) -> Tensor:
        """[T, B] the blocks of each sequence."""
        places_TB = torch.arange(batch)[:, None] * self._each + torch.arange(blocks_of(length))
        table_TB = places_TB if is_slab else self._order[places_TB]
        common = shared // BLOCK_TOKENS
        table_TB[:, :common] = table_TB[0, :common].clone()
        return table_TB

    def close(self) -> None:
        """Ends what computes."""
        for compute in (*self._computes, self._over_copy):
            compute.close()

    def _gathered(self, table_TB: Tensor, length: int) -> Call:
        copy, compute = self._copy, self._over_copy
        blocks = table_TB.flatten()
        keys, values = copy.keys[0, : len(blocks)], copy.values[0, : len(blocks)]
        step = _step(torch.arange(len(blocks)).view_as(table_TB), length)

        def gather_and_attend() -> Tensor:
            for pages in self._layers:
                torch.index_select(pages.keys[0], 0, blocks, out=keys)
                torch.index_select(pages.values[0], 0, blocks, out=values)
                logits_TV = compute.forward(step)
            return logits_TV.clone()

        return gather_and_attend

    def _kernels(self, pages: KvPages) -> Compute:
        from sihe.serving.engine.compute.cpu.compute import CpuCompute

        return CpuCompute(self._model, pages, "float32", threads=1, keep=True)


def _step(table_TB: Tensor, length: int) -> Step:
    """One token of each sequence, the last of its `length`."""
    return Step.of([Feed([row % _HIDDEN], length - 1, blocks) for row, blocks in enumerate(table_TB.tolist())])
