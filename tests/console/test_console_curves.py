"""Curves: thinned without losing a spike, and only what is new."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from sihe.console.curves import RunCurves, in_order, thin
from sihe.console.drawing import draw_lineage, draw_sparkline
from sihe.core.tracking import MetricPoint
from sihe.core.workspace import Workspace

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=400), st.integers(4, 50))
def test_thinning_keeps_the_ends_and_the_extremes(values: list[float], most: int) -> None:
    points = [MetricPoint(step, value, NOW) for step, value in enumerate(values)]
    kept = thin(points, most)
    assert len(kept) <= max(most, 4)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert max(point.value for point in kept) == max(values)
    assert min(point.value for point in kept) == min(values)
    assert [point.step for point in kept] == sorted({point.step for point in kept})


def test_a_reader_gets_each_point_once_and_a_repeated_step_again(workspace: Workspace) -> None:
    tracking = workspace.tracking
    run_id = tracking.start_run("pretrain", "a")
    for step in range(3):
        tracking.log_metrics(run_id, {"loss": 3.0 - step, "lr": 0.1}, step=step)
    curves = RunCurves(tracking, run_id)
    assert curves.changes(tracking.run(run_id)) == {"loss": ([0, 1, 2], [3.0, 2.0, 1.0]), "lr": ([0, 1, 2], [0.1] * 3)}
    assert curves.changes(tracking.run(run_id)) == {}
    tracking.log_metrics(run_id, {"loss": 0.5, "lr": 0.1}, step=3)
    assert curves.changes(tracking.run(run_id)) == {"loss": ([3], [0.5]), "lr": ([3], [0.1])}
    tracking.log_metrics(run_id, {"loss": 0.75, "lr": 0.1}, step=2)  # recovered from an earlier checkpoint
    looks = [curves.changes(tracking.run(run_id)) for _ in range(8)]
    assert [look["loss"] for look in looks if look] == [([2], [0.75])]


def test_a_loss_that_is_no_number_still_makes_json(workspace: Workspace) -> None:
    run_id = workspace.tracking.start_run("pretrain", "a")
    workspace.tracking.log_metrics(run_id, {"loss": math.nan}, step=0)
    series = RunCurves(workspace.tracking, run_id).changes(workspace.tracking.run(run_id))
    assert json.dumps(series, allow_nan=False) == '{"loss": [[0], [null]]}'


def test_the_four_curves_of_a_training_come_first() -> None:
    assert in_order(["a", "grad_norm", "lr", "tokens_per_s", "loss"]) == [
        "loss",
        "tokens_per_s",
        "lr",
        "grad_norm",
        "a",
    ]


def test_a_sparkline_needs_two_values_and_hides_what_is_no_number() -> None:
    assert draw_sparkline([1.0], "x") == ""
    drawn = draw_sparkline([3.0, math.nan, 1.0], 'from "3" to 1 <b>')
    assert "nan" not in drawn.lower().replace("nance", "")
    assert "from &#34;3&#34; to 1 &lt;b&gt;" in drawn
    assert drawn.count(",") == draw_sparkline([3.0, 1.0], "").count(",")


def test_lineage_stands_from_left_to_right_and_survives_a_circle() -> None:
    edges = [("model:m@1", "run:r"), ("run:r", "dataset:d@1"), ("dataset:d@1", "table:t@1"), ("table:t@1", "model:m@1")]
    drawn = draw_lineage(edges[:3], "run:r", lambda kind: kind.upper(), "lineage")
    places = {kind: drawn.index(f">{kind}<") for kind in ("TABLE", "DATASET", "RUN", "MODEL")}
    assert len(set(places.values())) == 4
    left = [
        float(drawn[place - 40 : place].split('x="')[1].split('"')[0])
        for place in (places["TABLE"], places["DATASET"], places["RUN"], places["MODEL"])
    ]
    assert left == sorted(left)
    assert len(set(left)) == 4
    assert 'href="/models#m"' in drawn
    assert 'class="self"' in drawn
    assert "<svg" in draw_lineage(edges, "run:r", str, "a circle")


def test_lineage_escapes_names() -> None:
    assert "<script>" not in draw_lineage([("run:<script>", "files:a")], "files:a", str, "<script>")


def test_a_line_that_passes_a_layer_gets_a_place_of_its_own() -> None:
    edges = [("run:r", "dataset:d"), ("dataset:d", "table:t"), ("run:r", "files:f")]
    drawn = draw_lineage(edges, "run:r", str, "lineage", names={"run:r": "a name"})
    assert ">a name<" in drawn
    boxes = [float(top) for top in re.findall(r'<rect x="[0-9.]+" y="([0-9.]+)"', drawn)]
    middles = {top + 23 for top in boxes}
    long = next(path for path in re.findall(r'<path d="([^"]+)"', drawn) if path.count("C") == 2)
    crossing = float(long.split("L")[1].split("C")[0].split()[1])
    dataset = drawn.index(">dataset<")
    box = float(re.findall(r'<rect x="[0-9.]+" y="([0-9.]+)"', drawn[:dataset])[-1])
    assert crossing != box + 23
    assert len(middles) >= 2
