"""What goes wrong in post-training, beyond the errors of the training room.

InvalidInput
├── NoAssistantTurn     a conversation, or what fits of it, has nothing to learn from
└── OpaqueTemplate      a chat template does not tell which part of a text the assistant says
TransientError
├── WeightSyncFailed    an engine did not take new weights in time, or refused them
└── StaleRollouts       what the engine gives was made by weights that are too old
"""

from __future__ import annotations

from sihe.core.errors import InvalidInput, TransientError


class NoAssistantTurn(InvalidInput):
    """A conversation has no token that the assistant says."""


class OpaqueTemplate(InvalidInput):
    """A chat template writes a conversation so that the assistant's part cannot be found in it."""


class WeightSyncFailed(TransientError, TimeoutError):
    """The engine did not get from `state` to the next one while it took the weights of `version`."""

    def __init__(self, state: str, version: int, reason: str) -> None:
        super().__init__(
            f"weights {version} did not reach the engine: it stayed {state} ({reason}); "
            "the rollouts go on once the engine answers again and the synchronisation is reset"
        )
        self.state = state
        self.version = version
        self.reason = reason


class StaleRollouts(TransientError):
    """Every rollout was made by weights more than `max_staleness` updates old."""

    def __init__(self, version: int, oldest: int, max_staleness: int) -> None:
        super().__init__(
            f"every rollout is older than max_staleness = {max_staleness}: the policy is at weights {version} and the "
            f"engine at {oldest}; synchronise more often, or see why the engine takes no weights"
        )
        self.version = version
        self.oldest = oldest
