"""Which period a process measures for, beside the others that serve the same deployment: the rule, pure.

A period is the same for all processes, and each sees a change of weights or versions at another moment: one has read
the new weights half a second earlier, one loads a new version in three seconds and another in thirty. Until then their
requests belong to different periods, because different versions answer them. So there is no switch that all would have
to follow at once. Each process looks at what it serves itself (its *split*), and at the periods in the records:

1. It joins the newest period, not older than its own, whose split is exactly its own. So a process that sees a change
   later than another finds its period there; and one that lags stays where it is, because its own period still fits.
2. Where the newest period knows the version of an arm that this process has loaded none for yet (it has just started,
   or a canary is ready elsewhere already), it waits: it measures nothing until it serves what that period compares. Its
   requests would look like lost ones of the arm that is missing.
3. Where its own period is the newest, and nothing is new but that a version has become known, the period goes on with
   that version, unless other arms were measured already.
4. Otherwise nobody was there before: it begins the next period.

Nobody ever goes back to an older period, and a period is begun only by a process whose own split has changed. So
processes that differ for long (one cannot load a version) stay in two periods, and do not alternate; and when changes
stop, all that serve the same end in the same period. Where two changes are seen in another order by two processes,
there are a few short periods on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sihe.serving.gateway.traffic.experiment import Period, Split


@dataclass(frozen=True, slots=True)
class Join:
    """Measure for this period; it may be one's own already."""

    period: Period


@dataclass(frozen=True, slots=True)
class Wait:
    """Measure for none until more is loaded."""


@dataclass(frozen=True, slots=True)
class Complete:
    """Let one's own period go on with the versions that have become known."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Begin the period of this number."""

    number: int


def choose(
    split: Split, periods: Sequence[Period], *, own: int | None, may_complete: bool
) -> Join | Wait | Complete | Begin:
    """What a process that serves `split` does next.

    `periods` are those in the records from its own on, newest first; `own` is the number of the one that it measures
    for, None for a process that measures for none. `may_complete` says that no arm whose version its period knows was
    measured there yet.
    """
    for period in periods:
        if period.split == split:
            return Join(period)
    newest = periods[0] if periods else None
    if newest is not None:
        known = newest.split.versions
        if any(version is None and known.get(arm) is not None for arm, version in split.versions.items()):
            return Wait()
        if newest.number == own and may_complete and split.completes(newest.split):
            return Complete()
    return Begin(max(newest.number if newest is not None else 0, own or 0) + 1)
