"""A process leaves a mark by which others see whether it is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from sihe.core import settings
from sihe.core.processes import is_gone, this_process
from sihe.core.workspace import Workspace

OPENS_A_RUN = """
import sys, time
from pathlib import Path
from sihe.core import settings
from sihe.core.workspace import Workspace

home = Path(sys.argv[1])
workspace = Workspace(settings.load({"home": str(home)}, environ={}, directory=home.parent))
print(workspace.tracking.start_run("labs", "long"), flush=True)
time.sleep(600)
"""


def test_this_process_is_not_gone() -> None:
    assert not is_gone(this_process())


def test_a_number_that_another_process_has_now_is_of_one_that_is_gone() -> None:
    machine, pid, started = this_process().split(" ")
    assert is_gone(f"{machine} {pid} {started}0")


def test_nothing_is_said_of_other_machines_or_boots_and_of_what_is_no_mark() -> None:
    _, pid, _ = this_process().split(" ")
    for mark in (f"elsewhere/boot {pid} 1", "", "nonsense", "a b c d"):
        assert not is_gone(mark)


def test_a_run_whose_process_was_killed_is_abandoned(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENS_A_RUN, str(tmp_path / "home")]
    with (
        Workspace(settings.load({"home": str(tmp_path / "home")}, environ={}, directory=tmp_path)) as workspace,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        assert not workspace.tracking.run(run_id).is_abandoned
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert workspace.tracking.run(run_id).is_abandoned
        workspace.tracking.end_run(run_id, "RUNNING")  # somebody goes on with it
        assert not workspace.tracking.run(run_id).is_abandoned
        workspace.tracking.end_run(run_id, "KILLED")
        assert not workspace.tracking.run(run_id).is_abandoned
