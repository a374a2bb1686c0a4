"""Activation checkpointing, put onto a model's blocks from outside; outputs and gradients are the same without it.

A module's `forward` is replaced, not the module: names of weights stay as they are, and hooks on the module itself
(FSDP2's, which gather its weights) run around it, while hooks on its children (tensor parallelism's messages) run again
with it. The fused attention kernel keeps no scores to begin with, so it is the whole attention layer, with the products
around the kernel, that `attention` computes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sihe.models.moe import replayed
from sihe.models.recompute_config import RecomputeConfig


def recompute(blocks: Iterable[nn.Module], config: RecomputeConfig, *, first_layer: int = 0) -> None:
    """Sets what `blocks` compute again; what was set before is undone.

    `first_layer` is the number of the first of `blocks` in the whole model. Random numbers are drawn the same again.
    """
    for layer, block in enumerate(blocks, start=first_layer):
        attention = block.get_submodule("attention")
        for module in (block, attention):
            vars(module).pop("forward", None)
        if config.is_recomputed(layer):
            module = attention if config.policy == "attention" else block
            # A partial of a method, so that a deep copy of the model runs its own.
            module.forward = partial(_recomputed, module.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the pass and around its repetition, in which mixtures must not count their tokens again."""
    return nullcontext(), replayed()
