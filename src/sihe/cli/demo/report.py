"""The end of the walk: a table of measured figures on the screen and as an HTML page."""

from __future__ import annotations

import platform
from importlib.resources import files
from typing import Any

from sihe.cli.demo.journal import Figures
from sihe.core.files import write_file
from sihe.core.workspace import Workspace


def rows(stages: dict[str, Figures]) -> list[tuple[str, str, str]]:
    """(stage, what, figure) of everything that was measured."""
    corpus, training, evaluation = stages["corpus"], stages["pretraining"], stages["evaluation"]
    counts = corpus["counts"]
    serving, retrieval, lab = stages["serving"], stages["retrieval"], stages["lab"]
    return [
        ("data", "documents kept of those read", f"{counts['kept']:,} of {counts['documents']:,}"),
        ("data", "tokens in the data set", f"{counts['train_tokens'] + counts['held_out_tokens']:,}"),
        ("data", "files to shards", f"{corpus['stage_s']:.1f} s"),
        ("training", "parameters", f"{training['parameters'] / 1e6:.2f} M"),
        ("training", "throughput, two ranks", f"{training['tokens_per_s']:,.0f} tokens/s"),
        ("training", "loss, first to last step", f"{training['losses'][0]:.3f} to {training['loss']:.3f}"),
        ("training", "rank killed: until the next step", _seconds(training["down_s"])),
        (
            "training",
            "steps computed twice, bit-equal with equal samples",
            f"{training['replayed_equal']} of {training['replayed']}",
        ),
        ("evaluation", "held-out perplexity, early version", f"{evaluation['early_perplexity']:,.1f}"),
        ("evaluation", "held-out perplexity, final version", f"{evaluation['final_perplexity']:,.1f}"),
        ("evaluation", "bits a byte, final version", f"{evaluation['final_bits_per_byte']:.3f}"),
        ("serving", "time to first token, alone", f"{serving['ttft_ms']:.0f} ms"),
        ("serving", "decoding, alone", f"{serving['tokens_per_s']:,.0f} tokens/s"),
        ("serving", f"decoding, {serving['streams']} streams", f"{serving['load_tokens_per_s']:,.0f} tokens/s"),
        (
            "serving",
            f"requests failed during {serving['swaps']} swaps",
            f"{serving['failed']} of {serving['answers']}",
        ),
        ("retrieval", "passages indexed", f"{retrieval['chunks']:,} in {retrieval['index_s']:.1f} s"),
        ("retrieval", "an answer with verified citations", f"{retrieval['ask_ms']:.0f} ms"),
        *(("lab", claim["name"], claim["shown"]) for claim in lab["claims"] if claim["provenance"] == "measured"),
        ("all", "whole walk", f"{sum(figures['stage_s'] for figures in stages.values()):.0f} s"),
    ]


def write_html(workspace: Workspace, stages: dict[str, Figures]) -> str:
    """Writes `<home>/demo/report.html`; its path."""
    from jinja2 import Environment

    template = (files("sihe.cli.demo") / "report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    html = page.render(
        rows=rows(stages),
        curve=_curve(stages["pretraining"]["losses"]),
        answers=stages["retrieval"]["answers"],
        completion=stages["serving"]["text"],
        training=stages["pretraining"],
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        made_at=workspace.clock.now().strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = workspace.path("demo", "report.html")
    write_file(path, html.encode())
    workspace.tracking.log_artifact(str(stages["pretraining"]["run"]), "demo.html", html.encode())
    return str(path)


def _curve(losses: list[float], width: int = 640, height: int = 200) -> dict[str, Any]:
    """The loss curve as points of an SVG polyline, with the values at its ends."""
    top, bottom = max(losses), min(losses)
    span = max(top - bottom, 1e-9)
    points = [
        f"{index * width / max(len(losses) - 1, 1):.1f},{height - (loss - bottom) / span * height:.1f}"
        for index, loss in enumerate(losses)
    ]
    return {"points": " ".join(points), "width": width, "height": height, "top": top, "bottom": bottom}


def _seconds(value: float | None) -> str:
    return "interrupted meanwhile" if value is None else f"{value:.1f} s"
