"""What a model's folder says about its vectors, and folders that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sihe.core.errors import ConfigError, CorruptData, NotFound, SiheError
from sihe.models.errors import UnsupportedModel
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder.engine import EncoderEngine
from sihe.serving.engine.encoder.recipe import read_recipe
from sihe.serving.engine.encoder.runner import EncoderRunner, is_encoder
from sihe.serving.engine.encoder.types import Document
from sihe.serving.errors import NoMemory
from support.encoding import SETTINGS, embed
from support.tiny_encoders import tiny_decoder_embedder, tiny_embedder, tiny_reranker
from support.tiny_models import tiny_model

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()


def test_which_folders_are_encoders(tmp_path: Path, embedder_folder: Path) -> None:
    assert is_encoder(embedder_folder)
    assert is_encoder(tiny_reranker(tmp_path / "reranker"))
    assert is_encoder(tiny_decoder_embedder(tmp_path / "decoder"))
    assert not is_encoder(tiny_model(tmp_path / "generator"))


def test_limits_of_the_folder_hold(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 10, "do_lower_case": True}))
    with EncoderEngine.load(folder, SETTINGS) as engine:
        assert engine.max_tokens == 10
        np.testing.assert_allclose(embed(engine, "FOX"), embed(engine, "fox"), atol=1e-6)
    with EncoderEngine.load(folder, EngineConfig(max_context=7)) as engine:
        assert engine.max_tokens == 7


def test_broken_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(name: str, change: Any, error: type[SiheError], match: str) -> None:
        folder = tiny_embedder(tmp_path / name)
        change(folder)
        with pytest.raises(error, match=match):
            EncoderEngine.load(folder, SETTINGS)

    def modules(*kinds: str) -> Any:
        entries = [{"path": "1_Pooling" if kind == "Pooling" else "", "type": f"x.{kind}"} for kind in kinds]
        return lambda folder: (folder / "modules.json").write_text(json.dumps(entries))

    attempt("no pooling", modules("Transformer"), UnsupportedModel, "Pooling")
    attempt("strange", modules("Transformer", "Pooling", "LSTM"), UnsupportedModel, "LSTM")
    attempt("order", modules("Pooling"), UnsupportedModel, "Transformer first")
    attempt("no list", lambda f: (f / "modules.json").write_text("{}"), CorruptData, "list of modules")
    attempt("no json", lambda f: (f / "1_Pooling/config.json").write_text("{"), CorruptData, "JSON")
    attempt("gone", lambda f: (f / "1_Pooling/config.json").unlink(), CorruptData, "cannot be read")
    outside = json.dumps([{"path": "../..", "type": "x.Transformer"}])
    attempt("outside", lambda f: (f / "modules.json").write_text(outside), CorruptData, "outside")
    both = json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True})
    attempt("both", lambda f: (f / "1_Pooling/config.json").write_text(both), UnsupportedModel, "pooling_mode")
    strange = json.dumps({"pooling_mode": 3})
    attempt("strange", lambda f: (f / "1_Pooling/config.json").write_text(strange), UnsupportedModel, "pooling_mode")
    for index, name in enumerate(("absent", ["query"])):
        prompts = json.dumps({"prompts": {"query": "find: "}, "default_prompt_name": name})
        attempt(
            f"prompt {index}",
            lambda f, text=prompts: (f / "config_sentence_transformers.json").write_text(text),
            ConfigError,
            "default_prompt_name is one of its prompts",
        )
    attempt("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), NotFound, "tokenizer")
    attempt("bad tokenizer", lambda f: (f / "tokenizer.json").write_text("{}"), CorruptData, "tokenizer")
    with pytest.raises(ConfigError, match="one label"):
        EncoderEngine.load(tiny_reranker(tmp_path / "labels", labels=3), SETTINGS)
    with pytest.raises(CorruptData, match="two different models"):
        EncoderEngine.load(tiny_embedder(tmp_path / "two", vocab_size=50), SETTINGS)
    monkeypatch.setattr("sihe.serving.engine.encoder.runner.available_bytes", lambda: 1000)
    with pytest.raises(NoMemory):
        EncoderEngine.load(tiny_embedder(tmp_path / "large"), SETTINGS)


def test_newer_names_of_poolings_are_read(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    assert read_recipe(folder).pooling == "last"


def test_segments_of_single_texts_are_the_first(embedder_folder: Path) -> None:
    runner = EncoderRunner.load(embedder_folder, SETTINGS)
    tokens = [5, 6, 7]
    mixed = runner.encode([Document(tokens), Document(tokens, [0, 0, 1])], [0, 0])
    np.testing.assert_allclose(mixed[0], runner.encode([Document(tokens)], [0])[0], atol=1e-6)
    assert not np.allclose(mixed[0], mixed[1], atol=1e-3)
