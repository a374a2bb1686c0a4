"""What the labs of checkpoints, adapters, preferences, loading, recovery and divergences compute, against oracles."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sihe.apps.coach.labs import checkpoint, elastic, kl, loader, lora, preference
from sihe.apps.coach.labs.kl_ranks import ESTIMATES, exact, gradient_cosines, optimum
from sihe.apps.coach.labs.loader_ranks import loading
from sihe.apps.coach.labs.lora_ranks import ranks
from sihe.apps.coach.labs.preference_ranks import curve, displacement

# ---- ckpt.async ------------------------------------------------------------------------------------------------------


@given(cost_s=st.floats(0.01, 1e3), mtbf_s=st.floats(1e3, 1e7), factor=st.floats(0.1, 10))
def test_no_other_interval_loses_less(cost_s: float, mtbf_s: float, factor: float) -> None:
    best_s = checkpoint.best_interval_s(cost_s, mtbf_s)
    least = checkpoint.lost_share(best_s, cost_s, mtbf_s)
    assert least == pytest.approx(math.sqrt(2 * cost_s / mtbf_s))
    assert checkpoint.lost_share(factor * best_s, cost_s, mtbf_s) >= least * (1 - 1e-12)


def test_a_killed_writer_leaves_the_checkpoint_before_it() -> None:
    measured = checkpoint.measure({"layers": 1, "cost-s": 30.0, "mtbf-h": 3.0}, limit_s=250).values
    assert measured["step-after-kill"] == 1
    assert measured["whole-after-kills"] == measured["kills"] == 2
    assert measured["left-after-kills"] == 0
    assert measured["changed-by-training"] == 0
    assert measured["size-measured"] == pytest.approx(measured["size-modelled"], rel=0.01)


# ---- lora.rank -------------------------------------------------------------------------------------------------------


def test_adapters_reach_the_best_error_of_their_rank() -> None:
    found = ranks(0, 1, ranks=[1, 2], true_rank=2, hidden=32, steps=250)
    half, full = found["learnt"]
    assert half["error"] == pytest.approx(lora.least_error(1, 2), rel=0.02)
    assert full["error"] < 1e-3
    assert full["logit_error"] < 1e-3 < half["logit_error"]
    assert half["parameters"] == lora.adapter_parameters(1, 32, 32, 4)
    assert 4 * half["parameters"] < half["file_bytes"] < 4 * half["parameters"] + 2000


def test_the_least_error_is_that_of_the_singular_values() -> None:
    matrix = torch.linalg.qr(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))[0]
    update = matrix @ torch.linalg.qr(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)))[0].T
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    for rank in range(1, 6):
        rest = update - (u[:, :rank] * s[:rank]) @ v[:rank]
        assert float(rest.norm() / update.norm()) == pytest.approx(lora.least_error(rank, 4), abs=1e-5)


# ---- dpo.margin ------------------------------------------------------------------------------------------------------


@given(beta=st.floats(0.01, 1), margin=st.floats(-40, 40))
def test_the_gradient_weight_is_that_of_the_paper(beta: float, margin: float) -> None:
    found = curve(beta, [0.0, margin, math.log(3) / beta])
    assert found["loss"][0] == pytest.approx(math.log(2))
    assert found["weight"][1] == pytest.approx(preference.gradient_weight(beta, margin), rel=1e-9)
    assert found["weight"][2] == pytest.approx(found["weight"][0] / 2)


def test_pushing_a_like_answer_down_takes_the_chosen_one_along() -> None:
    alike, unlike = displacement(0.9), displacement(0.0)
    assert alike["chosen"] < 0 < alike["third"]
    assert unlike["chosen"] > 0
    for change in (alike, unlike):
        assert change["chosen"] > change["rejected"], "the margin widens in any case"


def test_a_policy_learns_the_order_of_pairs() -> None:
    measured = preference.measure({"beta": 0.3, "margin": 2.0, "steps": 10}, limit_s=250).values
    assert measured["loss-at-start"] == pytest.approx(math.log(2), abs=1e-6)
    assert measured["margin-at-end"] > 1
    assert measured["margin-at-end"] == pytest.approx(measured["chosen-at-end"] - measured["rejected-at-end"], abs=1e-4)


# ---- loader.prefetch -------------------------------------------------------------------------------------------------


@given(cost_s=st.floats(0.01, 1), step_s=st.floats(0.01, 1))
def test_stalls_without_and_with_reading_ahead(cost_s: float, step_s: float) -> None:
    costs_s = [cost_s] * 50
    # The time ends with the last answer, so that one step fewer than batches counts.
    alone = 50 * cost_s / (50 * cost_s + 49 * step_s)
    assert loader.stall_share(costs_s, step_s, 0) == pytest.approx(alone)
    stalled_s = cost_s + 49 * max(0.0, cost_s - step_s)
    for depth in (1, 8):
        expected = stalled_s / (stalled_s + 49 * step_s)
        assert loader.stall_share(costs_s, step_s, depth) == pytest.approx(expected)


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=30), st.floats(0.01, 1))
def test_more_depth_never_waits_longer(costs_s: list[float], step_s: float) -> None:
    shares = [loader.stall_share(costs_s, step_s, depth) for depth in (0, 1, 2, 4, 8)]
    assert all(one >= other - 1e-12 for one, other in itertools.pairwise(shares))


def test_a_resume_neither_repeats_nor_misses() -> None:
    found = loading(0, 1, depths=[], costs_s=[], step_s=0.0, depth=3, taken=4)
    assert (found["next_sample"], found["read_ahead"]) == (4 * 8, 3 * 8)
    assert (found["differing"], found["repeated"], found["missed"]) == ([0, 0, 0], 0, 0)


# ---- elastic.kill ----------------------------------------------------------------------------------------------------


def test_differing_steps_are_counted() -> None:
    calm = [[1, 0.5, "a"], [2, 0.4, "b"]]
    assert elastic.differing(calm, [[1, 0.5, "a"], [1, 0.5, "a"], [2, 0.4, "b"]]) == 0
    assert elastic.differing(calm, [[1, 0.5, "a"], [2, 0.4000001, "b"], [3, 0.1, "c"]]) == 2
    assert elastic.differing(calm, calm[:1]) == 1


@pytest.mark.slow
def test_a_killed_rank_costs_steps_and_changes_none() -> None:
    measured = elastic.measure({"kill-step": 7, "checkpoint-every": 3}, limit_s=280).values
    assert (measured["resumed-step"], measured["repeated"], measured["next-sample"]) == (6, 1, 6 * 8)
    assert (measured["restarts"], measured["steps"], measured["steps-differing"]) == (1, 12, 0)


# ---- rlhf.kl ---------------------------------------------------------------------------------------------------------


def test_estimates_have_the_known_bias_and_gradients() -> None:
    generator = torch.Generator().manual_seed(4)
    log_q_V = torch.log_softmax(torch.randn(12, generator=generator, dtype=torch.float64), 0)
    logits_V = log_q_V + 0.2 * torch.randn(12, generator=generator, dtype=torch.float64)
    log_p_V = torch.log_softmax(logits_V, 0)
    found = exact(logits_V, log_q_V)
    expected = torch.nn.functional.kl_div(log_q_V, log_p_V, log_target=True, reduction="sum")
    assert found["kl"] == pytest.approx(float(expected))
    assert abs(found["k1"]["bias"]) < 1e-12
    assert abs(found["k3"]["bias"]) < 1e-12
    assert abs(found["k2"]["bias"]) > 1e-6
    assert found["k1"]["deviation"] > 3 * found["k3"]["deviation"]
    assert found["k1"]["negative"] > 0 == found["k2"]["negative"] == found["k3"]["negative"]
    cosines = gradient_cosines(logits_V, log_q_V)
    assert cosines["k1_length"] < 1e-12
    assert cosines["k2_reverse"] == pytest.approx(1.0)
    assert cosines["k3_forward"] == pytest.approx(1.0)
    assert cosines["k3_reverse"] < 0.9999
    assert set(ESTIMATES) == {"k1", "k2", "k3"}


@pytest.mark.parametrize(("share", "beta"), [(0.2, 0.5), (0.05, 0.2), (0.5, 5.0)])
def test_ascent_arrives_at_the_closed_form(share: float, beta: float) -> None:
    found = optimum(share, beta)
    assert found["learnt"] == pytest.approx(kl.best_share(share, beta), rel=1e-4)
    assert found["closed"] == pytest.approx(kl.best_share(share, beta), rel=1e-12)
