"""The same greedy tokens, whatever the engine does with a request on the way, for every architecture it serves.

The reference is transformers' own `generate` on the same files, one request at a time. Then: alone, in a batch, in
chunks of several sizes, on a cached prefix, preempted, and with both kinds of speculation; on the processor's own
kernels, where they serve the architecture, and by torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sihe.core.clock import FakeClock
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.draft import load_proposer
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.ports import NoObserver, StepStats
from sihe.serving.engine.runner import ModelRunner
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.types import GenerationRequest
from support.tiny_models import tiny_tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CLASSIC = {"vocab_size": 320, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 160, "bos_token_id": None}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=16)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=24)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, **MIXTURE)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**CLASSIC, eos_token_id=None)),
}
ANSWER = 24


@dataclass(frozen=True)
class Known:
    """A model folder and what transformers says to each prompt."""

    folder: Path
    prompts: list[tuple[int, ...]]
    answers: list[tuple[int, ...]]


def prompts() -> list[tuple[int, ...]]:
    """Of many lengths, most of them with one beginning; the last ones repeat themselves."""
    source = random.Random(0)
    shared = tuple(source.randrange(5, 300) for _ in range(48))
    own = [tuple(source.randrange(5, 300) for _ in range(size)) for size in (1, 15, 16, 40)]
    return [own[0], own[1], shared, *(shared + tail for tail in own), own[3][:10] * 4]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(11)
    model = ARCHITECTURES[request.param]().eval()
    with torch.no_grad():  # far from ties, and from the symmetries of fresh weights
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 * weight.shape[-1] ** -0.5)
            else:
                weight.uniform_(-0.5, 0.5)
                weight.add_(0.0 if "bias" in name else 1.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    answers = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False, pad_token_id=0
        )
        answers.append(tuple(whole[0, len(prompt) :].tolist()))
    return Known(folder, prompts(), answers)


@pytest.fixture(params=["kernels", "torch"])
def compute(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way steps are computed; `kernels` is torch, too, for an architecture that they leave out."""
    if request.param == "torch":
        monkeypatch.setattr("sihe.serving.engine.runner.is_supported", lambda _: False)
    return str(request.param)


class Watch(NoObserver):
    """Adds up what the steps say."""

    def __init__(self) -> None:
        self.hits = self.preempted = self.drafted = self.accepted = 0

    def on_step(self, stats: StepStats) -> None:
        self.hits += stats.hit_tokens
        self.preempted += stats.preempted
        self.drafted += stats.drafted_tokens
        self.accepted += stats.accepted_tokens


def run(known: Known, settings: EngineConfig, *, rounds: int = 1) -> Watch:
    """Asks everything at once, `rounds` times, and compares; what the engine did on the way."""
    watch = Watch()
    runner, tokenizer = ModelRunner.load(known.folder, settings), ModelTokenizer.load(known.folder)
    proposer = load_proposer(settings, tokenizer, runner)
    clock = FakeClock()  # stands still: proposals are free
    with Engine(runner, tokenizer, settings, name="x", proposer=proposer, observer=watch, clock=clock) as engine:
        for _ in range(rounds):
            with engine._changed:  # all of them wait before the first is taken up, however busy the machine is
                streams = [
                    engine.submit(GenerationRequest(prompt=prompt, max_tokens=ANSWER, temperature=0))
                    for prompt in known.prompts
                ]
            for stream, expected in zip(streams, known.answers, strict=True):
                assert stream.result(30).token_ids == expected
        engine.close(drain=True)
        assert engine._pool.num_used == 0
    return watch


@pytest.mark.usefixtures("compute")
def test_alone(known: Known) -> None:
    run(known, EngineConfig(dtype="float32", max_batch_size=1))


@pytest.mark.usefixtures("compute")
@pytest.mark.parametrize("budget", [9, 512])
def test_in_a_batch_and_in_chunks(known: Known, budget: int) -> None:
    run(known, EngineConfig(dtype="float32", max_batch_size=8, token_budget=budget))


@pytest.mark.usefixtures("compute")
def test_on_a_cached_prefix(known: Known) -> None:
    watch = run(known, EngineConfig(dtype="float32", max_batch_size=8, token_budget=64), rounds=2)
    assert watch.hits > 400


@pytest.mark.usefixtures("compute")
def test_preempted(known: Known) -> None:
    """A cache of one context, which all of the prompts together need several times over."""
    block = ModelRunner.load(known.folder, EngineConfig(dtype="float32", max_batch_size=1)).bytes_per_block
    settings = EngineConfig(dtype="float32", max_batch_size=8, token_budget=64, kv_cache_bytes=10 * block)
    assert run(known, settings).preempted > 0


@pytest.mark.usefixtures("compute")
@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_with_speculation(known: Known, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft model is the model itself, so that nearly all is accepted; what random weights say is rarely found."""
    monkeypatch.setattr("sihe.serving.engine.prompt_index._SIZES", (2, 1))  # so that there is anything to propose
    settings = EngineConfig(
        dtype="float32",
        max_batch_size=8,
        token_budget=64,
        speculation=kind,  # type: ignore[arg-type] # one of the literals
        draft_model=str(known.folder) if kind == "draft" else None,
    )
    watch = run(known, settings)
    assert watch.drafted > 20
    assert kind == "ngram" or watch.accepted > 80


@pytest.mark.usefixtures("compute")
def test_preempted_on_cached_prefixes_with_speculation_in_chunks(known: Known) -> None:
    """All at once."""
    block = ModelRunner.load(known.folder, EngineConfig(dtype="float32", max_batch_size=1)).bytes_per_block
    settings = EngineConfig(
        dtype="float32",
        max_batch_size=8,
        token_budget=21,
        speculation="draft",
        draft_model=str(known.folder),
        draft_tokens=3,
        kv_cache_bytes=10 * block,
    )
    watch = run(known, settings, rounds=2)
    assert watch.preempted > 0
    assert watch.accepted > 0
