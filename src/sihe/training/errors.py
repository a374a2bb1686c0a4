"""What goes wrong in training, beyond the errors that every room shares.

InvalidInput
├── Diverged            the loss is no number, or spikes, again and again
└── WrongCheckpoint     a checkpoint of another model, data set or configuration
TransientError
├── PeerSilent          another rank neither answers nor dies
├── PeerFailed          another rank says that it failed in what all do together
└── NothingToRewind     the first steps failed, before there was a checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sihe.core.errors import InvalidInput, TransientError


class Diverged(InvalidInput):
    """The loss or the gradient of `step` was not accepted, also after `rewinds` returns to a checkpoint."""

    def __init__(self, step: int, loss: float, grad_norm: float, *, rewinds: int = 0) -> None:
        tried = f" after {rewinds} returns to a checkpoint (recovery.max_rewinds)" if rewinds else ""
        super().__init__(
            f"training diverged at step {step}{tried}: loss {loss!r}, gradient norm {grad_norm!r}; "
            "check the data, lower peak_lr, lengthen warmup_steps, or set precision: fp32"
        )
        self.step = step
        self.rewinds = rewinds


class WrongCheckpoint(InvalidInput):
    """The checkpoint at `path` was written by a run that computes something else."""

    def __init__(self, path: Path, differences: Mapping[str, tuple[object, object]]) -> None:
        listed = "; ".join(f"{key} was {theirs!r} and is {ours!r}" for key, (theirs, ours) in differences.items())
        super().__init__(f"{path} belongs to another run ({listed}): train with its settings, or start a new run")
        self.path = str(path)
        self.differences = dict(differences)


class PeerSilent(TransientError, TimeoutError):
    """Another rank kept this one waiting longer than `timeout_s`: it hangs, or its machine does."""

    def __init__(self, timeout_s: float, reason: str) -> None:
        super().__init__(
            f"another rank did not answer within {timeout_s:g} s (collective_timeout_s): it hangs, or one step or "
            f"checkpoint takes longer than that; the transport says: {reason}"
        )
        self.timeout_s = timeout_s


class PeerFailed(TransientError):
    """Rank `rank` could not do its part of what all ranks do together, and says why."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} failed in what all ranks do together ({reason}): its own log says more")
        self.rank = rank
        self.reason = reason


class NothingToRewind(TransientError):
    """Step `step` was not accepted, and there is no checkpoint yet to go back to: the ranks start from the seed."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step} was not accepted, before the first checkpoint: the ranks start over")
        self.step = step
