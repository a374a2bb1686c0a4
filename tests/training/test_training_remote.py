"""Training on a data set at a URL: the numbers of the local one; what is wrong is known before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sihe.core import settings
from sihe.core.errors import ConfigError, CorruptData, NotFound
from sihe.core.workspace import Workspace
from sihe.data.loading.cache import ShardCache
from sihe.data.loading.dataset import TokenDataset
from sihe.data.loading.mixture import MixtureSource, MixtureStage, MixtureStream
from sihe.data.loading.samples import WindowSamples
from sihe.training.config import DataConfig, Mixing, TrainConfig
from sihe.training.plan import TrainPlan, make_plan
from sihe.training.service import TrainingService
from sihe.training.step import samples_digest
from support.tokens import make_dataset
from support.training_runs import InProcess, series, small_config, steps_of


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "published")


def config_of(dataset: str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"world_size": 1, "max_steps": 4, "warmup_steps": 1}
    return small_config(Path("replaced"), **values | changes).with_changes(dataset=dataset)


def trained(home: Path, config: TrainConfig, *, in_process: bool = True) -> Path:
    loaded = settings.load({"home": str(home)}, environ={}, directory=home.parent)
    with Workspace(loaded) as workspace:
        launcher = InProcess() if in_process else None
        return TrainingService(workspace, launcher=launcher).train(config).folder


def test_a_data_set_at_a_url_trains_to_the_same_bits(published: Path, tmp_path: Path) -> None:
    near = trained(tmp_path / "near", config_of(str(published)))
    far = trained(tmp_path / "far", config_of(f"file://{published}"))
    assert series(steps_of(far)) == series(steps_of(near))
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (near, far)]
    assert weights[0] == weights[1]
    plan = TrainPlan.read(far / "plan.json")
    assert plan.cache == tmp_path / "far" / "datasets" / ".cache"
    assert plan.identity == TrainPlan.read(near / "plan.json").identity
    shards = TokenDataset.open(published).manifest.splits["train"]
    assert {path.name for path in (plan.cache / "shards").iterdir() if not path.suffix} >= {s.sha256 for s in shards}


@pytest.mark.slow
def test_ranks_share_one_copy(published: Path, tmp_path: Path) -> None:
    near = trained(tmp_path / "near", config_of(str(published), world_size=2), in_process=False)
    far = trained(tmp_path / "far", config_of(f"file://{published}", world_size=2), in_process=False)
    assert series(steps_of(far)) == series(steps_of(near))


def test_a_mixture_of_near_and_far(published: Path, tmp_path: Path) -> None:
    """Against a stream that reads both from the disk, by the names of the configuration, which decide the order."""
    other = make_dataset(tmp_path / "published", name="yard", seed=1)
    folders = {str(published): published, f"file://{other}": other}
    mixing = Mixing(dict.fromkeys(folders, 0.5))
    run = trained(tmp_path / "home", config_of(str(published), data=DataConfig(mixture=(mixing,))))
    sources = [MixtureSource(n, WindowSamples(TokenDataset.open(f), "train", 16)) for n, f in folders.items()]
    stream = MixtureStream(sources, [MixtureStage(mixing.weights)], global_batch=8, seed=0, stop_sample=32)
    expected = [f"{samples_digest(next(stream).tokens, first=0):012x}" for _ in range(4)]
    assert [done.samples for done in steps_of(run)] == expected


def test_what_is_wrong_with_it_is_known_before_the_first_step(published: Path, tmp_path: Path) -> None:
    url, shard = f"file://{published}", published / "train-00000.bin"
    datasets = tmp_path / "datasets"
    with pytest.raises(ConfigError) as small:
        make_plan(config_of(url, data=DataConfig(cache_bytes=100)), datasets)
    assert small.value.key == "data.cache_bytes"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(CorruptData, match=r"train-00000\.bin"):
        make_plan(config_of(url), datasets)
    shard.unlink()
    with pytest.raises(NotFound, match=r"train-00000\.bin"):
        make_plan(config_of(url), datasets)
    shutil.rmtree(published)
    with pytest.raises(NotFound, match=r"dataset\.json"):
        make_plan(config_of(url), datasets)


def test_a_shard_with_other_bytes_is_named_by_the_first_step(published: Path, tmp_path: Path) -> None:
    shard = published / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CorruptData, match=r"train-00000\.bin"):
        trained(tmp_path / "home", config_of(f"file://{published}"))


def test_where_shards_are_kept_changes_no_number(published: Path) -> None:
    kept = config_of(str(published), data=DataConfig(cache_bytes=1 << 20, cache_folder="elsewhere"))
    assert kept.identity() == config_of(str(published)).identity()


def test_shards_that_do_not_all_fit_are_not_fetched_ahead(published: Path, tmp_path: Path) -> None:
    shards = TokenDataset.open(published).manifest.splits["train"]
    size = sum(2 * shard.tokens for shard in shards)
    cache = ShardCache(tmp_path / "cache", limit_bytes=size - 1)
    far = TokenDataset.open(f"file://{published}", cache=cache).remote_split("train")
    assert far is not None
    far.fetch_ahead()
    assert cache.size_bytes == 0
