"""The map: complete, without circles, and honest about who rates what and what runs."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from sihe.apps.coach.map import CONTENT, questions_of, the_map
from sihe.apps.coach.types import Capability, Map
from sihe.cli.nouns import NOUNS

# The handbook chapter's frequency table: (stars, difficulty) of each topic that it rates alone.
RATED = {
    "allreduce": (4, "medium"),
    "zero": (4, "hard"),
    "scheduling-policy": (4, "medium"),
    "checkpoint": (3, "medium"),
    "attention": (5, "medium"),
    "positions": (4, "medium"),
    "kv-cache": (4, "medium"),
    "fine-tuning": (4, "medium"),
    "rlhf-dpo": (3, "hard"),
    "rag": (4, "medium"),
    "feature-platform": (3, "hard"),
    "vector-database": (3, "hard"),
}


def raw() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONTENT / "map.yaml").read_text(encoding="utf-8"))
    return loaded


def first_topic(tree: dict[str, Any]) -> dict[str, Any]:
    topic: dict[str, Any] = tree["areas"][0]["groups"][0]["topics"][0]
    return topic


def test_the_map_has_3_areas_15_groups_and_55_topics() -> None:
    field = the_map()
    assert len(field.areas) == 3
    assert len(field.groups) == 15
    assert len(field.topics) == 55
    assert [len(group.topics) for group in field.groups] == [5, 4, 4, 3, 3, 3, 4, 4, 4, 3, 3, 3, 4, 4, 4]


def test_the_chapters_ratings_are_the_maps() -> None:
    alone = {
        topic.id: (topic.stars, topic.difficulty)
        for topic in the_map().topics.values()
        if topic.stars_source == "chapter"
    }
    assert alone == RATED
    together = {topic.id for topic in the_map().topics.values() if topic.stars_source == "chapter-group"}
    assert together == {
        *("data-parallel", "model-parallel"),
        *("job-scheduling", "elastic-training", "fault-recovery", "platform-resources"),
        *("traffic-routing", "dynamic-batching", "ab-testing", "hot-update"),
    }


def test_the_bank_is_the_chapters_and_mixed_precision_has_its_place() -> None:
    bank = {item.key: item for item in the_map().bank}
    assert {key for key in bank if key.startswith("infra-")} == {f"infra-{number}" for number in range(1, 14)}
    assert {key for key in bank if key.startswith("llm-")} == {f"llm-{number}" for number in range(1, 13)}
    assert sum(item.stars is not None for item in bank.values()) == 16
    mixed = bank["infra-5"]
    assert (mixed.topics, mixed.stars, mixed.difficulty) == (("gpu-memory",), 3, "medium")


def test_what_is_said_to_run_is_there_and_what_is_planned_is_not_claimed() -> None:
    for topic in the_map().topics.values():
        capability = topic.capability
        if capability.module is not None:
            assert find_spec(capability.module) is not None, f"{topic.id}: {capability.module} does not exist"
        if capability.command is not None:
            program, noun, *rest = capability.command.split()
            assert program == "sihe"
            app = getattr(import_module(NOUNS[noun].module), NOUNS[noun].app)
            verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
            assert not rest or rest[0] in verbs, f"{topic.id}: no such command as {capability.command}"


def test_a_path_teaches_first_things_first() -> None:
    field = the_map()
    for name in field.topics:
        path = [topic.id for topic in field.path_to(name)]
        assert path[-1] == name
        assert len(path) == len(set(path))
        for place, step in enumerate(path):
            assert set(field.topics[step].prerequisites) <= set(path[:place])


def test_questions_hang_on_their_topics() -> None:
    assert questions_of("zero") == ("zero",)
    assert questions_of("etl") == ()


def test_a_circle_is_refused_and_named() -> None:
    tree = raw()
    first_topic(tree)["prerequisites"] = ["zero"]  # which requires data-parallel itself
    with pytest.raises(ValidationError, match="circle: data-parallel → zero → data-parallel"):
        Map.model_validate(tree)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prerequisites": ["phlogiston"]}, "'phlogiston', which is no topic"),
        ({"id": "zero"}, "topic 'zero' stands twice"),
        ({"stars": 4}, "claims a rating by the chapter-group"),
        ({"stars_source": "chapter"}, "claims a rating by the chapter that"),
        ({"stars": 6}, "less than or equal to 5"),
        ({"colour": "red"}, "Extra inputs"),
        ({"name": {"zh": "数据并行"}}, "en"),
    ],
)
def test_bad_topics_are_refused(change: dict[str, Any], complaint: str) -> None:
    tree = raw()
    first_topic(tree).update(change)
    with pytest.raises(ValidationError, match=complaint):
        Map.model_validate(tree)


def test_a_capability_runs_or_is_planned_and_not_both() -> None:
    assert Capability(module="sihe.vectors").runs
    assert not Capability(planned="sihe.cluster").runs
    for bad in ({}, {"module": "sihe.vectors", "planned": "sihe.vectors"}):
        with pytest.raises(ValidationError, match="names a module or a command, or else"):
            Capability.model_validate(bad)
