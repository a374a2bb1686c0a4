"""The content is in order, and the check notices each way of being out of order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sihe.apps.coach.check import main, problems
from sihe.apps.coach.map import CONTENT
from sihe.apps.coach.parity import differences, shape_of


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """A copy of the content, to be spoilt."""
    return Path(shutil.copytree(CONTENT, tmp_path / "content"))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text, f"{file.name} has no {old!r} to spoil"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_content_that_ships_is_in_order() -> None:
    assert list(problems()) == []


def test_the_six_questions_and_thirty_chapters_are_there() -> None:
    questions = {folder.name for folder in (CONTENT / "questions").iterdir()}
    assert questions >= {"zero", "allreduce", "attention", "kv-cache", "rag", "vector-database"}
    for language in ("zh", "en"):
        assert len(list((CONTENT / "handbook" / language).glob("*.md"))) == 15


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("zero/question.yaml", "topic: zero", "topic: phlogiston", "'phlogiston' is no topic"),
        ("zero/question.yaml", "labs: [zero.memory]", "labs: [zero.nothing]", "'zero.nothing' does not exist"),
        ("zero/question.yaml", "stars: 4", "stars: 5", "should be the topic's"),
        ("zero/question.yaml", "minutes:", "seconds:", "Field required"),
        ("zero/question.yaml", "id: zero", "id: one", "the folder is 'zero'"),
        ("zero/question.yaml", "weight: ", "weight: 1  # ", "sum to"),
        ("zero/en.md", "## Trade-offs", "## Tradeoffs", "level-2 headings are"),
        ("zero/zh.md", "## 追问", "## 追问题", "level-2 headings are"),
        ("zero/en.md", "## Question", "# ZeRO\n\n## Question", "level-1 heading 'ZeRO'"),
        (
            "zero/en.md",
            "## In thirty seconds\n",
            "## In thirty seconds\n\nCosts $16$ and 4711 bytes.\n",
            "only in en: 4711",
        ),
        ("zero/en.md", "## In thirty seconds\n", "## In thirty seconds\n\nCosts $N$ bytes.\n", "not between dollars"),
        ("zero/en.md", "## In thirty seconds\n", "## In thirty seconds\n\nSee [nobody].\n", "cites [nobody]"),
        ("zero/zh.md", "## 追问\n", "## 追问\n\n### 还有一个\n\n答。\n", "level-3 headings under '追问'"),
        ("zero/en.md", "```formula\n", "```formula\nx = 1\n", "(formula) differs between zh and en"),
        ("zero/en.md", "```formula\n", "```python\n", "fenced blocks are"),
    ],
)
def test_a_spoilt_question_is_noticed(content: Path, file: str, old: str, new: str, complaint: str) -> None:
    edit(content / "questions" / file, old, new)
    assert any(complaint in problem for problem in problems(content)), list(problems(content))


def test_a_missing_text_is_noticed(content: Path) -> None:
    (content / "questions" / "zero" / "en.md").unlink()
    assert any("en.md" in problem and "not readable" in problem for problem in problems(content))


def test_a_chapter_that_lost_its_twin_is_noticed(content: Path) -> None:
    (content / "handbook" / "en" / "01-distributed-training.md").rename(content / "handbook" / "en" / "01-training.md")
    found = "\n".join(problems(content))
    assert "handbook/en/01-distributed-training.md: missing" in found
    assert "handbook/en/01-training.md: no such chapter" in found


def test_a_map_that_is_broken_stops_the_check(content: Path) -> None:
    edit(content / "map.yaml", "areas:", "areas: [")
    assert ["not readable as YAML" in problem for problem in problems(content)] == [True]


def test_the_command_says_how_many_and_exits_with_one(content: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(content)]) == 0
    (content / "questions" / "zero" / "zh.md").unlink()
    assert main([str(content)]) == 1
    count = len(list(problems(content)))  # others may name the question that is not readable any more
    assert capsys.readouterr().out.endswith(f"\n{count} problems\n")


# ---- parity by itself -----------------------------------------------------------------------------------------------


def test_two_texts_that_agree_have_no_difference() -> None:
    zh = (
        "## 甲\n\n共 １,024 个，占 7.5%，三个 [one]\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nx = 1  # 一\n```\n"
    )
    en = "## A\n\n1024, 7.5 %, 3 of them [one]\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nx = 1  # one\n```\n"
    assert list(differences(shape_of(zh), shape_of(en))) == []


@pytest.mark.parametrize(
    ("zh", "en", "complaint"),
    [
        ("## 甲\n\n共 64 个", "## A\n\n65 in all", "numbers only in zh: 64"),
        ("## 甲\n\n比 1.5", "## A\n\nratio 1.6", "numbers only in en: 1.6"),
        ("## 甲\n\n文\n\n## 乙\n\n文", "## A\n\ntext", "level-2 sections: 2 in zh, 1 in en"),
        ("## 甲\n\n文\n\n### 乙\n\n文", "## A\n\ntext", "1 level-3 headings in zh, 0 in en"),
        ("## 甲\n\n- 一\n- 二\n- 三", "## A\n\n- one", "3 list items in zh, 1 in en"),
        ("## 甲\n\n|a|\n|-|\n|b|\n", "## A\n\n|a|b|\n|-|-|\n|c|d|\n", "tables (rows, columns)"),
        ("## 甲\n\n```python\nx = 1\n```", "## A\n\n```python\nx = 2\n```", "fenced block 1 (python) differs"),
        ("## 甲\n\n见 [one]", "## A\n\nsee [two]", "citations only in zh: one"),
        ("## 甲\n\nhttps://a.example/x", "## A\n\nhttps://b.example/x", "addresses only in zh"),
        ("## 甲\n", "## A\n\ntext", "nothing under the heading in zh"),
    ],
)
def test_each_kind_of_difference_is_found(zh: str, en: str, complaint: str) -> None:
    found = list(differences(shape_of(zh), shape_of(en)))
    assert any(complaint in item for item in found), found
