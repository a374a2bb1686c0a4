"""The coach for one workspace: its content, its labs as runs, and what each learner predicted and recalled."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from sihe.apps.coach import map as content
from sihe.apps.coach.attempts import Attempt, Attempts, Prediction
from sihe.apps.coach.labs import registry
from sihe.apps.coach.labs.grading import check_prediction, grade
from sihe.apps.coach.labs.runner import result_of
from sihe.apps.coach.labs.types import Grade, Lab, LabResult
from sihe.apps.coach.map import QuestionText
from sihe.apps.coach.progress import state_of
from sihe.apps.coach.types import Map, Topic, TopicState
from sihe.core.errors import InvalidInput, NotFound
from sihe.core.files import exclusive
from sihe.core.workspace import Workspace

EXPERIMENT = "labs"
_RESULT = "result.json"
_QUEUE_S = 300.0  # labs run one at a time: two at once would measure each other


class CoachService:
    """The map, the questions and the labs; learners are told apart by name."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    @cached_property
    def _attempts(self) -> Attempts:
        return Attempts(self._workspace.records, self._workspace.clock)

    # ---- content ----------------------------------------------------------------------------------------------------

    def map(self) -> Map:
        """The map of the field."""
        return content.the_map()

    def topics(self) -> tuple[Topic, ...]:
        """Every topic, in the order of the map."""
        return tuple(self.map().topics.values())

    def topic(self, name: str) -> Topic:
        """One topic. Raises `NotFound`."""
        found = self.map().topics.get(name)
        if found is None:
            raise NotFound("topic", name, hint="see them with  sihe map")
        return found

    def questions(self) -> tuple[QuestionText, ...]:
        """Every question, most asked first."""
        return tuple(content.all_questions().values())

    def question(self, name: str) -> QuestionText:
        """One question. Raises `NotFound`."""
        return content.question(name)

    def labs(self) -> tuple[Lab, ...]:
        """Every lab."""
        return registry.labs()

    def lab(self, name: str) -> Lab:
        """One lab. Raises `NotFound`."""
        return registry.lab(name)

    # ---- predict, run, explain --------------------------------------------------------------------------------------

    def predict(
        self,
        lab: str,
        claim: str,
        value: float,
        learner: str = "me",
        *,
        parameters: Mapping[str, object] | None = None,
        attempt: int | None = None,
    ) -> Prediction:
        """Stores what a learner expects of a claim, before the run. Until then it may be changed.

        `parameters` are those that the lab will run with. Raises `AttemptClosed` when the attempt named by its number
        has run already, `LabParameterInvalid` for a claim that is not one to predict, `NotFound` for an unknown lab.
        """
        found = self.lab(lab)
        spec = found.claim(claim)
        check_prediction(spec, value)
        resolved = found.resolve(parameters)
        return self._attempts.predict(learner, lab, claim, value, spec.unit, parameters=resolved, attempt=attempt)

    def run_lab(self, lab: str, params: Mapping[str, object] | None = None, *, learner: str = "me") -> LabResult:
        """Runs a lab on this machine and grades the learner's predictions for it.

        Without `params` it runs with those that were predicted for, else with the lab's own. The run is tracked
        (experiment `labs`), its claims as metrics and the whole result as an artifact. Raises `LabParameterInvalid`,
        `LabFailed`, `LabTimeout`, `Busy` (another lab is measuring).
        """
        found = self.lab(lab)
        chosen = None if params is None else found.resolve(params)
        with exclusive(self._workspace.path("locks", "labs.lock"), timeout_s=_QUEUE_S):
            attempt = self._attempts.start(learner, lab, chosen, found.resolve(None))
            run_id: str | None = None
            try:
                run_id = self._workspace.tracking.start_run(
                    EXPERIMENT, lab, params=attempt.parameters, tags={"sihe.learner": learner}
                )
                result = self._measure(found, attempt, run_id)
            except BaseException as error:
                self._attempts.fail(attempt, run_id)
                if run_id is not None:
                    interrupted = isinstance(error, KeyboardInterrupt)
                    self._workspace.tracking.end_run(run_id, "KILLED" if interrupted else "FAILED")
                raise
        return result

    def grade(self, lab: str, claim: str, predicted: float, actual: float) -> Grade:
        """How near a prediction is to a value, by the claim's tolerance. Stores nothing."""
        return grade(self.lab(lab).claim(claim), predicted, actual)

    def result(self, run_id: str) -> LabResult:
        """The stored result of a lab's run. Raises `NotFound`."""
        return LabResult.model_validate_json(self._workspace.tracking.artifact(run_id, _RESULT))

    def attempts(self, learner: str = "me", lab: str | None = None) -> list[Attempt]:
        """A learner's attempts, newest first."""
        return self._attempts.history(learner, lab)

    def predictions(self, lab: str, learner: str = "me") -> list[Prediction]:
        """What a learner predicted for a lab, newest attempt first."""
        self.lab(lab)
        return self._attempts.predictions(learner, lab)

    # ---- the learner ------------------------------------------------------------------------------------------------

    def review(self, question: str, rating: int, learner: str = "me") -> None:
        """Stores how well a learner recalled a question: 1 forgotten, 2 with effort, 3 known, 4 at once."""
        self.question(question)
        if rating not in (1, 2, 3, 4):
            raise InvalidInput(f"a rating is 1 (forgotten) to 4 (at once), got {rating!r}")
        self._attempts.review(learner, question, rating)

    def states(self, learner: str = "me") -> dict[str, TopicState]:
        """Topic → new, seen or solid, for a learner."""
        ratings, verdicts = self._attempts.ratings(learner), self._attempts.verdicts(learner)
        return {topic.id: state_of(topic, content.questions_of(topic.id), ratings, verdicts) for topic in self.topics()}

    def _measure(self, lab: Lab, attempt: Attempt, run_id: str) -> LabResult:
        clock, tracking = self._workspace.clock, self._workspace.tracking
        started_at, start_s = clock.now(), clock.monotonic_s()
        measurement = registry.MEASURES[lab.id](attempt.parameters, limit_s=lab.limit_s)
        measured = result_of(
            lab, attempt.parameters, measurement, started_at=started_at, elapsed_s=clock.monotonic_s() - start_s
        )
        grades = tuple(
            grade(lab.claim(claim), value, measured.value(claim))
            for claim, value in self._attempts.made_in(attempt).items()
        )
        result = measured.model_copy(update={"run_id": run_id, "attempt": attempt.number, "grades": grades})
        tracking.log_metrics(run_id, {claim.key: claim.value for claim in result.claims})
        tracking.log_artifact(run_id, _RESULT, result.model_dump_json(indent=2).encode())
        self._attempts.finish(attempt, run_id, grades)
        tracking.end_run(run_id)
        return result
