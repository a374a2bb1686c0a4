"""Which labs there are: their descriptions in `content/labs`, and the functions that measure them.

Nothing here loads torch: a lab's heavy half runs in processes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Protocol

from sihe.apps.coach.labs import (
    ab_router,
    acceptance,
    accumulation,
    allreduce,
    attention,
    checkpoint,
    continuous_batch,
    dynamic_batch,
    elastic,
    extrapolation,
    flash_tiles,
    hot_swap,
    kl,
    kv_growth,
    kv_layouts,
    kvcache,
    loader,
    lora,
    loss_scale,
    mixture,
    pipeline,
    planning,
    preference,
    quant_speed,
    tensor,
    zero,
)
from sihe.apps.coach.labs.types import Lab, Measurement
from sihe.apps.coach.map import CONTENT, read_yaml
from sihe.core.errors import NotFound


class Measure(Protocol):
    """Takes the measurements of a lab within `limit_s` seconds."""

    def __call__(self, parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
        """A value for every claim of the lab. Raises `LabFailed` and `LabTimeout`."""
        ...


MEASURES: dict[str, Measure] = {
    "zero.memory": zero.measure,
    "allreduce.ring": allreduce.measure,
    "attention.cost": attention.measure,
    "kv.cache": kvcache.measure,
    "pipeline.bubble": pipeline.measure,
    "tp.split": tensor.measure,
    "accum.equivalence": accumulation.measure,
    "amp.scale": loss_scale.measure,
    "moe.balance": mixture.measure,
    "plan.search": planning.measure,
    "ckpt.async": checkpoint.measure,
    "lora.rank": lora.measure,
    "dpo.margin": preference.measure,
    "loader.prefetch": loader.measure,
    "elastic.kill": elastic.measure,
    "rlhf.kl": kl.measure,
    "attn.flash_tiles": flash_tiles.measure,
    "pos.extrapolation": extrapolation.measure,
    "kv.growth": kv_growth.measure,
    "quant.error_speed": quant_speed.measure,
    "spec.acceptance": acceptance.measure,
    "batch.dynamic": dynamic_batch.measure,
    "batch.continuous": continuous_batch.measure,
    "router.ab": ab_router.measure,
    "kv.layouts": kv_layouts.measure,
    "serve.hot_swap": hot_swap.measure,
}
LAB_IDS: tuple[str, ...] = tuple(MEASURES)


@cache
def lab(name: str) -> Lab:
    """The description of a lab. Raises `NotFound`."""
    if name not in MEASURES:
        raise NotFound("lab", name, hint=f"there are {', '.join(MEASURES)}")
    return read_yaml(CONTENT / "labs" / f"{name}.yaml", Lab)


def labs() -> tuple[Lab, ...]:
    """Every lab."""
    return tuple(lab(name) for name in MEASURES)
