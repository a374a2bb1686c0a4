"""The log of a run, and what follows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sihe.core.clock import FakeClock
from sihe.core.workspace import Workspace
from sihe.training.ledger import Follower, Ledger
from sihe.training.progress import EventReader, EventWriter
from sihe.training.types import AttemptReady, StepDone, TrainEvent


def step(number: int, attempt: int = 1, seconds: float = 0.5) -> StepDone:
    return StepDone(attempt, number, 10.0 / number, 1e-3, 1.0, 100, seconds, "ab", number * 8)


def write(path: Path, *events: StepDone | AttemptReady) -> None:
    writer = EventWriter(path)
    for event in events:
        writer.write(event)
    writer.close()


def test_events_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    assert list(reader.new()) == [], "no file yet"
    write(path, AttemptReady(1, 0, 0), step(1))
    assert list(reader.new()) == [AttemptReady(1, 0, 0), step(1)]
    assert list(reader.new()) == []
    write(path, step(2))
    assert list(reader.new()) == [step(2)]


def test_half_a_line_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, step(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    reader = EventReader(path)
    assert list(reader.new()) == [step(1)]
    path.write_bytes(whole + whole)
    assert list(reader.new()) == [step(1)]


def test_half_a_line_of_a_dead_rank_costs_no_other_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, step(1))
    path.write_bytes(path.read_bytes() + b'{"event": "step", "st')
    write(path, step(2), step(3))
    assert list(EventReader(path).new()) == [step(1), step(2), step(3)]


@pytest.mark.parametrize("line", [b"[]\n", b"3\n", b"{}\n", b'{"event": "other"}\n', b'{"event": "step"}\n', b"\xff\n"])
def test_what_is_no_event_is_skipped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(line)
    assert list(EventReader(path).new()) == []


def test_a_repeated_step_counts_once(tmp_path: Path) -> None:
    write(tmp_path / "e", step(1), step(2, seconds=9.0), step(2, attempt=2), step(3, attempt=2))
    ledger = Ledger(tmp_path / "e")
    assert ledger.tokens_per_s == 0
    ledger.read()
    assert ledger.tokens_per_s == 300 / 1.5
    assert ledger.last == step(3, attempt=2)


def follow(path: Path, workspace: Workspace, run_id: str, clock: FakeClock, seen: list[TrainEvent]) -> Follower:
    return Follower(Ledger(path), workspace.tracking, clock, run_id, log_every=2, max_steps=7, on_event=seen.append)


def points(workspace: Workspace, run_id: str) -> list[int]:
    return [point.step for point in workspace.tracking.client.get_metric_history(run_id, "loss")]


def test_a_curve_has_each_point_once(tmp_path: Path, workspace: Workspace) -> None:
    path, clock, seen = tmp_path / "e", FakeClock(), list[TrainEvent]()
    run_id = workspace.tracking.start_run("pretraining", "small")
    follower = follow(path, workspace, run_id, clock, seen)
    write(path, *map(step, range(1, 5)))
    follower.tick()
    assert points(workspace, run_id) == [], "not a write for each step"
    clock.advance(2)
    follower.tick()
    assert points(workspace, run_id) == [2, 4]
    write(path, step(3, 2), step(4, 2), step(5, 2), step(6, 2))  # a recovery repeats 3 and 4
    follower.finish()
    assert points(workspace, run_id) == [2, 4, 6]
    assert len(seen) == 8
    # Another supervisor, after this one was killed before it logged the last step:
    write(path, step(7, 2))
    later: list[TrainEvent] = []
    successor = follow(path, workspace, run_id, clock, later)
    successor.replay()
    assert later == []
    write(path, step(6, 3), step(7, 3))
    successor.finish()
    assert points(workspace, run_id) == [2, 4, 6, 7]
    assert len(later) == 2
