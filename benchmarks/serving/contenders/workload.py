"""Requests as users send them: real questions behind prefixes that many of them share, arriving as a Poisson process.

Two halves: grade-school problems behind the same five worked examples (GSM8K, Cobbe et al. 2021), and questions on a
paragraph that the previous question was on too (SQuAD 2.0, Rajpurkar et al. 2018). Answers are as long as the real
ones, within limits. Where the data is not at hand, functions of Python's library behind the head of their file.
"""

from __future__ import annotations

import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ANSWER_TOKENS = (16, 96)
_CHARACTERS_PER_TOKEN = 4  # to turn an answer into a number of tokens: no tokenizer decides how long ours are


@dataclass(frozen=True)
class Query:
    """A prompt and how many tokens are to be answered."""

    prompt: str
    tokens: int


@dataclass(frozen=True)
class Arrival:
    """A query and when it is sent, in seconds from the start."""

    at_s: float
    query: Query


def queries(data: Path, seed: int) -> list[Query]:
    """All there are, in an order that `seed` draws; questions on one paragraph stay in a row."""
    if not (data / "evaluation").exists():
        return _library_queries(seed)
    draw = random.Random(seed)
    problems, paragraphs = _problems(data, draw), _paragraphs(data, draw)
    mixed: list[Query] = []
    while problems and paragraphs:
        mixed += [paragraphs.pop(), problems.pop()]
    return mixed


def arrivals(found: list[Query], *, rate_per_s: float, duration_s: float, seed: int) -> list[Arrival]:
    """A Poisson process of `rate_per_s` for `duration_s`, taking queries in turn."""
    draw = random.Random(f"{seed} {rate_per_s}")
    sent: list[Arrival] = []
    at_s = draw.expovariate(rate_per_s)
    while at_s < duration_s:
        sent.append(Arrival(at_s, found[len(sent) % len(found)]))
        at_s += draw.expovariate(rate_per_s)
    return sent


def _query(prompt: str, answer: str) -> Query:
    least, most = ANSWER_TOKENS
    return Query(prompt, max(least, min(most, len(answer) // _CHARACTERS_PER_TOKEN)))


def _problems(data: Path, draw: random.Random) -> list[Query]:
    def read(name: str) -> list[dict[str, str]]:
        lines = (data / "evaluation" / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line]

    examples = read("gsm8k_train_2000.jsonl")[:5]
    shots = "\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in examples)
    rows = read("gsm8k_test_400.jsonl")
    draw.shuffle(rows)
    return [_query(f"{shots}\n\nQuestion: {row['question']}\nAnswer:", row["answer"]) for row in rows]


def _paragraphs(data: Path, draw: random.Random) -> list[Query]:
    document = json.loads((data / "retrieval" / "squad" / "squad_dev_v2_first8.json").read_text(encoding="utf-8"))
    articles = document["data"] if isinstance(document, dict) else document
    groups = [paragraph for article in articles for paragraph in article["paragraphs"]]
    draw.shuffle(groups)
    return [
        _query(f"{group['context']}\n\nQuestion: {item['question']}\nAnswer:", " " * 32 * _CHARACTERS_PER_TOKEN)
        for group in groups
        for item in group["qas"][:6]
    ]


def _library_queries(seed: int) -> list[Query]:
    found: list[Query] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        head, *functions = text.split("\ndef ")
        found += [_query(f"{head[:1500]}\ndef {body[:300]}", body[300:]) for body in functions[:6]]
    rows = [found[at : at + 6] for at in range(0, len(found), 6)]
    random.Random(seed).shuffle(rows)
    return [query for row in rows for query in row]
