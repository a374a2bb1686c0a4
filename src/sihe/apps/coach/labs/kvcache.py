"""Lab `kv.cache`: decoding with and without a cache of keys and values, and what the cache weighs."""

from __future__ import annotations

from collections.abc import Mapping

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

LAYERS = 4
HEADS = 8
HEAD_DIM = 32
_ITEM_BYTES = 4  # float32
_MIB = 2**20
_SHORTEST = 64

# Llama-3-8B: layers, KV heads, head dim (arXiv 2407.21783, table 3), bf16, at the context it was trained with.
_LLAMA = {"layers": 32, "kv_heads": 8, "head_dim": 128, "tokens": 8192, "item_bytes": 2}


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Times one decoded token at contexts that double up to `longest`, for both kinds of heads."""
    longest, kv_heads = int(parameters["longest"]), int(parameters["kv-heads"])
    contexts = context_lengths(longest)
    (answer,) = run_ranks(
        "sihe.apps.coach.labs.kvcache_ranks:decode",
        {"contexts": contexts, "kv_heads": [HEADS, kv_heads], "layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM},
        world_size=1,
        limit_s=limit_s,
        threads=2,
    )
    full, grouped = answer["full"], answer["grouped"]
    return Measurement(
        values={
            "bytes-measured": full["cache_bytes"][-1] / _MIB,
            "bytes-modelled": cache_bytes(LAYERS, HEADS, HEAD_DIM, longest, _ITEM_BYTES) / _MIB,
            "grouped-bytes": grouped["cache_bytes"][-1] / _MIB,
            "saving": full["cache_bytes"][-1] / grouped["cache_bytes"][-1],
            "speedup": full["without_s"][-1] / full["with_s"][-1],
            "without-growth": full["without_s"][-1] / full["without_s"][0],
            "with-growth": full["with_s"][-1] / full["with_s"][0],
            "difference": max(full["difference"], grouped["difference"]),
            "llama-bytes": cache_bytes(**_LLAMA) / 2**30,
        },
        tables=(_table(contexts, full, grouped),),
        series=(
            _series("without", Text(zh="不用缓存", en="Without a cache"), contexts, full["without_s"]),
            _series("with", Text(zh="用缓存", en="With a cache"), contexts, full["with_s"]),
            _series(
                "with-grouped",
                Text(zh="用缓存，分组查询", en="With a cache, grouped queries"),
                contexts,
                grouped["with_s"],
            ),
        ),
    )


def cache_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int, item_bytes: int) -> int:
    """Bytes of the keys and values of one sequence: 2·L·H_kv·D·T·b."""
    return 2 * layers * kv_heads * head_dim * tokens * item_bytes


def context_lengths(longest: int) -> list[int]:
    """Contexts that double up to `longest`."""
    lengths = [_SHORTEST]
    while lengths[-1] * 2 <= longest:
        lengths.append(lengths[-1] * 2)
    return lengths


def _table(contexts: list[int], full: dict[str, list[float]], grouped: dict[str, list[float]]) -> Table:
    return Table(
        key="tokens",
        title=Text(zh="生成一个词元", en="Decoding one token"),
        columns=(
            Column(label=Text(zh="上下文", en="Context")),
            Column(label=Text(zh="不用缓存", en="Without"), unit="ms", provenance="measured"),
            Column(label=Text(zh="用缓存", en="With"), unit="ms", provenance="measured"),
            Column(label=Text(zh="缓存", en="Cache"), unit="MiB", provenance="measured"),
            Column(label=Text(zh="分组查询，用缓存", en="Grouped, with"), unit="ms", provenance="measured"),
            Column(label=Text(zh="分组查询，缓存", en="Grouped, cache"), unit="MiB", provenance="measured"),
        ),
        rows=tuple(
            (
                context,
                round(full["without_s"][index] * 1e3, 3),
                round(full["with_s"][index] * 1e3, 3),
                round(full["cache_bytes"][index] / _MIB, 4),
                round(grouped["with_s"][index] * 1e3, 3),
                round(grouped["cache_bytes"][index] / _MIB, 4),
            )
            for index, context in enumerate(contexts)
        ),
    )


def _series(key: str, label: Text, contexts: list[int], seconds: list[float]) -> Series:
    return Series(
        key=key,
        chart="time",
        label=label,
        x=Axis(label=Text(zh="上下文长度", en="Context length"), log=True),
        y=Axis(label=Text(zh="每个词元的用时", en="Time per token"), unit="ms", log=True),
        provenance="measured",
        points=tuple((float(context), second * 1e3) for context, second in zip(contexts, seconds, strict=True)),
    )
