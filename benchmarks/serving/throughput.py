"""Tokens per second of the engine beside transformers, vLLM, llama.cpp and CTranslate2: the same weights and prompts.

Every contender works in a process of its own and one at a time, in turn. Decoding is the time of answers of `--tokens`
tokens less that of one-token answers to prompts of the same length; prefill is the latter. So whole engines are timed,
with whatever they do besides the model. A precision's contenders are compared with each other; shares are of what this
machine's memory or arithmetic allows, measured in the same run.

A peer that is not installed is left out, and said so: `make peers ROOM=serving`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import Claim, at_least, report
from benchmarks.serving.contenders.instructions import INSTRUCTIONS, environment_of, peer_for
from benchmarks.serving.contenders.limits import Limits, measure_limits
from benchmarks.serving.contenders.model import SHAPE, model_folder
from benchmarks.serving.contenders.page import Row, kept_with, write_page
from benchmarks.serving.contenders.pool import (
    OURS,
    THREADS,
    Contender,
    ContenderFailed,
    Entry,
    Measured,
    end_on_signal,
    first,
    quiet,
)


def _llama(precision: str, module: str = "llama") -> Entry:
    return Entry(module, precision, "llama")


_VLLM = Entry("vllm", "bfloat16", "vllm")
CLASSES = {
    "float32": (
        Entry(OURS, "float32"),
        Entry("transformers", "float32"),
        Entry("vllm", "float32", "vllm"),
        _llama("float32"),
        _llama("float32", "llama_flash"),
        Entry("ctranslate2", "float32", "ctranslate2"),
    ),
    "bfloat16": (
        Entry(OURS, "bfloat16"),
        Entry("transformers", "bfloat16"),
        _VLLM,
        _llama("bfloat16"),
        _llama("bfloat16", "llama_flash"),
    ),
    # vLLM has no eight bits here: its bf16 stands beside, as what int8 is to be twice as fast as.
    "int8": (
        Entry(OURS, "int8"),
        _VLLM,
        _llama("int8"),
        _llama("int8", "llama_flash"),
        Entry("ctranslate2", "int8", "ctranslate2"),
    ),
    "int4": (Entry(OURS, "int4"), _llama("int4"), _llama("int4", "llama_flash")),
}
CALM = 0.05  # of the processors' time: what others may have of it before a timing is repeated
WARM_BATCH = 8  # at most, of the turn that warms a contender up: 32 prompts of 1,024 tokens would take a minute
PREFILL_GOAL, DECODE_GOAL, INT8_GOAL = 1.2, 1.0, 2.0


@dataclass(frozen=True)
class Cell:
    """What is measured together."""

    precision: str
    prompt: int
    batch: int


@dataclass
class Figures:
    """Tokens a second of each contender at one cell, one figure a repeat."""

    prefill: dict[Entry, list[float]] = field(default_factory=lambda: defaultdict(list))
    decode: dict[Entry, list[float]] = field(default_factory=lambda: defaultdict(list))
    disturbed: float = 0.0


def start(precision: str, folder: Path, chosen: argparse.Namespace) -> list[Contender]:
    """The contenders of a class that can be had, each having answered the same prompts; says where they disagree."""
    context = -(-(max(chosen.prompts) + chosen.tokens) // 128) * 128
    contenders: list[Contender] = []
    firsts: dict[str, tuple[int, ...]] = {}
    for entry in CLASSES[precision]:
        if chosen.only and entry.module not in chosen.only:
            continue
        if chosen.instructions:
            peer = peer_for(entry, chosen.instructions)
            if peer is None:
                print(f"  left out: {entry.name} cannot be kept to {chosen.instructions}", flush=True)
                continue
            entry = peer
        contender = None
        try:
            log = folder.parent / f"{entry.name}.log"
            contender = Contender(entry, folder, context=context, log=log, urgent=chosen.urgent)
            firsts[entry.name] = contender.measure(batch=2, prompt=64, tokens=16, seed=0).first
            contenders.append(contender)
        except ContenderFailed as failure:
            if contender is not None:
                contender.close()
            print(f"  left out: {failure}", flush=True)
    # In float32 all must compute the same; in less, random weights are too near each other for that to say anything.
    reference = next(iter(firsts.values()), ())
    for name, tokens in firsts.items() if precision == "float32" else ():
        if tokens != reference:
            print(f"  {name} answers {tokens}, and {next(iter(firsts))} {reference}")
    return contenders


def measure(cell: Cell, contenders: list[Contender], chosen: argparse.Namespace) -> Figures:
    """Every contender in turn, `--repeats` times, each time after a turn of its own that warms up."""
    figures, seeds = Figures(), itertools.count(1)

    def timed(contender: Contender, tokens: int, batch: int = cell.batch) -> Measured:
        tries: list[Measured] = []
        while len(tries) < chosen.tries:
            found = contender.measure(batch=batch, prompt=cell.prompt, tokens=tokens, seed=next(seeds))
            tries.append(found)
            if found.disturbed < CALM:
                break
        return min(tries, key=lambda found: found.disturbed)

    for _ in range(chosen.repeats):
        with quiet(chosen.lock):
            for contender in contenders:
                timed(contender, 2, batch=min(cell.batch, WARM_BATCH))  # not counted: the caches hold others' weights
                for _ in range(chosen.tries):
                    one, whole = (timed(contender, tokens) for tokens in (1, chosen.tokens))
                    if whole.seconds > one.seconds:
                        break
                else:
                    raise ContenderFailed(f"{contender.entry.name}: {chosen.tokens} tokens took no longer than one")
                figures.prefill[contender.entry].append(cell.batch * cell.prompt / one.seconds)
                taken_s = whole.seconds - one.seconds
                figures.decode[contender.entry].append(cell.batch * (chosen.tokens - 1) / taken_s)
                figures.disturbed = max(figures.disturbed, one.disturbed, whole.disturbed)
    return figures


def rows_of(cell: Cell, figures: Figures, limits: Limits, tokens: int) -> list[Row]:
    """Medians of every contender, and their shares of the limit."""
    prefill = limits.prefill_tok_per_s(SHAPE, cell.precision, prompt=cell.prompt)
    decode = limits.decode_tok_per_s(SHAPE, cell.precision, batch=cell.batch, context=cell.prompt + tokens / 2)
    rows = []
    for entry in figures.prefill:
        speeds = statistics.median(figures.prefill[entry]), statistics.median(figures.decode[entry])
        shares = (speeds[0] / prefill, speeds[1] / decode) if entry.precision == cell.precision else (None, None)
        at = (cell.precision, cell.prompt, cell.batch)
        repeats = len(figures.prefill[entry])
        rows.append(Row(*at, entry.name, *speeds, *shares, disturbed=figures.disturbed, repeats=repeats))
    return rows


def show(cell: Cell, figures: Figures, rows: list[Row]) -> None:
    """A line a contender: medians with their range, and the share of the limit."""
    print(f"\n{cell.precision}, batch {cell.batch}, prompt {cell.prompt}: tokens/s, median (least, most), of the limit")
    for entry, row in zip(figures.prefill, rows, strict=True):
        line = f"  {entry.name:22}"
        for phase, values, middle, share in (
            ("prefill", figures.prefill[entry], row.prefill_tok_per_s, row.prefill_share),
            ("decode", figures.decode[entry], row.decode_tok_per_s, row.decode_share),
        ):
            line += f"  {phase} {middle:7.0f} ({min(values):.0f}, {max(values):.0f})"
            line += "     " if share is None else f" {share:4.0%}"
        print(line, flush=True)
    if figures.disturbed >= CALM:
        print(f"  others had up to {figures.disturbed:.0%} of this machine while that was timed")


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """Of each cell: ours against the best peer of the precision, and int8 against vLLM's bf16."""
    claims: list[Claim] = []
    for precision, prompt, batch in dict.fromkeys((row.precision, row.prompt, row.batch) for row in rows):
        cell = {
            row.contender: row for row in rows if (row.precision, row.prompt, row.batch) == (precision, prompt, batch)
        }
        ours = cell.get(f"{OURS} {precision}")
        if ours is None:
            continue
        for phase, goal in (("prefill", PREFILL_GOAL), ("decode", DECODE_GOAL)):
            speed = {name: getattr(row, f"{phase}_tok_per_s") for name, row in cell.items()}
            peers = {name: speed[name] for name in speed if name.endswith(f" {precision}") and name != ours.contender}
            where = f"{phase}, {precision}, batch {batch}, prompt {prompt}"
            mine = speed[ours.contender]
            if peers:
                best = max(peers, key=lambda name: peers[name])
                title = f"{where}: best peer is {best.split()[0]}"
                claims.append(at_least(title, mine, peers[best], unit="tokens/s", ratio=goal))
            if phase == "decode" and precision == "int8" and batch > 1 and _VLLM.name in speed:
                title = f"{where}: vLLM's bf16"
                claims.append(at_least(title, mine, speed[_VLLM.name], unit="tokens/s", ratio=INT8_GOAL))
    return claims


def parse() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024], help="tokens")
    parser.add_argument("--tokens", type=int, default=65, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tries", type=int, default=3, help="of one timing, until the machine is calm")
    parser.add_argument("--instructions", choices=INSTRUCTIONS, help="keep all to a lesser processor's instructions")
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="contenders, such as sihe llama")
    parser.add_argument("--quick", action="store_true", help="one repeat of prompts of 128 tokens")
    parser.add_argument("--lock", type=Path, help="a file to hold while timing, shared with what else computes here")
    parser.add_argument(
        "--urgent", action="store_true", help="go before other processes (as root): not an idle machine"
    )
    parser.add_argument("--page", type=Path, help="a Markdown file to write, with what earlier runs measured")
    parser.add_argument("--home", type=Path, default=Path("build/benchmarks/serving"), help="where the model is kept")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.prompts, chosen.repeats = [128], 1
    return chosen


def main() -> int:
    """One precision after the other, so that not all models are in memory at once; 1 when ours was not measured."""
    chosen = parse()
    end_on_signal()
    if chosen.instructions:
        os.environ.update(environment_of(chosen.instructions))  # for the limits, and for every contender
    folder = model_folder(chosen.home.resolve())
    rows: list[Row] = []
    kept = chosen.home / "-".join(filter(None, ("throughput", chosen.instructions)))
    kept = kept.with_suffix(".json")
    measured = True
    for precision in chosen.precisions:
        with quiet(chosen.lock), first(os.getpid(), really=chosen.urgent):
            limits = measure_limits(SHAPE)
        print(f"\n== {precision}: {limits.read_bytes_per_s[precision] / 1e9:.1f} GB/s read, ", end="")
        print(f"{limits.operations_per_s[precision] / 1e9:.0f} thousand million operations/s", flush=True)
        contenders = start(precision, folder, chosen)
        measured &= any(contender.entry.module == OURS for contender in contenders)
        if not contenders:
            continue
        try:
            for prompt, batch in itertools.product(chosen.prompts, chosen.batches):
                cell = Cell(precision, prompt, batch)
                figures = measure(cell, contenders, chosen)
                found = rows_of(cell, figures, limits, chosen.tokens)
                show(cell, figures, found)
                rows += found
                if chosen.page:
                    kept_with(kept, found)
        finally:
            for contender in contenders:
                contender.close()
    if chosen.page:
        rows = kept_with(kept, rows)
        write_page(chosen.page, rows, threads=THREADS, steps=chosen.tokens - 1, instructions=chosen.instructions)
    report(__file__, claims_of(rows))
    return 0 if measured or (chosen.only and OURS not in chosen.only) else 1


if __name__ == "__main__":
    sys.exit(main())
