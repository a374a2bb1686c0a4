"""What the labs about parallel training compute, against oracles. Nothing here depends on how fast the machine is."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
from pydantic import ValidationError

from sihe.apps.coach.gantt import draw_timeline, write_timeline
from sihe.apps.coach.labs import accumulation, loss_scale, mixture, pipeline, planning, tensor
from sihe.apps.coach.labs.accumulation_ranks import ragged_batch, short_weight
from sihe.apps.coach.labs.mixture_ranks import imbalance
from sihe.apps.coach.labs.registry import lab
from sihe.apps.coach.labs.types import Bar, Measurement, Timeline, WorkKind
from sihe.apps.coach.schema import Text
from sihe.core.errors import InternalError
from sihe.training.parallel.plan import ParallelPlan, Schedule
from sihe.training.parallel.timeline import order, timeline

SVG = "{http://www.w3.org/2000/svg}"


def _kept(name: str, found: Measurement) -> dict[str, float]:
    """The values, which must be those that the lab promises."""
    assert set(found.values) == {claim.key for claim in lab(name).claims}
    return found.values


# ---- pipeline.bubble -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "pieces"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-zero-bubble", 2), ("zbv", 2)],
)
def test_a_replay_of_an_order_is_its_simulation(schedule: Schedule, pieces: int) -> None:
    plan = ParallelPlan(pp=4, microbatches=8, schedule=schedule, stages_per_rank=pieces)
    works = [[(work.kind, work.stage, work.microbatch) for work in done] for done in order(plan)]
    replayed = {(slot.kind, slot.stage, slot.microbatch): (slot.start, slot.end) for slot in pipeline.replay(works)}
    expected = {(s.work.kind, s.work.stage, s.work.microbatch): (s.start, s.end) for s in timeline(plan)}
    assert replayed == expected


def test_an_order_in_which_ranks_wait_for_each_other_is_an_error() -> None:
    with pytest.raises(InternalError, match="cannot have been"):
        pipeline.replay([[("F", 0, 0), ("B", 0, 0)], [("B", 1, 0), ("F", 1, 0)]])


def test_two_real_ranks_wait_as_long_as_the_formulas_say() -> None:
    found = pipeline.measure({"ranks": 4, "microbatches": 8, "stages-per-rank": 2}, limit_s=250)
    values = _kept("pipeline.bubble", found)
    for name in ("gpipe", "onefb", "interleaved"):
        assert values[f"{name}-counted"] == pytest.approx(values[f"{name}-formula-two"], abs=1e-9)
        assert values[f"{name}-simulated"] == pytest.approx(values[f"{name}-formula"], abs=1e-9)
        assert 0 < values[f"{name}-timed"] < 1
    assert values["zbv-counted"] == pytest.approx(1 / (3 * 2 * 8 + 1))
    assert (values["gpipe-kept"], values["onefb-kept"]) == (8, 2)
    assert values["loss-difference"] < 1e-5
    real = next(picture for picture in found.timelines if picture.key == "timed-1f1b")
    for row in (0, 1):
        bars = sorted((bar for bar in real.bars if bar.row == row), key=lambda bar: bar.start)
        assert len(bars) == 16
        assert all(before.end <= after.start for before, after in pairwise(bars))


# ---- timelines -------------------------------------------------------------------------------------------------------


def _two_bars() -> Timeline:
    words = Text(zh="某<", en="some<")
    kinds = (WorkKind(key="a", label=words), WorkKind(key="b", label=words))
    bars = (Bar(row=0, start=0, end=2, kind="a", mark="7"), Bar(row=1, start=3, end=4, kind="b", mark="8"))
    return Timeline(
        key="t", title=words, unit=words, provenance="modelled", rows=(words, words), kinds=kinds, bars=bars
    )


def test_a_timeline_is_drawn_to_scale_in_both_languages() -> None:
    for language in ("zh", "en"):
        root = ElementTree.fromstring(draw_timeline(_two_bars(), language=language))  # type: ignore[arg-type]  # both are
        assert root.get("aria-label") == _two_bars().title.of(language)
        first, second = (group.find(f"{SVG}rect") for group in root.iter(f"{SVG}g"))
        assert first is not None
        assert second is not None
        width, further = float(first.get("width", "")), float(second.get("x", "")) - float(first.get("x", ""))
        assert further == pytest.approx(1.5 * (width + 0.8), abs=0.1)
        assert first.get("fill") != second.get("fill")
        assert "style" not in ElementTree.tostring(root, encoding="unicode")


def test_a_timeline_is_written_with_dots_where_a_row_waits() -> None:
    assert write_timeline(_two_bars(), width=16) == ["some<  77777777........", "some<  ............8888"]
    assert write_timeline(_two_bars(), width=8) == ["some<  77..", "some<  ...8"]  # a column for each whole unit


def test_a_bar_needs_a_row_a_kind_and_an_end_after_its_start() -> None:
    good = _two_bars()
    for wrong in ({"row": 2}, {"kind": "c"}):
        with pytest.raises(ValidationError, match="has no row"):
            Timeline.model_validate(good.model_dump() | {"bars": [good.bars[0].model_dump() | wrong]})
    with pytest.raises(ValidationError, match="ends after its start"):
        Bar(row=0, start=2, end=1, kind="a")


# ---- tp.split --------------------------------------------------------------------------------------------------------


def test_a_cut_layer_sends_what_the_formula_says_and_keeps_what_the_planner_counts() -> None:
    found = tensor.measure({"hidden": 128, "tokens": 64}, limit_s=250)
    values = _kept("tp.split", found)
    assert values["plain-sent"] == values["sequence-sent"] == values["sent-modelled"] == 4
    assert (values["plain-messages"], values["sequence-messages"]) == (4, 8)
    for name in ("plain", "sequence"):
        assert values[f"{name}-kept"] == pytest.approx(values[f"{name}-kept-modelled"], rel=1e-9)
        assert values[f"{name}-difference"] < 1e-5
    assert 0.5 < values["sequence-kept"] < values["plain-kept"] < 1
    # To the byte: measured and counted by the planner.
    assert all(row[-2] == row[-1] for row in found.tables[0].rows)


# ---- accum.equivalence -----------------------------------------------------------------------------------------------


def test_parts_of_a_batch_have_its_gradient_and_a_mean_of_means_has_not() -> None:
    found = accumulation.measure({"samples": 8, "shortness": 4, "ones": 300}, limit_s=250)
    values = _kept("accum.equivalence", found)
    assert values["parts-difference"] < 1e-5
    assert values["loss-spread"] < 1e-5
    assert values["means-error"] > 0.1
    assert values["short-weight"] == pytest.approx(values["short-weight-modelled"], rel=1e-4)
    assert (values["bf16-ones"], values["float32-ones"]) == (256, 300)
    assert values["float32-error"] < 1e-5 < 1e-3 < values["bf16-error"]


@pytest.mark.parametrize("shortness", [1, 2, 16])
def test_a_target_of_a_short_sample_weighs_too_much_by_r_plus_one_half(shortness: int) -> None:
    assert short_weight(ragged_batch(8, shortness)) == pytest.approx((shortness + 1) / 2, rel=1e-4)


# ---- amp.scale -------------------------------------------------------------------------------------------------------


def test_gradients_vanish_unscaled_and_overflow_when_scaled_too_much() -> None:
    found = loss_scale.measure({"batch-exponent": 18, "steps": 12, "growth": 2}, limit_s=250)
    values = _kept("amp.scale", found)
    assert values["vanished-unscaled"] > 0.05 > values["vanished-best"]
    assert values["error-unscaled"] > 10 * values["error-best"]
    vanished = [row[1] for row in found.tables[0].rows]
    # A few sums cancel to 0 at one scale and not at another, which depends on the order of the processor's additions.
    assert all(later <= before + 1e-4 for before, later in pairwise(vanished))
    assert [row[3] == "-" for row in found.tables[0].rows] == [
        row[0] <= values["largest-exponent"] for row in found.tables[0].rows
    ]
    # 2^16 at first, doubled every other step: 12 steps come to the upper end, and over it at least once.
    assert values["overflows"] >= 1
    assert values["settled-exponent"] > 16


# ---- moe.balance -----------------------------------------------------------------------------------------------------


def test_an_unbalanced_router_is_uneven_and_drops_what_is_over_capacity() -> None:
    found = mixture.measure({"experts": 8, "chosen": 2, "steps": 60}, limit_s=250)
    values = _kept("moe.balance", found)
    assert 1 < values["loss-imbalance"] < values["none-imbalance"] <= values["most-uneven"] == 4
    loads, drops = found.tables
    for column in (1, 2, 3):
        assert sum(float(row[column] or 0) for row in loads.rows) == pytest.approx(8, abs=0.01)
        dropped = [float(row[column] or 0) for row in drops.rows]
        assert dropped == sorted(dropped, reverse=True)
        assert dropped[-1] == 0  # at E / k no expert can be over


def test_imbalance_is_the_fullest_over_the_mean() -> None:
    assert imbalance(torch.tensor([3, 1, 0, 0])) == 3
    assert imbalance(torch.tensor([2, 2])) == 1


# ---- plan.search -----------------------------------------------------------------------------------------------------


def test_the_plan_fits_and_the_published_run_is_predicted() -> None:
    found = planning.measure({"billions": 7, "devices": 32, "global-batch": 128}, limit_s=60)
    values = _kept("plan.search", found)
    assert values["states-whole"] == pytest.approx(6.738 * 18, rel=1e-3)
    assert values["best-memory"] <= values["usable"] == pytest.approx(73.6)
    assert values["paper-bubble"] == 7 / (3 * 64 + 7)
    assert values["paper-seconds-modelled"] == pytest.approx(values["paper-seconds"], rel=0.1)
    assert values["paper-activations-modelled"] == pytest.approx(values["paper-activations"], rel=1e-9)
    assert sum(float(row[1] or 0) for row in found.tables[1].rows) == pytest.approx(values["best-seconds"], abs=1e-3)
