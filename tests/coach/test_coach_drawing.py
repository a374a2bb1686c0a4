"""The drawing: valid XML, every topic a named link, both languages, no collisions of text and marks."""

from __future__ import annotations

import re
from typing import Literal
from xml.etree import ElementTree

import pytest

from sihe.apps.coach.drawing import draw_map, topic_label
from sihe.apps.coach.map import the_map

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("columns", [1, 3])
def test_every_topic_is_a_link_with_a_name(language: Literal["zh", "en"], columns: int) -> None:
    field = the_map()
    root = ElementTree.fromstring(draw_map(field, language=language, columns=columns, states={"zero": "solid"}))
    links = {link.get("href"): link for link in root.iter(f"{SVG}a")}
    assert set(links) == {f"/topics/{name}" for name in field.topics}
    for topic in field.topics.values():
        link = links[f"/topics/{topic.id}"]
        assert topic.name.of(language) in "".join(link.itertext())
        state = "solid" if topic.id == "zero" else "new"
        assert link.get("aria-label") == topic_label(topic, language, state)
    words = "".join(root.itertext())
    for group in field.groups:
        assert group.name.of(language) in words
    for area in field.areas:
        assert area.name.of(language) in words


def test_the_state_of_the_learner_shows() -> None:
    field = the_map()
    drawn = {state: draw_map(field, states={"zero": state}) for state in ("new", "seen", "solid")}
    assert len(set(drawn.values())) == 3
    assert draw_map(field) == drawn["new"]


def test_a_label_says_what_the_marks_show() -> None:
    zero = the_map().topics["zero"]
    assert topic_label(zero, "en", "seen") == "ZeRO, 4 of 5 stars, hard, seen, runs here, has a lab"
    assert topic_label(zero, "zh", "new") == "ZeRO 优化，4/5 星，较难，未学，可以运行，有实验"


def test_inside_a_page_there_is_no_style_sheet_and_every_colour_is_a_property() -> None:
    drawn = draw_map(the_map(), standalone=False)
    assert "<style" not in drawn
    assert "style=" not in drawn
    for colour in re.findall(r'(?:fill|stroke)="([^"]+)"', drawn):
        assert colour in ("none", "transparent") or colour.startswith("var(--"), colour


def test_names_of_topics_leave_room_for_the_marks() -> None:
    # The marks begin at 262 of a card's 400 units, names at 42: in 14 px a letter takes about 8, a Chinese one 14.
    for topic in the_map().topics.values():
        assert len(topic.name.en) * 8 <= 262 - 42
        assert sum(14 if ord(letter) > 0x2E80 else 8 for letter in topic.name.zh) <= 262 - 42
