"""What the labs on attention, positions, caches and precisions compute, against oracles. Nothing depends on speed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sihe.apps.coach.labs import ab_router, acceptance, dynamic_batch, flash_tiles, kv_growth
from sihe.apps.coach.labs.acceptance_ranks import _one, distributions, redrawn_from_p
from sihe.apps.coach.labs.extrapolation_ranks import _squeezed, losses
from sihe.apps.coach.labs.flash_tiles_ranks import traffic
from sihe.apps.coach.labs.quant_speed_ranks import errors, rounded
from sihe.apps.coach.labs.registry import lab
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.serving.predictive.batching import BatchPolicy

# ---- attn.flash_tiles ------------------------------------------------------------------------------------------------


def test_the_counted_bytes_are_the_formulas() -> None:
    found = traffic(0, 1, lengths=[256, 512], head_dim=32, tile=32)
    assert found["plain_bytes"] == [flash_tiles.plain_bytes(length, 32) for length in (256, 512)]
    assert found["tiled_bytes"] == [flash_tiles.tiled_bytes(length, 32, 32) for length in (256, 512)]
    assert found["doubled_bytes"] == [flash_tiles.tiled_bytes(length, 32, 64) for length in (256, 512)]
    assert found["difference"] < 1e-5
    assert found["fast_bytes"][0] == found["fast_bytes"][1], "the fast memory grew with the length"


def test_every_choice_of_the_tiles_lab_divides_the_shortest_sequence() -> None:
    (tile,) = (parameter for parameter in lab("attn.flash_tiles").parameters if parameter.key == "tile")
    assert all(flash_tiles.sequence_lengths(512)[0] % (2 * int(choice)) == 0 for choice in tile.choices)


# ---- kv.growth -------------------------------------------------------------------------------------------------------


def test_resident_memory_grows_by_the_formula() -> None:
    measured = kv_growth.measure({"tokens": 1024, "layers": 8, "item-bytes": 2}, limit_s=100).values
    for kind in kv_growth.KINDS:
        assert measured[f"{kind}-measured"] == pytest.approx(measured[f"{kind}-modelled"], rel=0.1), kind
    assert measured["mha-modelled"] == 2 * 8 * 16 * 64 * 2 / 1024
    assert measured["one-more"] == pytest.approx(16 * measured["mha-modelled"] / 1024, rel=0.1)
    assert measured["untouched"] < measured["promised"] / 20
    # Published: 128 KiB for Llama-3-8B, 67.5 for DeepSeek-V2.
    assert (measured["llama-token"], measured["deepseek-token"]) == (128, 67.5)


# ---- quant.error_speed -----------------------------------------------------------------------------------------------


def test_rounding_reaches_the_nearest_of_its_levels_and_never_clips() -> None:
    weight = torch.tensor([[-7.0, 3.4, 0.2, 6.6], [0.07, 0.0, -0.01, 0.034]])
    torch.testing.assert_close(rounded(weight, 4, 4)[0], torch.tensor([-7.0, 3.0, 0.0, 7.0]))
    torch.testing.assert_close(rounded(weight, 4, 4)[1], torch.tensor([0.07, 0.0, -0.01, 0.03]))


def test_errors_follow_the_step_of_a_group() -> None:
    found = errors(30.0)
    # s / (sigma sqrt(12)), with the largest of 1,024 normal weights near 3.3 sigma and bf16's step of 2^-8.
    assert found["int8"] == pytest.approx(3.3 / 127 / math.sqrt(12), rel=0.15)
    assert found["int4-row"] == pytest.approx(3.3 / 7 / math.sqrt(12), rel=0.15)
    assert found["bfloat16"] < found["int8"] < found["int4"] < found["int4-row"]
    assert found["int8-outlier"] > 4 * found["int8"], "the outlier did not coarsen its column"
    assert found["int8-tensor-outlier"] > 2 * found["int8-outlier"]


# ---- pos.extrapolation -----------------------------------------------------------------------------------------------


def test_squeezed_positions_are_those_that_were_trained() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(256, 16, 1, 2, 2, 8, 32, 64)).eval()
    tokens = torch.randint(256, (1, 8))
    with torch.no_grad():  # every fourth place of the long window is a place of the short one
        torch.testing.assert_close(_squeezed(model, 8, 32)(tokens, 4 * torch.arange(8)[None]), model(tokens))
    assert _squeezed(model, 8, 8) is model


def test_ranks_share_the_kinds_and_lengths_are_judged_at_the_same_places(tmp_path: Path) -> None:
    file = tmp_path / "text.md"
    file.write_text("the same words again and again, " * 400)
    found = losses(1, 2, files=[str(file)], kinds=["rope", "none"], lengths=[64, 128], steps=40)
    assert list(found) == ["none"]
    assert all(0 < loss < math.log(256) for loss in found["none"])


# ---- spec.acceptance -------------------------------------------------------------------------------------------------


def test_the_rule_keeps_as_much_as_the_distributions_overlap_and_the_wrong_one_is_wrong() -> None:
    p, q, logits = distributions(0.7)
    overlap = torch.minimum(p, q).sum().item()
    generator = torch.Generator().manual_seed(0)
    kept = [len(_one(logits, q, 1, generator, seed=seed)[1]) - 1 for seed in range(200)]
    assert sum(kept) / 200 == pytest.approx(overlap, abs=4 * math.sqrt(overlap * (1 - overlap) / 200))
    torch.testing.assert_close(redrawn_from_p(p, p), p)
    wrong = redrawn_from_p(p, q)
    assert wrong.sum().item() == pytest.approx(1)
    assert (wrong - p).abs().sum() > 0.1


def test_tokens_of_a_pass_are_a_geometric_sum() -> None:
    assert acceptance.tokens_per_pass(0.8, 4) == pytest.approx(sum(0.8**power for power in range(5)))
    assert acceptance.tokens_per_pass(1, 4) == 5


# ---- batch.dynamic ---------------------------------------------------------------------------------------------------

COSTS = {1: 1.0, 2: 1.2, 4: 1.6, 8: 2.4}


def test_without_batches_the_queue_is_that_of_one_server() -> None:
    times = dynamic_batch.arrivals(0.7, 500)
    free, waits = 0.0, []
    for time in times:  # Lindley's recursion
        free = max(free, time) + 1.0
        waits.append(free - time)
    served = dynamic_batch.serve(BatchPolicy(1, 0.0, adaptive=False), times, COSTS)
    assert served.mean_s == pytest.approx(sum(waits) / len(waits))
    assert served.mean_batch == 1


def test_a_fixed_delay_is_paid_by_a_lone_caller_and_batches_form_under_load() -> None:
    fixed = dynamic_batch.serve(BatchPolicy(8, 3.0, adaptive=False), [100.0 * n for n in range(20)], COSTS)
    assert fixed.mean_s == pytest.approx(3.0 + 1.0)
    loaded = dynamic_batch.serve(BatchPolicy(8, 0.0), dynamic_batch.arrivals(2.0, 500), COSTS)
    alone = dynamic_batch.serve(BatchPolicy(1, 0.0), dynamic_batch.arrivals(2.0, 500), COSTS)
    assert loaded.mean_batch > 2
    assert loaded.p99_s < alone.p99_s / 5
    assert dynamic_batch.cost_of(3, COSTS) == pytest.approx(1.4)


# ---- router.ab -------------------------------------------------------------------------------------------------------


def test_only_those_move_that_a_growing_arm_wins() -> None:
    share, moved, back = ab_router.dealt(0.1, 0.25)
    assert share == pytest.approx(0.1, abs=0.02)
    assert moved == pytest.approx(0.15, abs=0.02)
    assert back == 0


def test_looking_again_finds_more_and_never_less() -> None:
    found = ab_router.replay(20, 10, 400, 0.3, 0.3, seed=1)
    assert found.once_any == sorted(found.once_any)
    assert found.always_any[-1] <= found.once_any[-1]
    certain = ab_router.replay(5, 10, 400, 0.1, 0.9, seed=1)
    assert (certain.once_last, certain.always_any[-1], certain.stopped_at) == (1, 1, 40)
