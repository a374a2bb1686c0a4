"""How well passages are found, and how often a question without an answer is refused; against plain bm25s.

Quality does not depend on the machine or its load, so each figure is computed once. Needs the shared retrieval data
(TEST_DATA); fusion is measured only when the embedder is installed.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import bm25s
import Stemmer

from benchmarks.harness import Claim, at_least, report
from sihe.apps.rag.dense import find_embedder
from sihe.apps.rag.ports import Embedder
from sihe.apps.rag.service import RagService
from sihe.core import settings
from sihe.core.workspace import Workspace

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.retrieval import Collection, ndcg, read_cranfield, read_squad

DATA = Path(os.environ.get("TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "retrieval"
QUESTIONS = 40  # of each article, for the refusals


def service_over(texts: dict[str, str], embedder: Embedder | None) -> RagService:
    """A service whose index `i` holds each text as a file of its own."""
    folder = Path(tempfile.mkdtemp())
    (folder / "d").mkdir()
    for name, text in texts.items():
        (folder / "d" / f"{name}.txt").write_text(text)
    workspace = Workspace(settings.load({"home": str(folder / "home")}, environ={}, directory=folder))
    service = RagService(workspace, embedder=embedder, use_embedder=embedder is not None)
    service.index("i", [folder / "d"])
    return service


def quality(collection: Collection, ranking: Callable[[str], list[str]]) -> float:
    """Mean nDCG@10 over the judged questions."""
    judged = [name for name in collection.questions if name in collection.gains]
    return mean(ndcg(ranking(collection.questions[name]), collection.gains[name]) for name in judged)


def ours(collection: Collection, embedder: Embedder | None) -> float:
    """The service as a user meets it."""
    service = service_over(collection.texts, embedder)

    def ranking(question: str) -> list[str]:
        return list(dict.fromkeys(Path(found.document).stem for found in service.search("i", question, k=20)))

    return quality(collection, ranking)


def peer(collection: Collection) -> float:
    """bm25s as its own documentation uses it: its tokenizer, English stop words and stemmer."""
    names, stemmer = list(collection.texts), Stemmer.Stemmer("english")
    engine = bm25s.BM25(k1=1.2, b=0.75)
    corpus = bm25s.tokenize(list(collection.texts.values()), stopwords="en", stemmer=stemmer, show_progress=False)
    engine.index(corpus, show_progress=False)

    def ranking(question: str) -> list[str]:
        terms = bm25s.tokenize([question], stopwords="en", stemmer=stemmer, show_progress=False)
        found, _ = engine.retrieve(terms, k=10, show_progress=False)
        return [names[index] for index in found[0]]

    return quality(collection, ranking)


def answered(collection: Collection, *, without_article: bool) -> float:
    """Share of questions answered, with or without the article that they are about in the index."""
    random.seed(0)
    titles = sorted({name.rpartition("#")[0] for name in collection.texts})
    whole = service_over(collection.texts, None)
    modes = []
    for title in titles:
        about = [name for name, gains in collection.gains.items() if next(iter(gains)).startswith(f"{title}#")]
        others = {name: text for name, text in collection.texts.items() if not name.startswith(f"{title}#")}
        service = service_over(others, None) if without_article else whole
        for name in random.sample(about, min(QUESTIONS, len(about))):
            modes.append(service.ask("i", collection.questions[name]).mode != "none")
    return mean(modes)


def main() -> None:
    """One line a figure, then the claims."""
    cranfield = read_cranfield(DATA / "cranfield")
    squad = read_squad(DATA / "squad" / "squad_dev_v2_first8.json")
    embedder = find_embedder()
    claims: list[Claim] = []
    for name, collection in (("Cranfield", cranfield), ("SQuAD", squad)):
        words, plain = ours(collection, None), peer(collection)
        print(f"{name}: {len(collection.texts)} texts, nDCG@10 by words {words:.4f}, plain bm25s {plain:.4f}")
        claims.append(at_least(f"{name}, by words, beside plain bm25s", words, plain, unit="nDCG@10", ratio=1.0))
        if embedder is not None:
            fused = ours(collection, embedder)
            print(f"{name}: nDCG@10 by words and meaning {fused:.4f}")
            claims.append(at_least(f"{name}, fusion beside words alone", fused, words, unit="nDCG@10", ratio=1.0))
    right, wrong = answered(squad, without_article=False), answered(squad, without_article=True)
    print(f"SQuAD: answered {right:.3f} of the questions with their article indexed, {wrong:.3f} without it")
    name = "SQuAD, questions answered with and without their article in the index"
    claims.append(at_least(name, right, wrong, unit="share", ratio=5.0))
    report(__file__, claims)


if __name__ == "__main__":
    main()
