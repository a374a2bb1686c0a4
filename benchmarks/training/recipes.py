"""Whether every post-training recipe moves its metric: each on three seeds, from nothing, as its command runs it.

    python -m benchmarks.training.recipes --page docs/reference/recipes.md     (`make recipes`)

One home serves all runs, so what recipes share is computed once and taken over by the others: the base of 800 steps in
the row of `sft`, the reward model in that of `reward`. A claim is the smallest change of the metric among the seeds.
With `--home` the rows of a recipe that is finished there are read instead of computed again: an interrupted measurement
goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Claim, report

SEEDS = 3


@dataclass(frozen=True)
class Case:
    """A recipe with other settings than its file has, and by how much its metric must move."""

    name: str
    recipe: str
    least: float
    settings: Mapping[str, object] = field(default_factory=dict)


CASES = (
    Case("pretrain", "pretrain", 1.5),
    Case("sft", "sft", 0.8),
    Case("lora", "lora", 0.6),
    Case("qlora", "qlora", 0.5),
    Case("reward", "reward", 0.2),
    Case("dpo", "dpo", 0.25),
    Case("ipo", "dpo", 0.25, {"stages.1.loss": "ipo", "stages.1.beta": 0.3}),
    Case("kto", "dpo", 0.25, {"stages.1.loss": "kto"}),
    Case("orpo", "dpo", 0.25, {"stages.1.loss": "orpo", "stages.1.beta": 0.5}),
    Case("rlhf", "rlhf", 0.15),
    Case("grpo", "grpo", 0.12),
    Case("distil", "distil", 1.5),
)


_PREFACE = """# What the post-training recipes reach

Written by `make recipes`, which runs `sihe train recipe <name> --seeds 3` for each of them (threads: {threads}) in a
home that is empty at first, and takes the figures from what the command says: the metric on 128 held-out problems,
before and after the recipe's last stage. `s` is the wall clock of the middle seed. Stages that recipes share are
computed once: the base of 800 steps counts in the row of sft, the reward model in that of reward. The command itself
writes the curves of all metrics into a report.
"""


def main() -> None:
    """Runs what is not in `--home` yet, then writes the claims and, on request, the page with its chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--home", type=Path, help="the folder of the runs and their reports, instead of a temporary one"
    )
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="and write no result")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, help="where to write the table; its chart goes beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = options.home or Path(scratch)
        found = {
            case.name: rows_of(case, home, options.threads)
            for case in CASES
            if options.only is None or case.name in options.only
        }
    if options.only is not None:
        return
    report(__file__, [claim_of(case, found[case.name]) for case in CASES])
    if options.page is not None:
        write_page(options.page, found, threads=options.threads)


def rows_of(case: Case, home: Path, threads: int) -> list[dict[str, Any]]:
    """What the recipe's command says of each seed."""
    kept = home / "measured" / f"{case.name}.json"
    if not kept.exists():
        settings = {"name": f"{case.name}-sums", **case.settings} if case.settings else {}
        command = [sys.executable, "-m", "sihe", "--home", str(home), "train", "recipe", case.recipe]
        command += ["--seeds", str(SEEDS), "--json"]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **limits})
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout, encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))["seeds"]
    for row in rows:
        print(f"{case.name:10} seed {row['seed']}  {row['metric']:14} {told(row)}  {row['seconds']:.0f} s", flush=True)
    return rows


def claim_of(case: Case, rows: Sequence[Mapping[str, Any]]) -> Claim:
    """The seed that moved least."""
    goal = _config(case).goal
    least = min((row["after"] - row["before"]) * (1 if goal == "up" else -1) for row in rows)
    metric = rows[0]["metric"]
    name = f"recipe {case.name}, {metric} {goal}, least of {len(rows)} seeds"
    return Claim(name, least, None, None, metric, f">= {case.least} {metric}", least >= case.least)


def told(row: Mapping[str, Any]) -> str:
    """A row as `before → after`."""
    return f"{row['before']:.3f} → {row['after']:.3f}"


def write_page(page: Path, found: Mapping[str, Sequence[Mapping[str, Any]]], *, threads: int) -> None:
    """The table, the settings behind it, and the chart."""
    chart = page.with_suffix(".svg")
    seeds = [row["seed"] for row in next(iter(found.values()))]
    lines = [*_PREFACE.format(threads=threads).splitlines(), ""]
    lines += [f"| recipe | metric | {' | '.join(f'seed {seed}' for seed in seeds)} | s |"]
    lines += [f"|---|---|{'---|' * len(seeds)}---|"]
    for case in CASES:
        rows = found[case.name]
        middle = sorted(row["seconds"] for row in rows)[len(rows) // 2]
        goal = "↑" if _config(case).goal == "up" else "↓"
        cells = " | ".join(told(row) for row in rows)
        lines.append(f"| {case.name} | {rows[0]['metric']} {goal} | {cells} | {middle:.0f} |")
    lines += ["", f"![The metric of each recipe by step: seed 0 blue, 1 orange, 2 green]({chart.name})", ""]
    lines += ["| recipe | stages | last stage |", "|---|---|---|"]
    lines += [_settings_row(case) for case in CASES]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    chart.write_text(drawn(found), encoding="utf-8")


def drawn(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A chart of each recipe's metric by step, three in a row, on a ground of its own."""
    from sihe.training.recipes.curve import draw_curves

    columns, width, height, title = 3, 420, 158, 34
    panels = []
    for number, (name, rows) in enumerate(found.items()):
        x, y = 16 + number % columns * width, 12 + number // columns * (height + title)
        lines = {f"seed {row['seed']}": row["curve"] for row in rows}
        panel = draw_curves(lines, label=f"{name}: {', '.join(told(row) for row in rows)}")
        placed = panel.replace("<svg ", f'<svg x="{x}" y="{y + 20}" width="{width - 24}" height="{height}" ', 1)
        panels.append(f'<text x="{x}" y="{y + 12}" font-weight="600">{name}: {rows[0]["metric"]}</text>{placed}')
    total = columns * width + 16, 24 + -(-len(found) // columns) * (height + title)
    look = 'font-family="system-ui, sans-serif" font-size="13" fill="#1c2024" color="#1c2024"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" role="img" '
        f'aria-label="The metric of each recipe by step" {look}>'
        f'<rect width="{total[0]}" height="{total[1]}" rx="12" fill="#ffffff"/>{"".join(panels)}</svg>\n'
    )


def _config(case: Case) -> Any:
    from sihe.training.recipes.reader import load_recipe

    return load_recipe(case.recipe, case.settings)


def _settings_row(case: Case) -> str:
    """The stages, and what the last one's settings are where they decide."""
    config = _config(case).public()
    stages = config["stages"]
    last = dict(stages[-1])
    update = last.pop("update")
    shown = {key: update[key] for key in ("steps", "batch", "peak_lr")}
    decisive = ("loss", "beta", "group", "epochs", "kl_coefficient", "rollout", "divergence", "operation")
    shown |= {key: last[key] for key in decisive if last.get(key) is not None}
    if last.get("adapter"):
        shown |= {"rank": last["adapter"]["lora"]["rank"], "base": last["adapter"]["base"]}
    path = " → ".join(f"{stage['kind']} {stage['update']['steps']}" for stage in stages)
    return f"| {case.name} | {path} | {', '.join(f'{key} {value}' for key, value in shown.items())} |"


if __name__ == "__main__":
    main()
