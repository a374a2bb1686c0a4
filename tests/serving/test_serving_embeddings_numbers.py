"""What the encoder computes: the reference library's numbers, whatever else is in the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional

from sihe.models.errors import CheckpointMismatch
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder.engine import EncoderEngine
from sihe.serving.engine.encoder.types import EmbeddingRequest, RerankRequest
from sihe.serving.errors import InputTooLong, InvalidRequest
from support.encoding import SETTINGS, TEXTS, embed
from support.tiny_encoders import (
    scrambled,
    tiny_decoder_embedder,
    tiny_embedder,
    tiny_reranker,
    word_tokenizer,
    write_modules,
)

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()


def reference(folder: Path, texts: list[str], pooling: str) -> torch.Tensor:
    """Vectors as the reference library makes them: text by text, so that nothing is padded."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rows = []
    with torch.no_grad():
        for text in texts:
            x_TD = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
            weight_T1 = torch.arange(1, len(x_TD) + 1)[:, None].float()
            rows.append(
                {
                    "cls": lambda x: x[0],
                    "mean": lambda x: x.mean(0),
                    "max": lambda x: x.amax(0),
                    "mean_sqrt_len": lambda x: x.sum(0) / len(x) ** 0.5,
                    "weightedmean": lambda x, w=weight_T1: (x * w).sum(0) / w.sum(),
                    "lasttoken": lambda x: x[-1],
                }[pooling.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")](x_TD)
            )
    return torch.stack(rows)


@pytest.mark.parametrize(
    "pooling",
    [
        "pooling_mode_cls_token",
        "pooling_mode_mean_tokens",
        "pooling_mode_max_tokens",
        "pooling_mode_mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens",
        "pooling_mode_lasttoken",
    ],
)
def test_pooled_vectors_agree(pooling: str, tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    write_modules(folder, pooling, normalise=False)
    with EncoderEngine.load(folder, SETTINGS) as engine:
        ours = torch.from_numpy(embed(engine, *TEXTS))
    torch.testing.assert_close(ours, reference(folder, TEXTS, pooling), rtol=1e-4, atol=1e-5)


def test_a_plain_folder_is_pooled_by_the_mean(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    (folder / "modules.json").unlink()
    with EncoderEngine.load(folder, SETTINGS) as engine:
        ours = torch.from_numpy(embed(engine, *TEXTS))
    expected = functional.normalize(reference(folder, TEXTS, "pooling_mode_mean_tokens"), dim=-1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["RobertaModel", "DistilBertModel", "Qwen3Model"])
def test_other_families_agree(kind: str, tmp_path: Path) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "RobertaModel": {
            "max_position_embeddings": 66,
            "type_vocab_size": 1,
            "intermediate_size": 48,
            "pad_token_id": 0,
        },
        "DistilBertModel": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        "Qwen3Model": {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "intermediate_size": 48,
        },
    }
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} if kind[0] != "D" else {}
    config = getattr(transformers, kind.replace("Model", "Config"))(vocab_size=200, **common, **shapes[kind])
    torch.manual_seed(0)
    scrambled(getattr(transformers, kind)(config), 1).save_pretrained(tmp_path)
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write_modules(tmp_path, "pooling_mode_lasttoken")
    with EncoderEngine.load(tmp_path, SETTINGS) as engine:
        ours = torch.from_numpy(embed(engine, *TEXTS))
    expected = functional.normalize(reference(tmp_path, TEXTS, "pooling_mode_lasttoken"), dim=-1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_window_is_kept(tmp_path: Path) -> None:
    config = transformers.MistralConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        sliding_window=5,
    )
    scrambled(transformers.MistralModel(config), 1).save_pretrained(tmp_path)
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write_modules(tmp_path, "pooling_mode_lasttoken", normalise=False)
    with EncoderEngine.load(tmp_path, SETTINGS) as engine:
        ours = torch.from_numpy(embed(engine, *TEXTS))
    torch.testing.assert_close(ours, reference(tmp_path, TEXTS, "pooling_mode_lasttoken"), rtol=1e-4, atol=1e-5)


def test_dense_layers_agree(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(2, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    sizes = {"in_features": 32, "out_features": 7, "bias": True}
    (folder / "2_Dense/config.json").write_text(json.dumps(sizes))  # Tanh is the library's default
    weights = {"linear.weight": torch.randn(7, 32), "linear.bias": torch.randn(7)}
    save_file(weights, folder / "2_Dense/model.safetensors")
    with EncoderEngine.load(folder, SETTINGS) as engine:
        ours = torch.from_numpy(embed(engine, *TEXTS))
    pooled = reference(folder, TEXTS, "pooling_mode_mean_tokens")
    mapped = torch.tanh(functional.linear(pooled, weights["linear.weight"], weights["linear.bias"]))
    torch.testing.assert_close(ours, functional.normalize(mapped, dim=-1), rtol=1e-4, atol=1e-5)
    save_file({"linear.weight": torch.randn(7, 31)}, folder / "2_Dense/model.safetensors")
    with pytest.raises(CheckpointMismatch):
        EncoderEngine.load(folder, SETTINGS)


def test_scores_agree(reranker: EncoderEngine, tmp_path: Path) -> None:
    folder = tiny_reranker(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours = reranker.submit(RerankRequest("quick fox", tuple(TEXTS))).result(30)
    assert ours.values.shape == (len(TEXTS), 1)
    for text, score in zip(TEXTS, ours.values[:, 0], strict=True):
        pair = word_tokenizer().encode("quick fox", text)
        with torch.no_grad():
            logit = model(torch.tensor([pair.ids]), token_type_ids=torch.tensor([pair.type_ids])).logits
        assert score == pytest.approx(float(torch.sigmoid(logit)), abs=1e-5)
    assert ours.num_tokens == sum(len(word_tokenizer().encode("quick fox", text).ids) for text in TEXTS)


def test_documents_are_cut_where_that_is_asked_for(reranker: EncoderEngine) -> None:
    def score(*documents: str, limit: int | None = None) -> list[float]:
        return [float(x) for x in reranker.submit(RerankRequest("quick", documents, limit)).result(30).values[:, 0]]

    assert score("the quick fox jumps", "dog", limit=2) == pytest.approx(score("the quick", "dog"), abs=1e-6)
    long = "dog " * 100
    with pytest.raises(InputTooLong, match=r"documents\[1\] has \d+ tokens and the model reads 64"):
        score("dog", long)
    assert score("dog", long, limit=20) == pytest.approx(score("dog", "dog " * 20), abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(TEXTS), st.integers(1, 8)), min_size=1, max_size=12))
def test_alone_and_batched_are_the_same_to_a_hundred_thousandth(
    embedder: EncoderEngine, parts: list[tuple[str, int]]
) -> None:
    texts = tuple(" ".join(text.split()[:words]) for text, words in parts)
    together = embed(embedder, *texts)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(row, embed(embedder, text)[0], rtol=0, atol=1e-5)


def test_token_lists_are_taken_as_they_are(embedder: EncoderEngine) -> None:
    ids = tuple(word_tokenizer().encode(TEXTS[0]).ids)
    answer = embedder.submit(EmbeddingRequest((ids, TEXTS[0]))).result(30)
    np.testing.assert_allclose(answer.values[0], answer.values[1], atol=1e-6)
    assert answer.num_tokens == 2 * len(ids)
    with pytest.raises(InvalidRequest, match=r"input\[1\] has token ids of 0 to 199, got 200"):
        embed(embedder, ids, (200,))


def test_fewer_dimensions_have_length_one(embedder: EncoderEngine) -> None:
    whole, cut = embed(embedder, *TEXTS), embed(embedder, *TEXTS, dimensions=5)
    expected = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    assert cut.shape == (len(TEXTS), 5)
    with pytest.raises(InvalidRequest, match="dimensions is at most 32"):
        embed(embedder, "fox", dimensions=33)


def test_prompts_stand_before_texts(tmp_path: Path) -> None:
    folder = tiny_decoder_embedder(tmp_path)
    with EncoderEngine.load(folder, SETTINGS) as engine:
        plain = embed(engine, "find: fox")
        np.testing.assert_allclose(embed(engine, "fox", prompt="query"), plain, atol=1e-6)
        np.testing.assert_allclose(embed(engine, "find: fox", prompt="document"), plain, atol=1e-6)
        with pytest.raises(InvalidRequest, match=r"\(document, query\), got 'absent'"):
            embed(engine, "fox", prompt="absent")


def test_a_prompt_can_be_left_out_of_the_pooling(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    write_modules(folder, "pooling_mode_mean_tokens", normalise=False, include_prompt=False)
    texts = {"prompts": {"query": "lazy dog "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(texts))
    with EncoderEngine.load(folder, SETTINGS) as engine:
        ours = embed(engine, "quick fox")[0]
        (ids_alone,) = engine.tokenizer.texts(["fox"], "input")
        taken = embed(engine, tuple(ids_alone.tokens))[0]  # no prompt stands before token ids
        engine.warm()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ids = word_tokenizer().encode("lazy dog quick fox").ids
    prompt = len(word_tokenizer().encode("lazy dog ").ids) - 1  # as sentence-transformers counts: less the [SEP]
    with torch.no_grad():
        x_TD = model(torch.tensor([ids])).last_hidden_state[0]
        alone_TD = model(torch.tensor([ids_alone.tokens])).last_hidden_state[0]
    np.testing.assert_allclose(ours, x_TD[prompt:].mean(0).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(taken, alone_TD.mean(0).numpy(), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near(embedder: EncoderEngine, embedder_folder: Path) -> None:
    with EncoderEngine.load(embedder_folder, EngineConfig(dtype="bfloat16")) as engine:
        rough = embed(engine, *TEXTS)
    assert float((rough * embed(embedder, *TEXTS)).sum(1).min()) > 0.999
