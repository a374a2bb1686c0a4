"""Which period a process measures a deployment for, and what it exchanges with the others that serve it.

`periods.choose` is the rule; this carries it out. The records are only read while routes are followed: a request finds
its period in memory. Where the records fail, or the process is not whole yet, it measures aside: for a period that
nobody else knows, which becomes a real one or is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping

from sihe.core.clock import Clock
from sihe.core.errors import Busy
from sihe.core.telemetry import logger
from sihe.serving.gateway.traffic.experiment import Experiment, ExperimentReport, Period, Split
from sihe.serving.gateway.traffic.experiment_store import ExperimentStore, Heard, together
from sihe.serving.gateway.traffic.periods import Begin, Complete, Join, Wait, choose

_TRIES = 5  # when others begin periods at the same moment


class Membership:
    """Of one process and one deployment. `follow` and `save` are called by one thread, everything else by any.

    `process` names the process in the records. Raises what reading these raises.
    """

    def __init__(
        self, deployment: str, process: str, weights: Mapping[str, float], *, store: ExperimentStore, clock: Clock
    ) -> None:
        self._deployment = deployment
        self._process = process
        self._store = store
        self._clock = clock
        self._log = logger("serving").bind(deployment=deployment)
        newest = next(iter(store.periods(deployment)), None)
        self._start = newest.number if newest is not None else 0  # older periods are not looked at
        self._is_member = False
        self._stays = 0
        self._saved = 0  # changes of the experiment that are stored
        self._is_stored = False  # whether this stay has a row
        self._heard: tuple[Experiment | None, dict[str, Heard]] = (None, {})  # who listens, and to what
        self._seen: Experiment | None = None  # the newest period as the others measure it, while this process does not
        split = Split(dict(weights), dict.fromkeys(weights))
        self._experiment = Experiment(deployment, max(1, self._start), split, clock.now())

    @property
    def experiment(self) -> Experiment:
        """What the requests of this process are measured by now."""
        return self._experiment

    def report(self) -> ExperimentReport:
        """What all processes have measured; of the others some seconds less than they have."""
        seen = self._seen
        return (seen if seen is not None else self._experiment).report()

    def follow(self, weights: Mapping[str, float], serving: Mapping[str, int | None]) -> None:
        """Measures for the period of these weights and of the versions that this process is `serving`. A version that
        is not there now is not changed. Where the records fail it measures aside, and the next call tries again."""
        known = self._experiment.split.versions
        split = Split(dict(weights), {arm: serving.get(arm) or known.get(arm) for arm in weights})
        if not self._is_member:
            self._experiment = self._experiment.followed_by(split, self._clock.now())
        try:
            self._keep_up(split)
        except Exception as error:  # noqa: BLE001 - what is lost is a measurement; the routes must not wait for it
            self._log.warning("period_not_followed", period=self._experiment.period, error=repr(error))
            if self._experiment.split != split:
                self._step_aside(split)

    def save(self) -> None:
        """Stores what this process has measured, if there is news. Raises what the records raise."""
        experiment, changes = self._experiment, self._experiment.changes
        if not self._is_member or changes == self._saved:
            return
        if not self._store.save(experiment, self._writer, is_new=not self._is_stored):
            self._log.warning("measurements_closed", period=experiment.period)  # this process was taken for gone
            self._replace(Period(experiment.period, experiment.split, experiment.started_at), is_member=False)
            return
        self._saved, self._is_stored = changes, True

    @property
    def _writer(self) -> str:
        return f"{self._process}.{self._stays}"

    def _keep_up(self, split: Split) -> None:
        for _ in range(_TRIES):
            periods = self._store.periods(self._deployment)
            if self._take(split, periods):
                self._hear(periods)
                return
        raise Busy(f"the periods of {self._deployment!r} were changed by others {_TRIES} times at once")

    def _take(self, split: Split, periods: tuple[Period, ...]) -> bool:
        """Takes the next step; whether it could be taken."""
        experiment, own = self._experiment, self._experiment.period if self._is_member else None
        may_complete = own is not None and experiment.becomes(split)
        from_own_on = [period for period in periods if period.number >= self._start]
        match choose(split, from_own_on, own=own, may_complete=may_complete):
            case Join(period):
                self._enter(period)
            case Wait() if self._is_member:
                # Where its period went on without it, what is not stored yet is not of that period's split.
                is_as_it_was = any((one.number, one.split) == (own, experiment.split) for one in periods)
                self._step_aside(split, saves=is_as_it_was)
            case Wait():
                pass
            case Complete():
                period = Period(experiment.period, split, self._clock.now())
                if not self._store.complete(self._deployment, period, periods[0].split):
                    return False
                self._enter(period)
            case Begin(number):
                period = Period(number, split, self._clock.now())
                newest = periods[0].number if periods else None
                if not self._store.begin(self._deployment, period, newest=newest):
                    return False
                self._enter(period)
        return True

    def _enter(self, period: Period) -> None:
        if self._is_member and self._experiment.period != period.number:
            self._leave()
            self._replace(period, is_member=True)
        else:
            self._experiment.place(period)  # what was measured aside was measured for this split
            self._is_member = True
        self._start, self._seen = period.number, None

    def _step_aside(self, split: Split, *, saves: bool = True) -> None:
        """Measures for no period of the records, until one fits."""
        if self._is_member:
            if saves:
                self._leave()
            self._replace(Period(self._experiment.period, split, self._clock.now()), is_member=False)

    def _replace(self, period: Period, *, is_member: bool) -> None:
        self._experiment = self._experiment.successor(period)
        self._is_member = is_member
        self._stays += 1  # a row is written by one stay alone: another one begins at nothing
        self._saved, self._is_stored = 0, False

    def _leave(self) -> None:
        try:
            self.save()
        except Exception as error:  # noqa: BLE001 - see `follow`
            self._log.warning("measurements_not_saved", period=self._experiment.period, error=repr(error))

    def _hear(self, periods: tuple[Period, ...]) -> None:
        """Takes in what the others have stored: of one's own period, or while there is none of the newest."""
        if self._is_member:
            self._listen(self._experiment, besides=self._writer)
        elif periods:
            newest, seen = periods[0], self._seen
            if seen is None or seen.period != newest.number:
                seen = Experiment(self._deployment, newest.number, newest.split, newest.started_at)
            seen.place(newest)
            self._listen(seen, besides=None)
            self._seen = seen

    def _listen(self, experiment: Experiment, *, besides: str | None) -> None:
        listener, known = self._heard
        if listener is not experiment:
            known = {}
        heard = self._store.heard(self._deployment, experiment.period, known, besides=besides)
        if listener is not experiment or heard != known:
            experiment.hear(together(heard))
            self._heard = experiment, heard
