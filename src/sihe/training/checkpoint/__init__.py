"""Checkpoints: sharded folders that are whole or absent, written beside the training, read under any plan.

    step-00000100/
        __0_0.distcp, __1_0.distcp, …   the tensors that each rank wrote (torch's distributed checkpoint)
        .metadata                       which file holds which part of which tensor
        state.json                      step, next sample, what the run computes, checksums, and a digest of itself

There is no random state to keep: the weights start from the seed, the sample order is a function of seed and position,
and the model draws nothing. A damaged checkpoint is moved aside (`damaged-…`) and the next older one is used.

The life of one: a copy in host memory (`snapshot`), for which the training stops; files in a staging folder, each
summed on its way and synced (`shards`); the manifest that vouches for them (`manifest`); one rename. Ranks that write
agree in a group of their own (`agreement`), so that the training goes on beside it (`store`).
"""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Checkpoint": "sihe.training.checkpoint.store",
        "Checkpoints": "sihe.training.checkpoint.store",
    },
)
