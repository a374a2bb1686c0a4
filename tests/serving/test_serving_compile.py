"""A compiled model says what the plain one does, in graphs that are made before the first request."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor.config import patch as patched
from torch._inductor.utils import fresh_cache

from sihe.core.clock import FakeClock
from sihe.core.errors import ConfigError
from sihe.models.architecture import AttentionConfig, LatentConfig, LayerConfig, PositionConfig
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.serving.engine.compute.paged import TorchCompute
from sihe.serving.engine.compute.step import Feed, Step
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.draft import load_proposer
from sihe.serving.engine.encoder.runner import EncoderRunner
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.kv.storage import KvPages, blocks_of
from sihe.serving.engine.runner import ModelRunner
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.types import GenerationRequest
from support.tiny_models import tiny_config, tiny_model

# The compiler's own: it reads autograd functions by making one, and imports what uses torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LATENT = replace(
    tiny_config(max_positions=160, eos=False),
    num_kv_heads=4,
    head_dim=14,
    attention=AttentionConfig(latent=LatentConfig(kv_rank=10, rotary_dim=6, value_dim=5)),
)
ALIBI = replace(
    tiny_config(max_positions=160, eos=False),
    positions=PositionConfig("alibi"),
    layers=LayerConfig(norm="layer", gated=False, activation="gelu_tanh", mlp_bias=True, embedding_norm=True),
)
ARCHITECTURES = {
    "latent": LATENT,
    "alibi": ALIBI,
    "relative, norm last": replace(
        ALIBI, positions=PositionConfig("relative"), layers=replace(ALIBI.layers, norm_first=False)
    ),
    "rotary, mixture": replace(tiny_config(eos=False), num_experts=4, experts_per_token=2, expert_intermediate_size=24),
}
TOKENS = random.Random(0).choices(range(5, 300), k=100)
ANSWER = 16


def prompts() -> list[tuple[int, ...]]:
    """Of many lengths, most of them with one beginning; the last one repeats itself."""
    source = random.Random(1)
    shared, *own = (tuple(source.choices(range(5, 300), k=length)) for length in (48, 1, 15, 16, 40))
    return [own[0], own[1], shared, *(shared + tail for tail in own), own[3][:10] * 4]


def decoder(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """Weights far from ties, and from the symmetries of fresh ones."""
    torch.manual_seed(3)
    model = Decoder(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=2 * weight.shape[-1] ** -0.5)
        else:
            weight.uniform_(-0.5, 0.5).add_(0.0 if "bias" in name else 1.0)
    return model.to(dtype)


def computing(model: Decoder, *, compile: bool) -> TorchCompute:
    pages = KvPages(model.config, num_blocks=24, dtype=model.embedding.weight.dtype)
    return TorchCompute(model, pages, compile=compile)


def num_graphs() -> int:
    """Graphs that this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def chunk(start: int, end: int, first_block: int = 0) -> Feed:
    return Feed(TOKENS[start:end], start, list(range(first_block, first_block + blocks_of(end))), end - start)


STEPS = (
    [chunk(0, 50)],  # the first sees many tokens, as in an engine that warms up
    [chunk(50, 51)],
    [chunk(51, 53)],
    [chunk(53, 54), chunk(0, 7, 8)],
    [chunk(54, 55), chunk(7, 8, 8), chunk(0, 3, 16)],
    [chunk(8, 72, 8)],
    [chunk(55, 100)],
    [chunk(72, 73, 8), chunk(3, 100, 16)],
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_graphs_serve_steps_of_any_size(name: str) -> None:
    model = decoder(ARCHITECTURES[name])
    plain, compiled = computing(model, compile=False), computing(model, compile=True)
    before = num_graphs()
    for feeds in STEPS:
        expected, found = (compute.forward(Step.of(feeds)) for compute in (plain, compiled))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert num_graphs() - before == 2


@pytest.mark.slow
def test_in_bfloat16_it_is_as_near_to_the_exact_logits_as_the_plain_one() -> None:
    config = tiny_config(eos=False)
    exact = computing(decoder(config, torch.bfloat16).float(), compile=False)
    plain, compiled = (computing(decoder(config, torch.bfloat16), compile=compile) for compile in (False, True))
    step = Step.of([chunk(0, 100)])
    expected = exact.forward(step)
    errors = [(compute.forward(step) - expected).square().mean().sqrt() for compute in (plain, compiled)]
    assert 0 < errors[1] < 1.2 * errors[0]


def ask(folder: Path, settings: EngineConfig, *, rounds: int = 1) -> list[tuple[int, ...]]:
    """What a warm engine says to all prompts at once, the last time; serving compiles nothing."""
    runner, tokenizer = ModelRunner.load(folder, settings), ModelTokenizer.load(folder)
    proposer = load_proposer(settings, tokenizer, runner)
    with Engine(runner, tokenizer, settings, name="x", proposer=proposer, clock=FakeClock()) as engine:
        engine.warm()
        warm = num_graphs()
        for _ in range(rounds):
            with engine._changed:  # all of them wait before the first is taken up
                streams = [
                    engine.submit(GenerationRequest(prompt=prompt, max_tokens=ANSWER, temperature=0))
                    for prompt in prompts()
                ]
            answers = [stream.result(60).token_ids for stream in streams]
        assert num_graphs() == warm
        engine.close(drain=True)
        assert engine._pool.num_used == 0
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latent", "alibi"])
def test_greedy_answers_are_those_of_the_plain_engine(name: str, tmp_path: Path) -> None:
    """Alone, in a batch, in chunks, on cached prefixes, preempted and with speculation."""
    folder = tiny_model(tmp_path / "model", config=ARCHITECTURES[name])
    plain = EngineConfig(dtype="float32", max_batch_size=1)
    block = ModelRunner.load(folder, plain).bytes_per_block
    expected = ask(folder, plain)
    assert len(set(expected)) == len(expected)
    settings = EngineConfig(dtype="float32", compile=True, max_batch_size=8)
    assert ask(folder, replace(settings, max_batch_size=1)) == expected
    assert ask(folder, settings) == expected
    assert ask(folder, replace(settings, token_budget=9), rounds=2) == expected
    crowded = replace(settings, token_budget=21, kv_cache_bytes=10 * block, draft_tokens=3)
    assert ask(folder, replace(crowded, speculation="draft", draft_model=str(folder)), rounds=2) == expected


@pytest.mark.slow
def test_what_was_compiled_goes_with_its_model() -> None:
    model = decoder(tiny_config())
    compute = computing(model, compile=True)
    compute.forward(Step.of([chunk(0, 5)]))
    left = weakref.ref(model.blocks[0].attention.qkv.weight)  # type: ignore[union-attr]
    del model, compute
    gc.collect()
    assert left() is None


def test_a_model_of_the_kernels_is_not_compiled(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="own kernels") as raised:
        Engine.load(model_folder, EngineConfig(device="cpu", compile=True))
    assert raised.value.key == "compile"


def test_an_encoder_is_not_compiled(embedder_folder: Path) -> None:
    with pytest.raises(ConfigError, match="generate") as raised:
        EncoderRunner.load(embedder_folder, EngineConfig(compile=True))
    assert raised.value.key == "compile"


def test_the_setting_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="compile is true or false") as raised:
        EngineConfig.from_mapping({"compile": "max-autotune"})
    assert raised.value.key == "compile"


def test_without_a_compiler_loading_says_what_is_missing(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, config=LATENT)
    refused = pytest.raises(ConfigError, match=r"needs.*C\+\+ compiler.*no-such-compiler")
    with fresh_cache(), patched({"cpp.cxx": (None, "no-such-compiler")}), refused as raised:
        Engine.load(folder, EngineConfig(device="cpu", compile=True))
    assert raised.value.key == "compile"
