"""Shapes, estimates by hand, the search beside brute force, and the comparison after a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sihe.cluster.collectives import costs
from sihe.cluster.collectives.costs import Link
from sihe.cluster.planner.communication import all_reduce, half_all_reduce
from sihe.cluster.planner.comparison import compare, predictions
from sihe.cluster.planner.errors import NothingFits
from sihe.cluster.planner.memory import has_head, predict_memory, predict_ranks
from sihe.cluster.planner.pipeline import layers_of_stages
from sihe.cluster.planner.presets import cluster, h100, model
from sihe.cluster.planner.search import check, divisors, layouts, search_layouts, why_slower
from sihe.cluster.planner.step import estimate_step
from sihe.cluster.planner.types import ClusterSpec, Layout, TransformerShape
from sihe.core.errors import ConfigError, InvalidInput, NotFound

SMALL = TransformerShape("small", 4, 64, 4, 2, 16, 128, vocab=100, sequence=32)
NODE = ClusterSpec(
    "node",
    nodes=2,
    per_node=2,
    memory_bytes=1e9,
    memory_bandwidth=1e9,
    peak_flops={"fp32": 1e9, "bf16": 2e9, "fp16": 2e9},
    inside=Link(1e-6, 1e9),
    between=Link(1e-5, 1e8),
    matmul_efficiency=0.5,
    memory_efficiency=0.5,
)


# ---- values ---------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_layers_counted_by_hand() -> None:
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert SMALL.parameters == 4 * layer + 100 * 64 + 64
    assert replace(SMALL, tied=False).parameters == SMALL.parameters + 100 * 64


def test_a_mixture_has_all_experts_and_a_token_meets_some() -> None:
    mixture = replace(SMALL, experts=8, experts_per_token=2, shared_ffn=32)
    extra = 7 * 3 * 64 * 128 + 64 * 8 + 3 * 64 * 32
    assert mixture.parameters == SMALL.parameters + 4 * extra
    assert mixture.active_matrix_parameters == SMALL.active_matrix_parameters + 3 * 64 * 128 + 64 * 8 + 3 * 64 * 32


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"tp": 0}, "layout.tp"),
        ({"zero": 1}, "layout.zero"),
        ({"shard": 2}, "layout.zero"),
        ({"ep": 2}, "layout.ep"),
        ({"precision": "fp8"}, "layout.precision"),
    ],
)
def test_a_layout_that_cannot_be_names_its_key(values: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Layout(**values)  # type: ignore[arg-type]
    assert raised.value.key == key


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        (Layout(tp=3), "layout.tp"),
        (Layout(pp=8, microbatches=8), "layout.pp"),
        (Layout(pp=4, microbatches=2), "layout.microbatches"),
        (Layout(stages_per_rank=2), "layout.stages_per_rank"),
        (Layout(dp=2, ep=2), "layout.ep"),
        (Layout(dp=8), "devices"),
    ],
)
def test_a_layout_that_does_not_fit_the_model_or_the_cluster_names_its_key(layout: Layout, key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(SMALL, layout, NODE)
    assert raised.value.key == key


def test_the_innermost_axis_has_the_fast_link() -> None:
    layout = Layout(dp=2, tp=2)
    assert NODE.link(layout.tp, layout.stride("tp")) is NODE.inside
    assert NODE.link(layout.dp, layout.stride("dp")) is NODE.between


def test_unknown_presets_say_which_there_are() -> None:
    with pytest.raises(NotFound, match="gpt-175b"):
        model("gpt-5")
    with pytest.raises(NotFound, match="h100"):
        cluster("tpu", 8)
    with pytest.raises(InvalidInput, match="whole nodes"):
        cluster("h100", 12)


# ---- time -----------------------------------------------------------------------------------------------------------


def test_the_messages_of_tensor_parallelism_are_four_rings_a_layer_both_ways() -> None:
    layout = Layout(tp=2, precision="fp32", microbatches=3)
    estimate = estimate_step(SMALL, layout, NODE)
    stream = 32 * 64 * 4
    expected = 3 * 4 * 4 * costs.ring(stream, 2, NODE.inside).seconds
    (tensor,) = estimate.traffic
    assert tensor.seconds == tensor.exposed_s == pytest.approx(expected)
    assert tensor.sent_bytes == pytest.approx(3 * 4 * 4 * stream)
    again = estimate_step(SMALL, replace(layout, recompute="full"), NODE)
    assert again.traffic[0].seconds == pytest.approx(1.5 * expected)


def test_replicas_sum_float32_gradients_once_a_step() -> None:
    estimate = estimate_step(SMALL, Layout(dp=2, microbatches=4), replace(NODE, nodes=1))
    (data,) = estimate.traffic
    assert data.sent_bytes == pytest.approx(4 * SMALL.parameters)
    assert 0 < data.exposed_s < data.seconds


def test_sharded_and_replicated_sums_are_priced_by_the_same_topology() -> None:
    size, spec = 1e9, h100(8)
    half = half_all_reduce(size, 64, 1, spec)
    assert half.seconds < costs.reduce_scatter(size, 64, spec.between).seconds / 4
    levels = costs.hierarchical(size, 8, 8, spec.inside, spec.between)
    assert all_reduce(size, 64, 1, spec).seconds == pytest.approx(levels.seconds)
    shape = model("llama-7b")
    summed, sharded = (
        estimate_step(shape, Layout(**axes), spec).traffic[0]  # type: ignore[arg-type]  # plain values
        for axes in ({"dp": 64}, {"shard": 64, "zero": 1})
    )
    gathered = half_all_reduce(2 * shape.parameters, 64, 1, spec)
    assert sharded.seconds == pytest.approx(summed.seconds + gathered.seconds)


def test_every_layer_is_in_one_stage_and_the_head_takes_the_place_of_some() -> None:
    shape = TransformerShape("small", 6, 384, 6, 6, 64, 1024, vocab=8192, sequence=256)
    assert layers_of_stages(shape, Layout(pp=2, microbatches=2)) == (4, 2)
    assert [has_head(Layout(pp=2, microbatches=2), rank) for rank in (0, 1)] == [False, True]
    v_shaped = Layout(pp=2, microbatches=4, stages_per_rank=2, schedule="zbv")
    assert has_head(v_shaped, 0)
    fullest = max(predict_ranks(shape, v_shaped), key=lambda estimate: estimate.total)
    assert predict_memory(shape, v_shaped) == fullest


def test_the_step_is_the_sum_of_its_parts_and_mfu_is_what_the_model_needs() -> None:
    estimate = estimate_step(SMALL, Layout(tp=2, dp=2, microbatches=2, recompute="full"), NODE)
    assert estimate.seconds == pytest.approx(sum(estimate.parts().values()))
    tokens = 2 * 2 * 32
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128
    needed = tokens * (4 * (6 * layer + 12 * 32 * 64) + 6 * 100 * 64)
    assert estimate.mfu == pytest.approx(needed / estimate.seconds / (4 * 2e9))


def test_full_recomputation_trades_memory_for_the_forward_pass() -> None:
    shape, spec = model("llama-7b"), h100(1)
    none, full = (estimate_step(shape, Layout(shard=8, zero=3, recompute=policy), spec) for policy in ("none", "full"))
    assert full.memory.activations < none.memory.activations / 10
    assert full.recompute_s == pytest.approx(full.compute_s / 3, rel=0.03)
    assert none.recompute_s == 0


# ---- search ---------------------------------------------------------------------------------------------------------


def test_the_search_finds_what_brute_force_finds() -> None:
    limit = 0.92 * NODE.memory_bytes
    every = [estimate_step(SMALL, layout, NODE) for layout in layouts(SMALL, NODE, 16, "bf16")]
    fastest = min((e for e in every if e.memory.total <= limit), key=lambda estimate: estimate.seconds)
    found = search_layouts(SMALL, NODE, global_batch=16)
    assert found.best.seconds == fastest.seconds
    assert found.considered == len(every)


def test_every_layout_uses_all_devices_for_the_whole_batch_and_can_be_run() -> None:
    every = list(layouts(SMALL, NODE, 16, "bf16"))
    assert len(set(every)) == len(every) > 20
    for layout in every:
        check(SMALL, layout, NODE)
        assert layout.world_size == NODE.devices
        assert layout.global_batch == 16


def test_less_memory_never_makes_the_step_faster_and_its_layout_fits() -> None:
    shape = model("llama-70b")
    seconds = []
    for memory in (160e9, 80e9, 40e9):
        spec = replace(cluster("h100", 64), memory_bytes=memory)
        best = search_layouts(shape, spec, global_batch=64).best
        assert best.memory.total <= 0.92 * memory
        seconds.append(best.seconds)
    assert seconds == sorted(seconds)


def test_runners_up_differ_in_their_axes_and_say_why_they_lost() -> None:
    found = search_layouts(model("llama-70b"), cluster("h100", 64), global_batch=64, runners_up=4)
    assert len(found.runners_up) in (4, 5)
    assert all(
        "slower" in lost.reason or "needs" in lost.reason or "as fast" in lost.reason for lost in found.runners_up
    )
    layout_axes = {
        (e.dp, e.shard, e.tp, e.pp, e.cp, e.zero) for e in (lost.estimate.layout for lost in found.runners_up[:4])
    }
    assert len(layout_axes) == 4


def test_the_reason_names_the_part_that_is_longer() -> None:
    slow = estimate_step(SMALL, Layout(dp=4, recompute="full"), NODE)
    fast = estimate_step(SMALL, Layout(dp=4), NODE)
    assert "recompute +" in why_slower(slow, fast)
    assert why_slower(fast, fast) == "as fast, to a thousandth"


def test_a_model_that_fits_nowhere_says_how_much_the_smallest_layout_needs() -> None:
    with pytest.raises(NothingFits, match="take more devices") as raised:
        search_layouts(model("gpt-1t"), cluster("a100-80g", 8), global_batch=8)
    assert raised.value.needed > raised.value.limit


def test_a_batch_that_nobody_can_share_out_is_refused() -> None:
    one_head = replace(SMALL, heads=1, kv_heads=1, head_dim=64, layers=1)
    with pytest.raises(ConfigError) as raised:
        search_layouts(one_head, NODE, global_batch=3)
    assert raised.value.key == "global_batch"


def test_divisors() -> None:
    assert divisors(1) == [1]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


# ---- after a run ----------------------------------------------------------------------------------------------------


def test_predicted_beside_measured() -> None:
    estimate = estimate_step(SMALL, Layout(), NODE)
    time, memory = compare(estimate, {"peak memory": 2 * estimate.memory.total, "step time": estimate.seconds / 2})
    assert (time.quantity, time.ratio) == ("step time", 2.0)
    assert (memory.quantity, memory.ratio) == ("peak memory", 0.5)
    assert compare(estimate, {"MFU": 0.0})[0].ratio is None
    with pytest.raises(KeyError, match="speed"):
        compare(estimate, {"speed": 1.0})
    assert predictions(estimate)["peak memory"][0] == predict_memory(SMALL, Layout()).total


@pytest.mark.slow
def test_this_machine_has_positive_speeds_and_every_core() -> None:
    from sihe.cluster.planner.measurement import measure_machine

    spec = measure_machine()
    assert spec.devices >= 1
    assert min(spec.peak_flops.values()) > 1e6
    assert spec.memory_bandwidth > 1e6
    assert 0 <= spec.inside.latency_s < 1
