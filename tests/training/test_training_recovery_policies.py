"""Decisions about failures, without a run: what is accepted, repeated, skipped, and which numbers of workers fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import ConfigError, CorruptData
from sihe.training.config import TrainConfig
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.recovery import (
    LossGuard,
    RecoveryConfig,
    Rewind,
    after_skips,
    feasible_workers,
    next_rewind,
    resized,
)
from sihe.training.rewinds import read_rewinds, write_rewinds
from support.training_runs import small_config

SPIKES = RecoveryConfig(spike_factor=2.0, spike_zscore=6.0, spike_window=5)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_no_number_is_never_accepted(loss: float, norm: float) -> None:
    assert "nan" in (objection := LossGuard(RecoveryConfig()).objection(1, loss, norm) or "") or "inf" in objection
    assert LossGuard(RecoveryConfig()).objection(1, 1e9, 1e9) is None, "spikes are off"


def guard_after(*losses: float, config: RecoveryConfig = SPIKES) -> LossGuard:
    guard = LossGuard(config)
    for step, loss in enumerate(losses, start=1):
        assert guard.objection(step, loss, 1.0) is None
    return guard


def test_spikes() -> None:
    assert "2 times the median 3" in (guard_after(3, 3, 3, 3, 3).objection(6, 6.1, 1.0) or "")
    noisy = (3.0, 3.1, 2.9, 3.05, 2.95)
    assert guard_after(*noisy).objection(6, 3.3, 1.0) is None
    assert "6 deviations" in (guard_after(*noisy).objection(6, 3.5, 1.0) or ""), "1.4826 x 0.05 x 6 = 0.44"
    assert guard_after(*noisy).objection(6, 1.0, 1.0) is None, "down is no spike"
    assert guard_after(3, 3, 3, 3).objection(5, 100.0, 1.0) is None, "too early to say"


def test_a_guard_forgets_what_is_rewound() -> None:
    guard = guard_after(3, 3, 3, 3, 3, 1, 1, 1)
    assert guard.objection(9, 2.5, 1.0) is not None
    guard.rewind(5)
    assert guard.objection(6, 2.5, 1.0) is None
    again = LossGuard(SPIKES, dict.fromkeys(range(1, 9), 1.0))
    assert again.objection(9, 2.5, 1.0) is not None, "a run that goes on knows its losses"


def decide(past: list[Rewind], first_sample: int, **config: int) -> Rewind | None:
    return next_rewind(
        RecoveryConfig(**config), past, step=7, first_sample=first_sample, next_sample=first_sample + 8, reason="nan"
    )


def test_a_step_is_repeated_then_skipped_then_it_is_enough() -> None:
    past: list[Rewind] = []
    actions = []
    for first_sample in (48, 48, 56, 56, 64):
        rewind = decide(past, first_sample)
        if rewind is None:
            break
        past.append(rewind)
        actions.append((rewind.action, first_sample))
    assert actions == [("repeat", 48), ("skip", 48), ("repeat", 56), ("skip", 56)]
    assert decide([], 48, max_rewinds=0) is None
    first = decide([], 48, repeats=0)
    assert first is not None
    assert first.action == "skip"


def test_the_order_goes_on_behind_what_is_skipped() -> None:
    past = [Rewind(7, 48, 56, "nan", action) for action in ("repeat", "skip")]
    past += [Rewind(7, 56, 64, "nan", "skip"), Rewind(20, 200, 208, "nan", "repeat")]
    assert [after_skips(sample, past) for sample in (40, 48, 56, 64, 200)] == [40, 64, 64, 64, 200]


def test_the_record_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "rewinds.json"
    assert read_rewinds(path) == ()
    rewinds = (Rewind(7, 48, 56, "loss nan", "repeat"), Rewind(7, 48, 56, "loss nan", "skip"))
    write_rewinds(path, rewinds)
    assert read_rewinds(path) == rewinds
    for text in ("[", "{}x", json.dumps([{"step": 1}]), "[3]"):
        path.write_text(text)
        with pytest.raises(CorruptData, match="rewinds"):
            read_rewinds(path)


# ---- workers ------------------------------------------------------------------------------------------------------


def workers(
    plan: ParallelPlan, least: int | None, most: int | None, batch: int = 12, micro: int = 2
) -> tuple[int, ...]:
    config = RecoveryConfig(min_workers=least, max_workers=most)
    return feasible_workers(plan, config, global_batch=batch, micro_batch=micro)


def test_workers_that_share_the_global_batch_evenly() -> None:
    assert workers(ParallelPlan(dp=4), None, None) == (4,)
    assert workers(ParallelPlan(dp=4), 1, 8) == (1, 2, 3, 4, 6)
    assert workers(ParallelPlan(dp=2, tp=2), 1, 9) == (2, 4, 6, 8), "two ranks make a replica"
    assert workers(ParallelPlan(shard=4, zero=3), 1, 6) == (1, 2, 3, 4, 6)
    assert workers(ParallelPlan(dp=2, shard=2, zero=2), 1, 6) == (2, 4, 6), "whole groups of shards"
    pipeline = ParallelPlan(dp=2, pp=2, microbatches=2)
    assert workers(pipeline, 2, 8, batch=12, micro=2) == (2, 4, 6), "twelve samples are three times two times two"


@given(st.integers(1, 6), st.integers(1, 48))
def test_every_feasible_number_keeps_the_batch(ranks: int, batch: int) -> None:
    plan = ParallelPlan(dp=ranks)
    for count in workers(plan, 1, 8 if ranks <= 8 else ranks, batch=batch):
        assert batch % resized(plan, count).batch_ranks == 0 or count == ranks
        assert resized(plan, count).world_size == count


def test_a_plan_on_other_ranks() -> None:
    assert resized(ParallelPlan(dp=4), 4) == ParallelPlan(dp=4)
    assert resized(ParallelPlan(dp=2, tp=2), 2) == ParallelPlan(tp=2)
    assert resized(ParallelPlan(shard=4, zero=3), 1) == ParallelPlan()
    with pytest.raises(ConfigError, match="multiples of 2 ranks, got 3"):
        resized(ParallelPlan(dp=2, tp=2), 3)


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_rewinds", -1),
        ("spike_factor", 1.0),
        ("spike_window", 2),
        ("hang_timeout_s", 0),
        ("straggler_factor", 0.5),
        ("min_workers", 0),
        ("startup_timeout_s", 0),
    ],
)
def test_a_bad_setting_is_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"recovery\.{key}") as caught:
        RecoveryConfig(**{key: value})  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.key == f"recovery.{key}"


def test_settings_in_a_configuration(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    values: dict[str, Any] = config.public()
    values["recovery"] = {"min_workers": 1, "max_workers": 4}
    elastic = TrainConfig.from_mapping(values)
    assert elastic.world_sizes == (1, 2, 4)
    assert elastic.identity() == config.identity(), "how failures are met does not make another run"
    values["recovery"] = {"min_worker": 1}
    with pytest.raises(ConfigError, match=r"recovery\.min_worker'"):
        TrainConfig.from_mapping(values)
    with pytest.raises(ConfigError, match=r"min_workers.*at most the plan's ranks \(2\)"):
        small_config(tmp_path, recovery=RecoveryConfig(min_workers=3))
    with pytest.raises(ConfigError, match=r"max_workers.*at least the plan's ranks \(2\)"):
        small_config(tmp_path, recovery=RecoveryConfig(max_workers=1))
    assert RecoveryConfig().quiet_s(120) == 90
    assert RecoveryConfig(hang_timeout_s=5).quiet_s(120) == 5
