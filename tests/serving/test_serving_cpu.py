"""The CPU's kernels against the decoder itself, and against themselves: the same bits in any company."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from numba import njit
from numba.core.errors import TypingError

from sihe.core.errors import InternalError
from sihe.models.architecture import AttentionConfig, LayerConfig, PositionConfig, RopeScaling
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.serving.engine.compute.cpu import draws, team
from sihe.serving.engine.compute.cpu.compute import CpuCompute
from sihe.serving.engine.compute.cpu.kernels import Code, Kind
from sihe.serving.engine.compute.cpu.layout import lay_out
from sihe.serving.engine.compute.cpu.support import WeightKind
from sihe.serving.engine.compute.cpu.team import SOURCES, _work
from sihe.serving.engine.compute.cpu.warm import compile_kernels
from sihe.serving.engine.compute.cpu.weights import pack, unpack
from sihe.serving.engine.compute.step import Feed, Step
from sihe.serving.engine.kv.storage import KvPages, blocks_of
from sihe.serving.engine.sampler import Draw, sample

LLAMA = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=80,
    max_positions=256,
    tie_embeddings=False,
)


def like(**changes: object) -> ModelConfig:
    return ModelConfig(**{**LLAMA.__dict__, **changes})  # type: ignore[arg-type]


GPT2 = like(
    num_kv_heads=6,
    attention=AttentionConfig(qkv_bias=True, out_bias=True),
    positions=PositionConfig(kind="learned"),
    layers=LayerConfig(norm="layer", gated=False, activation="gelu_tanh", mlp_bias=True),
    tie_embeddings=True,
)
MODELS = {
    "llama": LLAMA,
    "multi-head": like(num_kv_heads=6),
    "multi-query": like(num_heads=14, num_kv_heads=1),
    "wide heads": like(num_heads=2, num_kv_heads=1, head_dim=72),
    "qwen2": like(attention=AttentionConfig(qkv_bias=True)),
    "qwen3": like(attention=AttentionConfig(qk_norm=True), head_dim=16),
    "window": like(attention=AttentionConfig(window=7)),
    "long window": like(attention=AttentionConfig(window=70)),
    "whole panels": like(num_heads=4, num_kv_heads=2, head_dim=16),
    "scaled": like(positions=PositionConfig(scaling=RopeScaling("llama3", 8.0, 32))),
    "gpt2": GPT2,
    # Rows of the last product so long that 140 of them are several blocks of the second cache.
    "long rows": like(intermediate_size=4096, num_layers=1),
    "relu": like(layers=LayerConfig(norm="layer", gated=False, activation="relu")),
    "gelu": like(layers=LayerConfig(norm="rms", gated=False, activation="gelu")),
    "sinusoidal": like(positions=PositionConfig(kind="sinusoidal")),
    "mixtral": like(num_experts=5, experts_per_token=2, expert_intermediate_size=40),
    "shared expert": like(
        num_experts=4, experts_per_token=3, expert_intermediate_size=24, shared_expert_size=40, router_balance="bias"
    ),
}


def decoder(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.copy_(weight * 3 if weight.ndim > 1 else weight + torch.randn_like(weight) * 0.1)
        del name
    return model


@contextmanager
def computing(
    model: Decoder,
    kind: WeightKind = "float32",
    threads: int = 2,
    blocks: int = 40,
    pages: torch.dtype | None = None,
) -> Iterator[CpuCompute]:
    dtype = pages or (torch.float32 if kind == "float32" else torch.bfloat16)
    compute = CpuCompute(
        copy.deepcopy(model), KvPages(model.config, num_blocks=blocks, dtype=dtype), kind, threads=threads
    )
    try:
        yield compute
    finally:
        compute.close()


def fed(compute: CpuCompute, tokens: Sequence[int], blocks: Sequence[int], cuts: Sequence[int] = ()) -> torch.Tensor:
    """Logits of every token when they are fed in the chunks that `cuts` end."""
    logits, start = [], 0
    for end in (*cuts, len(tokens)):
        feed = Feed(tokens[start:end], start, blocks[: blocks_of(end)], num_logits=end - start)
        logits.append(compute.forward(Step.of([feed])).clone())
        start = end
    return torch.cat(logits)


def some_tokens(length: int) -> list[int]:
    return torch.randint(97, (length,)).tolist()


BLOCKS = [7, 2, 11, 0, 5, 9, 1, 14, 3]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_decoders(name: str) -> None:
    model, tokens = decoder(MODELS[name]), some_tokens(140)
    with torch.inference_mode(), computing(model) as compute:
        expected = model(torch.tensor([tokens]))[0]
        torch.testing.assert_close(fed(compute, tokens, BLOCKS), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "int8 pages"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "window", "multi-query", "long rows"])
def test_a_token_has_the_same_bits_in_any_company(name: str, kind: str) -> None:
    model, tokens = decoder(MODELS[name]), some_tokens(140)
    weights = cast(WeightKind, "float32" if kind == "int8 pages" else kind)
    pages = torch.int8 if kind == "int8 pages" else None
    with computing(model, weights, pages=pages) as compute:
        whole = fed(compute, tokens, BLOCKS)
        assert torch.equal(fed(compute, tokens, BLOCKS, [1, 2, 19, 64, 100, 139]), whole)
        assert torch.equal(fed(compute, tokens, [30, *BLOCKS[1:]], list(range(1, 140))), whole)
        # Beside others: 13 sequences decode, one reads its prompt, and one proposes three tokens.
        others = [some_tokens(20 + 3 * row) for row in range(3)]
        feeds = [Feed(other[:-1], 0, [20 + 4 * row + i for i in range(4)], 0) for row, other in enumerate(others)]
        compute.forward(Step.of(feeds))
        feeds = [
            Feed(other[-1:], len(other) - 1, [20 + 4 * row + i for i in range(4)]) for row, other in enumerate(others)
        ]
        own = Feed(tokens[130:134], 130, np.array(BLOCKS, np.int32), num_logits=4)
        prompt = Feed(some_tokens(33), 0, [34, 35, 36])
        beside = compute.forward(Step.of([feeds[0], own, *feeds[1:], prompt])).clone()
        assert torch.equal(beside[1:5], whole[130:134])
        # Whose logits are not wanted is left out of the last layer, and changes nothing.
        assert torch.equal(beside[-1], fed(compute, prompt.tokens, [37, 38, 39])[-1])
    with computing(model, weights, threads=1, pages=pages) as alone:
        assert torch.equal(fed(alone, tokens, BLOCKS), whole)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_of_rows_change_no_bit(name: str, kind: WeightKind) -> None:
    """600 tokens are cut by blocks of rows, with one thread and with two; pieces of up to 150 are cut by panels."""
    model, tokens = decoder(dataclasses.replace(MODELS[name], max_positions=1024)), some_tokens(600)
    blocks = list(range(38))
    with computing(model, kind) as compute:
        whole = fed(compute, tokens, blocks)
        assert torch.equal(fed(compute, tokens, blocks, [150, 300, 450]), whole)
    with computing(model, kind, threads=1) as alone:
        assert torch.equal(fed(alone, tokens, blocks), whole)


def _projected(compute: CpuCompute) -> np.ndarray:
    """What the last product of queries, keys and values has written."""
    program = compute._program
    address, stride = (int(number) for number in program.ops[program.ops[:, 0] == Code.PLACE][-1, 2:4])
    numbers = (ctypes.c_float * (program.rows * stride // 4)).from_address(address)
    return np.ctypeslib.as_array(numbers).reshape(program.rows, -1)[:, :128]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("wanted", [(1, 1), (0, 70), (1, 0)])
def test_queries_that_nobody_reads_are_spared(wanted: tuple[int, int], kind: WeightKind) -> None:
    config = dataclasses.replace(MODELS["whole panels"], max_positions=512, num_layers=1)
    tokens, others = some_tokens(420), some_tokens(90)
    with computing(decoder(config), kind, blocks=80) as compute:

        def logits(first: int, second: int) -> tuple[torch.Tensor, torch.Tensor]:
            feeds = [Feed(tokens, 0, range(30), num_logits=first), Feed(others, 0, range(40, 50), num_logits=second)]
            rows = compute.forward(Step.of(feeds)).clone()
            return rows[:first], rows[first:]

        every = logits(len(tokens), len(others))
        projected = _projected(compute)
        projected[:] = np.nan
        for some, all_of, count in zip(logits(*wanted), every, wanted, strict=True):
            assert torch.equal(some, all_of[len(all_of) - count :])
        heads = np.isnan(projected[: len(tokens) + len(others)].reshape(-1, 2, 64))  # two queries of 16, a key, a value
        assert not heads[:, :, 32:].any()
        assert heads[:, :, :32].all(axis=(1, 2)).sum() > 200, "blocks of rows of which none is wanted have queries"
        assert logits(len(tokens), len(others))[0].equal(every[0])


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("shape", [(64, 96), (70, 45), (3, 40, 33)])
def test_packed_weights_stand_for_the_matrix(kind: Kind, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape)
    packed = pack(weight, kind)
    restored = unpack(packed)[:, : shape[-2], : shape[-1]].reshape(shape)
    step = {Kind.FLOAT32: 0.0, Kind.BFLOAT16: 2.0**-8, Kind.INT8: 1 / 127, Kind.INT4: 1 / 7}[kind]
    assert (restored - weight).abs().max() <= step * weight.abs().max()
    assert not unpack(packed)[:, shape[-2] :].any()
    if kind is Kind.INT4:  # about 0.1 is what round-to-nearest in groups of 32 gives on a normal matrix
        assert (restored - weight).norm() / weight.norm() < 0.1


@pytest.mark.parametrize(("kind", "tolerance"), [("bfloat16", 0.02), ("int8", 0.04), ("int4", 0.3)])
def test_fewer_bits_stay_near(kind: WeightKind, tolerance: float) -> None:
    model, tokens = decoder(LLAMA), some_tokens(60)
    with torch.inference_mode(), computing(model, kind) as compute:
        expected = model(torch.tensor([tokens]))[0]
        got = fed(compute, tokens, BLOCKS)
    assert (got - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("name", ["llama", "multi-head", "multi-query", "wide heads", "qwen3", "window"])
def test_int8_keys_and_values_stay_near(name: str) -> None:
    model, tokens = decoder(MODELS[name]), some_tokens(140)
    with torch.inference_mode(), computing(model, pages=torch.int8) as compute:
        expected = model(torch.tensor([tokens]))[0]
        got = fed(compute, tokens, BLOCKS, [1, 17, 18, 90])
    assert (got - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("place", ["embedding.weight", "blocks.0.attention.qkv.weight", "blocks.1.mlp.down.weight"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_weight_that_is_not_finite_is_seen_in_the_logits(place: str, kind: WeightKind) -> None:
    model = decoder(LLAMA)
    model.get_parameter(place).view(-1)[5] = torch.nan
    with computing(model, kind) as compute:
        assert not torch.isfinite(fed(compute, [0, 1, 2, 3], BLOCKS)[-1]).any()


@pytest.mark.parametrize("pages", [torch.float32, torch.int8])
def test_what_lies_behind_a_sequence_is_not_read(pages: torch.dtype) -> None:
    model, tokens = decoder(LLAMA), some_tokens(21)
    with computing(model, pages=pages) as compute:
        expected = fed(compute, tokens, [0, 1])
        for numbers in (compute._pages.keys, compute._pages.values):
            numbers.view(torch.uint8).fill_(0xFF)  # NaN as float32, in the scales of int8 too
        assert torch.equal(fed(compute, tokens, [0, 1], [3, 20]), expected)


def test_what_a_step_is_told_grows_and_shrinks_with_it() -> None:
    """More sequences, longer ones and more tokens than ever before, then one alone again, where others' numbers lie."""
    with computing(decoder(LLAMA), blocks=80) as compute:
        alone = compute.forward(Step.of([Feed([1, 2, 3], 0, [70])])).clone()
        tokens = some_tokens(200)
        long = compute.forward(Step.of([Feed(tokens, 0, list(range(13)))])).clone()
        many = [Feed([1, 2, 3], 0, [row]) for row in range(60)]
        both = compute.forward(Step.of([*many, Feed(tokens, 0, list(range(60, 73)))]))
        assert torch.equal(both[:60], alone.expand(60, -1))
        assert torch.equal(both[60:], long)
        assert torch.equal(compute.forward(Step.of([Feed([1, 2, 3], 0, [79])])), alone)


@pytest.mark.parametrize(
    "feed",
    [
        Feed([97], 0, [0]),
        Feed([-1], 0, [0]),
        Feed([1], 0, [40]),
        Feed([1], 16, [0]),
        Feed([1], 256, list(range(17))),
        Feed([1], 0, [0], num_logits=2),
        Feed([1], 0, [0], num_logits=-1),
    ],
)
def test_a_step_that_points_outside_is_refused(feed: Feed) -> None:
    with computing(decoder(LLAMA)) as compute, pytest.raises(InternalError, match="not there"):
        compute.forward(Step.of([feed]))


def test_warming_up_leaves_nothing_to_compile() -> None:
    compile_kernels()
    compiled = (_work, lay_out, draws._draw_rows)
    before = [len(function.signatures) for function in compiled]
    with computing(decoder(LLAMA)) as compute:
        logits = fed(compute, [1, 2, 3], BLOCKS)
        sample(logits, [Draw(temperature=1.0, top_k=top_k, top_p=0.9, seed=1, position=0) for top_k in (0, 5, 0)])
    assert [len(function.signatures) for function in compiled] == before


def test_a_kernel_that_does_not_compile_is_an_error_before_any_thread_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    @njit
    def broken(shared: Any, semaphores: int, helpers: int, scratch: int) -> Any:
        return shared.nothing_of_this_name(semaphores, helpers, scratch)

    monkeypatch.setattr(team, "_work", broken)
    before = threading.active_count()
    with pytest.raises(TypingError, match="nothing_of_this_name"):
        team.Team(2)
    assert threading.active_count() == before


def test_kernels_are_compiled_again_when_any_of_their_sources_changes() -> None:
    """What is kept on disk goes by `SOURCES`: every function that is compiled in must come from one of them."""
    found, left = set(), [_work.py_func]
    while left:
        function = left.pop()
        found.add(function.__module__)
        for name in function.__code__.co_names:
            called = getattr(function.__globals__.get(name), "py_func", None)
            if called is not None and called.__module__.startswith("sihe."):
                left.append(called)
    assert found <= {module.__name__ for module in SOURCES}
    assert sys.modules["sihe.core.simd"] in SOURCES  # what tiles are written with
    assert {"kernels", "attention", "team"} <= {name.rsplit(".")[-1] for name in found}
