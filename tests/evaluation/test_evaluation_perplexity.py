"""Perplexity by hand, by brute force, and on the wrong model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sihe.apps.evaluation import EvaluationService, VocabularyMismatch
from sihe.apps.evaluation import perplexity as measure
from sihe.apps.evaluation.perplexity import negative_log_likelihood, text_bytes, windows
from sihe.apps.evaluation.types import Perplexity
from sihe.core.errors import CorruptData, InvalidInput, NotFound, TooLarge
from sihe.core.workspace import Workspace
from sihe.data.errors import DatasetTooSmall
from sihe.data.loading import TokenDataset, write_dataset
from sihe.models.checkpoint import load_model, save_model
from support.tiny_models import SPECIAL, tiny_config, tiny_model, tiny_tokenizer

TEXTS = ["the quick brown fox", "你好，世界 🙂", "", "pack my box with five dozen jugs " * 4, "héllo"]
EOS = SPECIAL.index("<|eos|>")


def make_dataset(folder: Path, *, texts: list[str] | None = None, tokenizer: Tokenizer | None = None) -> TokenDataset:
    tokenizer = tokenizer or tiny_tokenizer()
    ids = [token for text in (TEXTS if texts is None else texts) for token in (*tokenizer.encode(text).ids, EOS)]
    with write_dataset(
        folder,
        name="toy",
        version="v1",
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=EOS,
        created_at="2026-01-01T00:00:00+00:00",
        shard_tokens=50,
    ) as writer:
        writer.append("train", np.zeros(10, np.int64))
        writer.append("held_out", np.array(ids))
        writer.add_file("tokenizer.json", tokenizer.to_str().encode())
    return TokenDataset.open(folder)


@pytest.fixture
def dataset(workspace: Workspace) -> TokenDataset:
    return make_dataset(workspace.path("datasets", "toy", "v1"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def make_uniform(folder: Path) -> None:
    model = load_model(folder)
    assert model.head is not None
    with torch.no_grad():
        model.head.weight.zero_()
    save_model(model, folder)


# ---- the figures ---------------------------------------------------------------------------------------------------


def test_equal_logits_give_the_size_of_the_vocabulary(
    workspace: Workspace, dataset: TokenDataset, folder: Path
) -> None:
    make_uniform(folder)
    result = EvaluationService(workspace).perplexity(folder, dataset.folder)
    predicted = dataset.num_tokens("held_out") - 1
    # Every text begins at a document's first token, so that only the split's very first token has no prediction.
    first = len(tiny_tokenizer().decode([int(dataset.split("held_out").tokens(0, 1)[0])]).encode())
    size = sum(len(text.encode()) for text in TEXTS) - first
    assert result.tokens == predicted
    assert result.text_bytes == size
    assert result.perplexity == pytest.approx(320, rel=1e-5)
    assert result.nats_per_token == pytest.approx(math.log(320), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(predicted * math.log2(320) / size, rel=1e-6)


def by_brute_force(folder: Path, dataset: TokenDataset, length: int, stride: int) -> float:
    """One forward pass for each token, over the context that the definition gives it."""
    model, tokens = (
        load_model(folder),
        torch.from_numpy(dataset.split("held_out").tokens(0, dataset.num_tokens("held_out"))),
    )
    targets = len(tokens) - 1
    length = min(length, targets)
    total = 0.0
    for target in range(1, targets + 1):
        window = max(0, math.ceil((target - length) / stride))
        start = min(window * stride, targets - length)
        with torch.no_grad():
            logits = model(tokens[None, start:target])[0, -1].double()
        total -= float(logits.log_softmax(0)[tokens[target]])
    return total


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (16, 5), (7, 1), (128, 128), (64, 64)])
def test_every_token_is_predicted_once_from_its_context(
    workspace: Workspace, dataset: TokenDataset, folder: Path, length: int, stride: int
) -> None:
    service = EvaluationService(workspace)
    result = service.perplexity(folder, dataset.folder, sequence_length=length, stride=stride)
    assert result.tokens == dataset.num_tokens("held_out") - 1
    assert result.nats == pytest.approx(by_brute_force(folder, dataset, length, stride), rel=1e-5)


@given(num_tokens=st.integers(2, 200), length=st.integers(1, 60), data=st.data())
def test_windows_cover_each_target_once(num_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    size = min(length, num_tokens - 1)
    seen: list[int] = []
    for window in windows(num_tokens, length, stride):
        assert 0 <= window.start <= num_tokens - 1 - size
        assert 0 <= window.known < size
        assert window.known >= (size - stride if seen else 0)  # the promised context
        seen += range(window.start + window.known + 1, window.start + size + 1)
    assert seen == list(range(1, num_tokens))


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_the_batch_size_does_not_matter(dataset: TokenDataset, folder: Path, batch: int) -> None:
    model, split = load_model(folder), dataset.split("held_out")
    heard: list[tuple[int, int]] = []
    nats, count = negative_log_likelihood(
        model, split, sequence_length=8, stride=6, batch=batch, on_progress=lambda *pair: heard.append(pair)
    )
    reference, _ = negative_log_likelihood(model, split, sequence_length=8, stride=6, batch=5)
    assert count == len(split) - 1
    assert nats == pytest.approx(reference, rel=1e-6)
    assert heard[-1] == (count, count)


def test_the_same_call_gives_the_same_figures(workspace: Workspace, dataset: TokenDataset, folder: Path) -> None:
    service = EvaluationService(workspace)
    first, second = (service.perplexity(folder, dataset.folder) for _ in range(2))
    assert first.figures == second.figures
    assert first.run_id != second.run_id


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
def test_bytes_do_not_depend_on_how_the_split_is_read(
    dataset: TokenDataset, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = text_bytes(dataset.split("held_out"), tiny_tokenizer(), EOS)
    monkeypatch.setattr(measure, "_PIECE", piece)
    assert text_bytes(dataset.split("held_out"), tiny_tokenizer(), EOS) == expected


def test_figures_at_the_edge_are_infinite_rather_than_errors() -> None:
    hopeless = Perplexity("m", "d", "r", 8, 8, tokens=1, text_bytes=0, nats=5000.0)
    assert hopeless.perplexity == math.inf
    assert hopeless.bits_per_byte == math.inf


# ---- records -------------------------------------------------------------------------------------------------------


def test_an_alias_is_evaluated_and_tracked(workspace: Workspace, dataset: TokenDataset, folder: Path) -> None:
    tracking = workspace.tracking
    version = tracking.register_model("gpt", folder)
    tracking.set_alias("gpt", "champion", version.version)
    result = EvaluationService(workspace).perplexity("gpt@champion", "toy", stride=64)
    assert result.model == "model:gpt@1"
    assert result.dataset == "dataset:toy@v1"
    run = tracking.run(result.run_id)
    assert (run.experiment, run.status) == ("evaluation", "FINISHED")
    assert run.metrics == pytest.approx(result.figures)
    assert run.params["model"] == "model:gpt@1"
    assert run.params["stride"] == "64"
    edges = set(tracking.ancestors(f"run:{result.run_id}"))
    assert {(f"run:{result.run_id}", "model:gpt@1"), (f"run:{result.run_id}", "dataset:toy@v1")} <= edges


def test_a_failure_half_way_leaves_a_failed_run(
    workspace: Workspace, dataset: TokenDataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EvaluationService(workspace).perplexity(folder, dataset.folder, on_progress=stop)
    (run,) = workspace.tracking.runs("evaluation")
    assert run.status == "FAILED"


# ---- what cannot be evaluated --------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_before_any_step(
    workspace: Workspace, dataset: TokenDataset, folder: Path
) -> None:
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    a, b = list(vocabulary)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(VocabularyMismatch, match="tokenizers differ in 'model'"):
        EvaluationService(workspace).perplexity(folder, dataset.folder)
    assert workspace.tracking.runs("evaluation") == []


def test_a_tokenizer_in_another_layout_is_the_same_tokenizer(
    workspace: Workspace, dataset: TokenDataset, folder: Path
) -> None:
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    values["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(values, indent=7), encoding="utf-8")
    assert EvaluationService(workspace).perplexity(folder, dataset.folder).tokens > 0


def test_too_small_a_vocabulary_is_refused(workspace: Workspace, dataset: TokenDataset, tmp_path: Path) -> None:
    from dataclasses import replace

    folder = tiny_model(tmp_path / "small", config=replace(tiny_config(), vocab_size=290))
    with pytest.raises(VocabularyMismatch, match=r"has 290 tokens and the data set's 300"):
        EvaluationService(workspace).perplexity(folder, dataset.folder)


def test_a_model_without_a_tokenizer_is_refused(workspace: Workspace, dataset: TokenDataset, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(NotFound, match="what the token ids mean"):
        EvaluationService(workspace).perplexity(folder, dataset.folder)


def test_a_broken_tokenizer_is_corrupt(workspace: Workspace, dataset: TokenDataset, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptData, match="not a tokenizer"):
        EvaluationService(workspace).perplexity(folder, dataset.folder)


def test_a_split_without_a_prediction_is_too_small(workspace: Workspace, folder: Path) -> None:
    dataset = make_dataset(workspace.path("datasets", "toy", "v1"), texts=[""])
    with pytest.raises(DatasetTooSmall):
        EvaluationService(workspace).perplexity(folder, dataset.folder)


def test_two_tokens_are_enough(workspace: Workspace, folder: Path) -> None:
    make_uniform(folder)
    dataset = make_dataset(workspace.path("datasets", "toy", "v1"), texts=["", ""])
    result = EvaluationService(workspace).perplexity(folder, dataset.folder)
    assert (result.tokens, result.text_bytes) == (1, 0)
    assert result.perplexity == pytest.approx(320, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sequence_length": 129}, TooLarge),
        ({"sequence_length": 0}, InvalidInput),
        ({"sequence_length": 8, "stride": 9}, InvalidInput),
        ({"stride": 0}, InvalidInput),
        ({"batch": 0}, InvalidInput),
    ],
)
def test_windows_that_cannot_be_are_refused(
    workspace: Workspace, dataset: TokenDataset, folder: Path, options: dict[str, int], error: type[Exception]
) -> None:
    with pytest.raises(error):
        EvaluationService(workspace).perplexity(folder, dataset.folder, **options)


def test_unknown_names_are_not_found(workspace: Workspace, dataset: TokenDataset, folder: Path) -> None:
    service = EvaluationService(workspace)
    with pytest.raises(NotFound):
        service.perplexity("nobody@champion", dataset.folder)
    with pytest.raises(NotFound, match="sihe text prepare"):
        service.perplexity(folder, "nothing")
    with pytest.raises(NotFound, match="sihe text prepare"):
        service.perplexity(folder, "toy@v2")
    with pytest.raises(NotFound):
        service.perplexity(folder, "../../toy")


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_the_figures(
    workspace: Workspace, dataset: TokenDataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from sihe.apps.evaluation.commands import app
    from sihe.core import terminal

    monkeypatch.setattr(terminal, "workspace", lambda: workspace)
    done = CliRunner().invoke(app, ["perplexity", str(folder), "toy", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    shown = json.loads(done.stdout)
    expected = EvaluationService(workspace).perplexity(folder, "toy")
    assert shown["perplexity"] == expected.perplexity
    assert shown["dataset"] == "dataset:toy@v1"
