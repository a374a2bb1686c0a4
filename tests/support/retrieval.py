"""Retrieval collections with judgments, and the measure of a ranking."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path


@dataclass(frozen=True)
class Collection:
    """Texts by name, questions by name, and for each question the gain of each relevant text."""

    texts: dict[str, str]
    questions: dict[str, str]
    gains: dict[str, dict[str, float]]


def read_cranfield(folder: Path) -> Collection:
    """Cranfield: title and abstract. Grades 1 (best) to 4 become gains 4 to 1; -1 is not relevant.

    The judgments name a query by its position in the file, not by the number that stands there.
    """
    texts = {}
    for entry in re.split(r"^\.I ", (folder / "cran.all.1400").read_text(), flags=re.MULTILINE)[1:]:
        found = re.match(r"(\d+)\n\.T\n(.*?)\.A\n.*?\.W\n(.*)", entry, re.DOTALL)
        if found is None:
            raise ValueError(f"not a Cranfield document: {entry[:40]!r}")
        texts[found[1]] = f"{found[2].strip()}\n\n{found[3].strip()}"
    entries = re.split(r"^\.I ", (folder / "cran.qry").read_text(), flags=re.MULTILINE)[1:]
    questions = {str(position): entry.split(".W\n")[1].strip() for position, entry in enumerate(entries, 1)}
    gains: dict[str, dict[str, float]] = {}
    for line in (folder / "cranqrel").read_text().splitlines():
        query, document, grade = line.split()
        if int(grade) > 0:
            gains.setdefault(query, {})[document] = 5.0 - int(grade)
    return Collection(texts, questions, gains)


def read_squad(file: Path) -> Collection:
    """SQuAD: each paragraph is a text, named `title#number`, and the only gain of the questions that it answers."""
    texts: dict[str, str] = {}
    questions: dict[str, str] = {}
    gains: dict[str, dict[str, float]] = {}
    for article in json.loads(file.read_text())["data"]:
        for number, paragraph in enumerate(article["paragraphs"]):
            name = f"{article['title']}#{number}"
            texts[name] = paragraph["context"]
            for asked in paragraph["qas"]:
                if not asked["is_impossible"]:
                    questions[asked["id"]] = asked["question"]
                    gains[asked["id"]] = {name: 1.0}
    return Collection(texts, questions, gains)


def ndcg(ranked: Sequence[str], gains: Mapping[str, float], k: int = 10) -> float:
    """Normalised discounted cumulative gain at k (Järvelin and Kekäläinen, 2002), linear gains."""
    found = sum(gains.get(name, 0.0) / log2(rank + 2) for rank, name in enumerate(ranked[:k]))
    best = sum(gain / log2(rank + 2) for rank, gain in enumerate(sorted(gains.values(), reverse=True)[:k]))
    return found / best if best else 0.0
