"""`sihe plan` as a user types it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sihe.cluster.commands import app
from sihe.core.errors import ConfigError

RUNNER = CliRunner()


def run(*arguments: str) -> str:
    result = RUNNER.invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_best_plan_is_told_with_its_memory_its_time_and_its_rivals() -> None:
    said = run("--model", "llama-7b", "--devices", "8", "--global-batch", "64")
    for word in ("llama-7b (6.738 B) on 8 x a100-80g", "MFU", "activations", "bubble", "slower", "considered"):
        assert word in said


def test_json_is_one_document_whose_parts_add_up() -> None:
    found = json.loads(run("--model", "llama-7b", "--json", "--runners-up", "2"))
    best = found["best"]
    assert sum(best["parts"].values()) == pytest.approx(best["seconds"])
    parts = {key: size for key, size in best["memory_bytes"].items() if key != "total"}
    assert sum(parts.values()) == pytest.approx(best["memory_bytes"]["total"])
    assert len(found["runners_up"]) in (2, 3)


def test_a_given_layout_is_predicted_as_it_is() -> None:
    said = json.loads(run("--layout", "tp=2,dp=4,microbatches=2,recompute=full,sequence_parallel=false", "--json"))
    assert said["layout"]["tp"] == 2
    assert said["layout"]["sequence_parallel"] is False
    assert {axis["axis"] for axis in said["traffic"]} == {"tp", "dp"}


@pytest.mark.parametrize(
    ("layout", "key"), [("tp", "tp"), ("speed=3", "speed"), ("tp=two", "layout"), ("tp=5", "layout.tp")]
)
def test_a_layout_that_cannot_be_read_or_run_names_its_key(layout: str, key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        run("--layout", layout)
    assert raised.value.key == key


def test_topology_orders_the_axes_and_times_the_algorithms() -> None:
    arguments = ("topology", "--devices", "16", "--layout", "tp=8,dp=2,microbatches=4", "--json")
    found = json.loads(run(*arguments))
    assert found["placements"][0]["order"] == ["dp", "tp"]
    assert set(found["all_reduce"]) == {"ring", "double tree", "hierarchical", "halving-doubling"}
    assert "hierarchical" in run(*arguments[:-1])


def test_presets_are_listed() -> None:
    assert {"gpt-175b", "llama-405b"} <= {each["model"] for each in json.loads(run("presets", "--json"))["models"]}
    assert "h100" in run("presets")
