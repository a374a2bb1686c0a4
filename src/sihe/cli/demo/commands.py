"""`sihe demo`: the stages in order, each skipped when this walk has done it already."""

from __future__ import annotations

import time

import typer

from sihe.core import terminal

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def demo() -> None:
    """Walk the whole house on real input, about 3 minutes; killed and run again, it goes on where it was."""
    from sihe.cli.demo import corpus, laboratory, pretraining, report, retrieval, serving
    from sihe.cli.demo.journal import Journal
    from sihe.cli.demo.screen import Screen
    from sihe.cli.demo.stage import Stage, Walk
    from sihe.core.files import exclusive

    stages = (
        Stage("corpus", "Files to tokens: lake, filter, dedupe, tokenizer, shards", corpus.prepare),
        Stage("pretraining", "Pre-training on two ranks, one of them killed half way", pretraining.train),
        Stage("evaluation", "Held-out perplexity, early and final version", pretraining.evaluate),
        Stage("serving", "Deploy, stream, swap versions under load", serving.serve),
        Stage("retrieval", "Index the handbook, answer with citations", retrieval.ask),
        Stage("lab", "One lab, measured beside its model", laboratory.measure),
    )
    with terminal.workspace() as workspace, exclusive(workspace.path("demo", ".lock"), timeout_s=1):
        journal, screen = Journal(workspace.path("demo", "journal.json")), Screen()
        walk = Walk(workspace, journal, screen)
        screen.line(f"Sihe, walk {journal.walk}, in {workspace.home}")
        for number, stage in enumerate(stages, 1):
            screen.heading(number, len(stages), stage.title)
            if journal.figures(stage.name) is not None:
                screen.detail("done before the interruption")
                continue
            started = time.perf_counter()
            figures = stage.run(walk)
            seconds = time.perf_counter() - started
            journal.done(stage.name, {**figures, "stage_s": seconds})
            screen.detail(f"{seconds:.1f} s")
        path = report.write_html(workspace, journal.stages())
        screen.line("")
        terminal.table(["wing", "measured", "figure"], report.rows(journal.stages()))
        journal.finish()
        screen.line(f"\nreport   {path}")
        home = "" if workspace.settings.home == type(workspace.settings)().home else f" --home {workspace.home}"
        screen.line(
            f"console  sihe{home} up   and open http://{workspace.settings.server.host}:{workspace.settings.server.port}"
        )
