"""Attempts at a lab, and what a learner predicted in them, in the records database.

An attempt is open until it runs. Predictions belong to the open attempt and may be changed until then; once it has
started they are history, and the next prediction opens the next attempt. The order is enforced inside one transaction,
so that a prediction that races with a run is either in it or refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, Select, func, select, update

from sihe.apps.coach.errors import AttemptClosed
from sihe.apps.coach.labs.types import Grade
from sihe.apps.coach.tables import lab_runs, predictions, reviews
from sihe.core.clock import Clock
from sihe.core.ids import check_name, new_id
from sihe.core.records import Records

AttemptState = Literal["open", "running", "done", "failed"]


@dataclass(frozen=True)
class Attempt:
    """One attempt of one learner at one lab."""

    id: str
    learner: str
    lab: str
    number: int
    state: AttemptState
    parameters: Mapping[str, int | float]
    run_id: str | None
    created_at: datetime


@dataclass(frozen=True)
class Prediction:
    """What a learner said, and how near it was once the lab had run."""

    attempt: int
    claim: str
    value: float
    unit: str
    predicted_at: datetime
    actual: float | None
    ratio: float | None
    verdict: str | None


class Attempts:
    """The attempt history of every learner. Safe for several processes at once."""

    def __init__(self, records: Records, clock: Clock) -> None:
        self._records = records
        self._clock = clock

    def predict(
        self,
        learner: str,
        lab: str,
        claim: str,
        value: float,
        unit: str,
        *,
        parameters: Mapping[str, int | float],
        attempt: int | None = None,
    ) -> Prediction:
        """Stores a prediction in the learner's open attempt, opening one if there is none.

        The attempt keeps the `parameters` of the latest prediction: the lab will run with them. Raises `AttemptClosed`
        when `attempt` is named and is not the open one.
        """
        check_name("learner", learner)
        now = self._clock.now()
        with self._records.transaction() as connection:
            found = self._open(connection, learner, lab, parameters)
            if attempt is not None and attempt != found.number:
                raise AttemptClosed(
                    f"attempt {attempt} at lab {lab} does not take predictions: they come before the run; "
                    f"the open attempt is number {found.number}"
                )
            where = (predictions.c.lab_run == found.id, predictions.c.claim == claim)
            connection.execute(predictions.delete().where(*where))
            connection.execute(
                predictions.insert().values(lab_run=found.id, claim=claim, value=value, unit=unit, predicted_at=now)
            )
            connection.execute(update(lab_runs).where(lab_runs.c.id == found.id).values(parameters=dict(parameters)))
        return Prediction(found.number, claim, value, unit, now, None, None, None)

    def start(
        self, learner: str, lab: str, parameters: Mapping[str, int | float] | None, defaults: Mapping[str, int | float]
    ) -> Attempt:
        """Closes the learner's open attempt to predictions; it runs now.

        Without `parameters` it runs with those that the predictions were made for, and without predictions with
        `defaults`.
        """
        check_name("learner", learner)
        with self._records.transaction() as connection:
            found = self._open(connection, learner, lab, defaults)
            chosen = dict(found.parameters if parameters is None else parameters)
            connection.execute(
                update(lab_runs)
                .where(lab_runs.c.id == found.id)
                .values(state="running", started_at=self._clock.now(), parameters=chosen)
            )
        return Attempt(found.id, learner, lab, found.number, "running", chosen, None, found.created_at)

    def made_in(self, attempt: Attempt) -> dict[str, float]:
        """Claim → predicted value of an attempt."""
        with self._records.transaction() as connection:
            rows = connection.execute(select(predictions).where(predictions.c.lab_run == attempt.id))
            return {row.claim: row.value for row in rows}

    def finish(self, attempt: Attempt, run_id: str, grades: Sequence[Grade]) -> None:
        """Marks a run as done, and writes each grade beside its prediction, in one transaction."""
        with self._records.transaction() as connection:
            self._end(connection, attempt, "done", run_id)
            for grade in grades:
                connection.execute(
                    update(predictions)
                    .where(predictions.c.lab_run == attempt.id, predictions.c.claim == grade.claim)
                    .values(actual=grade.actual, ratio=grade.ratio, verdict=grade.verdict)
                )

    def fail(self, attempt: Attempt, run_id: str | None) -> None:
        """Marks a run as failed. Nothing was shown, so its predictions move on to the next attempt."""
        with self._records.transaction() as connection:
            self._end(connection, attempt, "failed", run_id)
            following = self._open(connection, attempt.learner, attempt.lab, attempt.parameters)
            kept = select(predictions.c.claim).where(predictions.c.lab_run == following.id)
            connection.execute(
                update(predictions)
                .where(predictions.c.lab_run == attempt.id, predictions.c.claim.not_in(kept.scalar_subquery()))
                .values(lab_run=following.id)
            )

    def history(self, learner: str, lab: str | None = None) -> list[Attempt]:
        """The learner's attempts, newest first."""
        query = (
            select(lab_runs)
            .where(lab_runs.c.learner == learner)
            .order_by(lab_runs.c.created_at.desc(), lab_runs.c.id.desc())
        )
        with self._records.transaction() as connection:
            rows = connection.execute(query if lab is None else query.where(lab_runs.c.lab == lab))
            return [_attempt(row) for row in rows]

    def predictions(self, learner: str, lab: str) -> list[Prediction]:
        """Everything that the learner predicted for a lab, newest attempt first."""
        query: Select[Any] = (
            select(predictions, lab_runs.c.attempt)
            .join(lab_runs, lab_runs.c.id == predictions.c.lab_run)
            .where(lab_runs.c.learner == learner, lab_runs.c.lab == lab)
            .order_by(lab_runs.c.attempt.desc(), predictions.c.predicted_at)
        )
        with self._records.transaction() as connection:
            return [
                Prediction(r.attempt, r.claim, r.value, r.unit, r.predicted_at, r.actual, r.ratio, r.verdict)
                for r in connection.execute(query)
            ]

    def review(self, learner: str, question: str, rating: int) -> None:
        """Stores how well the learner recalled a question, 1 to 4."""
        check_name("learner", learner)
        row = {"id": new_id("review"), "learner": learner, "question": question, "rating": rating}
        with self._records.transaction() as connection:
            connection.execute(reviews.insert().values(**row, reviewed_at=self._clock.now()))

    def ratings(self, learner: str) -> dict[str, int]:
        """Question → the learner's latest rating of it."""
        query = select(reviews).where(reviews.c.learner == learner).order_by(reviews.c.reviewed_at, reviews.c.id)
        with self._records.transaction() as connection:
            return {row.question: row.rating for row in connection.execute(query)}

    def verdicts(self, learner: str) -> dict[str, list[str]]:
        """Lab → the verdicts of the learner's latest finished attempt at it (empty when nothing was predicted)."""
        found: dict[str, list[str]] = {}
        latest: dict[str, str] = {}
        for attempt in self.history(learner):
            if attempt.state == "done" and attempt.lab not in latest:
                latest[attempt.lab], found[attempt.lab] = attempt.id, []
        with self._records.transaction() as connection:
            rows = connection.execute(select(predictions).where(predictions.c.lab_run.in_(latest.values())))
            lab_of = {identifier: lab for lab, identifier in latest.items()}
            for row in rows:
                if row.verdict is not None:
                    found[lab_of[row.lab_run]].append(row.verdict)
        return found

    def _open(self, connection: Connection, learner: str, lab: str, parameters: Mapping[str, int | float]) -> Attempt:
        """The learner's open attempt at a lab, created if there is none. The transaction holds the write lock."""
        mine = (lab_runs.c.learner == learner, lab_runs.c.lab == lab)
        row = connection.execute(select(lab_runs).where(*mine, lab_runs.c.state == "open")).first()
        if row is not None:
            return _attempt(row)
        number = connection.execute(select(func.max(lab_runs.c.attempt)).where(*mine)).scalar() or 0
        created = Attempt(new_id("lab"), learner, lab, number + 1, "open", dict(parameters), None, self._clock.now())
        connection.execute(
            lab_runs.insert().values(
                id=created.id,
                learner=learner,
                lab=lab,
                attempt=created.number,
                state="open",
                parameters=dict(parameters),
                created_at=created.created_at,
            )
        )
        return created

    def _end(self, connection: Connection, attempt: Attempt, state: AttemptState, run_id: str | None) -> None:
        connection.execute(
            update(lab_runs)
            .where(lab_runs.c.id == attempt.id)
            .values(state=state, run_id=run_id, ended_at=self._clock.now())
        )


def _attempt(row: Row[Any]) -> Attempt:
    return Attempt(row.id, row.learner, row.lab, row.attempt, row.state, row.parameters, row.run_id, row.created_at)
