"""Documents, blocks, sentences, chunks and terms: every offset points where it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.apps.rag.analysis import language_of, question_terms, size_of, terms_of
from sihe.apps.rag.chunks import MAX_WORDS, chunks_of
from sihe.apps.rag.documents import MAX_BYTES, blocks_of, read_documents
from sihe.apps.rag.sentences import plain, sentences_of
from sihe.apps.rag.types import Document, Skipped
from sihe.core.errors import NotFound

MARKDOWN = """---
title: 元数据
---
# 四合 *Sihe*

Intro line one
goes on here.

## Lists `x`

- First item with **bold**.
- [x] Second item.
  Its second line.

  A second paragraph.
1. Third.

> A quote.
> # not a heading

| a | b |
|---|---|
| 1 | 2 |

```python
# not a heading
```

Setext
------
Last 段落。
<div>html</div>

- Paper: <https://example.org/a/long/address>
"""


def document(text: str, name: str = "a.md") -> Document:
    return Document(name, name, text, "", language_of(text), "Title")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_blocks_of_markdown_point_at_their_text(newline: str) -> None:
    text = MARKDOWN.replace("\n", newline)
    if newline == "\r":
        text = text.removeprefix(text[: text.index("# 四合")])  # front matter needs line feeds
    found = [
        (block.kind, block.text or text[block.start : block.end].replace(newline, "\n"))
        for block in blocks_of("a.md", text)
    ]
    assert found == [
        ("heading", "四合 Sihe"),
        ("prose", "Intro line one\ngoes on here."),
        ("heading", "Lists x"),
        ("prose", "First item with **bold**."),
        ("prose", "Second item.\n  Its second line."),
        ("prose", "A second paragraph."),
        ("prose", "Third."),
        ("quote", "> A quote.\n> # not a heading"),
        ("table", "| a | b |\n|---|---|\n| 1 | 2 |"),
        ("code", "```python\n# not a heading\n```"),
        ("heading", "Setext"),
        ("prose", "Last 段落。"),
        ("other", "<div>html</div>"),
        ("reference", "Paper: <https://example.org/a/long/address>"),
    ]


def test_plain_text_is_paragraphs() -> None:
    text = "# no heading\nhere\n\n\n  second  \r\n\r\nthird\n"
    assert [text[block.start : block.end] for block in blocks_of("a.txt", text)] == [
        "# no heading\nhere",
        "second",
        "third",
    ]


@given(st.text(alphabet=st.sampled_from("a。.\n\r #-*>|`1\t中!? "), max_size=200), st.sampled_from(["a.md", "a.txt"]))
@settings(deadline=None)
def test_any_text_gives_chunks_that_are_spans_of_it(text: str, name: str) -> None:
    last = 0
    for chunk in chunks_of(document(text, name)):
        assert last <= chunk.start < chunk.end <= len(text)
        assert text[chunk.start : chunk.end].strip()
        for start, end in chunk.prose:
            assert chunk.start <= start <= end <= chunk.end
            for first, after in sentences_of(text, start, end):
                assert start <= first < after <= end
                assert text[first:after] == text[first:after].strip()
        last = chunk.end


def test_long_sections_are_cut_between_sentences_and_lose_nothing() -> None:
    sentences = [f"This is sentence number {n} about distributed training of models." for n in range(200)]
    text = "# Title\n\n" + " ".join(sentences) + "\n\n```\n" + "code line of five words\n" * 200 + "```\n"
    chunks = chunks_of(document(text))
    assert all(size_of(text[chunk.start : chunk.end]) <= MAX_WORDS for chunk in chunks)
    together = "".join(text[chunk.start : chunk.end] for chunk in chunks)
    assert "".join(together.split()) == "".join(text.removeprefix("# Title").split())
    prose = [text[chunk.start : chunk.end] for chunk in chunks if chunk.prose]
    assert all(piece.startswith("This is sentence") and piece.endswith((".", "```", "words")) for piece in prose)


def test_chunks_know_their_headings() -> None:
    text = "intro\n\n# A\n\none\n\n## B\n\ntwo\n\n### C\n\nthree\n\n## D\n\nfour\n"
    assert [(chunk.headings, text[chunk.start : chunk.end]) for chunk in chunks_of(document(text))] == [
        ((), "intro"),
        (("A",), "one"),
        (("A", "B"), "two"),
        (("A", "B", "C"), "three"),
        (("A", "D"), "four"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        (
            "See e.g. Fig. 3 of John F. Smith et al. in the text. Next.",
            ["See e.g. Fig. 3 of John F. Smith et al. in the text.", "Next."],
        ),
        ("It grows with N. The rest does not.", ["It grows with N.", "The rest does not."]),
        (
            'Version 1.2.3 costs 3.5 GB. (It does.) "So?" Yes.',
            ["Version 1.2.3 costs 3.5 GB.", "(It does.)", '"So?"', "Yes."],
        ),
        ("第一句。第二句！“第三句？”第四句", ["第一句。", "第二句！", "“第三句？”", "第四句"]),
        ("混合 GPU。Then English. 再中文。", ["混合 GPU。", "Then English.", "再中文。"]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in sentences_of(text)] == expected


def test_plain_reads_without_marks() -> None:
    assert (
        plain("The **bold** `code` and [a link](http://x.y/z)\nsnake_case_name *it*")
        == "The bold code and a link snake_case_name it"
    )
    assert plain("第一行\n第二行") == "第一行第二行"
    assert plain("a * b * c") == "a * b * c"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The models are training", ["model", "train"]),
        ("all-reduce AllReduce", ["reduc", "allreduc", "allreduc"]),
        ("GPU's don’t", ["gpu"]),
        ("什么是键值缓存?", ["键值", "缓存"]),
        ("ZeRO三阶段 KV-Cache", ["zero", "三", "阶段", "kv", "cach", "kvcach"]),
        ("", []),
        ("?!", []),
    ],
)
def test_terms(text: str, expected: list[str]) -> None:
    assert terms_of(text) == expected


def test_characters_of_no_known_word_become_bigrams() -> None:
    assert "魑魍" not in terms_of("模型")
    assert terms_of("鑫淼焱") == ["鑫淼", "淼焱"] or "鑫淼焱" in terms_of("鑫淼焱")


def test_words_of_asking_count_in_texts_and_not_in_questions() -> None:
    assert question_terms("What is the difference between X and Y?") == ["x", "y"]
    assert question_terms("请介绍一下张量并行的原理") == ["张量", "并行"]
    assert question_terms("What does it mean?") == ["mean"]
    assert "differ" in terms_of("difference")


def test_language() -> None:
    assert language_of("ZeRO 的三个阶段各切分什么") == "zh"
    assert language_of("What does 四合 mean in English words") == "en"
    assert language_of("") == "en"


def test_jieba_is_silent_and_writes_no_cache(tmp_path: Path) -> None:
    code = "from sihe.apps.rag.analysis import terms_of; print(terms_of('分布式训练'))"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONWARNINGS": "error", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    assert "训练" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_reading_skips_what_is_no_text_and_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.md").write_bytes("# B\r\n\r\n文本".encode())
    (folder / "sub" / "a.txt").write_text("text")
    (folder / ".hidden.md").write_text("hidden")
    (folder / ".git" / "c.md").write_text("hidden")
    (folder / "binary.md").write_bytes(b"\xff\xfe\x00")
    (folder / "zero.txt").write_bytes(b"a\0b")
    (folder / "empty.md").write_text("  \n")
    (folder / "code.py").write_text("x = 1")
    (folder / "gone.md").symlink_to(folder / "nowhere.md")
    with (folder / "big.txt").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    os.mkfifo(folder / "pipe.md")
    found = list(read_documents([folder, folder / "b.md", folder / "code.py"]))
    documents = {item.name: item.text for item in found if isinstance(item, Document)}
    assert documents == {"docs/b.md": "# B\r\n\r\n文本", "docs/sub/a.txt": "text"}
    reasons = {Path(item.path).name: item.reason for item in found if isinstance(item, Skipped)}
    assert set(reasons) == {"binary.md", "zero.txt", "empty.md", "code.py", "gone.md", "big.txt", "pipe.md"}
    assert "no UTF-8" in reasons["binary.md"]
    assert "binary" in reasons["zero.txt"]
    assert "regular file" in reasons["pipe.md"]
    with pytest.raises(NotFound, match="missing"):
        list(read_documents([tmp_path / "missing"]))


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for place in ("x/docs", "y/docs"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.md").write_text(place)
    found = list(read_documents([tmp_path / "x" / "docs", tmp_path / "y" / "docs"]))
    names = [item.name for item in found if isinstance(item, Document)]
    assert names == ["docs/a.md", (tmp_path / "y" / "docs" / "a.md").resolve().as_posix()]
