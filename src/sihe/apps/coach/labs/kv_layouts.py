"""Lab `kv.layouts`: the KV cache as slabs and as pages: what each reserves, and what reading each costs a step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from sihe.apps.coach.labs.kv_layouts_memory import Reserved, admitted, lengths_of, prefixed, reserved
from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text
from sihe.serving.engine.kv.blocks import blocks_of

KV_HEADS, GROUP, HEAD_DIM, LAYERS = 4, 4, 64, 8
LAYOUTS = ("slab", "pages", "gathered", "torch")
SEQUENCES = 256  # conversations whose memory is counted
_LABELS = {
    "slab": Text(zh="整块连续", en="Contiguous slab"),
    "pages": Text(zh="分页，原地读取", en="Pages, read in place"),
    "gathered": Text(zh="分页，先拷成连续的", en="Pages, gathered into a copy"),
    "torch": Text(zh="分页，先拷再用 torch", en="Pages, gathered, by torch"),
}


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Counts what a mix of conversations reserves, and times attention over caches of each layout."""
    longest, batch, mean, prefix, item_bytes = (
        int(parameters[key]) for key in ("tokens", "batch", "mean", "prefix", "item-bytes")
    )
    lengths, batches = sequence_lengths(longest), sorted({1, batch})
    (found,) = run_ranks(
        "sihe.apps.coach.labs.kv_layouts_ranks:costs",
        {"lengths": lengths, "batches": batches, "item_bytes": item_bytes, "prefix": prefix},
        world_size=1,
        limit_s=limit_s,
        threads=1,
    )
    seconds = {int(size): times for size, times in found["seconds"].items()}
    full = seconds[batch]
    mix = list(islice(lengths_of(mean, longest), SEQUENCES))
    kept = reserved(mix, longest)
    alike = prefixed(prefix, [max(1, min(length, longest - prefix)) for length in mix])
    read = read_bytes(batch, longest, item_bytes)
    return Measurement(
        values={
            "slab-wasted": 100 * kept.slab_waste,
            "pages-wasted": 100 * kept.page_waste,
            "pages-wasted-modelled": 100 * 7.5 / (kept.used / SEQUENCES + 7.5),
            "vllm-low": 20.4,
            "vllm-high": 38.2,
            "slabs-fit": SEQUENCES,
            "pages-fit": admitted(lengths_of(mean, longest), SEQUENCES * blocks_of(longest)),
            "prefix-copied": alike.copied,
            "prefix-shared": alike.shared,
            "prefix-saved": 100 * (1 - alike.shared / alike.copied),
            "prefix-time": found["own_s"] / found["shared_s"],
            "slab-ms": full["slab"][-1] * 1e3,
            "pages-ms": full["pages"][-1] * 1e3,
            "gathered-ms": full["gathered"][-1] * 1e3,
            "torch-ms": full["torch"][-1] * 1e3,
            "pages-ratio": full["pages"][-1] / full["slab"][-1],
            "gathered-ratio": full["gathered"][-1] / full["pages"][-1],
            "gathered-ratio-short": full["gathered"][0] / full["pages"][0],
            "gathered-ratio-modelled": 3,
            "copied": read / 2**20,
            "bandwidth": read / full["pages"][-1] / 1e9,
            "differing": found["differing"],
            "difference": found["difference"],
        },
        tables=(_times(lengths, seconds), _memory(kept, longest)),
        series=tuple(_series(layout, lengths, full[layout]) for layout in LAYOUTS),
    )


def sequence_lengths(longest: int) -> list[int]:
    """Four lengths that double, the last `longest`."""
    return [longest >> halvings for halvings in (3, 2, 1, 0)]


def read_bytes(batch: int, length: int, item_bytes: int) -> int:
    """Bytes of keys and values that the attention of one step reads: 2·L·H_kv·D·b·n a sequence."""
    return 2 * LAYERS * KV_HEADS * HEAD_DIM * item_bytes * length * batch


def _times(lengths: list[int], seconds: Mapping[int, Mapping[str, list[float]]]) -> Table:
    return Table(
        key="times",
        title=Text(zh="一个解码步里八层注意力的用时", en="Attention of eight layers in one decoding step"),
        columns=(
            Column(label=Text(zh="批次", en="Batch")),
            Column(label=Text(zh="上下文词元", en="Tokens of context")),
            *(Column(label=_LABELS[layout], unit="ms", provenance="measured") for layout in LAYOUTS),
            Column(label=Text(zh="先拷 / 原地", en="Gathered / in place"), unit="×", provenance="measured"),
        ),
        rows=tuple(
            (
                batch,
                length,
                *(round(times[layout][place] * 1e3, 3) for layout in LAYOUTS),
                round(times["gathered"][place] / times["pages"][place], 2),
            )
            for batch, times in seconds.items()
            for place, length in enumerate(lengths)
        ),
    )


def _memory(kept: Reserved, longest: int) -> Table:
    return Table(
        key="reserved",
        title=Text(
            zh=f"{SEQUENCES} 段对话预留的词元位置", en=f"Places for tokens that {SEQUENCES} conversations reserve"
        ),
        columns=(
            Column(label=Text(zh="布局", en="Layout")),
            Column(label=Text(zh="预留", en="Reserved"), unit="tok", provenance="measured"),
            Column(label=Text(zh="用到", en="Used"), unit="tok", provenance="measured"),
            Column(label=Text(zh="空着", en="Wasted"), unit="%", provenance="measured"),
        ),
        rows=(
            (f"slab {longest:,}", kept.slabs, kept.used, round(100 * kept.slab_waste, 2)),
            ("page 16", kept.pages, kept.used, round(100 * kept.page_waste, 2)),
        ),
    )


def _series(layout: str, lengths: list[int], seconds: list[float]) -> Series:
    return Series(
        key=layout,
        chart="attention",
        label=_LABELS[layout],
        x=Axis(label=Text(zh="上下文词元", en="Tokens of context"), log=True),
        y=Axis(label=Text(zh="一步的注意力", en="Attention of a step"), unit="ms", log=True),
        provenance="measured",
        points=tuple((float(length), taken * 1e3) for length, taken in zip(lengths, seconds, strict=True)),
    )
