"""`sihe lab …`, `sihe coach …` and `sihe map`: predict, run and explain; study; see the whole field."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sihe.core import terminal

if TYPE_CHECKING:
    from sihe.apps.coach.labs.types import LabResult
    from sihe.apps.coach.schema import Language
    from sihe.apps.coach.service import CoachService
    from sihe.core.workspace import Workspace

lab_app = typer.Typer(no_args_is_help=True, help="Predict, run and explain a measurement on this machine.")
coach_app = typer.Typer(no_args_is_help=True, help="Questions to study, and how far you are.")
map_app = typer.Typer(help="The map of AI infrastructure: topics, stars, and what runs behind each.")

_Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]
_Learner = Annotated[str, typer.Option("--learner", help="Whose history.")]
_Lab = Annotated[str, typer.Argument(help="Such as zero.memory; see `sihe lab list`.")]
_Set = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the lab.")]

_STATE_MARKS = {"new": "○", "seen": "◐", "solid": "●"}


@lab_app.command("list")
def lab_list(as_json: _Json = False) -> None:
    """Show the labs and what each asks."""
    with terminal.workspace() as workspace:
        coach, language = _open(workspace)
        labs = coach.labs()
    if as_json:
        terminal.emit(list(labs), as_json=True)
        return
    rows = [(lab.id, lab.title.of(language), ", ".join(claim.key for claim in lab.asks)) for lab in labs]
    terminal.table(("lab", "title", "asks"), rows)


@lab_app.command("show")
def lab_show(lab: _Lab, as_json: _Json = False) -> None:
    """Show what a lab measures, its formula, its parameters and what it asks."""
    with terminal.workspace() as workspace:
        coach, language = _open(workspace)
        found = coach.lab(lab)
    if as_json:
        terminal.emit(found, as_json=True)
        return
    terminal.say(f"{found.title.of(language)}\n\n{found.purpose.of(language)}\n\n{found.formula}\n")
    parameters = [
        (
            item.key,
            f"{item.default:g}",
            ", ".join(f"{choice:g}" for choice in item.choices) or f"{item.low:g} – {item.high:g}",
            item.label.of(language),
        )
        for item in found.parameters
    ]
    terminal.table(("parameter", "default", "values", ""), parameters)
    terminal.say("")
    asked = [(claim.key, claim.unit, claim.ask.of(language)) for claim in found.asks if claim.ask]
    terminal.table(("predict", "unit", "question"), asked)


@lab_app.command("predict")
def lab_predict(
    lab: _Lab,
    claim: Annotated[str, typer.Argument(help="Which number; see `sihe lab show`.")],
    value: Annotated[float, typer.Argument(help="What you expect, in the claim's unit.")],
    setting: _Set = None,
    learner: _Learner = "me",
    as_json: _Json = False,
) -> None:
    """Store what you expect, before the lab runs."""
    with terminal.workspace() as workspace:
        coach, _ = _open(workspace)
        made = coach.predict(lab, claim, value, learner, parameters=_settings(setting))
    if as_json:
        terminal.emit(made, as_json=True)
    else:
        terminal.say(f"stored: {claim} = {value:g} {made.unit} (attempt {made.attempt}); now  sihe lab run {lab}")


@lab_app.command("run")
def lab_run(lab: _Lab, setting: _Set = None, learner: _Learner = "me", as_json: _Json = False) -> None:
    """Measure, grade your predictions, and explain."""
    with terminal.workspace() as workspace:
        coach, language = _open(workspace)
        with terminal.progress() as shown:
            shown.add_task(lab, total=None, note=f"at most {coach.lab(lab).limit_s:.0f} s")
            result = coach.run_lab(lab, _settings(setting), learner=learner)
    if as_json:
        terminal.emit(result, as_json=True)
    else:
        _print_result(result, language)


@coach_app.command("list")
def coach_list(as_json: _Json = False) -> None:
    """Show the questions, most asked first."""
    with terminal.workspace() as workspace:
        coach, language = _open(workspace)
        questions = [item.question for item in coach.questions()]
    if as_json:
        terminal.emit(questions, as_json=True)
        return
    rows = [
        (item.id, "★" * item.stars, item.difficulty, item.minutes, ", ".join(item.labs), item.title.of(language))
        for item in questions
    ]
    terminal.table(("question", "stars", "difficulty", "minutes", "labs", "title"), rows)


@coach_app.command("show")
def coach_show(
    question: Annotated[str, typer.Argument(help="Such as zero; see `sihe coach list`.")],
    hint: Annotated[int, typer.Option("--hint", min=0, help="Show hints up to this tier instead of the answer.")] = 0,
    as_json: _Json = False,
) -> None:
    """Read a question with its answer, or only its hints."""
    with terminal.workspace() as workspace:
        coach, language = _open(workspace)
        found = coach.question(question)
    if as_json:
        terminal.emit({**found.question.model_dump(mode="json"), "text": found.body(language)}, as_json=True)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    title = f"# {found.question.title.of(language)}\n\n"
    hints = [f"{tier}. {text.of(language)}" for tier, text in enumerate(found.question.hints[:hint], start=1)]
    Console().print(Markdown(title + ("\n".join(hints) if hint else found.body(language))))


@coach_app.command("review")
def coach_review(
    question: Annotated[str, typer.Argument(help="Such as zero.")],
    rating: Annotated[int, typer.Argument(min=1, max=4, help="1 forgotten, 2 with effort, 3 known, 4 at once.")],
    learner: _Learner = "me",
) -> None:
    """Store how well you recalled a question."""
    with terminal.workspace() as workspace:
        coach, _ = _open(workspace)
        coach.review(question, rating, learner)
    terminal.say(f"stored: {question} = {rating}")


@coach_app.command("progress")
def coach_progress(learner: _Learner = "me", as_json: _Json = False) -> None:
    """Show how many topics are new, seen and solid."""
    with terminal.workspace() as workspace:
        coach, _ = _open(workspace)
        states = list(coach.states(learner).values())
    terminal.emit({state: states.count(state) for state in ("new", "seen", "solid")}, as_json=as_json)


@map_app.callback(invoke_without_command=True)
def map_show(
    svg: Annotated[Path | None, typer.Option("--svg", help="Write the drawing to this file instead.")] = None,
    learner: _Learner = "me",
    as_json: _Json = False,
) -> None:
    """Show the map, or write it as SVG."""
    with terminal.workspace() as workspace:
        coach, language = _open(workspace)
        field, states = coach.map(), coach.states(learner)
    if as_json:
        terminal.emit(field, as_json=True)
    elif svg is not None:
        from sihe.apps.coach.drawing import draw_map
        from sihe.core.files import write_file

        write_file(svg, draw_map(field, language=language, states=states).encode())
        terminal.say(f"wrote {svg}")
    else:
        for area in field.areas:
            topics = sum(len(group.topics) for group in area.groups)
            terminal.say(f"\n{area.name.of(language)} · {topics}")
            for group in area.groups:
                terminal.say(f"  {group.name.of(language)}")
                for topic in group.topics:
                    mark, stars = _STATE_MARKS[states[topic.id]], "★" * topic.stars + "☆" * (5 - topic.stars)
                    behind = topic.capability.command or topic.capability.module or f"({topic.capability.planned})"
                    terminal.say(f"    {mark} {stars}  {_padded(topic.name.of(language), 28)} {behind}")


def _open(workspace: Workspace) -> tuple[CoachService, Language]:
    from sihe.apps.coach.service import CoachService

    return CoachService(workspace), workspace.settings.locale


def _settings(given: list[str] | None) -> dict[str, str] | None:
    """`NAME=VALUE` options as a mapping; None when there are none."""
    if not given:
        return None
    for item in given:
        if "=" not in item:
            raise typer.BadParameter(f"expected NAME=VALUE, got {item!r}", param_hint="--set")
    return dict(item.split("=", 1) for item in given)


def _print_result(result: LabResult, language: Language) -> None:
    from sihe.apps.coach.gantt import write_timeline

    claims = [(claim.label.of(language), claim.shown, claim.provenance) for claim in result.claims]
    terminal.table(("claim", "value", "provenance"), claims)
    for table in result.tables:
        terminal.say(f"\n{table.title.of(language)}")
        terminal.table([f"{column.label.of(language)} {column.unit}".strip() for column in table.columns], table.rows)
    for timeline in result.timelines:
        terminal.say(f"\n{timeline.title.of(language)}")
        for line in write_timeline(timeline, language=language):
            terminal.say(line)
    if result.grades:
        terminal.say("")
        rows = [
            (grade.claim, f"{grade.predicted:g}", f"{grade.actual:.4g}", grade.unit, grade.verdict)
            for grade in result.grades
        ]
        terminal.table(("predicted", "you said", "it was", "unit", "verdict"), rows)
    terminal.say(f"\n{result.explanation.of(language)}\n\nrun {result.run_id} · {result.elapsed_s:.1f} s")


def _padded(text: str, width: int) -> str:
    """`text` filled up to `width` columns; a Chinese character takes two."""
    from unicodedata import east_asian_width

    taken = sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)
    return text + " " * max(width - taken, 0)
