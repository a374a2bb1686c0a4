"""What a rank is told when it starts, wherever it does: its command, and the variables of torch's rendezvous."""

from __future__ import annotations

import sys

from sihe.cluster.types import ProcessJob


def arguments(job: ProcessJob) -> tuple[str, ...]:
    """The arguments of the interpreter that runs a rank of `job`."""
    # -P: a file in the user's folder must not shadow a package that the rank imports.
    return ("-P", "-u", "-m", job.module, *job.args)


def variables(
    job: ProcessJob, *, attempt: int, world_size: int, address: str, port: int, interface: str | None
) -> dict[str, str]:
    """What all ranks of an attempt are told: the store at `address` and `port`, and the network `interface` for gloo.

    Without an interface gloo takes that of the machine's name. The job's own variables win.
    """
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": job.name,
        "TORCHELASTIC_RESTART_COUNT": str(attempt - 1),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": str(job.threads_per_rank),
        **({"GLOO_SOCKET_IFNAME": interface} if interface and sys.platform == "linux" else {}),
        **job.env,
    }
