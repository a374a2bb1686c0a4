"""The reference library is the oracle: logits and gradients on random weights, through both libraries' files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sihe.models.checkpoint import load_model, save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

SHAPES = {
    "multi-head, tied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "grouped, untied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "one key head, tied": {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide heads, grouped": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
LIMIT = 1e-4  # of the promise; measured errors are below 1e-5


def reference(shape: dict[str, object]) -> torch.nn.Module:
    """A transformers Llama with weights far from their small initial values, norms included."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{
                "vocab_size": 211,
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_hidden_layers": 3,
                "max_position_embeddings": 256,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
                "rms_norm_eps": 1e-5,
                "initializer_range": 0.15,
                **shape,
            }
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model.eval()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference at any position, over the largest logit there."""
    return float(((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max())


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def theirs(request: pytest.FixtureRequest) -> torch.nn.Module:
    return reference(request.param)


@pytest.fixture
def ours(theirs: torch.nn.Module, tmp_path: Path) -> Decoder:
    theirs.save_pretrained(tmp_path / "theirs")
    return load_model(tmp_path / "theirs")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(211, (3, 200), generator=torch.Generator().manual_seed(1))


def test_logits_agree_on_their_files(ours: Decoder, theirs: torch.nn.Module, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens).logits) <= LIMIT


def test_logits_agree_on_our_files(tmp_path: Path, tokens: torch.Tensor) -> None:
    for number, tied in enumerate((True, False)):
        config = ModelConfig(
            vocab_size=211,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            intermediate_size=96,
            max_positions=256,
            rope_theta=2e4,
            tie_embeddings=tied,
        )
        torch.manual_seed(number)
        ours = Decoder(config)
        with torch.no_grad():
            for weight in ours.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        folder = tmp_path / str(number)
        save_model(ours, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(theirs).__name__ == "LlamaForCausalLM"
        with torch.no_grad():
            assert relative_error(ours(tokens), theirs(tokens).logits) <= LIMIT


def test_a_model_survives_the_round_trip_through_us(ours: Decoder, theirs: torch.nn.Module, tmp_path: Path) -> None:
    save_model(ours, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_gradients_agree(ours: Decoder, theirs: torch.nn.Module, tokens: torch.Tensor, tmp_path: Path) -> None:
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :50] = -100
    nll, count = ours.loss(inputs, targets)
    (nll / count).backward()
    logits = theirs(inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    assert float((nll / count).detach()) == pytest.approx(float(loss.detach()), rel=1e-5)

    # Gradients go through the checkpoint's own mapping, by being written as if they were weights.
    with torch.no_grad():
        for weight in (*ours.parameters(), *theirs.parameters()):
            weight.copy_(weight.grad)
    save_model(ours, tmp_path / "gradients")
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gradients").state_dict()
    for name, gradient in theirs.state_dict().items():
        difference = float((got[name] - gradient).norm() / gradient.norm())
        assert difference <= LIMIT, f"{name}: {difference}"


def test_bfloat16_stays_near_float32(ours: Decoder, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        exact = ours(tokens[:1, :64])
        rounded = ours.bfloat16()(tokens[:1, :64]).float()
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
