"""What the labs compute, against oracles, on small parameters. Nothing here depends on how fast the machine is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sihe.apps.coach.errors import LabFailed
from sihe.apps.coach.labs import allreduce, attention, kvcache, zero
from sihe.apps.coach.labs.attention_ranks import costs, fused_attention, naive_attention
from sihe.apps.coach.labs.kvcache_ranks import Cache, decode
from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.registry import lab, labs
from sihe.apps.coach.labs.runner import result_of
from sihe.apps.coach.labs.timing import peak_bytes
from sihe.apps.coach.labs.types import Measurement
from sihe.core.clock import FakeClock
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder


def test_every_lab_promises_what_its_explanation_names() -> None:
    for found in labs():
        assert found.asks, f"{found.id} asks nothing"
        assert len({claim.key for claim in found.claims}) == len(found.claims)


def test_a_measurement_that_breaks_the_promise_is_an_error() -> None:
    clock = FakeClock()
    found = lab("zero.memory")
    values = {claim.key: 1.0 for claim in found.claims}
    kept = result_of(found, {}, Measurement(values=values), started_at=clock.now(), elapsed_s=0.0)
    assert "{" not in kept.explanation.en + kept.explanation.zh
    del values["stage2-extra"]
    values["phlogiston"] = 1.0
    with pytest.raises(LabFailed, match=r"missing \['stage2-extra'\], unknown \['phlogiston'\]"):
        result_of(found, {}, Measurement(values=values), started_at=clock.now(), elapsed_s=0.0)


# ---- zero.memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "size_gb"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_the_formulas_give_the_papers_example(stage: int, size_gb: float) -> None:
    assert zero.bytes_per_parameter(stage, 64) * 7.5 == pytest.approx(size_gb, rel=0.003)


def test_each_stage_holds_what_the_formula_says() -> None:
    measured = zero.measure({"ranks": 2, "hidden": 64, "blocks": 2}, limit_s=250).values
    for stage in (0, 1, 3):
        assert measured[f"stage{stage}-measured"] == pytest.approx(measured[f"stage{stage}-modelled"], abs=0.01)
    # fully_shard keeps its own shard of the weights (2/N bytes) beside the gathered ones.
    assert measured["stage2-measured"] == pytest.approx(2 + 16 / 2, abs=0.01)
    assert measured["stage2-extra"] == pytest.approx(2 / 2, abs=0.01)
    # Gradients, not losses: Adam would hide a wrong scale.
    assert measured["gradient-difference"] < 0.02


# ---- allreduce.ring --------------------------------------------------------------------------------------------------


def test_the_ring_adds_up_on_three_ranks_even_when_chunks_are_uneven_or_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    sizes = [3072, 7, 2, 1, 1000]
    answers = run_ranks("support.coach_targets:ring_sums", {"sizes": sizes}, world_size=3, limit_s=250)
    assert [answer["wrong"] for answer in answers] == [[], [], []]
    for answer in answers:
        assert answer["sent"][0] == 2 * 2 / 3 * 3072 * 4
    # Whatever the chunks, all ranks together send every byte 2(N − 1) times.
    for index, size in enumerate(sizes):
        assert sum(answer["sent"][index] for answer in answers) == 2 * 2 * size * 4


def test_messages_grow_up_to_the_limit_and_divide_evenly() -> None:
    sizes = allreduce.message_items(1.0)
    assert sizes == [3072, 12288, 49152, 196608]
    assert all(size % 12 == 0 for size in sizes)


# ---- attention.cost --------------------------------------------------------------------------------------------------


def test_both_forms_agree_with_a_loop_over_positions() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = np.zeros((2, 5, 4))
    for head in range(2):
        for position in range(5):
            scores = (k[head, : position + 1] @ q[head, position]).numpy() / 2.0
            weights = np.exp(scores) / np.exp(scores).sum()
            expected[head, position] = weights @ v[head, : position + 1].numpy()
    for form in (naive_attention, fused_attention):
        np.testing.assert_allclose(form(q, k, v).numpy(), expected, rtol=1e-9)


def test_naive_memory_is_quadratic_and_fused_memory_is_not() -> None:
    lengths = [256, 512, 1024]
    taken = costs(0, 1, lengths=lengths, heads=2, head_dim=16)
    assert taken["difference"] < 1e-5
    assert attention.exponent(lengths, taken["naive_bytes"]) == pytest.approx(2.0, abs=0.1)
    assert attention.exponent(lengths, taken["fused_bytes"]) < 1.5
    assert taken["naive_bytes"][-1] >= 2 * attention.score_bytes(1024, 2)


def test_the_peak_is_counted_to_the_byte() -> None:
    def call() -> None:
        first = torch.empty(1000, dtype=torch.float32)
        del first
        torch.empty(500, dtype=torch.float32)

    # The allocator rounds up to its alignment of 64 bytes.
    assert 4000 <= peak_bytes(call) < 4000 + 128


@given(power=st.floats(0.5, 3.0), factor=st.floats(1e-6, 1e6))
def test_the_exponent_of_a_power_law_is_its_power(power: float, factor: float) -> None:
    lengths = [128, 256, 512, 1024]
    assert attention.exponent(lengths, [factor * length**power for length in lengths]) == pytest.approx(power)


def test_lengths_double_and_flops_count_both_products() -> None:
    assert attention.sequence_lengths(1024) == [128, 256, 512, 1024]
    assert attention.attention_flops(10, 3, 8) == 3 * (2 * 10 * 10 * 8 + 2 * 10 * 10 * 8)


# ---- kv.cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_greedy_decoding_is_the_same_with_and_without_a_cache(kv_heads: int) -> None:
    torch.manual_seed(3)
    config = ModelConfig(64, 32, 2, 4, kv_heads, 8, 64, 40)
    model = Decoder(config).eval()
    prompt = torch.randint(64, (1, 9))
    with torch.no_grad():
        plain = prompt
        for _ in range(12):
            plain = torch.cat([plain, model(plain)[:, -1:].argmax(-1)], dim=1)
        cache = Cache(config, 40)
        cached, fed = prompt, prompt
        for _ in range(12):
            positions = torch.arange(cache.length, cache.length + fed.shape[1])[None]
            following = model.logits(model.hidden(fed, positions, cache)[:, -1:]).argmax(-1)
            cache.length += fed.shape[1]
            cached, fed = torch.cat([cached, following], dim=1), following
    assert torch.equal(plain, cached)


def test_the_cache_weighs_what_the_formula_says() -> None:
    taken = decode(0, 1, contexts=[16, 32], kv_heads=[4, 1], layers=2, heads=4, head_dim=8)
    for name, kv_heads in (("full", 4), ("grouped", 1)):
        assert taken[name]["cache_bytes"] == [
            kvcache.cache_bytes(2, kv_heads, 8, tokens, item_bytes=4) for tokens in (16, 32)
        ]
        assert taken[name]["difference"] < 1e-4


def test_the_formula_gives_the_known_size_of_a_large_model() -> None:
    # Llama-3-8B: 128 KiB a token, 1 GiB at 8,192.
    assert kvcache.cache_bytes(32, 8, 128, 1, 2) == 128 * 1024
    assert kvcache.cache_bytes(32, 8, 128, 8192, 2) == 2**30
