"""The values of the map: areas, groups, topics and the question bank. Frozen, checked when made, no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from sihe.apps.coach.schema import Difficulty, Identifier, LabId, StarsSource, Text, Value, Words

TopicState = Literal["new", "seen", "solid"]


class Capability(Value):
    """What runs a topic here: code (`module`, perhaps a `command`), or the place where it will live (`planned`)."""

    module: Words | None = None
    command: Words | None = None
    planned: Words | None = None

    @model_validator(mode="after")
    def _runs_or_is_planned(self) -> Capability:
        if (self.planned is None) == (self.module is None and self.command is None):
            raise ValueError("a capability names a module or a command, or else where it is planned")
        return self

    @property
    def runs(self) -> bool:
        """Whether there is code behind it today."""
        return self.planned is None


class Topic(Value):
    """One node of the map."""

    id: Identifier
    name: Text
    gist: Text
    stars: int = Field(ge=1, le=5)
    stars_source: StarsSource
    difficulty: Difficulty
    level: int = Field(ge=1, le=3)
    round: int = Field(ge=1, le=4)
    prerequisites: tuple[Identifier, ...] = ()
    labs: tuple[LabId, ...] = ()
    capability: Capability


class Group(Value):
    """A few topics that belong together: one box of the map, one chapter of the handbook."""

    id: Identifier
    name: Text
    topics: tuple[Topic, ...] = Field(min_length=1)


class Area(Value):
    """A third of the field."""

    id: Identifier
    name: Text
    groups: tuple[Group, ...] = Field(min_length=1)


class BankItem(Value):
    """A question of the handbook chapter, by topic. Its stars are a row of the chapter's frequency table."""

    key: Identifier
    topics: tuple[Identifier, ...] = Field(min_length=1)
    name: Text
    stars: int | None = Field(None, ge=1, le=5)
    difficulty: Difficulty | None = None


class Map(Value):
    """The whole field. Ids are unique, prerequisites exist and make no circle, ratings agree with the bank."""

    areas: tuple[Area, ...]
    bank: tuple[BankItem, ...]

    @cached_property
    def topics(self) -> dict[str, Topic]:
        """Every topic by id, in the order of the map."""
        return {topic.id: topic for group in self.groups for topic in group.topics}

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Every group, in the order of the handbook."""
        return tuple(group for area in self.areas for group in area.groups)

    def group_of(self, topic: str) -> Group:
        """The group that holds a topic."""
        return next(group for group in self.groups if any(item.id == topic for item in group.topics))

    def area_of(self, group: str) -> Area:
        """The area that holds a group."""
        return next(area for area in self.areas if any(item.id == group for item in area.groups))

    def path_to(self, topic: str) -> tuple[Topic, ...]:
        """What to learn, first things first, to be ready for `topic`; it comes last."""
        done: dict[str, Topic] = {}

        def visit(current: Topic) -> None:
            for before in current.prerequisites:
                if before not in done:
                    visit(self.topics[before])
            done[current.id] = current

        visit(self.topics[topic])
        return tuple(done.values())

    @model_validator(mode="after")
    def _holds_together(self) -> Map:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        ids = [area.id for area in self.areas] + [group.id for group in self.groups]
        ids_of_topics = [topic.id for group in self.groups for topic in group.topics]
        for kind, names in (("area or group", ids), ("topic", ids_of_topics)):
            for name in sorted({name for name in names if names.count(name) > 1}):
                yield f"{kind} {name!r} stands twice"
        for topic in self.topics.values():
            for before in topic.prerequisites:
                if before not in self.topics:
                    yield f"topic {topic.id!r} requires {before!r}, which is no topic"
        for item in self.bank:
            for name in item.topics:
                if name not in self.topics:
                    yield f"bank item {item.key!r} names {name!r}, which is no topic"
        if (circle := self._circle()) is not None:
            yield f"prerequisites go in a circle: {' → '.join(circle)}"
        yield from self._misratings()

    def _circle(self) -> list[str] | None:
        """A circle of prerequisites, or None."""
        finished: set[str] = set()

        def walk(name: str, trail: list[str]) -> list[str] | None:
            if name in trail:
                return [*trail[trail.index(name) :], name]
            if name in finished or name not in self.topics:
                return None
            for before in self.topics[name].prerequisites:
                if (found := walk(before, [*trail, name])) is not None:
                    return found
            finished.add(name)
            return None

        return next((found for name in self.topics if (found := walk(name, [])) is not None), None)

    def _misratings(self) -> Iterator[str]:
        """A topic rated by the chapter carries the stars of its row; a `chapter-group` row names several topics."""
        rated = [item for item in self.bank if item.stars is not None]
        for topic in self.topics.values():
            if topic.stars_source == "ours":
                continue
            shared = topic.stars_source == "chapter-group"
            rows = [item for item in rated if topic.id in item.topics and (len(item.topics) > 1) == shared]
            if not any((row.stars, row.difficulty) == (topic.stars, topic.difficulty) for row in rows):
                yield f"topic {topic.id!r} claims a rating by the {topic.stars_source} that the bank does not show"
