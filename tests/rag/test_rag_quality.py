"""Floors on quality: on judged collections, and on the handbook with questions as people ask them."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

import sihe
from sihe.apps.rag.service import RagService
from sihe.core.workspace import Workspace
from support.data import shared_data
from support.retrieval import Collection, ndcg, read_cranfield, read_squad

HANDBOOK = Path(sihe.__file__).parent / "apps" / "coach" / "content" / "handbook"
QUESTIONS = [
    ("How does ring all-reduce work and how many bytes does each worker send?", "en/01"),
    ("What does ZeRO stage 3 shard?", "en/01"),
    ("ZeRO 三个阶段分别切分什么?", "zh/01"),
    ("为什么张量并行要留在 NVLink 之内?", "zh/01"),
    ("What is gang scheduling?", "en/02"),
    ("怎样让多个任务共享一块 GPU?", "zh/02"),
    ("TTFT 和 TPOT 有什么区别?", "zh/03"),
    ("How should an inference service autoscale?", "en/03"),
    ("How often should a training job save a checkpoint?", "en/04"),
    ("数据加载成为瓶颈怎么办?", "zh/04"),
    ("How does RoPE encode positions?", "en/07"),
    ("为什么 attention 要除以根号 d?", "zh/07"),
    ("What is a mixture of experts?", "en/07"),
    ("LoRA 是怎么减少可训练参数的?", "zh/08"),
    ("How does DPO differ from PPO?", "en/08"),
    ("How much memory does the KV cache need?", "en/09"),
    ("投机解码为什么不改变输出分布?", "zh/09"),
    ("How does retrieval-augmented generation work?", "en/10"),
    ("怎么评测代码生成的能力?", "zh/12"),
    ("如何做模型热更新而不丢请求?", "zh/14"),
    ("What is a point-in-time join?", "en/15"),
    ("HNSW 的参数怎么选?", "zh/15"),
]
UNRELATED = [
    "Who won the world cup in 2018?",
    "今天天气怎么样?",
    "How do I bake sourdough bread?",
    "红烧肉怎么做?",
    "What is the capital of France?",
    "如何学习弹钢琴?",
]


def quality(workspace: Workspace, folder: Path, collection: Collection, *, every: int = 1) -> float:
    """nDCG@10 of the service, each text a file of its own, on every n-th question."""
    folder.mkdir()
    for name, text in collection.texts.items():
        (folder / f"{name}.txt").write_text(text)
    service = RagService(workspace, use_embedder=False)
    service.index("i", [folder])
    figures = []
    for query in [name for name in collection.questions if name in collection.gains][::every]:
        passages = service.search("i", collection.questions[query], k=20)
        names = dict.fromkeys(Path(passage.document).stem for passage in passages)
        figures.append(ndcg(list(names), collection.gains[query]))
    return mean(figures)


def test_words_alone_on_cranfield(workspace: Workspace, tmp_path: Path) -> None:
    assert quality(workspace, tmp_path / "d", read_cranfield(shared_data("retrieval/cranfield"))) >= 0.50


def test_words_alone_on_squad(workspace: Workspace, tmp_path: Path) -> None:
    collection = read_squad(shared_data("retrieval/squad/squad_dev_v2_first8.json"))
    assert quality(workspace, tmp_path / "d", collection, every=5) >= 0.87


@pytest.fixture(scope="module")
def handbook(tmp_path_factory: pytest.TempPathFactory) -> RagService:
    from sihe.core import settings

    if len(list(HANDBOOK.glob("*/*.md"))) < 30:
        pytest.skip("the handbook is not written yet")
    home = tmp_path_factory.mktemp("handbook")
    workspace = Workspace(settings.load({"home": str(home)}, environ={}, directory=home))
    service = RagService(workspace, use_embedder=False)
    service.index("handbook", [HANDBOOK])
    return service


def test_questions_find_their_chapter_first_by_words_alone(handbook: RagService) -> None:
    wrong = {
        question: handbook.search("handbook", question)[0].document
        for question, chapter in QUESTIONS
        if not handbook.search("handbook", question)[0].document.startswith(f"handbook/{chapter}")
    }
    # The right chapter is among the first three for the one; the other asks with words that weigh more elsewhere.
    known = {"How should an inference service autoscale?", "How often should a training job save a checkpoint?"}
    assert set(wrong) <= known, wrong


def test_answers_are_whole_checked_sentences_in_the_language_of_the_question(handbook: RagService) -> None:
    answered = 0
    for question, chapter in QUESTIONS:
        answer = handbook.ask("handbook", question)
        assert answer.language == chapter[:2]
        assert answer.dropped_citations == 0
        answered += answer.mode == "extractive"
        for citation in answer.citations:
            assert (
                handbook.document("handbook", citation.document).text[citation.start : citation.end] == citation.quote
            )
            assert citation.quote.rstrip("\"'”’)）」*").endswith((".", "?", "!", "。", "？", "！"))
            assert not citation.quote.startswith(("#", "|", "-", "```"))
            assert "https://" not in citation.quote
    assert answered >= 0.9 * len(QUESTIONS) - 1


@pytest.mark.parametrize("question", UNRELATED)
def test_unrelated_questions_are_not_answered(handbook: RagService, question: str) -> None:
    assert handbook.ask("handbook", question).mode == "none"
