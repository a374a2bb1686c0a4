"""The mixture of experts against a loop over experts, against transformers' Mixtral, and what keeps it balanced."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sihe.core.errors import ConfigError
from sihe.models.checkpoint import load_model, save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.moe import MixtureOfExperts, balance_loss, mixtures, replayed

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_positions=40,
    num_experts=5,
    experts_per_token=2,
)
LIMIT = 1e-4


def mixture(seed: int = 0, **changes: object) -> MixtureOfExperts:
    torch.manual_seed(seed)
    made = MixtureOfExperts(replace(CONFIG, **changes)).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(std=0.5)
    return made


def tokens_of(count: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count // 2, 16, dtype=torch.float64, generator=generator, requires_grad=True)


def by_a_loop(moe: MixtureOfExperts, x_BTD: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Each expert over all tokens, weighed by zero where it was not chosen; drops the last in order of preference."""
    x_MD = x_BTD.flatten(0, 1)
    p_ME = (x_MD @ moe.router.weight.T).softmax(-1)
    chosen_Mk = (p_ME if bias_E is None else p_ME + bias_E).argsort(dim=1, descending=True)[:, : moe.experts_per_token]
    total_M1 = p_ME.gather(1, chosen_Mk).sum(1, keepdim=True)
    limit = len(x_MD) if moe.capacity_factor is None else moe.capacity_factor * chosen_Mk.numel() / moe.num_experts
    y_MD = torch.zeros_like(x_MD)
    for expert in range(moe.num_experts):
        kept_M = torch.zeros(len(x_MD), dtype=torch.bool)
        for rank in range(moe.experts_per_token):
            for token in range(len(x_MD)):
                if chosen_Mk[token, rank] == expert and int(kept_M.sum()) < limit:
                    kept_M[token] = True
        gate, up = moe.gate_up[expert]
        y = (functional.silu(x_MD @ gate.T) * (x_MD @ up.T)) @ moe.down[expert].T
        y_MD = y_MD + y * (p_ME[:, expert, None] / total_M1) * kept_M[:, None]
    if moe.shared is not None:
        gate, up = moe.shared.gate_up.weight
        y_MD = y_MD + (functional.silu(x_MD @ gate.T) * (x_MD @ up.T)) @ moe.shared.down.weight.T
    return y_MD.view_as(x_BTD)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts_per_token": 1},
        {"experts_per_token": 5},
        {"shared_expert_size": 7, "expert_intermediate_size": 3},
        {"capacity_factor": 0.7},
        {"num_experts": 40},  # many of them without a token
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_a_loop_over_experts(changes: dict[str, object]) -> None:
    moe, x = mixture(**changes), tokens_of(14)
    weights = [x, *moe.parameters()]
    ours, theirs = moe(x), by_a_loop(moe, x)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    got = torch.autograd.grad(ours, weights, direction)
    for mine, expected in zip(got, torch.autograd.grad(theirs, weights, direction), strict=True):
        torch.testing.assert_close(mine, expected)


def test_gradients_against_finite_differences() -> None:
    moe = mixture(num_experts=3, shared_expert_size=2)
    names = [name for name, _ in moe.named_parameters()]
    weights = [weight.detach().requires_grad_() for weight in moe.parameters()]
    assert torch.autograd.gradcheck(
        lambda x, *w: torch.func.functional_call(moe, dict(zip(names, w, strict=True)), x), (tokens_of(6), *weights)
    )


def test_capacity_drops_the_last_and_says_how_many() -> None:
    moe = mixture(experts_per_token=1, capacity_factor=0.5)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2] = 1.0
        x = torch.ones(1, 20, 16, dtype=torch.float64)
        y = moe(x)
    assert moe.dropped == 18  # 20 choices, all for one of 5 experts, whose capacity is half of the mean
    assert moe.load_E is not None
    assert moe.load_E.tolist() == [0, 0, 20, 0, 0]
    assert y[0, :2].any(-1).all()
    assert not y[0, 2:].any()


# ---- expert parallelism underneath ---------------------------------------------------------------------------------


class Halves:
    """Two processes in one: the first holds experts 0 and 1, the second the rest; this is the second's view.

    Rows of the first are worked on in place of being sent.
    """

    def __init__(self, first: MixtureOfExperts) -> None:
        self.first = first
        self.counts: list[int] = []

    def dispatch(self, x_SD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, object]:
        self.counts = counts_E.tolist()
        away = int(counts_E[:2].sum())
        return x_SD[away:], counts_E[2:], x_SD[:away]

    def combine(self, y_RD: Tensor, state: object) -> Tensor:
        assert isinstance(state, Tensor)
        away = self.first._experts(state, torch.tensor(self.counts[:2]))
        return torch.cat([away, y_RD])


def test_an_exchange_moves_rows_to_their_experts() -> None:
    moe, x = mixture(), tokens_of(14)
    expected = torch.autograd.grad(moe(x).square().sum(), [x, moe.gate_up, moe.down, moe.router.weight])
    first, second = mixture(), mixture()
    for half, experts in ((first, slice(0, 2)), (second, slice(2, 5))):
        half.gate_up = torch.nn.Parameter(moe.gate_up[experts].detach())
        half.down = torch.nn.Parameter(moe.down[experts].detach())
    second.exchange = Halves(first)
    loss = second(x).square().sum()
    dx, router = torch.autograd.grad(loss, [x, second.router.weight], retain_graph=True)
    parts = torch.autograd.grad(loss, [first.gate_up, second.gate_up, first.down, second.down])
    for got, want in zip((dx, torch.cat(parts[:2]), torch.cat(parts[2:]), router), expected, strict=True):
        torch.testing.assert_close(got, want)


# ---- balance -------------------------------------------------------------------------------------------------------


def test_balance_is_one_where_all_experts_are_equal_and_larger_where_not() -> None:
    moe = mixture(balance_coefficient=0.5)
    with torch.no_grad():
        moe.router.weight.zero_()
    moe(tokens_of(14))
    even = moe.take_balance()
    assert even is not None
    assert float(even.detach()) == pytest.approx(0.5)
    assert moe.take_balance() is None
    mixture_of_one = mixture(balance_coefficient=0.5, experts_per_token=1)
    with torch.no_grad():
        mixture_of_one.router.weight.zero_()
        mixture_of_one.router.weight[1] = 5.0
    mixture_of_one(torch.ones(1, 6, 16, dtype=torch.float64))
    collapsed = mixture_of_one.take_balance()
    assert collapsed is not None
    assert float(collapsed.detach()) == pytest.approx(0.5 * 5)


def test_the_loss_carries_the_balance_times_the_count_and_only_with_gradients() -> None:
    torch.manual_seed(0)
    model = Decoder(replace(CONFIG, balance_coefficient=0.3))
    batch = torch.randint(61, (3, 11))
    inputs, targets = batch[:, :-1], batch[:, 1:].clone()
    targets[0, :4] = -1
    model.hidden(inputs)
    balance = balance_loss(model.blocks)
    assert balance is not None
    with torch.no_grad():
        plain, _ = model.loss(inputs, targets)
    total, count = model.loss(inputs, targets)
    assert int(count) == 26
    assert float(total.detach()) == pytest.approx(float(plain) + 26 * float(balance.detach()), rel=1e-6)
    assert 0.3 * 2 < float(balance.detach()) < 0.3 * 2 * 5


def test_without_a_balance_loss_there_is_none() -> None:
    for kind in ("none", "bias"):
        model = Decoder(replace(CONFIG, router_balance=kind))
        model.hidden(torch.zeros(1, 4, dtype=torch.long))
        assert balance_loss(model.blocks) is None


def test_the_bias_chooses_and_does_not_weigh() -> None:
    moe, x = mixture(router_balance="bias"), tokens_of(14)
    assert moe.balance_steps is not None
    moe.balance_steps.copy_(torch.tensor([300, -200, 0, 150, -50]))
    expected = by_a_loop(moe, x, bias_E=moe.balance_steps * 1e-3)
    torch.testing.assert_close(moe(x), expected)
    assert not torch.allclose(expected, by_a_loop(moe, x))


def test_the_bias_evens_out_a_skewed_router() -> None:
    moe = mixture(router_balance="bias", experts_per_token=1)
    with torch.no_grad():
        moe.router.weight.mul_(0.05)
    x = tokens_of(400)

    def spread() -> float:
        moe.seen_E = None
        moe(x)
        assert moe.load_E is not None
        return float(moe.load_E.max() / moe.load_E.double().mean())

    before = spread()
    for _ in range(200):
        moe(x)
        moe.update_bias()
    assert spread() < 1.15 < 1.3 < before


def test_a_bias_survives_a_cast() -> None:
    moe = mixture(router_balance="bias")
    assert moe.balance_steps is not None
    moe.balance_steps.fill_(12345)
    assert moe.bfloat16().double().balance_steps.tolist() == [12345] * 5


def test_load_is_counted_once_a_pass() -> None:
    moe, x = mixture(), tokens_of(14)
    moe(x)
    moe(x)
    with torch.no_grad():
        moe(x)
    with replayed():
        moe(x)
    assert moe.load_E is not None
    assert moe.seen_E is not None
    assert int(moe.load_E.sum()) == 28
    assert torch.equal(moe.seen_E, 2 * moe.load_E)


# ---- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"experts_per_token": 6}, "experts_per_token"),
        ({"experts_per_token": 0}, "experts_per_token"),
        ({"num_experts": 0}, "experts_per_token"),
        ({"num_experts": -1}, "num_experts"),
        ({"shared_expert_size": 1.5}, "shared_expert_size"),
        ({"router_balance": "hope"}, "router_balance"),
        ({"balance_coefficient": 0.0}, "balance_coefficient"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(CONFIG, **changes)
    assert caught.value.key == key


MIXTURES = [
    CONFIG,
    replace(CONFIG, router_balance="none"),
    replace(CONFIG, router_balance="bias", capacity_factor=1.25),
    replace(CONFIG, shared_expert_size=8, expert_intermediate_size=10, balance_coefficient=0.2),
]


@pytest.mark.parametrize("config", MIXTURES)
def test_configuration_and_weights_come_back(config: ModelConfig, tmp_path: Path) -> None:
    assert ModelConfig(**json.loads(json.dumps(asdict(config)))) == config
    torch.manual_seed(0)
    model = Decoder(config)
    assert sum(weight.numel() for weight in model.parameters()) == config.num_parameters
    for moe in mixtures(model):
        if moe.balance_steps is not None:
            moe.balance_steps.random_(-9, 9)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_token_meets_only_its_experts() -> None:
    config = replace(CONFIG, shared_expert_size=8)
    assert config.num_parameters - config.num_active_parameters == 2 * 3 * (3 * 16 * 24)
    assert config.flops_per_token(7) == 6 * config.num_active_parameters + 12 * 2 * 16 * 7


# ---- Mixtral -------------------------------------------------------------------------------------------------------


def test_logits_loss_and_gradients_agree_with_mixtral(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    shape = transformers.MixtralConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_local_experts=6,
        num_experts_per_tok=3,
        router_aux_loss_coef=0.2,
        output_router_logits=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.MixtralForCausalLM(shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    tokens = torch.randint(101, (3, 40))
    said = theirs(tokens, labels=tokens)
    logits = ours(tokens)
    error = (logits - said.logits).abs().amax(-1) / said.logits.abs().amax(-1)
    assert float(error.detach().max()) <= LIMIT
    balance = balance_loss(ours.blocks)
    assert balance is not None
    assert float(balance.detach()) * 3 == pytest.approx(
        0.2 * float(said.aux_loss.detach()), rel=1e-5
    )  # their shares sum to 3

    nll = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    (nll + 3 * balance).backward()
    said.loss.backward()
    with torch.no_grad():
        for weight in (*ours.parameters(), *theirs.parameters()):
            weight.copy_(weight.grad)
    save_model(ours, tmp_path / "gradients")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gradients")
    assert type(back).__name__ == "MixtralForCausalLM"
    got = back.state_dict()
    for name, gradient in theirs.state_dict().items():
        assert float((got[name] - gradient).norm() / gradient.norm()) <= LIMIT, name
