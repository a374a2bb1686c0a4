"""Pages against plain attention: the same logits however a sequence is cut into steps and wherever its blocks lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sihe.models.architecture import AttentionConfig, PositionConfig, PositionKind
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.score_bias import RelativeBias
from sihe.serving.engine.compute.paged import TorchCompute
from sihe.serving.engine.compute.step import Feed, Step
from sihe.serving.engine.kv.storage import BLOCK_TOKENS, KvPages, blocks_of


def small(window: int | None = None, kv_heads: int = 2, positions: PositionKind = "rope") -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=8,
        intermediate_size=48,
        max_positions=128,
        attention=AttentionConfig(window=window),
        positions=PositionConfig(positions),
    )
    model = Decoder(config).eval().requires_grad_(False)
    for bias in model.modules():
        if isinstance(bias, RelativeBias):
            bias.table.normal_()  # fresh ones hardly matter
    return model


def fed(compute: TorchCompute, tokens: Sequence[int], blocks: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    """Logits of every token when they are fed in the chunks that `cuts` end."""
    logits, start = [], 0
    for end in (*cuts, len(tokens)):
        feed = Feed(tokens[start:end], start, blocks[: blocks_of(end)], num_logits=end - start)
        logits.append(compute.forward(Step.of([feed])).clone())
        start = end
    return torch.cat(logits)


@pytest.mark.parametrize("positions", ["rope", "alibi", "relative"])
@pytest.mark.parametrize(("window", "kv_heads"), [(None, 4), (None, 1), (5, 2), (20, 2)])
def test_a_sequence_cut_into_steps_gives_the_logits_of_the_whole(
    window: int | None, kv_heads: int, positions: PositionKind
) -> None:
    model = small(window, kv_heads, positions)
    tokens = torch.randint(97, (50,)).tolist()
    compute = TorchCompute(model, KvPages(model.config, num_blocks=9, dtype=torch.float32))
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]))[0]
    torch.testing.assert_close(fed(compute, tokens, [7, 2, 5, 0], [1, 2, 19, 33, 49]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["rope", "alibi", "relative"])
def test_feeds_of_different_lengths_share_a_step(positions: PositionKind) -> None:
    model = small(positions=positions)
    compute = TorchCompute(model, KvPages(model.config, num_blocks=16, dtype=torch.float32))
    rows = [torch.randint(97, (length,)).tolist() for length in (40, 17, 3, 25)]
    blocks = [[0, 3, 6], [1, 4], [2], [15, 9]]
    for tokens, table in zip(rows[:3], blocks[:3], strict=True):
        fed(compute, tokens[:-1], table, [])
    feeds = [Feed(tokens[-1:], len(tokens) - 1, table) for tokens, table in zip(rows[:3], blocks[:3], strict=True)]
    feeds.insert(1, Feed(rows[3], 0, np.array(blocks[3], np.int32), num_logits=2))
    with torch.inference_mode():
        alone = [model(torch.tensor([tokens]))[0] for tokens in rows]
    expected = torch.stack([alone[0][-1], alone[3][-2], alone[3][-1], alone[1][-1], alone[2][-1]])
    torch.testing.assert_close(compute.forward(Step.of(feeds)), expected, atol=1e-5, rtol=1e-4)


def test_a_copied_block_serves_as_the_first_one() -> None:
    model = small()
    pages = KvPages(model.config, num_blocks=4, dtype=torch.float32)
    compute = TorchCompute(model, pages)
    tokens = torch.randint(97, (BLOCK_TOKENS + 1,)).tolist()
    expected = fed(compute, tokens, [0, 1], [BLOCK_TOKENS])[-1:]
    pages.copy(0, 3)
    torch.testing.assert_close(compute.forward(Step.of([Feed(tokens[-1:], BLOCK_TOKENS, [3, 2])])), expected)
