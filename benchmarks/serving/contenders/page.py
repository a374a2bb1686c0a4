"""The page of a whole run: every contender at every cell, with its share of the limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_HEAD = """# Tokens per second of the engine and its peers

Written by `python -m benchmarks.serving.throughput --page docs/reference/serving_speed.md`: a Llama of 124.7 M
parameters with random weights, {threads} processors, medians of alternating repeats. Decoding is {steps} tokens after
the prompt: the difference of two timings, and so the less certain the longer the prompt (after 1,024 tokens repeats
have differed by up to a factor of two). Shares are of the limit of that precision on this machine: for decoding reading
all weights and keys once a step, or the peak of multiplication where that takes longer; for prefill the peak, with all
tokens through all layers (ours leaves out what nobody reads of the last one: 8 %).
"""


@dataclass(frozen=True)
class Row:
    """One contender at one cell; shares are None where its precision is not the cell's."""

    precision: str
    prompt: int
    batch: int
    contender: str
    prefill_tok_per_s: float
    decode_tok_per_s: float
    prefill_share: float | None
    decode_share: float | None
    disturbed: float
    repeats: int


def kept_with(path: Path, rows: Sequence[Row]) -> list[Row]:
    """`rows` and those of other precisions and prompts that earlier runs left in the file `path`, which keeps all."""
    new = {(row.precision, row.prompt, row.batch) for row in rows}
    before = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    kept = [row for row in before if (row.precision, row.prompt, row.batch) not in new] + list(rows)
    path.write_text(json.dumps([asdict(row) for row in kept], indent=1), encoding="utf-8")
    return sorted(kept, key=lambda row: (row.precision, row.prompt, row.batch))


def write_page(path: Path, rows: Sequence[Row], *, threads: int, steps: int, instructions: str | None) -> None:
    """A table for each precision and length of prompt; `instructions` as in `contenders.instructions`."""
    parts = [_HEAD.format(threads=threads, steps=steps)]
    if instructions:
        parts.append(
            f"All were kept to {instructions} (`--instructions {instructions}`) on a processor that has more.\n"
        )
    for precision, prompt in dict.fromkeys((row.precision, row.prompt) for row in rows):
        of = [row for row in rows if (row.precision, row.prompt) == (precision, prompt)]
        batches = list(dict.fromkeys(row.batch for row in of))
        parts.append(f"## {precision}, prompts of {prompt} tokens\n")
        columns = [f"{phase} B={batch}" for phase in ("prefill", "decode") for batch in batches]
        lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for contender in dict.fromkeys(row.contender for row in of):
            found = {row.batch: row for row in of if row.contender == contender}
            cells = [_cell(found[batch].prefill_tok_per_s, found[batch].prefill_share) for batch in batches]
            cells += [_cell(found[batch].decode_tok_per_s, found[batch].decode_share) for batch in batches]
            lines.append(f"| {contender} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
        disturbed, repeats = max(row.disturbed for row in of), sorted({row.repeats for row in of})
        parts.append(
            f"Repeats: {' or '.join(map(str, repeats))}. Others had at most {disturbed:.0%} of the machine meanwhile.\n"
        )
    path.write_text("\n".join(parts), encoding="utf-8")


def _cell(speed: float, share: float | None) -> str:
    return f"{speed:,.0f}" if share is None else f"{speed:,.0f} ({share:.0%})"
