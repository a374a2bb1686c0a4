"""Configurations: every wrong value is an error that names its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sihe.core.errors import ConfigError
from sihe.training.config import ModelShape, OptimizerConfig, TrainConfig
from sihe.training.presets.reader import load_config, parse_override, preset_names
from support.training_runs import small_config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_batch", 10),
        ("micro_batch", 0),
        ("max_steps", 0),
        ("warmup_steps", 21),
        ("peak_lr", float("nan")),
        ("peak_lr", -1.0),
        ("min_lr_ratio", 1.5),
        ("precision", "fp8"),
        ("keep_checkpoints", 0),
        ("max_restarts", -1),
        ("threads_per_rank", 0),
        ("model_name", "../escape"),
    ],
)
def test_a_wrong_value_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        small_config(Path("data"), **{key: value})
    assert caught.value.key == key


def test_micro_batches_follow_from_the_sizes() -> None:
    config = small_config(Path("data"))
    assert config.accumulation_steps == 2
    assert config.tokens_per_step == 128


def test_a_configuration_survives_plain_values() -> None:
    config = small_config(Path("data"), optimizer=OptimizerConfig("lion", {"betas": [0.8, 0.99]}), alias="best")
    assert TrainConfig.from_mapping(config.public()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1}, "unknown training setting 'learning_rate': known are .*peak_lr"),
        ({"max_steps": "many"}, "'max_steps': .* got 'many'"),
        ({"model": {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "depth": 3}}, r"'model\.depth'"),
        ({"model": {"num_layers": 1, "num_heads": 2}}, r"'model\.hidden_size' is missing"),
        ({"model": {"hidden_size": 9, "num_layers": 1, "num_heads": 2}}, "multiple of num_heads"),
        ({"model": 3}, "'model'"),
    ],
)
def test_plain_values_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_mapping(small_config(Path("data")).public() | change)


def test_numbers_as_yaml_writes_them() -> None:
    values = small_config(Path("data")).public() | {"peak_lr": "1e-3"}  # YAML 1.1 reads 1e-3 as text
    assert TrainConfig.from_mapping(values).peak_lr == 1e-3


def test_the_identity_is_what_decides_the_numbers() -> None:
    config = small_config(Path("data"))
    same = config.with_changes(world_size=1, micro_batch=4, checkpoint_every=9, alias="x", max_restarts=0)
    assert same.identity() == config.identity()
    for change in (
        {"seed": 1},
        {"peak_lr": 1.0},
        {"max_steps": 21},
        {"global_batch": 16},
        {"optimizer": OptimizerConfig("lion")},
    ):
        assert config.with_changes(**change).identity() != config.identity()
    wider = config.with_changes(model=ModelShape(hidden_size=64, num_layers=2, num_heads=4))
    assert wider.identity() != config.identity()


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_whole(name: str) -> None:
    config = load_config(name, {"dataset": "any"})
    assert config.model_name == name


def test_overrides_win_and_reach_into_sections() -> None:
    overrides = dict(map(parse_override, ["dataset=d", "model.num_layers=3", "max_steps=50", "warmup_steps=5"]))
    config = load_config("nano-1m", overrides)
    assert (config.model.num_layers, config.max_steps) == (3, 50)


@pytest.mark.parametrize("item", ["max_steps", "=3", "a=[1"])
def test_an_override_must_be_an_assignment(item: str) -> None:
    with pytest.raises(ConfigError):
        parse_override(item)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"presets are .*nano-10m"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="got list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "torn.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "torn.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="'max_steps' has no parts"):
        load_config("nano-1m", {"max_steps.first": 3})
