"""What the questions on the inference platform tell a reader to run gives the figures that they quote."""

from __future__ import annotations

import re
from ast import literal_eval

import pytest

from sihe.apps.coach.map import CONTENT

_FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(question: str) -> str:
    return (CONTENT / "questions" / question / "en.md").read_text(encoding="utf-8")


def printed_by(question: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    (code,) = _FENCE.findall(text_of(question))
    exec(compile(code, question, "exec"), {})
    return capsys.readouterr().out.splitlines()


def test_the_batches_are_those_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed_by("dynamic-batching", capsys)
    row = next(line for line in text_of("dynamic-batching").splitlines() if line.startswith("| 2 | "))
    quoted = [tuple(float(value) for value in cell.split(",")) for cell in row.strip("| ").split(" | ")[2:]]
    assert [tuple(float(value) for value in line.split()[1:]) for line in lines] == quoted
    assert len(quoted) == 3


def test_a_canary_goes_back_after_as_many_requests_as_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed_by("ab-testing", capsys)
    row = next(line for line in text_of("ab-testing").splitlines() if line.startswith("| requests until"))
    quoted = [int(cell.replace(",", "")) for cell in row.strip("| ").split(" | ")[1:]]
    assert [int(line.split()[1]) for line in lines] == quoted[:3]


def test_a_bounded_home_shares_one_prefix_out(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = printed_by("traffic-routing", capsys)
    loads = literal_eval(line)
    assert sum(loads) == 3000
    assert 1000 < max(loads) <= 1.25 * 1000 + 5, "the home has more than the others, and no more than its bound"
