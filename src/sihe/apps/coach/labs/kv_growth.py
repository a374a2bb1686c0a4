"""Lab `kv.growth`: what a token of context weighs, by how keys and values are shared, in resident memory."""

from __future__ import annotations

from collections.abc import Mapping

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

HEADS = 16
HEAD_DIM = 64
GROUPED_HEADS = 4
LATENT_RANK = 4 * HEAD_DIM  # DeepSeek-V2's own proportions: 4 and 1/2 head dims (arXiv 2405.04434, section 3.1.2)
LATENT_ROTARY = HEAD_DIM // 2
KINDS = ("mha", "gqa", "mqa", "mla")
_LABELS = {
    "mha": Text(zh="多头（MHA）", en="Multi-head (MHA)"),
    "gqa": Text(zh="分组查询（GQA）", en="Grouped (GQA)"),
    "mqa": Text(zh="单一 KV 头（MQA）", en="Multi-query (MQA)"),
    "mla": Text(zh="潜向量（MLA）", en="Latent (MLA)"),
}
_MIB = 2**20


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Fills the cache of one sequence of `tokens` tokens for each kind and reads the process's resident memory."""
    tokens, layers, item_bytes = (int(parameters[key]) for key in ("tokens", "layers", "item-bytes"))
    counts = token_counts(tokens)
    (found,) = run_ranks(
        "sihe.apps.coach.labs.kv_growth_ranks:grow",
        {"counts": counts, "layers": layers, "item_bytes": item_bytes, "kinds": list(KINDS)},
        world_size=1,
        limit_s=limit_s,
        threads=1,
    )
    modelled = {kind: token_bytes(kind, layers, item_bytes) for kind in KINDS}
    values = {}
    for kind in KINDS:
        values[f"{kind}-measured"] = found["resident_bytes"][kind][-1] / tokens / 1024
        values[f"{kind}-modelled"] = modelled[kind] / 1024
    error = max(abs(found["resident_bytes"][kind][-1] / (modelled[kind] * tokens) - 1) for kind in KINDS)
    return Measurement(
        values={
            **values,
            "error": 100 * error,
            "untouched": found["untouched_bytes"] / _MIB,
            "promised": found["promised_bytes"] / _MIB,
            "one-more": found["one_more_bytes"] / _MIB,
            "llama-token": 2 * 32 * 8 * 128 * 2 / 1024,
            "deepseek-token": 60 * (512 + 64) * 2 / 1024,
        },
        tables=(_table(counts, found["resident_bytes"], layers, item_bytes),),
        series=tuple(_series(kind, counts, found["resident_bytes"][kind]) for kind in KINDS),
    )


def token_bytes(kind: str, layers: int, item_bytes: int) -> int:
    """Bytes that one token leaves behind: 2·L·H_kv·D·b, or L·(rank + rotary)·b with a latent."""
    if kind == "mla":
        return layers * (LATENT_RANK + LATENT_ROTARY) * item_bytes
    return 2 * layers * kv_heads(kind) * HEAD_DIM * item_bytes


def kv_heads(kind: str) -> int:
    """Heads that have keys and values of their own."""
    return {"mha": HEADS, "gqa": GROUPED_HEADS, "mqa": 1}[kind]


def token_counts(tokens: int) -> list[int]:
    """Four counts that double, the last `tokens`: whole blocks."""
    return [tokens >> halvings for halvings in (3, 2, 1, 0)]


def _table(counts: list[int], resident: Mapping[str, list[int]], layers: int, item_bytes: int) -> Table:
    return Table(
        key="resident",
        title=Text(zh="驻留内存的增长", en="Growth of resident memory"),
        columns=(
            Column(label=Text(zh="注意力", en="Attention")),
            *(Column(label=Text(zh=f"{count}", en=f"{count}"), unit="MiB", provenance="measured") for count in counts),
            Column(label=Text(zh="公式", en="Formula"), unit="MiB", provenance="modelled"),
        ),
        rows=tuple(
            (
                kind.upper(),
                *(round(size / _MIB, 2) for size in resident[kind]),
                round(token_bytes(kind, layers, item_bytes) * counts[-1] / _MIB, 2),
            )
            for kind in KINDS
        ),
    )


def _series(kind: str, counts: list[int], resident: list[int]) -> Series:
    return Series(
        key=kind,
        chart="memory",
        label=_LABELS[kind],
        x=Axis(label=Text(zh="上下文词元", en="Tokens of context"), log=True),
        y=Axis(label=Text(zh="驻留内存", en="Resident memory"), unit="MiB", log=True),
        provenance="measured",
        points=tuple((float(count), max(size, 1) / _MIB) for count, size in zip(counts, resident, strict=True)),
    )
