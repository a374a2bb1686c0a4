"""Ranks with a chosen fate, run as `python -m support.ranks <fate> <folder>` by the launcher's tests."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

from sihe.cluster.heartbeats import Heartbeat
from sihe.cluster.launchers.rank import EXIT_LEFT, supervised
from sihe.core.errors import CorruptData
from sihe.core.files import disk_errors

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[2])


def first_time(name: str) -> bool:
    """Whether `name` was never asked before, in any process."""
    try:
        (FOLDER / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def wait_forever() -> None:
    signal.pause()


def main() -> None:
    fate = sys.argv[1]
    (FOLDER / f"rank-{RANK}.pid").write_text(str(os.getpid()))
    if fate == "ends":
        sys.stdout.write(f"rank {RANK} of {os.environ['WORLD_SIZE']} with {os.environ['OMP_NUM_THREADS']} threads\n")
    elif fate == "exits-3":
        sys.exit(3)
    elif fate == "killed-once":
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if RANK == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            wait_forever()
    elif fate == "always-killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fate == "corrupt":
        if RANK == 1:
            raise CorruptData(FOLDER / "shard-0.bin", "3 bytes are missing", hint="prepare it again")
        wait_forever()
    elif fate == "disk-full":
        with disk_errors(FOLDER):
            raise OSError(errno.ENOSPC, "No space left on device")
    elif fate == "bug":
        raise KeyError("nothing named so")
    elif fate == "waits":
        wait_forever()
    elif fate == "devices":
        sys.stdout.write(f"{os.environ['LOCAL_RANK']} of {os.environ['CUDA_VISIBLE_DEVICES']}")
    elif fate == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (FOLDER / f"deaf-{RANK}").touch()
        if RANK == 0:
            while not (FOLDER / "deaf-1").exists():
                pass
            sys.exit(3)
        while True:
            signal.pause()
    elif fate == "sums":
        sums()
    elif fate in ("stops-once", "gets-stuck-once"):
        hangs_once(fate)
    elif fate == "leaves-when-asked":
        leaves_when_asked()
    elif fate == "leaves-unasked":
        sys.exit(EXIT_LEFT)
    else:
        raise ValueError(fate)


def hangs_once(fate: str) -> None:
    """Rank 1 comes to step 3 and no further, the others wait for it in step 4."""
    heartbeat = Heartbeat.from_environment()
    for step in range(1, 4 if RANK == 1 else 5):
        heartbeat.beat(step)
    if first_time(f"hung-{RANK}"):
        if fate == "stops-once" and RANK == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        wait_forever()


def leaves_when_asked() -> None:
    """Works until it is wanted in another number; with three ranks there is nothing left to do."""
    heartbeat = Heartbeat.from_environment()
    world_size = int(os.environ["WORLD_SIZE"])
    (FOLDER / f"world-{world_size}").touch()
    while world_size != 3:
        heartbeat.beat(1)
        if heartbeat.is_leave_wanted:
            sys.exit(EXIT_LEFT)


def sums() -> None:
    """An all-reduce over gloo, in which rank 1 is killed the first time, after the group was formed."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([RANK + 1.0])
    dist.all_reduce(total)
    if RANK == 1 and first_time("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(total)
    (FOLDER / f"sum-{RANK}").write_text(str(total.item()))
    dist.destroy_process_group()


if __name__ == "__main__":
    supervised(main)
