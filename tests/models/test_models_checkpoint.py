"""Model folders that are damaged, incomplete or hostile, and those that are merely unusual."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sihe.core.errors import CorruptData, NoSpace, NotFound
from sihe.models import checkpoint
from sihe.models.checkpoint import load_config, load_model, save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.errors import CheckpointMismatch

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_positions=32,
    bos_token_id=1,
    eos_token_id=2,
)
Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG)


@pytest.fixture
def folder(model: Decoder, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / checkpoint.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / checkpoint.WEIGHTS)


def same_weights(a: Decoder, b: Decoder) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(weight, theirs[name]) for name, weight in a.named_parameters())


def test_weights_and_configuration_come_back(model: Decoder, folder: Path) -> None:
    loaded = load_model(folder)
    assert loaded.config == CONFIG
    assert same_weights(loaded, model)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_can_be_saved_over_another(model: Decoder, folder: Path) -> None:
    with torch.no_grad():
        model.embedding.weight.zero_()
    save_model(model, folder)
    assert same_weights(load_model(folder), model)


def test_the_dtype_is_the_callers_choice(model: Decoder, tmp_path: Path) -> None:
    save_model(model.bfloat16(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path, torch.bfloat16).embedding.weight.dtype == torch.bfloat16
    widened = load_model(tmp_path)
    assert {weight.dtype for weight in widened.parameters()} == {torch.float32}
    assert torch.equal(widened.embedding.weight, model.embedding.weight.float())


def test_loaded_weights_do_not_depend_on_the_file(folder: Path, model: Decoder) -> None:
    loaded = load_model(folder)
    with (folder / checkpoint.WEIGHTS).open("r+b") as file:
        file.seek(1000)
        file.write(b"\0" * 2000)
    assert same_weights(loaded, model)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(Q1))
    with pytest.raises(CheckpointMismatch, match="is missing") as caught:
        load_model(folder)
    assert caught.value.tensor == Q1


def test_an_unused_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}))
    with pytest.raises(CheckpointMismatch, match="is not used") as caught:
        load_model(folder)
    assert caught.value.tensor == "model.layers.2.mlp.up_proj.weight"


def test_a_misshapen_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({Q1: torch.ones(16, 15)}))
    with pytest.raises(CheckpointMismatch, match=r"shape \[16, 15\].* asks for \[16, 16\]") as caught:
        load_model(folder)
    assert caught.value.tensor == Q1


def test_a_transposed_tensor_of_the_same_size_is_refused(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    with pytest.raises(CheckpointMismatch, match=r"shape \[24, 16\]"):
        load_model(folder)


def test_integers_are_no_weights(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({Q1: torch.ones(16, 16, dtype=torch.int64)}))
    with pytest.raises(CheckpointMismatch, match=r"torch\.int64, not floating-point"):
        load_model(folder)


def test_another_configuration_is_a_mismatch(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointMismatch, match="is missing") as caught:
        load_model(folder)
    assert caught.value.tensor.startswith("model.layers.2.")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_file_cut_short_is_corrupt(folder: Path, share: float) -> None:
    weights = folder / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * share)])
    with pytest.raises(CorruptData, match="cut short"):
        load_model(folder)


def test_a_hostile_header_is_corrupt(folder: Path) -> None:
    (folder / checkpoint.WEIGHTS).write_bytes(b"\xff" * 64)
    with pytest.raises(CorruptData):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_broken_configuration_is_corrupt(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CorruptData):
        load_config(folder)


def test_an_absent_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        load_model(tmp_path / "nowhere")


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / checkpoint.WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(NotFound, match="pickled"):
        load_model(folder)


# ---- shards --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(folder: Path) -> Path:
    tensors = load_file(folder / checkpoint.WEIGHTS)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / checkpoint.WEIGHTS).unlink()
    return folder


def test_shards_are_read(sharded: Path, model: Decoder) -> None:
    assert same_weights(load_model(sharded), model)


def test_saving_replaces_shards(sharded: Path, model: Decoder) -> None:
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    save_model(model, sharded)
    assert same_weights(load_model(sharded), model)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptData, match="model-00002-of-00002"):
        load_model(sharded)


@pytest.mark.parametrize("index", ['{"weight_map": []}', "{}", '{"weight_map": {"a": "../model.safetensors"}}'])
def test_a_hostile_index_is_corrupt(sharded: Path, index: str) -> None:
    (sharded / checkpoint.INDEX).write_text(index)
    with pytest.raises(CorruptData):
        load_model(sharded)


# ---- what is unusual and right -------------------------------------------------------------------------------------


def test_a_stored_copy_of_a_tied_head_is_accepted(folder: Path, model: Decoder) -> None:
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert same_weights(load_model(folder), model)


def test_another_head_beside_a_tied_embedding_is_refused(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointMismatch) as caught:
        load_model(folder)
    assert caught.value.tensor == "lm_head.weight"


def test_stored_rotary_angles_of_old_checkpoints_are_passed_over(folder: Path, model: Decoder) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(2)}))
    assert same_weights(load_model(folder), model)


# ---- a full disk ---------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_former_model(folder: Path, model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(NoSpace):
        save_model(Decoder(CONFIG), folder)
    assert same_weights(load_model(folder), model)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
