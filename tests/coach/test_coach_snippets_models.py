"""What the questions on the Transformer, mixtures and batching quote of this house is what it computes."""

from __future__ import annotations

import re

import pytest

from sihe.apps.coach.labs import continuous_batch
from sihe.apps.coach.map import CONTENT
from sihe.models.config import ModelConfig

_FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(question: str) -> str:
    return (CONTENT / "questions" / question / "en.md").read_text(encoding="utf-8")


def test_the_shape_of_the_snippet_has_the_parameters_of_the_formula(capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of("transformer")
    (code,) = _FENCE.findall(text)
    exec(compile(code, "transformer", "exec"), {})
    assert f"{int(capsys.readouterr().out):,}" in text


def test_mixtral_has_the_parameters_that_are_quoted_and_meets_the_experts_of_the_table() -> None:
    text = text_of("moe")
    mixtral = ModelConfig(
        *(32000, 4096, 32, 32, 8, 128, 14336, 32768), tie_embeddings=False, num_experts=8, experts_per_token=2
    )
    assert f"{mixtral.num_parameters:,} and {mixtral.num_active_parameters:,}" in text
    for batch in (1, 4, 8, 32):
        assert f"| {batch} | {8 * (1 - 0.75**batch):.1f} |" in text


def test_the_tables_on_batching_are_those_of_the_lab() -> None:
    text = text_of("batching")
    found = continuous_batch.measure({"budget": 512, "prompt": 16384, "memory": 30}, limit_s=60)
    pauses, memory = (table.rows for table in found.tables)
    for budget in (128, 512, 1024, 4096):
        ((_, longest, first),) = [row for row in pauses if row[0] == budget]
        assert f"| {budget:,} | {longest} ms | {first} ms |" in text
    for percent, preemptions, steps, _ in memory:
        assert f"| {percent} % | {preemptions} | {steps:,} |" in text
    assert f"occupancy {found.values['places-static']:.1f} %" in text
    assert f"occupancy {found.values['places-continuous']:.1f} %" in text
