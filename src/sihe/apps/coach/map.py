"""Reads the map and the questions that ship with the coach into frozen values, once a process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sihe.apps.coach.errors import ContentInvalid
from sihe.apps.coach.schema import Question
from sihe.apps.coach.types import Map
from sihe.core.errors import NotFound

CONTENT = Path(__file__).parent / "content"
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class QuestionText:
    """A question with its Markdown in both languages."""

    question: Question
    zh: str
    en: str

    def body(self, language: str) -> str:
        """The Markdown in `language`."""
        return self.zh if language == "zh" else self.en


def read_map(path: Path = CONTENT / "map.yaml") -> Map:
    """The map in the file `path`. Raises `ContentInvalid`."""
    return read_yaml(path, Map)


def read_yaml(path: Path, form: type[_Model]) -> _Model:
    """A YAML file as a `form`. Raises `ContentInvalid` that names the file, the field and what is wrong with it."""
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return form.model_validate(raw)
    except FileNotFoundError as error:
        raise ContentInvalid(str(path), "the file is missing") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ContentInvalid(str(path), f"not readable as YAML: {error}") from error
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join(str(part) for part in found["loc"]) or "(whole)"
        raise ContentInvalid(str(path), f"{field}: {found['msg']}") from error


def read_question(folder: Path) -> QuestionText:
    """The question in `folder`. Raises `ContentInvalid`."""
    texts = {}
    for language in ("zh", "en"):
        file = folder / f"{language}.md"
        try:
            texts[language] = file.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise ContentInvalid(str(file), f"not readable: {error}") from error
    return QuestionText(read_yaml(folder / "question.yaml", Question), texts["zh"], texts["en"])


def question_folders(content: Path = CONTENT) -> list[Path]:
    """The folders of the questions, by name."""
    root = content / "questions"
    return sorted(folder for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []


@cache
def the_map() -> Map:
    """The map that ships with the coach."""
    return read_map()


@cache
def all_questions() -> dict[str, QuestionText]:
    """Every question that ships with the coach by id, most asked first."""
    found = [read_question(folder) for folder in question_folders()]
    found.sort(key=lambda item: (-item.question.stars, item.question.id))
    return {item.question.id: item for item in found}


def question(name: str) -> QuestionText:
    """One question. Raises `NotFound`."""
    questions = all_questions()
    if name not in questions:
        raise NotFound("question", name, hint=f"there are {', '.join(questions)}")
    return questions[name]


def questions_of(topic: str) -> tuple[str, ...]:
    """Ids of the questions about a topic."""
    return tuple(name for name, item in all_questions().items() if item.question.topic == topic)
