"""The form of `question.yaml` and of its two texts: what `content/README.md` explains and `check.py` enforces.

Pure values, no I/O. An unknown key, an empty text or a missing language is an error that names the field.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Language = Literal["zh", "en"]
Difficulty = Literal["easy", "medium", "hard"]
StarsSource = Literal["chapter", "chapter-group", "ours"]

Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=60)]
LabId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+\.[a-z0-9]+(_[a-z0-9]+)*$", max_length=60)]
Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

# The level-2 headings of `zh.md` and `en.md`, in this order, nothing else at level 2.
SECTIONS: tuple[tuple[str, str, str], ...] = (
    ("question", "题目", "Question"),
    ("short", "三十秒回答", "In thirty seconds"),
    ("deep", "深入回答", "In depth"),
    ("tradeoffs", "权衡", "Trade-offs"),
    ("mistakes", "常见错误", "Common mistakes"),
    ("follow-ups", "追问", "Follow-ups"),
    ("run", "动手看", "See it run"),
)


class Value(BaseModel):
    """A frozen piece of content that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Text(Value):
    """The same words in both languages."""

    zh: Words
    en: Words

    def of(self, language: str) -> str:
        """The words in `language`; English for a language that the house does not speak."""
        return self.zh if language == "zh" else self.en


class Source(Value):
    """Where a fact comes from: a page with an address, or the lab that measured it."""

    key: Identifier
    title: Words
    url: Annotated[str, StringConstraints(pattern=r"^https://\S+$")] | None = None
    lab: LabId | None = None
    where: Words | None = Field(None, description="section, table, figure or page")

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.url is None) == (self.lab is None):
            raise ValueError(f"source {self.key!r} needs either a url or a lab")
        return self


class RubricItem(Value):
    """One thing that a good answer contains, with its share of the mark."""

    key: Identifier
    weight: int = Field(ge=1, le=100, description="per cent of the mark; the weights of a question sum to 100")
    text: Text


class FollowUp(Value):
    """What an interviewer asks next. Its answer is the level-3 section at the same place in the texts."""

    key: Identifier
    ask: Text
    question: Identifier | None = Field(None, description="id of the question that treats it at length")


class Question(Value):
    """The facts about one question: the content of `question.yaml`."""

    id: Identifier
    topic: Identifier
    title: Text
    stars: int = Field(ge=1, le=5)
    stars_source: StarsSource
    difficulty: Difficulty
    level: int = Field(ge=1, le=3)
    round: int = Field(ge=1, le=4)
    minutes: int = Field(ge=1, le=90, description="to read and answer, without the lab")
    prerequisites: tuple[Identifier, ...] = Field((), description="topics to know first")
    labs: tuple[LabId, ...] = ()
    sources: tuple[Source, ...] = Field(min_length=1)
    rubric: tuple[RubricItem, ...] = Field(min_length=3)
    hints: tuple[Text, ...] = Field(min_length=2, max_length=4, description="in tiers: each gives away more")
    follow_ups: tuple[FollowUp, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _consistent(self) -> Question:
        total = sum(item.weight for item in self.rubric)
        if total != 100:
            raise ValueError(f"the rubric's weights sum to {total}, not to 100")
        for name, keys in (
            ("sources", [source.key for source in self.sources]),
            ("rubric", [item.key for item in self.rubric]),
            ("follow_ups", [follow_up.key for follow_up in self.follow_ups]),
            ("prerequisites", list(self.prerequisites)),
            ("labs", list(self.labs)),
        ):
            repeated = sorted({key for key in keys if keys.count(key) > 1})
            if repeated:
                raise ValueError(f"{name} repeats {', '.join(repeated)}")
        return self
