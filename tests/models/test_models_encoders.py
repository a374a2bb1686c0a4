"""Encoders that transformers computes too: hidden states and scores of their files, and files written by us."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.architecture import PositionConfig
from sihe.models.checkpoint import load_config, load_encoder, load_trunk, save_model
from sihe.models.config import ModelConfig
from sihe.models.encoder import Encoder
from sihe.models.errors import CheckpointMismatch, UnsupportedModel

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

LIMIT = 1e-4  # of the promise; measured errors are below 1e-5
SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BERT = {**SHAPE, "max_position_embeddings": 64, "type_vocab_size": 2}
ROBERTA = {**SHAPE, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1}
DISTILBERT = {
    "vocab_size": 101,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
QWEN = {**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False}


def bert(kind: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**BERT, **more))


def roberta(kind: str, name: str = "Roberta", **more: Any) -> Callable[[], nn.Module]:
    config = getattr(transformers, f"{name}Config")
    return lambda: getattr(transformers, f"{name}{kind}")(config(**ROBERTA, **more))


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert("Model"),
    "bert, masked": bert("ForMaskedLM"),
    "bert, scored": bert("ForSequenceClassification"),
    "roberta": roberta("Model"),
    "roberta, masked": roberta("ForMaskedLM"),
    "xlm-roberta": roberta("Model", "XLMRoberta"),
    "xlm-roberta, scored": roberta("ForSequenceClassification", "XLMRoberta"),
    "distilbert": lambda: transformers.DistilBertModel(transformers.DistilBertConfig(**DISTILBERT)),
    "qwen3": lambda: transformers.Qwen3Model(transformers.Qwen3Config(**QWEN)),
    "qwen3, head": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN)),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(
            vocab_size=101, n_layer=2, n_head=4, n_embd=32, n_positions=64, bos_token_id=None, eos_token_id=None
        )
    ),
}
SCORED: dict[str, Callable[[], nn.Module]] = {
    "bert": bert("ForSequenceClassification", num_labels=1),
    "bert, labels": bert("ForSequenceClassification", num_labels=3),
    "roberta": roberta("ForSequenceClassification", num_labels=1),
    "xlm-roberta": roberta("ForSequenceClassification", "XLMRoberta", num_labels=1),
}


def made(make: Callable[[], nn.Module]) -> Any:
    """A model whose biases and norms too have random values."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(-0.5, 0.5)
                if "bias" not in name:
                    weight.add_(1.0)
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in any vector, over the largest value there."""
    return float(((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).detach().max())


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(5, 101, (2, 50), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", TRUNKS.values(), ids=TRUNKS.keys())
def test_hidden_states_agree_whatever_stands_behind_them(
    make: Callable[[], nn.Module], tokens: Tensor, tmp_path: Path
) -> None:
    theirs = made(make)
    theirs.save_pretrained(tmp_path)
    expected = theirs(tokens, output_hidden_states=True).hidden_states[-1]
    assert relative_error(load_trunk(tmp_path).hidden(tokens), expected) <= LIMIT


@pytest.mark.parametrize("make", SCORED.values(), ids=SCORED.keys())
def test_scores_agree_and_survive_our_files(make: Callable[[], nn.Module], tokens: Tensor, tmp_path: Path) -> None:
    theirs = made(make)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_encoder(tmp_path / "theirs")
    expected = theirs(tokens).logits
    assert ours(tokens).shape == (2, ours.config.num_labels)
    torch.testing.assert_close(ours(tokens), expected, rtol=LIMIT, atol=LIMIT)
    save_model(ours, tmp_path / "ours")
    assert load_config(tmp_path / "ours") == ours.config
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    weights = theirs.state_dict()
    assert back.state_dict().keys() == weights.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_segments_are_told_apart(name: str, tokens: Tensor, tmp_path: Path) -> None:
    theirs = made(SCORED[name])
    theirs.save_pretrained(tmp_path)
    types = (torch.arange(50) > 20).long().expand(2, -1) * (theirs.config.type_vocab_size - 1)
    ours = load_encoder(tmp_path)(tokens, types_BT=types)
    torch.testing.assert_close(ours, theirs(tokens, token_type_ids=types).logits, rtol=LIMIT, atol=LIMIT)


def test_masked_tokens_of_a_roberta_agree(tokens: Tensor, tmp_path: Path) -> None:
    theirs = made(TRUNKS["roberta, masked"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_encoder(tmp_path / "theirs")
    assert relative_error(ours(tokens), theirs(tokens).logits) <= LIMIT
    save_model(ours, tmp_path / "ours")
    back = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_a_bare_encoder_survives_our_files(name: str, tokens: Tensor, tmp_path: Path) -> None:
    made(TRUNKS[name]).save_pretrained(tmp_path / "theirs")
    ours = load_trunk(tmp_path / "theirs")
    assert isinstance(ours, Encoder)
    save_model(ours, tmp_path / "ours")
    assert load_config(tmp_path / "ours") == ours.config
    assert torch.equal(load_encoder(tmp_path / "ours")(tokens), ours(tokens))
    back = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert relative_error(ours(tokens), back(tokens).last_hidden_state) <= LIMIT


def test_a_trunk_is_still_read_whole(tmp_path: Path) -> None:
    made(TRUNKS["bert, scored"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.bias"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match="is missing"):
        load_trunk(tmp_path)
    save_file(
        {**weights, "bert.encoder.layer.2.output.dense.bias": weights[name].clone()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointMismatch, match="is not used"):
        load_trunk(tmp_path)


def test_entries_that_make_no_model_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="BertForTokenClassification"):
        ModelConfig.from_hf({**BERT, "model_type": "bert", "architectures": ["BertForTokenClassification"]})
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        ModelConfig.from_hf({**ROBERTA, "model_type": "roberta", "max_position_embeddings": 2})
    with pytest.raises(ConfigError, match="pad_token_id"):
        ModelConfig.from_hf({**ROBERTA, "model_type": "roberta", "pad_token_id": -1})
    with pytest.raises(UnsupportedModel, match="sinusoidal"):
        ModelConfig.from_hf({**DISTILBERT, "model_type": "distilbert", "sinusoidal_pos_embds": True})
    with pytest.raises(ConfigError, match="offset"):
        PositionConfig("rope", offset=2)
    with pytest.raises(ConfigError, match="offset"):
        PositionConfig("learned", offset=-1)
    shape = ModelConfig.from_hf({**BERT, "model_type": "bert"})
    with pytest.raises(ConfigError, match="num_labels"):
        ModelConfig(**{**vars(shape), "task": "scored"})
    with pytest.raises(ConfigError, match="num_labels"):
        ModelConfig(**{**vars(shape), "num_labels": 2})
    with pytest.raises(ConfigError, match="'pooled' or 'scored'"):
        Encoder(ModelConfig(**{**vars(shape), "task": "hidden"})).pooled(torch.zeros(1, 32))
