"""An encoder in bytes: near float32 by measurement, and the same bits alone and in a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional

from sihe.core.errors import ConfigError
from sihe.models.encoder import Encoder
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder import kernels, quantised
from sihe.serving.engine.encoder.engine import EncoderEngine
from sihe.serving.engine.encoder.quantised import ByteTrunk, is_faster, widen_worst
from sihe.serving.engine.encoder.runner import EncoderRunner
from sihe.serving.engine.encoder.types import Document, Floats
from support.encoding import SETTINGS
from support.tiny_encoders import tiny_decoder_embedder, tiny_embedder, tiny_reranker


@pytest.fixture(scope="module")
def in_bytes(embedder_folder: Path) -> EncoderRunner:
    """The embedder with its products in bytes, whatever is faster here."""
    runner = EncoderRunner.load(embedder_folder, SETTINGS)
    assert isinstance(runner.trunk, Encoder)
    runner.in_bytes = ByteTrunk(runner.trunk)
    return runner


def documents(*lengths: int) -> list[Document]:
    generator = np.random.default_rng(sum(lengths))
    return [Document(generator.integers(200, size=length).tolist()) for length in lengths]


def test_bytes_give_nearly_the_same_vectors(in_bytes: EncoderRunner, embedder_folder: Path) -> None:
    texts = documents(3, 60, 17, 1, 17, 30)
    exact = EncoderRunner.load(embedder_folder, SETTINGS).encode(texts, [0] * 6)
    assert float((exact * in_bytes.encode(texts, [0] * 6)).sum(1).min()) > 0.995


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=12))
def test_bytes_give_the_same_bits_alone_and_batched(in_bytes: EncoderRunner, lengths: list[int]) -> None:
    texts = documents(*lengths)
    together = in_bytes.encode(texts, [0] * len(texts))
    for text, row in zip(texts, together, strict=True):
        assert np.array_equal(row, in_bytes.encode([text], [0])[0])


def test_kernels_agree_with_torch() -> None:
    generator = np.random.default_rng(0)
    y = generator.normal(scale=3, size=(7, 96)).astype(np.float32)
    y[3] = 0
    scales, lows = np.full(7, 0.5, np.float32), np.full(7, -0.25, np.float32)
    sums, bias, factors = generator.normal(size=(3, 96)).astype(np.float32)
    before = torch.from_numpy(y * 0.5 - 0.25 * sums + bias)
    codes = np.empty(y.shape, np.uint8)

    def read(scales: Floats, lows: Floats) -> torch.Tensor:
        assert (codes.min(1) == 0).all()
        assert (codes.max(1) >= 254).all()
        return torch.from_numpy(codes * scales[:, None] + lows[:, None])

    def near(codes: torch.Tensor, expected: torch.Tensor, scales: Floats) -> None:
        assert ((codes - expected).abs() <= torch.from_numpy(scales)[:, None] * 0.51 + 1e-5).all()

    s, w = scales.copy(), lows.copy()
    kernels.gelu_to_bytes(y.copy(), s, w, sums, bias, factors, codes)
    near(read(s, w), functional.gelu(before) * torch.from_numpy(factors), s)
    s, w, x = scales.copy(), lows.copy(), generator.normal(size=(7, 96)).astype(np.float32)
    weight, shift = generator.normal(size=(2, 96)).astype(np.float32)
    expected = functional.layer_norm(
        torch.from_numpy(x) + before, (96,), torch.from_numpy(weight), torch.from_numpy(shift), 1e-5
    )
    kernels.add_norm_to_bytes(y.copy(), s, w, sums, bias, x, weight, shift, np.float32(1e-5), factors, codes)
    torch.testing.assert_close(torch.from_numpy(x), expected, rtol=1e-4, atol=1e-5)
    near(read(s, w), expected * torch.from_numpy(factors), s)
    plain = y.copy()
    kernels.gelu(plain, scales, lows, sums, bias)
    torch.testing.assert_close(torch.from_numpy(plain), functional.gelu(before), rtol=1e-4, atol=1e-5)
    plain = y.copy()
    kernels.scaled(plain, scales, lows, sums, bias)
    torch.testing.assert_close(torch.from_numpy(plain), before, rtol=1e-5, atol=1e-5)


def test_what_is_no_number_stays_none_in_bytes(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][150, 3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    runner = EncoderRunner.load(folder, SETTINGS)
    assert isinstance(runner.trunk, Encoder)
    runner.in_bytes = ByteTrunk(runner.trunk)
    rows = runner.encode([Document([5, 6]), Document([5, 150])], [0, 0])
    assert np.isfinite(rows[0]).all()
    assert not np.isfinite(rows[1]).any()


def test_products_that_cost_too_much_stay_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "is_faster", lambda *_: True)
    texts = documents(3, 60, 17, 1, 17, 30)
    for kind in (tiny_embedder, tiny_reranker):
        folder = kind(tmp_path / kind.__name__)
        rough, better = (EncoderRunner.load(folder, SETTINGS) for _ in range(2))
        monkeypatch.setattr(quantised, "LEAST_COSINE", 0.0)
        lowest = rough.quantise()
        assert lowest is not None
        wanted = lowest + 0.2 * (1 - lowest)
        monkeypatch.setattr(quantised, "LEAST_COSINE", wanted)
        assert (better.quantise() or 0.0) >= wanted
        assert rough.in_bytes is not None
        assert better.in_bytes is not None
        assert rough.in_bytes.wide == []
        assert better.in_bytes.wide, "bytes alone do not come so near"
        exact = EncoderRunner.load(folder, SETTINGS).encode(texts, [0] * 6)
        far, near = (np.abs(one.encode(texts, [0] * 6) - exact).mean() for one in (rough, better))
        assert near < far


def test_as_few_stay_in_float32_as_it_takes(embedder_folder: Path) -> None:
    trunk = EncoderRunner.load(embedder_folder, SETTINGS).trunk
    assert isinstance(trunk, Encoder)

    def settled(costs: dict[tuple[int, int], float]) -> tuple[list[tuple[int, int]], float]:
        in_bytes = ByteTrunk(trunk)
        lowest = widen_worst(
            in_bytes,
            lambda: np.float32([1 - sum(cost for place, cost in costs.items() if place not in in_bytes.wide)]),
        )
        return in_bytes.wide, round(lowest, 4)

    assert settled({(0, 3): 0.0003, (1, 3): 0.0002}) == ([], 0.9995)
    assert settled({(0, 3): 0.0004, (1, 3): 0.0006}) == ([(1, 3)], 0.9996)
    assert settled({(0, 3): 0.0008, (1, 3): 0.0009}) == ([(0, 3), (1, 3)], 1.0)
    assert settled({(0, 2): 0.0009, (1, 3): 0.0009}) == ([(0, 2), (0, 3), (1, 3)], 1.0)
    assert settled({(0, 0): 0.01})[1] == 0.99, "no more can be done: whoever asks must do without bytes"


def test_a_model_that_bytes_would_change_stays_in_float32(
    embedder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "is_faster", lambda *_: True)
    monkeypatch.setattr(quantised, "widen_worst", lambda *_: 0.9)
    runner = EncoderRunner.load(embedder_folder, EngineConfig(dtype="int8"))
    assert runner.in_bytes is None
    exact = EncoderRunner.load(embedder_folder, SETTINGS)
    assert np.array_equal(runner.encode(documents(5), [0]), exact.encode(documents(5), [0]))


def test_int8_is_taken_where_it_is_faster_and_says_what_it_costs(
    embedder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for faster in (True, False):
        monkeypatch.setattr("sihe.serving.engine.encoder.quantised.is_faster", lambda *_, answer=faster: answer)
        runner = EncoderRunner.load(embedder_folder, EngineConfig(dtype="int8"))
        assert (runner.in_bytes is not None) == faster
        assert runner.encode(documents(5), [0]).shape == (1, 32)
    with pytest.raises(ConfigError, match="int8 is for BERT"):
        EncoderEngine.load(tiny_decoder_embedder(tmp_path), EngineConfig(dtype="int8"))
    with pytest.raises(ConfigError, match="int4 for models that generate"):
        EncoderEngine.load(embedder_folder, EngineConfig(dtype="int4"))


def test_which_is_faster_is_measured(in_bytes: EncoderRunner) -> None:
    assert isinstance(in_bytes.trunk, Encoder)
    assert in_bytes.in_bytes is not None
    assert is_faster(in_bytes.trunk, in_bytes.in_bytes) in (True, False)
