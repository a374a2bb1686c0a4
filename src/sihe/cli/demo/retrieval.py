"""Stage 5: the handbook as an index, and three questions answered with citations that are checked."""

from __future__ import annotations

import time

from sihe.cli.demo.corpus import handbook
from sihe.cli.demo.journal import Figures
from sihe.cli.demo.stage import Walk
from sihe.core.errors import InternalError

INDEX = "handbook"
QUESTIONS = (
    "How often should a checkpoint be written?",
    "为什么环形 AllReduce 的通信量与 worker 数无关？",
    "What is a point-in-time join?",
)


def ask(walk: Walk) -> Figures:
    """Indexes the handbook and answers the questions."""
    from sihe.apps.rag.service import RagService

    service = RagService(walk.workspace)
    started = time.perf_counter()
    report = service.index(INDEX, [handbook()])
    figures: Figures = {"documents": report.documents, "chunks": report.chunks, "retriever": report.retriever}
    figures["index_s"] = time.perf_counter() - started
    walk.screen.detail(f"{report.documents} documents, {report.chunks} passages, retrieval by {report.retriever}")
    answers, milliseconds = [], []
    for question in QUESTIONS:
        started = time.perf_counter()
        answer = service.ask(INDEX, question)
        milliseconds.append(1000 * (time.perf_counter() - started))
        if not answer.citations:
            raise InternalError(f"no citation for {question!r}: the handbook should answer it")
        walk.screen.detail(f"Q  {question}")
        walk.screen.detail(f"A  {answer.text}")
        for number, citation in enumerate(answer.citations, 1):
            walk.screen.detail(f"   [{number}] {citation.document}, characters {citation.start} to {citation.end}")
        answers.append(
            {
                "question": question,
                "answer": answer.text,
                "citations": [f"{item.document}:{item.start}-{item.end}" for item in answer.citations],
            }
        )
    figures |= {"answers": answers, "citations": sum(len(answer["citations"]) for answer in answers)}
    figures["ask_ms"] = sorted(milliseconds)[len(milliseconds) // 2]
    return figures
