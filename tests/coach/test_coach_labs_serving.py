"""What the labs on attention, positions, caches and precisions compute, against oracles. Nothing depends on speed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sihe.apps.coach.labs import flash_tiles, kv_growth
from sihe.apps.coach.labs.extrapolation_ranks import _squeezed, losses
from sihe.apps.coach.labs.flash_tiles_ranks import traffic
from sihe.apps.coach.labs.quant_speed_ranks import errors, rounded
from sihe.apps.coach.labs.registry import lab
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder

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
