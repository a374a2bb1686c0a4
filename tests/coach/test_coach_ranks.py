"""Ranks: fresh processes whose answers come back, and which never stay behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sihe.apps.coach.errors import LabFailed, LabTimeout
from sihe.apps.coach.labs.ranks import run_ranks


@pytest.fixture(autouse=True)
def _targets_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def is_running(pid: int) -> bool:
    """Whether a process with that id exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: object, *, limit_s: float = 30.0) -> bool:
    """Whether `condition()` becomes true within `limit_s`."""
    assert callable(condition)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_an_answer_comes_back_from_another_process() -> None:
    (answer,) = run_ranks("support.coach_targets:echo", {"word": "环"}, world_size=1, limit_s=60)
    assert (answer["rank"], answer["of"], answer["word"]) == (0, 1, "环")
    assert answer["pid"] != os.getpid()
    assert not is_running(answer["pid"])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processors are chosen as Linux has it")
@pytest.mark.parametrize(("processors", "threads"), [(1, 1), (None, 3)])
def test_there_are_no_more_threads_than_processors(processors: int | None, threads: int) -> None:
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, sorted(mine)[:processors])  # what is started here may use no others either
        (answer,) = run_ranks("support.coach_targets:echo", {"word": ""}, world_size=1, limit_s=60, threads=3)
    finally:
        os.sched_setaffinity(0, mine)
    assert answer["threads"] == min(threads, len(mine))


def test_a_lab_that_takes_too_long_is_stopped_and_leaves_nothing(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(LabTimeout, match=r"stopped after 3 s while ranks \[0\] were running"):
        run_ranks("support.coach_targets:sleep_for_ever", {"pid_file": str(pid_file)}, world_size=1, limit_s=3)
    if pid_file.exists():  # on a very busy machine it was stopped before it got so far
        assert not is_running(int(pid_file.read_text()))


def test_one_rank_that_fails_takes_the_others_with_it_and_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(LabFailed, match=r"rank 1 of support\.coach_targets:second_fails") as caught:
        run_ranks("support.coach_targets:second_fails", {"pid_folder": str(tmp_path)}, world_size=2, limit_s=100)
    assert "ValueError: the words of rank one" in str(caught.value)
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert pids
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see other processes")
def test_a_rank_leaves_when_its_parent_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = textwrap.dedent(f"""
        from sihe.apps.coach.labs.ranks import run_ranks
        run_ranks("support.coach_targets:sleep_for_ever", {{"pid_file": {str(pid_file)!r}}}, world_size=1, limit_s=100)
    """)
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert wait_until(lambda: pid_file.exists() and pid_file.read_text())
        rank = int(pid_file.read_text())
        assert is_running(rank)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert wait_until(lambda: not is_running(rank))
    finally:
        parent.kill()
        parent.wait()
