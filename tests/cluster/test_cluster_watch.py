"""Heartbeats, and what is read from them: who hangs, who is slow. No process, no clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from sihe.cluster.capacity import FileCapacity
from sihe.cluster.heartbeats import Heartbeat, HeartbeatBoard, Phase, Pulse
from sihe.cluster.types import WatchPolicy
from sihe.cluster.watch import Hang, HangWatch, StragglerWatch
from sihe.core.errors import CorruptData, InvalidInput

POLICY = WatchPolicy(hang_timeout_s=10, startup_timeout_s=60, straggler_window=5)


def stepping(beats: int, step: int) -> Pulse:
    return Pulse(beats, step, Phase.STEPPING)


class Watched:
    """A watch that is looked at once a second."""

    def __init__(self, ranks: int = 2) -> None:
        self.watch = HangWatch(POLICY, ranks)
        self.now_s = 0.0

    def pass_s(
        self, seconds: int, *pulses: Pulse, stopped: set[int] | None = None, ended: set[int] | None = None
    ) -> Hang | None:
        for _ in range(seconds):
            self.now_s += 1
            hang = self.watch.look(self.now_s, pulses, stopped=stopped or set(), ended=ended or set())
            if hang:
                return hang
        return None


def test_the_rank_that_the_others_wait_for_hangs() -> None:
    watched = Watched()
    assert watched.pass_s(5, stepping(7, 3), stepping(7, 3)) is None
    assert watched.pass_s(10, stepping(8, 4), stepping(7, 3)) is None
    assert watched.pass_s(1, stepping(8, 4), stepping(7, 3)) == Hang(rank=1, seconds=15, step=3)


def test_in_the_same_step_it_is_the_one_that_is_quiet_longest() -> None:
    watched = Watched()
    watched.pass_s(3, stepping(7, 3), stepping(7, 3))
    hang = watched.pass_s(20, stepping(7, 3), stepping(9, 3))
    assert hang is not None
    assert hang.rank == 0


def test_one_rank_that_works_is_enough() -> None:
    watched = Watched()
    for beats in range(50):
        assert watched.pass_s(1, stepping(beats, 1), stepping(1, 1)) is None


def test_patience_while_any_rank_starts_or_saves() -> None:
    watched = Watched()
    assert watched.pass_s(59, Pulse(), Pulse()) is None
    saving = Pulse(5, 4, Phase.SLOW)
    assert watched.pass_s(59, saving, stepping(5, 4)) is None
    # It is over, and the other rank has not yet had the time to go on.
    assert watched.pass_s(9, stepping(6, 4), stepping(5, 4)) is None
    assert Watched().pass_s(62, Pulse(), Pulse()) == Hang(rank=0, seconds=60, step=0)


def test_a_stopped_process_finds_no_patience_and_is_the_culprit() -> None:
    hang = Watched().pass_s(20, Pulse(3, 1, Phase.SLOW), stepping(9, 2), stopped={1})
    assert hang == Hang(rank=1, seconds=10, step=2)


def test_a_rank_that_has_ended_is_not_the_culprit() -> None:
    hang = Watched().pass_s(20, stepping(3, 1), stepping(9, 2), ended={0})
    assert hang is not None
    assert hang.rank == 1
    assert Watched().pass_s(90, stepping(3, 1), stepping(9, 2), ended={0, 1}) is None


def test_a_suspended_launcher_blames_nobody() -> None:
    watched = Watched()
    watched.pass_s(1, stepping(1, 1), stepping(1, 1))
    watched.now_s += 3600
    assert watched.pass_s(1, stepping(1, 1), stepping(1, 1)) is None


def compute(watch: StragglerWatch, first_step: int, *seconds: float) -> list[int]:
    """The stragglers after a window in which each rank takes so many seconds a step."""
    found = []
    for step in range(first_step, first_step + 5):
        found += watch.look([Pulse(step, step, Phase.STEPPING, step, value) for value in seconds])
    return [straggler.rank for straggler in found]


def test_stragglers_are_reported_once_a_window() -> None:
    watch = StragglerWatch(POLICY, 3)
    assert compute(watch, 1, 1.0, 1.4, 1.0) == []
    assert compute(watch, 6, 1.0, 1.7, 1.0) == [1]
    assert compute(watch, 11, 5.0, 1.0, 2.0) == [0], "2 s is not above 1.5 times the median 3 s of the others"
    assert compute(StragglerWatch(POLICY, 1), 1, 9.0) == []
    assert compute(StragglerWatch(POLICY, 2), 1, 1.0, 2.0) == [1]


def test_one_slow_step_is_no_straggler() -> None:
    watch = StragglerWatch(POLICY, 2)
    for step in range(1, 6):
        times = (9.0 if step == 3 else 1.0, 1.0)
        assert watch.look([Pulse(step, step, Phase.STEPPING, step, value) for value in times]) == []


def test_beats_reach_the_board(tmp_path: Path) -> None:
    board = HeartbeatBoard(tmp_path / "beats", 2)
    assert board.read() == (Pulse(), Pulse())
    first, second = (Heartbeat(tmp_path / "beats", rank) for rank in range(2))
    first.beat(3)
    with second.slow():
        assert board.read() == (Pulse(1, 3, Phase.STEPPING), Pulse(1, 0, Phase.SLOW))
    second.beat(4)
    second.computed(4, 0.5)
    second.beat()
    assert board.read()[1] == Pulse(4, 4, Phase.STEPPING, 4, 0.5)
    assert not first.is_leave_wanted
    board.want_leave(True)
    assert first.is_leave_wanted
    board.want_leave(False)
    assert not second.is_leave_wanted
    board.close()


def test_a_heartbeat_that_nobody_watches() -> None:
    heartbeat = Heartbeat.from_environment()
    heartbeat.beat(1)
    assert not heartbeat.is_leave_wanted


def test_a_file_that_holds_no_heartbeats(tmp_path: Path) -> None:
    (tmp_path / "beats").write_bytes(b"x" * 4096)
    with pytest.raises(CorruptData):
        Heartbeat(tmp_path / "beats", 0)
    HeartbeatBoard(tmp_path / "two", 2).close()
    with pytest.raises(CorruptData, match="at least 256 bytes"):
        Heartbeat(tmp_path / "two", 2)


def test_policies_check_themselves() -> None:
    for bad in ({"hang_timeout_s": 0}, {"startup_timeout_s": 1}, {"straggler_factor": 1}, {"straggler_window": 2}):
        with pytest.raises(InvalidInput, match=next(iter(bad))):
            WatchPolicy(**bad)


def test_slots_in_a_file(tmp_path: Path) -> None:
    capacity = FileCapacity(tmp_path / "workers")
    assert capacity() is None
    (tmp_path / "workers").write_text("3\n")
    assert capacity() == 3
    (tmp_path / "workers").write_text("three")
    assert capacity() == 3, "the last good value stays"
    (tmp_path / "workers").unlink()
    assert capacity() is None
