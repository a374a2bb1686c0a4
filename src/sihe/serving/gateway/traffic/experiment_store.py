"""Periods and what they were measured by, in the records: periods are of all processes, measurements of each its own.

Whoever writes holds the deployment's row meanwhile, so that of two processes which begin a period the second one finds
that of the first, and so that nothing is written about a deployment that was removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from sihe.core.clock import Clock
from sihe.core.errors import NotFound
from sihe.core.records import Records
from sihe.core.telemetry import logger
from sihe.serving.gateway.traffic.experiment import Experiment, Period, Split
from sihe.serving.gateway.traffic.tally import Tally
from sihe.serving.tables import deployments, measurements, periods, reports

KEPT_PERIODS = 20  # of each deployment
MAX_WRITERS = 32  # of each period, before those that are gone become one
GONE_AFTER = timedelta(minutes=10)  # without a report of the process: clocks of two machines differ by less
_TOGETHER = "together"
_UNREADABLE = (AttributeError, KeyError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Heard:
    """What a writer had stored at a revision of its row."""

    revision: int
    tally: Tally


class ExperimentStore:
    """Rows of `sihe_periods`, the latest twenty of each deployment, and of `sihe_measurements`."""

    def __init__(self, records: Records, clock: Clock) -> None:
        self._records = records
        self._clock = clock
        self._log = logger("serving")

    # ---- periods ----------------------------------------------------------------------------------------------------

    def periods(self, deployment: str) -> tuple[Period, ...]:
        """Those that are kept, newest first."""
        query = select(periods).where(periods.c.deployment == deployment).order_by(periods.c.number.desc())
        with self._records.snapshot() as connection:
            rows = connection.execute(query).all()
        return tuple(Period(row.number, Split(**row.split), row.started_at) for row in rows)

    def begin(self, deployment: str, period: Period, *, newest: int | None) -> bool:
        """Begins a period after the `newest` one that was seen; False where another process has begun one since.

        Raises `NotFound` for a deployment that was removed.
        """
        with self._records.transaction() as connection:
            self._hold(connection, deployment)
            if self._newest(connection, deployment) != newest:
                return False
            values = {"split": _plain(period.split), "started_at": period.started_at}
            connection.execute(periods.insert().values(deployment=deployment, number=period.number, **values))
            last = period.number - KEPT_PERIODS
            for table, number in ((periods, periods.c.number), (measurements, measurements.c.period)):
                connection.execute(table.delete().where(table.c.deployment == deployment, number <= last))
        return True

    def complete(self, deployment: str, period: Period, former: Split) -> bool:
        """Lets the newest period go on with a split that knows more versions than the `former` one; False where it is
        not that period any more. Raises `NotFound` for a deployment that was removed."""
        is_it = (periods.c.deployment == deployment) & (periods.c.number == period.number)
        with self._records.transaction() as connection:
            self._hold(connection, deployment)
            split = connection.execute(select(periods.c.split).where(is_it)).scalar()
            if split is None or Split(**split) != former or self._newest(connection, deployment) != period.number:
                return False
            values = {"split": _plain(period.split), "started_at": period.started_at}
            connection.execute(periods.update().where(is_it).values(**values))
        return True

    # ---- measurements -----------------------------------------------------------------------------------------------

    def latest(self, deployment: str) -> Experiment | None:
        """The newest period with what all processes have stored of it; None where there is none."""
        found = self.periods(deployment)
        if not found:
            return None
        newest = found[0]
        experiment = Experiment(deployment, newest.number, newest.split, newest.started_at)
        experiment.hear(together(self.heard(deployment, newest.number, {})))
        return experiment

    def heard(
        self, deployment: str, period: int, known: Mapping[str, Heard], *, besides: str | None = None
    ) -> dict[str, Heard]:
        """What each writer has stored of a period, but for one of them; what is `known` is not read again."""
        is_it = (measurements.c.deployment == deployment) & (measurements.c.period == period)
        query = select(measurements.c.writer, measurements.c.revision).where(is_it, measurements.c.writer != besides)
        with self._records.snapshot() as connection:
            found = {row.writer: row.revision for row in connection.execute(query)}
            kept = {writer: known[writer] for writer in found.keys() & known.keys()}
            kept = {writer: heard for writer, heard in kept.items() if heard.revision == found[writer]}
            new = found.keys() - kept.keys()
            rows = connection.execute(select(measurements).where(is_it, measurements.c.writer.in_(new))) if new else ()
            read = [(row.writer, row.revision, row.statistics) for row in rows]
        return kept | {
            writer: Heard(revision, self._tally(deployment, writer, values) or Tally())
            for writer, revision, values in read
        }

    def save(self, experiment: Experiment, writer: str, *, is_new: bool) -> bool:
        """Stores what this process has measured as the row of `writer`, which `is_new` or was stored before.

        False where that is not possible any more: the row has become one with others that were taken for gone, or the
        period is over and forgotten. For a deployment that was removed there is nothing to do.
        """
        deployment, period = experiment.deployment, experiment.period
        values: dict[str, Any] = {"statistics": experiment.to_mapping(), "updated_at": self._clock.now()}
        is_it = (measurements.c.deployment == deployment) & (measurements.c.period == period)
        with self._records.transaction() as connection:
            try:
                self._hold(connection, deployment)
            except NotFound:
                return True
            if not is_new:
                row = measurements.update().where(is_it, measurements.c.writer == writer)
                return connection.execute(row.values(revision=measurements.c.revision + 1, **values)).rowcount == 1
            is_there = (periods.c.deployment == deployment) & (periods.c.number == period)
            if connection.execute(select(periods.c.number).where(is_there)).one_or_none() is None:
                return False
            self._make_room(connection, deployment, period, is_it)
            key = {"deployment": deployment, "period": period, "writer": writer}
            connection.execute(measurements.insert().values(**key, revision=0, **values))
        return True

    def _make_room(self, connection: Connection, deployment: str, period: int, is_it: ColumnElement[bool]) -> None:
        """Makes one row of those whose processes are gone, where there are many: a process that is restarted again and
        again leaves one each time."""
        rows = connection.execute(select(measurements).where(is_it).order_by(measurements.c.writer)).all()
        if len(rows) < MAX_WRITERS:
            return
        query = select(reports.c.process).where(reports.c.deployment == deployment)
        alive, before = set(connection.execute(query).scalars()), self._clock.now() - GONE_AFTER
        gone = {
            row.writer: tally
            for row in rows
            if row.writer == _TOGETHER or (row.writer.partition(".")[0] not in alive and row.updated_at < before)
            if (tally := self._tally(deployment, row.writer, row.statistics)) is not None
        }
        if len(gone) < 2:
            return
        connection.execute(measurements.delete().where(is_it, measurements.c.writer.in_(gone)))
        revision = 1 + max(row.revision for row in rows)
        statistics = Tally.sum(gone[writer] for writer in sorted(gone, key=_age)).to_mapping()
        values = {"revision": revision, "statistics": statistics, "updated_at": self._clock.now()}
        connection.execute(
            measurements.insert().values(deployment=deployment, period=period, writer=_TOGETHER, **values)
        )

    def _tally(self, deployment: str, writer: str, values: Mapping[str, Any]) -> Tally | None:
        """What a row holds; None where another version of the house wrote it in another form."""
        try:
            return Tally.from_mapping(values)
        except _UNREADABLE as error:
            self._log.warning("measurements_unreadable", deployment=deployment, writer=writer, error=repr(error))
            return None

    def _hold(self, connection: Connection, deployment: str) -> None:
        query = select(deployments.c.name).where(deployments.c.name == deployment).with_for_update()
        if connection.execute(query).one_or_none() is None:
            raise NotFound("deployment", deployment, hint="see them with  sihe deploy list")

    def _newest(self, connection: Connection, deployment: str) -> int | None:
        query = select(func.max(periods.c.number)).where(periods.c.deployment == deployment)
        found: int | None = connection.execute(query).scalar()
        return found


def together(heard: Mapping[str, Heard]) -> Tally:
    """What all writers have measured, the earliest first."""
    return Tally.sum(heard[writer].tally for writer in sorted(heard, key=_age))


def _age(writer: str) -> tuple[bool, str]:
    return writer != _TOGETHER, writer


def _plain(split: Split) -> dict[str, Any]:
    return {"weights": dict(split.weights), "versions": dict(split.versions)}
