"""Checks the coach's content: `python -m sihe.apps.coach.check [content folder]` prints one line a problem.

Exit code 0 when there is none, 1 otherwise. What the forms are, `content/README.md` explains.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from sihe.apps.coach.errors import ContentInvalid
from sihe.apps.coach.labs.registry import LAB_IDS, lab
from sihe.apps.coach.labs.runner import places
from sihe.apps.coach.map import CONTENT, QuestionText, question_folders, read_map, read_question
from sihe.apps.coach.parity import Shape, differences, shape_of
from sihe.apps.coach.schema import SECTIONS, Question
from sihe.apps.coach.types import Group, Map

_LANGUAGES = ("zh", "en")
_SOURCES_TITLE = {"zh": "出处", "en": "Sources"}


def problems(content: Path = CONTENT) -> Iterator[str]:
    """Every problem of the content folder, each as one line that starts with the file."""
    try:
        field = read_map(content / "map.yaml")
    except ContentInvalid as error:
        yield str(error)
        return
    for topic in field.topics.values():
        for name in topic.labs:
            if name not in LAB_IDS:
                yield f"map.yaml: topic {topic.id!r} names the lab {name!r}, which does not exist"
    yield from _lab_problems(field)
    questions: dict[str, QuestionText] = {}
    for folder in question_folders(content):
        try:
            questions[folder.name] = read_question(folder)
        except ContentInvalid as error:
            yield str(error)
    for name, item in questions.items():
        for problem in _question_problems(name, item, field, questions):
            yield f"questions/{name}: {problem}"
    yield from _handbook_problems(content / "handbook", field)


def _lab_problems(field: Map) -> Iterator[str]:
    for name in LAB_IDS:
        try:
            found = lab(name)
        except ContentInvalid as error:
            yield str(error)
            continue
        claims = {claim.key for claim in found.claims}
        named = {language: places(found.explanation.of(language)) for language in _LANGUAGES}
        if found.id != name:
            yield f"labs/{name}.yaml: id is {found.id!r}"
        measured = {topic.id for topic in field.topics.values() if name in topic.labs}
        if set(found.topics) != measured:
            yield f"labs/{name}.yaml: topics are {sorted(found.topics)}, but map.yaml gives it to {sorted(measured)}"
        for key in sorted((named["zh"] | named["en"]) - claims):
            yield f"labs/{name}.yaml: the explanation names {key!r}, which is no claim"
        for key in sorted(named["zh"] ^ named["en"]):
            yield f"labs/{name}.yaml: the explanation names {key!r} in one language only"


def _question_problems(name: str, item: QuestionText, field: Map, questions: dict[str, QuestionText]) -> Iterator[str]:
    question = item.question
    yield from _reference_problems(name, question, field, questions)
    shapes = {language: shape_of(item.body(language)) for language in _LANGUAGES}
    for column, language in enumerate(_LANGUAGES, start=1):
        yield from (f"{language}.md: {problem}" for problem in _form_problems(shapes[language], column, question))
    yield from differences(shapes["zh"], shapes["en"])


def _reference_problems(name: str, question: Question, field: Map, questions: dict[str, QuestionText]) -> Iterator[str]:
    if question.id != name:
        yield f"question.yaml: id is {question.id!r}, but the folder is {name!r}"
    for topic in (question.topic, *question.prerequisites):
        if topic not in field.topics:
            yield f"question.yaml: {topic!r} is no topic of the map"
    if question.topic in question.prerequisites:
        yield f"question.yaml: {question.topic!r} is its own prerequisite"
    for used in (*question.labs, *(source.lab for source in question.sources if source.lab)):
        if used not in LAB_IDS:
            yield f"question.yaml: the lab {used!r} does not exist (there are {', '.join(LAB_IDS)})"
    for follow_up in question.follow_ups:
        if follow_up.question is not None and follow_up.question not in questions:
            yield f"question.yaml: follow-up {follow_up.key!r} names {follow_up.question!r}, which is no question"
    topic_of_question = field.topics.get(question.topic)
    if topic_of_question is not None and question.stars_source != "ours":
        rated = (topic_of_question.stars, topic_of_question.stars_source, topic_of_question.difficulty)
        if rated != (question.stars, question.stars_source, question.difficulty):
            yield f"question.yaml: stars, stars_source, difficulty should be the topic's {rated}"


def _form_problems(shape: Shape, column: int, question: Question) -> Iterator[str]:
    expected = [section[column] for section in SECTIONS]
    actual = [section.title for section in shape.sections]
    if shape.titles:
        yield f"has a level-1 heading {shape.titles[0]!r}: the title stands in question.yaml"
    if actual != expected:
        yield f"level-2 headings are {actual}, expected {expected}"
        return
    follow_ups = shape.sections[[section[0] for section in SECTIONS].index("follow-ups")]
    if len(follow_ups.subheadings) != len(question.follow_ups):
        yield (
            f"{len(follow_ups.subheadings)} level-3 headings under {follow_ups.title!r}, "
            f"but question.yaml has {len(question.follow_ups)} follow_ups"
        )
    keys = {source.key for source in question.sources}
    for key in sorted(shape.citations - keys):
        yield f"cites [{key}], which is no source of question.yaml"
    for key in sorted(keys - shape.citations):
        yield f"never cites its source [{key}]"


def _handbook_problems(root: Path, field: Map) -> Iterator[str]:
    groups = {f"{number:02d}-{group.id}.md": group for number, group in enumerate(field.groups, start=1)}
    for language in _LANGUAGES:
        found = {file.name for file in (root / language).glob("*.md")}
        for name in sorted(set(groups) - found):
            yield f"handbook/{language}/{name}: missing"
        for name in sorted(found - set(groups)):
            yield f"handbook/{language}/{name}: no such chapter (expected {', '.join(groups)})"
    for name, group in groups.items():
        files = [root / language / name for language in _LANGUAGES]
        if all(file.is_file() for file in files):
            zh, en = (shape_of(file.read_text(encoding="utf-8")) for file in files)
            for language, shape in (("zh", zh), ("en", en)):
                found_here = _chapter_problems(shape, language, group)
                yield from (f"handbook/{language}/{name}: {problem}" for problem in found_here)
            yield from (f"handbook/{name}: {difference}" for difference in differences(zh, en))


def _chapter_problems(shape: Shape, language: str, group: Group) -> Iterator[str]:
    if len(shape.titles) != 1:
        yield f"has {len(shape.titles)} level-1 headings, expected one: the title"
    sections = [section for section in shape.sections if section.title]
    if len(sections) < len(group.topics):
        yield f"has {len(sections)} level-2 sections, expected at least one for each of {len(group.topics)} topics"
    for section in sections:
        if section.title == _SOURCES_TITLE[language] and not section.addresses:
            yield f"'## {section.title}' has no address"


def main(arguments: list[str]) -> int:
    """Prints the problems; the exit code."""
    found = list(problems(Path(arguments[0]) if arguments else CONTENT))
    for problem in found:
        sys.stdout.write(problem + "\n")
    sys.stdout.write(f"{len(found)} problems\n" if found else "content is in order\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
