"""What every rank does around its work: it dies with its launcher, shows its stacks when asked, reports its errors.

Imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from sihe.cluster.launchers import reports
from sihe.cluster.launchers.stacks import DUMP_SIGNAL, STACKS_FILE

LAUNCHER_PID = "LAUNCHER_PID"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
EXIT_LEFT = 75
"""The exit code of a rank that left at a checkpoint, as its launcher wished, to be started again (EX_TEMPFAIL of
sysexits.h)."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def supervised(main: Callable[[], None]) -> NoReturn:
    """Runs `main` as one rank of a job, and ends the process with its exit code.

    An error is written to the report that the launcher reads. The end is immediate, without that of the interpreter:
    destructors of a process group may wait for peers that are gone, and a thread of foreign code that comes back to an
    interpreter which ends is torn out of that code, which aborts the process ("terminate called without an active
    exception"). So `main` finishes what it writes, and handlers of `atexit` do not run.
    """
    _die_with_launcher()
    _show_stacks_when_asked()
    code = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            sys.stderr.write(f"{exit_.code}\n")
    except BaseException as error:  # noqa: BLE001 - the process ends here, whatever it was
        code = 1
        with suppress(OSError):
            if path := os.environ.get(ERROR_FILE):
                reports.write(Path(path), error)
        with suppress(OSError):
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _die_with_launcher() -> None:
    """Makes sure that this process does not outlive its launcher, not even one that was SIGKILLed."""
    expected = int(os.environ.get(LAUNCHER_PID, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(expected,), daemon=True).start()
    if os.getppid() != expected:  # it died before we asked to be told
        os._exit(1)


def _show_stacks_when_asked() -> None:
    if path := os.environ.get(STACKS_FILE):
        with suppress(OSError):  # a full disk: it works without
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            faulthandler.register(DUMP_SIGNAL, file=descriptor, all_threads=True)


def _watch_parent(expected: int) -> None:
    while os.getppid() == expected:
        time.sleep(0.5)
    os._exit(1)
