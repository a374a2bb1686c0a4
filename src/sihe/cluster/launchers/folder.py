"""What an attempt leaves on disk: a folder for each rank with its logs, its stacks and its last words.

Every launcher writes it in the same form, so that whoever looks for the cause of a failure looks in one place.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from sihe.cluster.launchers import reports
from sihe.cluster.launchers.rank import ERROR_FILE
from sihe.cluster.launchers.stacks import STACKS_FILE
from sihe.cluster.types import RankFailed
from sihe.core.errors import SiheError, UserError
from sihe.core.files import disk_errors


class AttemptFolder:
    """`<log_dir>/attempt-<number>`, made when it is opened. Raises `NoSpace`.

    Attempts of former launchers of the same job count: theirs stay as they are.
    """

    def __init__(self, log_dir: Path) -> None:
        with disk_errors(log_dir):
            log_dir.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.name.rpartition("-")[2]) for path in log_dir.glob("attempt-[0-9]*")]
            self.number = max(numbers, default=0) + 1
            self.path = log_dir / f"attempt-{self.number:03d}"
            self.path.mkdir()

    def prepare(self, rank: int) -> dict[str, str]:
        """Makes the folder of a rank and reserves its report; the environment that tells the rank of both."""
        home = self.rank(rank)
        with disk_errors(home):
            home.mkdir()
        reports.reserve(self.report(rank))
        return {ERROR_FILE: str(self.report(rank)), STACKS_FILE: str(self.stacks(rank))}

    def rank(self, rank: int) -> Path:
        """The folder of a rank."""
        return self.path / f"rank-{rank}"

    def output(self, rank: int) -> Path:
        """What a rank prints."""
        return self.rank(rank) / "stdout.log"

    def log(self, rank: int) -> Path:
        """The error output of a rank."""
        return self.rank(rank) / "stderr.log"

    def stacks(self, rank: int) -> Path:
        """Where a rank writes its stacks when it is asked to."""
        return self.rank(rank) / "stacks.log"

    def report(self, rank: int) -> Path:
        """Where a rank writes the error with which it ends."""
        return self.rank(rank) / "error.json"

    def last_words(self, rank: int) -> SiheError | None:
        """The error with which a rank ended, when it is one of ours."""
        report = reports.read(self.report(rank))
        return report.error() if report else None

    def first_failure(self, failed: Mapping[int, int | str], pids: Sequence[int]) -> RankFailed:
        """Of the ranks that `failed`, the one that caused the others' failures.

        `failed` has their codes as `sihe.cluster.launchers.attempt.Attempt.codes` gives them, `pids` the processes of
        all ranks. An input error comes first, then a rank that was lost, then a killed one, then whoever reported
        first.
        """
        found = {rank: reports.read(self.report(rank)) for rank in failed}

        def order(rank: int) -> tuple[bool, bool, bool, int]:
            report, code = found[rank], failed[rank]
            is_input = report is not None and isinstance(report.error(), UserError)
            is_lost, is_killed = isinstance(code, str), isinstance(code, int) and code < 0
            return not is_input, not is_lost, not is_killed, report.at_ns if report else 0

        rank = min(failed, key=order)
        code, report = failed[rank], found[rank]
        if isinstance(code, str):
            return RankFailed(self.number, rank, pids[rank], None, None, code, self.log(rank))
        name = _signal_name(-code) if code < 0 else None
        reason = f"was killed by {name}" if name else f"exited with code {code}"
        if report and not name:
            reason = f"failed with {report.summary}"
        exit_code = code if code > 0 else None
        return RankFailed(self.number, rank, pids[rank], exit_code, name, reason, self.log(rank))


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal has a number only
        return f"signal {signum}"
