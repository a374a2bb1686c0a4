"""Lab `tp.split`: one layer cut over two ranks, with the sequence whole and cut too, and every byte counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Column, Measurement, Table
from sihe.apps.coach.schema import Text
from sihe.cluster.planner import presets
from sihe.cluster.planner.activations import layer_bytes
from sihe.cluster.planner.types import Layout, TransformerShape

_RANKS = 2
_BATCH = 2
_HEAD_DIM = 32
_LARGE = "llama-70b"
_LARGE_RANKS = 8
_NAMES = {
    "whole": Text(zh="不切", en="Whole"),
    "plain": Text(zh="切矩阵", en="Matrices cut"),
    "sequence": Text(zh="切矩阵，也切序列", en="Matrices and sequence cut"),
}


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Runs one layer whole and cut in both ways on two processes; the fullest rank counts."""
    hidden, tokens = int(parameters["hidden"]), int(parameters["tokens"])
    shape = layer_shape(hidden, tokens)
    answers = run_ranks(
        "sihe.apps.coach.labs.tensor_ranks:layer",
        {"shape": _model_config(shape), "tokens": tokens},
        world_size=_RANKS,
        limit_s=limit_s,
    )
    stream = 4 * _BATCH * tokens * hidden
    fullest = {name: {key: max(answer[name][key] for answer in answers) for key in answers[0][name]} for name in _NAMES}
    whole = Layout(micro_batch=_BATCH, precision="fp32")
    layouts = {
        "whole": whole,
        "plain": replace(whole, tp=_RANKS, sequence_parallel=False),
        "sequence": replace(whole, tp=_RANKS),
    }
    kept = {name: layer_bytes(shape, layout) for name, layout in layouts.items()}
    values = {
        "sent-modelled": 4 * 2 * (_RANKS - 1) / _RANKS,
        "two-columns-modelled": (_RANKS - 1) / _RANKS * (shape.ffn + hidden) / hidden,
        "one-message-modelled": 2 * (_RANKS - 1) / _RANKS,
        "weights-share": fullest["plain"]["weights"] / fullest["whole"]["weights"],
        "large-plain": large_share(sequence_parallel=False),
        "large-sequence": large_share(sequence_parallel=True),
    }
    for name in ("plain", "sequence"):
        values |= {
            f"{name}-sent": fullest[name]["sent"] / stream,
            f"{name}-messages": fullest[name]["messages"],
            f"{name}-kept": fullest[name]["saved"] / fullest["whole"]["saved"],
            f"{name}-kept-modelled": kept[name] / kept["whole"],
            f"{name}-difference": fullest[name]["difference"],
        }
    rows = [
        (
            _NAMES[name],
            found["messages"],
            found["sent"] / 1024,
            found["weights"] / 1024,
            found["saved"] / 1024,
            kept[name] / 1024,
        )
        for name, found in fullest.items()
    ]
    return Measurement(values=values, tables=(_table(rows),))


def layer_shape(hidden: int, tokens: int) -> TransformerShape:
    """The planner's description of the layer: grouped queries, a gated layer 8/3 as wide as the stream."""
    heads = hidden // _HEAD_DIM
    width = -(-hidden * 8 // (3 * 64)) * 64
    return TransformerShape("layer", 1, hidden, heads, heads // 2, _HEAD_DIM, width, vocab=64, sequence=tokens)


def large_share(*, sequence_parallel: bool) -> float:
    """Of what a layer of Llama 2 70B keeps for its backward pass, the share of one of 8 tensor ranks."""
    shape = presets.model(_LARGE)
    layout = Layout(tp=_LARGE_RANKS, sequence_parallel=sequence_parallel)
    return layer_bytes(shape, layout) / layer_bytes(shape, Layout())


def _model_config(shape: TransformerShape) -> dict[str, int]:
    """The same sizes as `sihe.models.config.ModelConfig` names them."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_layers": shape.layers,
        "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "max_positions": shape.sequence,
    }


def _table(rows: list[tuple[Text, float, float, float, float, float]]) -> Table:
    return Table(
        key="layer",
        title=Text(
            zh=f"一层，前向加反向，{_RANKS} 个进程中的一个",
            en=f"One layer, forward and backward, one of {_RANKS} ranks",
        ),
        columns=(
            Column(label=Text(zh="切法", en="Cut")),
            Column(label=Text(zh="集合通信", en="Collectives"), provenance="measured"),
            Column(label=Text(zh="发出", en="Sent"), unit="KiB", provenance="measured"),
            Column(label=Text(zh="权重", en="Weights"), unit="KiB", provenance="measured"),
            Column(label=Text(zh="留给反向的激活", en="Kept for backward"), unit="KiB", provenance="measured"),
            Column(label=Text(zh="规划器的估算", en="The planner's count"), unit="KiB", provenance="modelled"),
        ),
        rows=tuple((f"{name.zh} / {name.en}", *numbers) for name, *numbers in rows),
    )
