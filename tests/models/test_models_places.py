"""Who sees whom: windows, documents, both directions; biases on scores; and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sihe.core.errors import ConfigError, TooLarge
from sihe.models.architecture import AttentionConfig, LatentConfig, LayerConfig, PositionConfig, RopeScaling
from sihe.models.checkpoint import load_encoder, load_model, save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.encoder import Encoder
from sihe.models.latent import LatentAttention
from sihe.models.places import positions_in
from sihe.models.transformer import Block

BASE = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=40,
)
CLASSIC = LayerConfig(norm="layer", gated=False, activation="gelu", mlp_bias=True, embedding_norm=True)
LATENT = AttentionConfig(latent=LatentConfig(kv_rank=6, rotary_dim=4, value_dim=5, q_rank=7))
KINDS = {
    "rope": BASE,
    "rope, stretched": replace(BASE, positions=PositionConfig(scaling=RopeScaling("yarn", 4.0, 10))),
    "rope, dynamic": replace(BASE, positions=PositionConfig(scaling=RopeScaling("dynamic", 4.0, 10))),
    "learned": replace(BASE, positions=PositionConfig("learned")),
    "sinusoidal": replace(BASE, positions=PositionConfig("sinusoidal"), layers=replace(CLASSIC, norm_first=False)),
    "relative": replace(BASE, positions=PositionConfig("relative", buckets=8, max_distance=10)),
    "alibi": replace(BASE, positions=PositionConfig("alibi"), layers=CLASSIC),
    "none": replace(BASE, positions=PositionConfig("none"), attention=AttentionConfig(qkv_bias=True, qk_norm=True)),
    "latent": replace(BASE, num_kv_heads=4, attention=LATENT),
    "window": replace(BASE, attention=AttentionConfig(window=7)),
    "mixture": replace(BASE, num_experts=4, experts_per_token=2, router_balance="none"),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    return strong(Decoder(request.param))


def strong(model: Decoder) -> Decoder:
    """Weights large enough for attention to prefer some places over others."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def tokens_of(time: int, *, batch: int = 2) -> Tensor:
    return torch.randint(61, (batch, time), generator=torch.Generator().manual_seed(1))


def test_weights_are_as_many_as_configured_and_come_back(model: Decoder, tmp_path: Path) -> None:
    config = model.config
    assert sum(weight.numel() for weight in model.parameters()) == config.num_parameters
    assert ModelConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded(tokens_of(20)), model(tokens_of(20)))


def test_no_token_sees_a_later_one(model: Decoder) -> None:
    tokens, changed = tokens_of(20), tokens_of(20)
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


def test_packed_documents_are_as_if_alone(model: Decoder) -> None:
    """Outputs, and gradients through the loss of all of them together."""
    lengths = (5, 1, 9, 10)
    tokens = tokens_of(sum(lengths), batch=1)
    documents = torch.repeat_interleave(torch.tensor([3, -3, 0, 3]), torch.tensor(lengths))
    packed = model(tokens, documents_BT=documents[None])
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-3)
    targets = tokens.roll(-1, dims=1)
    together = torch.autograd.grad(
        model.loss(tokens, targets, documents_BT=documents[None])[0], tuple(model.parameters())
    )
    parts = zip(tokens.split(lengths, dim=1), targets.split(lengths, dim=1), strict=True)
    apart = torch.autograd.grad(sum(model.loss(x, y)[0] for x, y in parts), tuple(model.parameters()))
    for got, expected in zip(together, apart, strict=True):
        assert float((got - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-5


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=3))
def test_positions_begin_anew_in_each_run(documents: list[list[int]]) -> None:
    expected = []
    for row in documents:
        places: list[int] = []
        for at, number in enumerate(row):
            places.append(places[-1] + 1 if at and row[at - 1] == number else 0)
        expected.append(places)
    assert positions_in(torch.tensor(documents)).tolist() == expected


def test_a_window_is_counted_in_tokens() -> None:
    torch.manual_seed(0)
    model = strong(Decoder(replace(BASE, num_layers=1, attention=AttentionConfig(window=7))))
    tokens, changed = tokens_of(20), tokens_of(20)
    changed[:, 3] = (changed[:, 3] + 1) % 61
    moved = (model(tokens) - model(changed)).abs().amax((0, 2)) > 1e-5
    assert moved.tolist() == [3 <= place < 10 for place in range(20)]


def test_an_encoder_sees_both_sides_and_a_window_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = AttentionConfig(causal=False, window=4)
    config = replace(BASE, num_layers=1, attention=shape, task="masked_token", tie_embeddings=False)
    model = Encoder(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    tokens, changed = tokens_of(20), tokens_of(20)
    changed[:, 9] = (changed[:, 9] + 1) % 61
    moved = (model(tokens) - model(changed)).abs().amax((0, 2)) > 1e-5
    assert moved.tolist() == [6 <= place <= 12 for place in range(20)]
    save_model(model, tmp_path)
    assert torch.equal(load_encoder(tmp_path)(tokens), model(tokens))


# ---- against sums written out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relative", "alibi"])
def test_biases_enter_scores_and_take_gradients(kind: str) -> None:
    """Attention with a bias, against its definition, one query and head at a time."""
    torch.manual_seed(0)
    model = strong(Decoder(replace(KINDS[kind], num_kv_heads=2))).double()
    attention = model.blocks[0].attention
    places = model.places.prefix(9, torch.device("cpu"), torch.float64)
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    q, k, v = attention.qkv(x).unflatten(-1, (2, 4, 8)).split([2, 1, 1], dim=3)
    distance = torch.arange(9) - torch.arange(9)[:, None]
    bias_NTS = attention.mix.bias(distance, torch.float64)
    rows = []
    for time in range(9):
        for head in range(4):
            score = (q[:, time, head // 2, head % 2, None] * k[:, : time + 1, head // 2, 0]).sum(-1) / 8**0.5
            weight = (score + bias_NTS[head, time, : time + 1]).softmax(-1)
            rows.append((weight[..., None] * v[:, : time + 1, head // 2, 0]).sum(1))
    expected = attention.out(torch.stack(rows, dim=1).view(2, 9, 32))
    got = attention(x, places)
    torch.testing.assert_close(got, expected)
    direction, inputs = torch.randn_like(got), [x, *attention.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# ---- shares of heads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rope", "relative", "alibi", "none", "latent"])
def test_a_share_of_the_heads_gives_its_share_of_the_sum(kind: str) -> None:
    """As tensor parallelism replaces weights: by the rows of some heads, and the columns of the output alike."""
    torch.manual_seed(0)
    model = strong(Decoder(KINDS[kind]))
    block = model.blocks[0]
    assert isinstance(block, Block)
    places, x = model.places.prefix(9, torch.device("cpu"), torch.float32), torch.randn(2, 9, 32)
    whole = block.attention(x, places)
    total = torch.zeros_like(whole)
    for half in range(2):
        torch.manual_seed(0)
        attention = strong(Decoder(KINDS[kind])).blocks[0].attention
        names = ("q_up", "kv_up") if isinstance(attention, LatentAttention) else ("qkv",)
        for name in names:
            product = attention.get_submodule(name)
            for key, weight in list(product.named_parameters()):
                setattr(product, key, nn.Parameter(weight.detach().chunk(2)[half]))
        attention.out.weight = nn.Parameter(attention.out.weight.detach().chunk(2, dim=1)[half])
        if kind == "alibi":
            attention.mix.bias.slopes_N = attention.mix.bias.slopes_N.chunk(2)[half]
        if kind == "relative":
            attention.mix.bias.table = nn.Parameter(attention.mix.bias.table.detach().chunk(2, dim=1)[half])
        part = attention(x, places)
        total += part - (attention.out.bias if half and attention.out.bias is not None else 0)
    torch.testing.assert_close(total, whole, atol=1e-5, rtol=1e-4)


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_another_attention_cannot_stand_in_for_all(model: Decoder) -> None:
    def attend(layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q_BTNH.shape[2] // x.shape[2], dim=2).transpose(1, 2) for x in (k_BTKH, v_BTKH))
        return nn.functional.scaled_dot_product_attention(q_BTNH.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)

    tokens, config = tokens_of(12), model.config
    if config.positions.kind in ("relative", "alibi") or config.attention.window:
        with pytest.raises(ConfigError, match="another attention can only"):
            model.hidden(tokens, attend=attend)
    else:
        torch.testing.assert_close(model.hidden(tokens, attend=attend), model.hidden(tokens), atol=1e-4, rtol=1e-4)
        with pytest.raises(ConfigError, match="another attention can only"):
            model.hidden(tokens, attend=attend, documents_BT=torch.zeros_like(tokens))


def test_too_long_a_sequence_says_so_whatever_the_positions(model: Decoder) -> None:
    with pytest.raises(TooLarge, match=r"at most 40 tokens .* got 41"):
        model(torch.zeros(1, 41, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"attention": {"window": 0}}, "attention.window"),
        ({"attention": {"causal": "yes"}}, "attention.causal"),
        ({"attention": {"heads": 3}}, "attention"),
        ({"attention": {"latent": {"kv_rank": 3}}}, "attention.latent"),
        ({"attention": {"causal": False}}, "attention.causal"),
        ({"task": "masked_token"}, "attention.causal"),
        ({"task": "sort"}, "task"),
        ({"attention": LATENT}, "attention.latent"),
        (
            {"num_kv_heads": 4, "attention": AttentionConfig(latent=LatentConfig(4, 8, 4))},
            "attention.latent.rotary_dim",
        ),
        ({"attention": {"latent": {"kv_rank": 3, "rotary_dim": 3, "value_dim": 3}}}, "attention.latent.rotary_dim"),
        ({"positions": {"kind": "rotary"}}, "positions.kind"),
        ({"positions": {"kind": "relative", "buckets": 30}}, "positions.buckets"),
        ({"positions": {"kind": "alibi", "scaling": asdict(RopeScaling("linear", 2.0, 10))}}, "positions.scaling"),
        (
            {"positions": {"scaling": {"kind": "yarn", "factor": 0.5, "original_positions": 9}}},
            "positions.scaling.factor",
        ),
        ({"positions": 3}, "positions"),
        ({"layers": {"norm": "batch"}}, "layers.norm"),
        ({"layers": {"activation": "relu"}}, "layers.gated"),
        ({"layers": {"token_types": -1}}, "layers.token_types"),
        ({"layers": asdict(CLASSIC), "num_experts": 2, "experts_per_token": 1}, "layers.gated"),
    ],
)
def test_what_does_not_go_together_is_named(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**(asdict(BASE) | change))
    assert caught.value.key == key
