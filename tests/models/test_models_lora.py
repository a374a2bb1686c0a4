"""Adapters against a hand-made oracle (each matrix of the checkpoint changed by scale · B A) and against PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sihe.core.errors import AlreadyExists, ConfigError, CorruptData, InvalidInput, NotFound
from sihe.models.checkpoint import load_model, save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.errors import CheckpointMismatch, UnsupportedAdapter
from sihe.models.lora import Lora, apply_lora
from sihe.models.lora_config import TARGETS, LoraConfig
from sihe.models.lora_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter, load_lora_config, save_adapter

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=64,
    tie_embeddings=False,
)
ALL = LoraConfig(rank=4, alpha=12.0, targets=TARGETS)
CHOICES = {
    "all": ALL,
    "queries and values": LoraConfig(rank=3, alpha=5.0),
    "keys": LoraConfig(rank=2, targets=("k_proj",)),
    "out and up": LoraConfig(rank=5, targets=("up_proj", "o_proj")),
    "gate and down, rank-stabilised": LoraConfig(rank=4, alpha=6.0, targets=("gate_proj", "down_proj"), rslora=True),
}


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return decoder


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(1))


def shake(lora: Lora, name: str, seed: int = 2) -> None:
    """Gives both factors of an adapter weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in lora.parameters(name):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)


def changed_by_hand(model: Decoder, lora: Lora, name: str, folder: Path) -> Decoder:
    """The model whose checkpoint, matrix by matrix, has the adapter's update added."""
    save_model(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for matrix, a, b in lora.matrices(name):
        tensors[f"{matrix}.weight"] += (lora.config(name).scale * b.double() @ a.double()).float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load_model(folder)


def gradients(model: Decoder, tokens: torch.Tensor, weights: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    nll, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    return list(torch.autograd.grad(nll, weights))


# ---- one adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES.keys())
def test_logits_are_those_of_the_changed_matrices(
    model: Decoder, tokens: torch.Tensor, config: LoraConfig, tmp_path: Path
) -> None:
    before = model(tokens)
    lora = apply_lora(model, config)
    assert torch.equal(model(tokens), before)  # B starts at zero
    shake(lora, "default")
    expected = changed_by_hand(model, lora, "default", tmp_path)(tokens)
    assert float((expected - before).detach().abs().max()) > 0.1
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)
    assert {name.rpartition(".")[2] for name, _, _ in lora.matrices("default")} == set(config.targets)


def test_gradients_are_those_through_the_update(model: Decoder, tokens: torch.Tensor, tmp_path: Path) -> None:
    """By the chain rule: with W' = W + s B A, dB = s dW' Aᵀ and dA = s Bᵀ dW'."""
    lora = apply_lora(model, ALL)
    shake(lora, "default")
    changed = changed_by_hand(model, lora, "default", tmp_path / "changed")
    weights = list(changed.parameters())
    for weight, gradient in zip(weights, gradients(changed, tokens, weights), strict=True):
        weight.data = gradient
    save_model(changed, tmp_path / "gradients")  # by the checkpoint's own mapping, as if gradients were weights
    of_matrices = load_file(tmp_path / "gradients" / "model.safetensors")

    learning = [weight for weight in model.parameters() if weight.requires_grad]
    assert {id(weight) for weight in learning} == {id(weight) for weight in lora.parameters()}
    nll, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    nll.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == (".lora." in name), name
    with torch.no_grad():
        triples = [(name, a.clone(), b.clone()) for name, a, b in lora.matrices("default")]
        for weight in lora.parameters():
            weight.copy_(weight.grad)
    for (name, a, b), (_, da, db) in zip(triples, lora.matrices("default"), strict=True):
        dw = of_matrices[f"{name}.weight"] * ALL.scale
        torch.testing.assert_close(db.detach(), dw @ a.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(da.detach(), b.T @ dw, rtol=1e-3, atol=1e-4)


def test_merging_changes_the_weights_and_unmerging_changes_them_back(
    model: Decoder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    lora = apply_lora(model, ALL)
    shake(lora, "default")
    expected = model(tokens)
    lora.merge()
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)
    save_model(model, tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(tokens), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match="unmerge it"):
        lora.use(None)
    lora.unmerge()
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)
    for name, weight in before.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=0, atol=1e-6)
    with pytest.raises(InvalidInput, match="merged"):
        lora.unmerge()


def test_dropout_leaves_inputs_out_in_training_only(model: Decoder, tokens: torch.Tensor) -> None:
    lora = apply_lora(model, LoraConfig(rank=4, dropout=0.5))
    shake(lora, "default")
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    expected = model(tokens)
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    torch.manual_seed(3)
    with torch.no_grad():
        layer = model.blocks[0].get_submodule("attention.qkv")
        x = torch.ones(1, 1, 32)
        lora.use(None)
        base = layer(x)
        lora.use("default")
        mean = torch.stack([layer(x) - base for _ in range(4000)]).mean(0)
        model.eval()
        torch.testing.assert_close(mean, layer(x) - base, rtol=0, atol=0.15)  # inverted dropout keeps the mean
    assert torch.equal(model(tokens), expected)


def test_bfloat16_weights_take_a_float32_adapter(model: Decoder, tokens: torch.Tensor, tmp_path: Path) -> None:
    lora = apply_lora(model, ALL)
    shake(lora, "default")
    with torch.no_grad():
        exact = model(tokens)
        merged = changed_by_hand(model, lora, "default", tmp_path).bfloat16()(tokens).float()
        lora.detach()
        model.bfloat16()
        lora = apply_lora(model, ALL)
        shake(lora, "default")
        assert {weight.dtype for weight in lora.parameters()} == {torch.float32}
        assert float((model(tokens).float() - exact).norm()) < 3 * float((merged - exact).norm())


def test_a_copied_model_has_adapters_of_its_own(model: Decoder, tokens: torch.Tensor) -> None:
    lora = apply_lora(model, ALL)
    shake(lora, "default")
    other = copy.deepcopy(model)
    expected = model(tokens)
    with torch.no_grad():
        for weight in lora.parameters():
            weight.zero_()
    assert torch.equal(other(tokens), expected)
    assert not torch.equal(model(tokens), expected)


# ---- several adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def three(model: Decoder) -> Lora:
    lora = apply_lora(model, ALL, "first")
    lora.add("second", LoraConfig(rank=2, targets=("k_proj", "down_proj")))
    lora.add("third", LoraConfig(rank=6, alpha=3.0, targets=("q_proj", "v_proj", "gate_proj")))
    for seed, name in enumerate(lora.names):
        shake(lora, name, seed)
    return lora


def test_the_active_one_runs_and_learns(model: Decoder, tokens: torch.Tensor, three: Lora, tmp_path: Path) -> None:
    for name in three.names:
        three.use(name)
        learning = {id(weight) for weight in model.parameters() if weight.requires_grad}
        assert learning == {id(weight) for weight in three.parameters(name)}
        with torch.no_grad():
            expected = changed_by_hand(model, three, name, tmp_path / name)(tokens)
            torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


def test_the_base_alone_runs_when_adapters_are_off(model: Decoder, tokens: torch.Tensor, three: Lora) -> None:
    with three.disabled():
        assert three.active is None
        disabled = model(tokens)
    assert three.active == "first"
    adapted = model(tokens)
    three.use(None)
    assert torch.equal(model(tokens), disabled)
    three.detach()
    assert torch.equal(model(tokens), disabled)
    assert not torch.equal(adapted, disabled)
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize("places", [[2, 0, -1, 1], [1, 1, 0, 1], [2, 2, 2, 2], [-1, -1, -1, -1]])
def test_each_row_has_the_adapter_of_its_choice(
    model: Decoder, tokens: torch.Tensor, three: Lora, places: list[int]
) -> None:
    with torch.no_grad():
        expected = []
        for row, place in zip(tokens, places, strict=True):
            three.use(three.names[place] if place >= 0 else None)
            expected.append(model(row[None]))
        three.use("second")
        with three.by_row(torch.tensor(places)):
            got = model(tokens)
        torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-5)
        with three.by_row(torch.tensor(places)[:, None].expand(tokens.shape)):  # as a packed batch would say it
            torch.testing.assert_close(model(tokens), got, rtol=1e-4, atol=1e-5)
        three.use("second")
        assert three.active == "second"


def test_gradients_flow_through_a_choice_by_row(model: Decoder, tokens: torch.Tensor, three: Lora) -> None:
    weights = {}
    for name in three.names[:2]:
        three.use(name)
        row = tokens[:1] if name == "first" else tokens[1:2]
        weights[name] = gradients(model, row, three.parameters(name))
    for weight in three.parameters("first"):
        weight.requires_grad_(True)
    with three.by_row(torch.tensor([0, 1])):
        both = three.parameters("first") + three.parameters("second")
        got = gradients(model, tokens[:2], both)
    for ours, alone in zip(got, weights["first"] + weights["second"], strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)


def test_an_adapter_can_be_removed(model: Decoder, tokens: torch.Tensor, three: Lora) -> None:
    three.use(None)
    base = model(tokens)
    three.use("first")
    three.merge()
    three.remove("first")
    torch.testing.assert_close(model(tokens), base, rtol=1e-4, atol=1e-5)
    assert three.names == ("second", "third")
    assert not any(".first." in name for name in model.state_dict())


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"rank": True}, "lora.rank"),
        ({"alpha": 0.0}, "lora.alpha"),
        ({"alpha": float("nan")}, "lora.alpha"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"targets": ()}, "lora.targets"),
        ({"targets": ("qkv",)}, "lora.targets"),
        ({"targets": ("q_proj", "q_proj")}, "lora.targets"),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**values)  # type: ignore[arg-type]
    assert caught.value.key == key


def test_names_are_checked(model: Decoder, three: Lora) -> None:
    with pytest.raises(AlreadyExists):
        three.add("first", ALL)
    for name in ("a.b", "", "keys", "train"):
        with pytest.raises(ConfigError, match="name"):
            three.add(name, ALL)
    for call in (three.use, three.remove, three.config, three.parameters):
        with pytest.raises(NotFound, match="first"):
            call("nobody")  # type: ignore[operator]
    with pytest.raises(InvalidInput, match=r"-1\.\.2"), three.by_row(torch.tensor([3])):
        pass
    with pytest.raises(AlreadyExists, match="carries adapters"):
        apply_lora(model, ALL, "fourth")


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(model: Decoder, tmp_path: Path) -> Path:
    lora = apply_lora(copy.deepcopy(model), CHOICES["gate and down, rank-stabilised"])
    shake(lora, "default")
    save_adapter(lora, "default", tmp_path / "adapter", base_model="base")
    return tmp_path / "adapter"


def test_an_adapter_comes_back(model: Decoder, tokens: torch.Tensor, folder: Path) -> None:
    lora = apply_lora(model, ALL)
    load_adapter(lora, folder, "loaded")
    assert lora.config("loaded").targets == ("gate_proj", "down_proj")
    assert lora.config("loaded") == CHOICES["gate and down, rank-stabilised"] == load_lora_config(folder)
    lora.use("loaded")
    got = model(tokens)
    lora.detach()
    expected = apply_lora(model, load_lora_config(folder))
    shake(expected, "default")
    assert torch.equal(model(tokens), got)


def test_the_names_are_those_of_peft(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    assert sorted(tensors)[:2] == [
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight",
    ]
    assert tensors["base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight"].shape == (4, 32)
    assert tensors["base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight"].shape == (48, 4)
    assert len(tensors) == 8


def refused(model: Decoder, folder: Path) -> None:
    lora = apply_lora(model, ALL)
    try:
        load_adapter(lora, folder, "loaded")
    finally:
        assert lora.names == ("default",)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


def test_tensors_that_do_not_fit_are_named(model: Decoder, folder: Path) -> None:
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    good = (folder / ADAPTER_WEIGHTS).read_bytes()
    for change, reason in (
        (lambda tensors: tensors.pop(name), "is missing"),
        (lambda tensors: tensors.update({name: torch.ones(4, 47)}), r"shape \[4, 47\]"),
        (lambda tensors: tensors.update({name.replace("down", "none"): torch.ones(1)}), "is not used"),
    ):
        edit(folder, change)
        with pytest.raises(CheckpointMismatch, match=reason):
            refused(copy.deepcopy(model), folder)
        (folder / ADAPTER_WEIGHTS).write_bytes(good)
    (folder / ADAPTER_WEIGHTS).write_bytes(good[:-40])
    with pytest.raises(CorruptData, match="cut short"):
        refused(copy.deepcopy(model), folder)
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(NotFound, match="pickled"):
        refused(copy.deepcopy(model), folder)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["lm_head"]}, "target_modules"),
        ({"target_modules": ".*proj"}, "target_modules"),
    ],
)
def test_what_ours_cannot_be_is_refused_by_name(folder: Path, values: dict[str, object], key: str) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UnsupportedAdapter) as caught:
        load_lora_config(folder)
    assert caught.value.key == key


@pytest.mark.parametrize("content", [b"", b"[]", b'{"peft_type": "LORA", "target_modules": 3, "r": 4}'])
def test_broken_settings_are_corrupt(folder: Path, content: bytes) -> None:
    (folder / ADAPTER_CONFIG).write_bytes(content)
    with pytest.raises(CorruptData):
        load_lora_config(folder)


def test_an_absent_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=ADAPTER_CONFIG):
        load_lora_config(tmp_path)


# ---- PEFT itself ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT under transformers 5
@pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES.keys())
def test_peft_agrees_and_reads_our_files(
    model: Decoder, tokens: torch.Tensor, config: LoraConfig, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    transformers = pytest.importorskip("transformers")
    save_model(model, tmp_path / "base")
    lora = apply_lora(model, config)
    shake(lora, "default")
    save_adapter(lora, "default", tmp_path / "ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=2e-5)
        lora.merge()
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(model(tokens), theirs.merge_and_unload()(tokens).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT under transformers 5
def test_we_read_files_of_peft(model: Decoder, tokens: torch.Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    transformers = pytest.importorskip("transformers")
    save_model(model, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    lora = apply_lora(model, ALL)
    load_adapter(lora, tmp_path / "theirs", "theirs")
    lora.use("theirs")
    assert lora.config("theirs") == LoraConfig(rank=3, alpha=7.0, targets=TARGETS, rslora=True)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=2e-5)
    save_adapter(lora, "theirs", tmp_path / "again")
    ours, stored = (load_file(tmp_path / place / ADAPTER_WEIGHTS) for place in ("again", "theirs"))
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stored.items())
