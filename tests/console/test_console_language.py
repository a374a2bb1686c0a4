"""Two languages with the same sentences, and the right one for each reader."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from sihe.console.language import LANGUAGES, catalogue, choose, translate
from sihe.core.errors import InternalError
from sihe.core.settings import known_keys

CONSOLE = Path(__file__).parents[2] / "src" / "sihe" / "console"
# Keys whose last part is a value of the house: `t("status." ~ run.status)`.
FAMILIES = (
    "finding.", "rollout.", "traffic.m_", "traffic.requests_per_s", "traffic.ttft_s", "traffic.tpot_s",
    "traffic.in_hand", "traffic.kv_used", "traffic.agreement_",
    "status.", "metric.", "lineage.", "difficulty.", "level.", "round.", "section.", "rubric.", "provenance.",
    "verdict.", "deployment.", "failure.", "nav.", "about.", "setting.", "lab.step_", "mode.", "state.", "recall.",
)  # fmt: skip


def test_both_catalogues_have_the_same_keys() -> None:
    assert set(catalogue("en")) == set(catalogue("zh"))


def test_both_catalogues_have_the_same_placeholders() -> None:
    def placeholders(sentence: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}

    for key in catalogue("en"):
        assert placeholders(catalogue("en")[key]) == placeholders(catalogue("zh")[key]), key


def test_no_sentence_is_empty_and_chinese_is_chinese() -> None:
    for language in LANGUAGES:
        assert all(sentence.strip() for sentence in catalogue(language).values())
    same = {key for key in catalogue("en") if catalogue("en")[key] == catalogue("zh")[key]}
    assert same <= {"about.python", "playground.placeholder"}, "these sentences are not translated"


def test_every_setting_is_explained_in_both_languages() -> None:
    settings = {key: text for key, text in catalogue("en").items() if key.startswith("setting.")}
    assert settings == {f"setting.{key}": meaning for key, meaning in known_keys().items()}


def test_words_that_yaml_takes_for_truth_values_stay_words() -> None:
    assert translate("en", "verdict.off") == "Off"
    assert not {"True", "False", "None"} & set(catalogue("en").values())


def used_keys() -> set[str]:
    found: set[str] = set()
    for file in [*CONSOLE.rglob("*.html"), *CONSOLE.rglob("*.py")]:
        found |= set(re.findall(r"""\bt\(\s*["']([a-z_]+\.[A-Za-z0-9_.-]+)["']""", file.read_text(encoding="utf-8")))
    return {key for key in found if not key.endswith((".", "_"))}


def test_every_sentence_that_a_page_asks_for_exists() -> None:
    assert len(used_keys()) > 100
    assert used_keys() <= set(catalogue("en"))


def test_no_sentence_is_left_over() -> None:
    unused = set(catalogue("en")) - used_keys()
    assert {key for key in unused if not key.startswith(FAMILIES)} == set()


def test_an_unknown_sentence_is_a_bug() -> None:
    with pytest.raises(InternalError, match=r"no sentence 'runs\.nowhere'"):
        translate("en", "runs.nowhere")


@pytest.mark.parametrize(
    ("query", "cookie", "accept", "expected"),
    [
        ("zh", "en", "en", "zh"),
        (None, "zh", "en", "zh"),
        ("fr", None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        (None, None, "fr, en;q=0.3, zh;q=0.2", "en"),
        (None, None, "zh;q=0.2, en-GB;q=0.9", "en"),
        (None, None, "zh;q=nonsense", "en"),
        (None, None, "zh;q=0", "en"),
        (None, None, None, "en"),
    ],
)
def test_language_of_a_request(query: str | None, cookie: str | None, accept: str | None, expected: str) -> None:
    assert choose(query=query, cookie=cookie, accept=accept, default="en") == expected
