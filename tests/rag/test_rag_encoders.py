"""Search with a deployed embedding model and a deployed reranker: a real server, and what happens when it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from sihe.apps.rag.endpoint import EmbeddingsEndpoint, RerankEndpoint
from sihe.apps.rag.service import RagService
from sihe.core import settings
from sihe.core.errors import ConfigError, Unreachable
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.gateway.gateway import Gateway
from support.http_server import serving
from support.tiny_encoders import tiny_embedder, tiny_reranker

TEXTS = {"fox": "The quick fox jumps over the dog.", "zebra": "Zebras jump over the quick fox.", "box": "Pack my box."}


@dataclass(frozen=True)
class House:
    workspace: Workspace
    gateway: Gateway
    url: str
    documents: Path


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("home")
    documents = home / "documents"
    documents.mkdir()
    for name, text in TEXTS.items():
        (documents / f"{name}.md").write_text(f"# {name}\n\n{text}\n", encoding="utf-8")
    with Workspace(settings.load({"home": str(home)}, environ={}, directory=home)) as workspace:
        for seed in (0, 1):
            workspace.tracking.register_model("vectors", tiny_embedder(home / f"vectors{seed}", seed=seed))
        workspace.tracking.register_model("scores", tiny_reranker(home / "scores"))
        workspace.tracking.set_alias("vectors", "live", 1)
        with Gateway(workspace, poll_interval_s=0.05, registry=CollectorRegistry()) as gateway:
            for name, target in (("embed", "vectors@live"), ("rerank", "scores")):
                gateway.deploy(name, target)
                gateway.wait_ready(name, timeout_s=60)
            app = FastAPI()
            app.include_router(router(gateway))
            install_errors(app)
            with serving(app) as url:
                yield House(workspace, gateway, f"{url}/v1", documents)


def test_vectors_come_from_the_deployment_and_carry_its_version(house: House) -> None:
    embedder = EmbeddingsEndpoint(house.url, "embed")
    rows = embedder.embed([*TEXTS.values()] * 100)
    assert (embedder.name, embedder.dim, rows.shape) == ("vectors@1", 32, (300, 32))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rows[:3], rows[-3:], atol=1e-5)
    assert embedder.embed([]).shape == (0, 32)
    with pytest.raises(ConfigError, match="absent"):
        _ = EmbeddingsEndpoint(house.url, "absent").name
    with pytest.raises(Unreachable):
        _ = EmbeddingsEndpoint("http://127.0.0.1:9", "embed").dim


def test_search_uses_meaning_and_the_rerankers_order(house: House) -> None:
    embedder, reranker = EmbeddingsEndpoint(house.url, "embed"), RerankEndpoint(house.url, "rerank")
    plain = RagService(house.workspace, embedder=embedder)
    plain.index("animals", [house.documents])
    passages = plain.search("animals", "quick fox")
    assert {passage.retriever for passage in passages} == {"bm25+vectors@1"}
    ranked = RagService(house.workspace, embedder=embedder, reranker=reranker).search("animals", "quick fox")
    assert {passage.retriever for passage in ranked} == {"bm25+vectors@1+rerank"}
    assert sorted(passage.text for passage in ranked) == sorted(passage.text for passage in passages)
    scores = reranker.score("quick fox", [passage.text for passage in ranked])
    assert [passage.score for passage in ranked] == pytest.approx(scores, abs=1e-5)
    assert scores == sorted(scores, reverse=True)


def test_search_goes_on_by_words_when_the_models_are_gone(house: House) -> None:
    RagService(house.workspace, embedder=EmbeddingsEndpoint(house.url, "embed")).index("gone", [house.documents])
    away = "http://127.0.0.1:9"
    service = RagService(
        house.workspace, embedder=EmbeddingsEndpoint(away, "embed"), reranker=RerankEndpoint(away, "rerank")
    )
    passages = service.search("gone", "quick fox")
    assert passages
    assert {passage.retriever for passage in passages} == {"bm25"}
    assert "BM25 alone" in str(service.ask("gone", "Where does the fox jump?").note)


def test_another_version_is_not_compared_with_the_vectors_of_the_first(house: House) -> None:
    embedder = EmbeddingsEndpoint(house.url, "embed")
    service = RagService(house.workspace, embedder=embedder)
    service.index("swapped", [house.documents])
    house.gateway.move_alias("vectors", "live", 2)
    house.gateway.wait_ready("embed", timeout_s=60)
    try:
        assert {passage.retriever for passage in service.search("swapped", "quick fox")} == {"bm25"}
        assert embedder.name == "vectors@2"
        service.index("swapped", [house.documents])
        assert {passage.retriever for passage in service.search("swapped", "quick fox")} == {"bm25+vectors@2"}
    finally:
        house.gateway.move_alias("vectors", "live", 1)
        house.gateway.wait_ready("embed", timeout_s=60)
