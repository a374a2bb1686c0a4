"""Attention by tiles against torch's own: values, gradients by our kernels, and the bytes that move."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sihe.core.errors import ConfigError, InvalidInput
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.tiled_attention import TiledAttend, plain, tiled


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- traffic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "q_tile", "k_tile"), [(64, 16, 16), (37, 16, 8), (37, 8, 32), (5, 64, 64), (1, 1, 1)])
def test_tiles_give_what_torch_gives(time: int, q_tile: int, k_tile: int) -> None:
    q, k, v = (drawn(time, 8, seed=seed) * 3 for seed in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    for out, _ in (plain(q, k, v), tiled(q, k, v, q_tile=q_tile, k_tile=k_tile)):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_bytes_are_those_of_the_formula() -> None:
    time, head_dim, tile = 128, 16, 32
    q, k, v = (drawn(time, head_dim, seed=seed) for seed in range(3))
    tiles, row = time // tile, head_dim * 4
    _, traffic = tiled(q, k, v, q_tile=tile, k_tile=tile)
    visits = tiles * (tiles + 1) // 2  # tiles at or under the diagonal
    assert traffic.read_bytes == time * row + visits * 2 * tile * row
    assert traffic.written_bytes == time * row
    assert traffic.fast_bytes == 4 * (4 * tile * head_dim + tile * tile + 2 * tile)
    _, whole = plain(q, k, v)
    assert whole.moved_bytes == 4 * time * row + 4 * time * time * 4


def test_traffic_falls_with_the_tile_and_plain_traffic_grows_with_the_square() -> None:
    moved = {}
    for time in (128, 256, 512):
        q, k, v = (drawn(time, 16, seed=seed) for seed in range(3))
        moved[time] = plain(q, k, v)[1].moved_bytes
        by_tile = [tiled(q, k, v, q_tile=tile, k_tile=16)[1].moved_bytes for tile in (16, 32, 64)]
        assert moved[time] > by_tile[0] > by_tile[1] > by_tile[2]
    assert moved[512] / moved[256] == pytest.approx(4, rel=0.1)


# ---- settings ------------------------------------------------------------------------------------------------------


def test_bad_settings_are_named() -> None:
    for values, key in (({"window": 0}, "attention.window"), ({"tile": 48}, "attention.tile")):
        with pytest.raises(ConfigError) as caught:
            TiledAttend(**values)
        assert caught.value.key == key
    with pytest.raises(InvalidInput, match="head dim"):
        TiledAttend()(0, drawn(1, 4, 2, 24), drawn(1, 4, 2, 24), drawn(1, 4, 2, 24))


# ---- kernels, interpreted in a process of their own: Triton reads the switch when kernels are loaded ---------------


def check_kernels() -> None:
    """Runs in the child."""
    cases = [(1, 37, 4, 2, 32, None), (2, 16, 2, 2, 64, None), (1, 18, 1, 1, 128, None), (1, 1, 1, 1, 16, None),
             (1, 53, 4, 2, 16, 20), (1, 40, 2, 1, 16, 1), (1, 33, 2, 1, 16, 100)]  # fmt: skip
    for batch, time, heads, kv_heads, head_dim, window in cases:
        q = (drawn(batch, time, heads, head_dim, seed=1) * 2).requires_grad_()
        k = drawn(batch, time, kv_heads, head_dim, seed=2).requires_grad_()
        # values come to an attend as a strided part of the fused product
        v = drawn(batch, time, kv_heads, 3, head_dim, seed=3)[:, :, :, 1].requires_grad_()
        weight = drawn(batch, time, heads, head_dim, seed=4)
        got = TiledAttend(window=window, tile=16)(0, q, k, v)
        age = torch.arange(time)[:, None] - torch.arange(time)
        seen = (age >= 0) & (age < (window or time))
        moved = (x.transpose(1, 2) for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(*moved, attn_mask=seen, enable_gqa=True)
        expected = expected.transpose(1, 2)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        ours = torch.autograd.grad((got * weight).sum(), (q, k, v))
        theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
        for mine, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=2e-5)
    torch.manual_seed(0)
    decoder = Decoder(
        ModelConfig(
            vocab_size=31,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            intermediate_size=32,
            max_positions=32,
        )
    )
    tokens = torch.randint(31, (2, 21))
    torch.testing.assert_close(decoder(tokens, attend=TiledAttend(tile=16)), decoder(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # the interpreter runs every program in Python: a minute on a busy machine
def test_kernels_agree_with_torch_forward_and_backward() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'sihe[triton]'")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "kernels agree\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_kernels()
    sys.stdout.write("kernels agree\n")
