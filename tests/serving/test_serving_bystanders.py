"""Shadows and request logs of models that do not generate, over HTTP: scikit-learn models, embedders, rerankers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sihe.core import settings
from sihe.core.errors import InvalidInput
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.engine.encoder.exchange import Encoding
from sihe.serving.engine.encoder.types import EmbeddingRequest
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.request_log import LogEntry, RequestRecord
from sihe.serving.gateway.traffic.shadow import ShadowReport
from sihe.serving.predictive.backends.sklearn import SklearnBackend
from sihe.serving.predictive.registration import register, save_sklearn
from support.http_server import serving
from support.tiny_encoders import tiny_embedder, tiny_reranker

POISON = -77.0  # a number on which no version has an answer
TEXTS = ["the quick fox", "a dog", "pack my box with five dozen jugs"]


def line(factor: float, features: int = 1) -> Any:
    """A model that multiplies the sum of its features."""
    rows = np.random.default_rng(0).normal(size=(20, features))
    return make_pipeline(StandardScaler(), LinearRegression()).fit(rows, factor * rows.sum(1))


@dataclass(frozen=True)
class House:
    """`line`: version 1 multiplies by 1, version 2 by 2, version 3 by 3 and wants two features. `vectors` and `scores`
    have two versions each."""

    gateway: Gateway
    registry: CollectorRegistry
    url: str

    def infer(self, value: float = 4.0, id: str = "r", **fields: Any) -> httpx.Response:
        body = {"inputs": [{"name": "input", "shape": [1, 1], "datatype": "FP64", "data": [value]}], **fields}
        return httpx.post(f"{self.url}/v2/models/line/infer", json=body, headers={"x-request-id": id}, timeout=30)

    def ask(self, path: str, id: str = "r", **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=body, headers={"x-request-id": id}, timeout=30)

    def until(self, holds: Callable[[], bool]) -> None:
        """Lets the gateway look at the world until something holds."""
        for _ in range(1000):
            self.gateway.notify()
            if holds():
                return
            threading.Event().wait(0.01)
        raise AssertionError("it did not come to hold")

    def shadow(self, name: str, target: str) -> None:
        """Gives a deployment a shadow that runs always, and waits until it can."""
        self.gateway.traffic.set_shadow(name, target, only_idle=False)
        version = int(target.partition("@")[2])
        self.until(lambda: any(a.name == "shadow" and a.version == version for a in self.gateway.status(name).arms))

    def report(self, name: str, copies: int) -> ShadowReport:
        """What became of so many copies."""
        self.until(lambda: httpx.get(f"{self.url}/api/deployments/{name}/shadow").json()["copies"] == copies)
        report = self.gateway.traffic.shadow(name)
        assert report is not None
        return report

    def rows(self, name: str) -> dict[tuple[str, str], RequestRecord]:
        """What was logged, by the request's id and the arm."""
        self.gateway._request_log.flush()  # type: ignore[union-attr]
        return {(row.request_id, row.arm): row for row in self.gateway.traffic.logs(name, limit=None)}

    def counted(self, arm: str, ending: str) -> float:
        labels = {"deployment": "line", "arm": arm, "ending": ending}
        return self.registry.get_sample_value("sihe_traffic_requests_total", labels) or 0.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("home")
    with Workspace(settings.load({"home": str(root)}, environ={}, directory=root)) as workspace:
        for factor, features in ((1, 1), (2, 1), (3, 2)):
            folder = root / f"line-{factor}"
            save_sklearn(line(factor, features), folder, example=np.ones((2, features)))
            register(workspace.tracking, "line", folder)
        for seed in (0, 1):
            workspace.tracking.register_model("vectors", tiny_embedder(root / f"embedder{seed}", seed=seed))
            workspace.tracking.register_model("scores", tiny_reranker(root / f"reranker{seed}", seed=seed))
        registry = CollectorRegistry()
        with Gateway(workspace, poll_interval_s=0.05, registry=registry) as gateway:
            app = FastAPI()
            app.include_router(router(gateway))
            install_errors(app)
            for name in ("line", "vectors", "scores"):
                gateway.deploy(name, f"{name}@1")
                gateway.wait_ready(name, timeout_s=60)
            with serving(app) as url:
                yield House(gateway, registry, url)


@pytest.fixture
def house(home: House) -> Iterator[House]:
    yield home
    for name in ("line", "vectors", "scores"):
        home.gateway.traffic.set_shadow(name, None)
        home.gateway.traffic.set_logs(name, 0)


# ---- shadows ---------------------------------------------------------------------------------------------------------


def test_a_predictive_shadow_is_compared_and_nobody_hears_it(house: House) -> None:
    house.shadow("line", "line@2")
    finished = house.counted("shadow", "finished")
    answers = [house.infer(value).json() for value in (4.0, 0.0, 4.0)]
    assert [answer["model_version"] for answer in answers] == ["1"] * 3
    report = house.report("line", 3)
    # Twice nothing is nothing, but for what rounding leaves of it.
    assert (report.compared, report.failed, report.measure, report.same) == (3, 0, "outputs", 1)
    assert report.mean_agreement == pytest.approx(1 / 3)
    assert report.mean_latency_s is not None
    assert report.mean_latency_s > 0
    assert house.counted("shadow", "finished") == finished + 3
    assert [arm.arm for arm in house.gateway.traffic.experiment("line").arms] == ["stable"]  # copies count nowhere


def test_the_same_version_agrees_with_itself(house: House) -> None:
    house.shadow("line", "line@1")
    for value in (1.0, 2.0):
        house.infer(value)
    report = house.report("line", 2)
    assert (report.same, report.mean_agreement) == (2, 1.0)


def test_a_shadow_that_wants_other_inputs_is_a_finding_and_no_trouble(house: House) -> None:
    house.shadow("line", "line@3")
    failed = house.counted("shadow", "failed")
    assert [house.infer(value).status_code for value in (1.0, 2.0)] == [200, 200]
    assert house.report("line", 2).failed == 2
    assert house.counted("shadow", "failed") == failed + 2


def test_a_shadow_of_another_kind_is_refused(house: House) -> None:
    for name, target in (("line", "vectors@1"), ("vectors", "line@1")):
        with pytest.raises(InvalidInput, match="version of the same kind"):
            house.gateway.traffic.set_shadow(name, target)
    assert house.gateway.traffic.policy("line").shadow is None


def test_vectors_are_compared_by_their_cosine(house: House) -> None:
    for version, is_same in ((1, True), (2, False)):
        house.shadow("vectors", f"vectors@{version}")
        ours = [item["embedding"] for item in house.ask("embeddings", model="vectors", input=TEXTS).json()["data"]]
        report = house.report("vectors", 1)
        assert (report.measure, report.compared, report.same) == ("cosine", 1, int(is_same))
        assert report.mean_agreement is not None
        if is_same:
            assert report.mean_agreement == pytest.approx(1, abs=1e-5)
            first = ours
            continue
        assert ours == first, "the caller's answer is the stable version's"
        house.gateway.traffic.set_shadow("vectors", None)
        house.gateway.deploy("other", "vectors@2")
        house.gateway.wait_ready("other", timeout_s=60)
        theirs = [item["embedding"] for item in house.ask("embeddings", model="other", input=TEXTS).json()["data"]]
        house.gateway.remove("other")
        a, b = np.array(first), np.array(theirs)
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert report.mean_agreement == pytest.approx(cosines.mean(), abs=1e-4)


def test_rerankers_are_compared_by_the_order_of_documents(house: House) -> None:
    house.shadow("scores", "scores@1")
    assert house.ask("rerank", model="scores", query="a fox", documents=TEXTS).status_code == 200
    report = house.report("scores", 1)
    assert (report.measure, report.same, report.mean_agreement) == ("order", 1, 1.0)


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_inferences_are_logged_without_their_values_unless_they_are_asked_for(house: House) -> None:
    house.gateway.traffic.set_logs("line", 1.0)
    house.infer(4.0, "quiet")
    house.infer(4.0, "quiet2")
    house.infer(5.0, "quiet3")
    house.gateway.traffic.set_logs("line", 1.0, text=True)
    answer = house.infer(4.0, "open").json()
    house.gateway.traffic.set_logs("line", 0.0)
    house.infer(4.0, "unlogged")
    rows = house.rows("line")
    quiet, open_ = rows["quiet", "stable"], rows["open", "stable"]
    assert (quiet.prompt, quiet.answer, quiet.prompt_characters, quiet.answer_characters) == (None, None, 8, 8)
    assert quiet.prompt_hash == rows["quiet2", "stable"].prompt_hash == open_.prompt_hash
    assert quiet.prompt_hash != rows["quiet3", "stable"].prompt_hash
    assert json.loads(open_.prompt or "") == {
        "inputs": [{"name": "input", "datatype": "FP64", "shape": [1, 1], "data": [4.0]}]
    }
    assert json.loads(open_.answer or "") == {"outputs": answer["outputs"]}
    assert (open_.kind, open_.version, open_.ending, open_.temperature) == ("infer", "line@1", "finished", None)
    assert open_.latency_s > 0
    assert ("unlogged", "stable") not in rows


def test_what_failed_is_logged_with_its_inputs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SklearnBackend.run

    def failing(self: SklearnBackend, inputs: Any, outputs: frozenset[str]) -> Any:
        if (inputs["input"] == POISON).any():
            raise ArithmeticError("poisoned")
        return run(self, inputs, outputs)

    monkeypatch.setattr(SklearnBackend, "run", failing)
    house.gateway.traffic.set_logs("line", 1.0, text=True)
    assert house.infer(POISON, "poisoned").status_code == 500
    assert house.infer("no number", "wrong").status_code == 400  # type: ignore[arg-type]
    rows = house.rows("line")
    row = rows["poisoned", "stable"]
    assert (row.ending, row.answer) == ("failed", "")
    assert "poisoned" in (row.error or "")
    assert json.loads(row.prompt or "")["inputs"][0]["data"] == [POISON]
    assert ("wrong", "stable") not in rows, "what was refused never ran"


def test_a_shadows_answer_is_a_record_of_its_own(house: House) -> None:
    house.gateway.traffic.set_logs("line", 1.0, text=True)
    house.shadow("line", "line@2")
    house.infer(3.0, "both")
    house.report("line", 1)
    rows = house.rows("line")
    mine, other = rows["both", "stable"], rows["both", "shadow"]
    assert (other.version, other.agreement, mine.agreement) == ("line@2", 0.0, None)
    assert other.prompt_hash == mine.prompt_hash
    values = [json.loads(row.answer or "")["outputs"][0]["data"][0] for row in (mine, other)]
    assert values == pytest.approx([3.0, 6.0])


def test_texts_and_vectors_are_logged(house: House) -> None:
    house.gateway.traffic.set_logs("vectors", 1.0, text=True)
    house.gateway.traffic.set_logs("scores", 1.0, text=True)
    made = house.ask("embeddings", "e", model="vectors", input=TEXTS).json()
    scored = house.ask("rerank", "s", model="scores", query="a fox", documents=TEXTS).json()
    embedded, ranked = house.rows("vectors")["e", "stable"], house.rows("scores")["s", "stable"]
    assert (embedded.kind, embedded.prompt_tokens) == ("embeddings", made["usage"]["prompt_tokens"])
    assert json.loads(embedded.prompt or "") == {"input": TEXTS}
    np.testing.assert_allclose(
        json.loads(embedded.answer or "")["embeddings"], [item["embedding"] for item in made["data"]], atol=1e-6
    )
    assert (ranked.kind, json.loads(ranked.prompt or "")) == ("rerank", {"query": "a fox", "documents": TEXTS})
    by_place = {item["index"]: item["relevance_score"] for item in scored["results"]}
    assert json.loads(ranked.answer or "")["relevance_scores"] == pytest.approx([by_place[place] for place in range(3)])


def test_the_gateway_lets_records_go_by_each_deployments_days(house: House) -> None:
    house.gateway.traffic.set_logs("line", 1.0, keep_days=7)
    house.infer(4.0, "today")
    log = house.gateway._request_log
    assert log is not None
    made = LogEntry(
        house.gateway.workspace.clock.now() - timedelta(days=8), "old", "line", "stable", "line@1", None,
        Encoding(EmbeddingRequest(("a",))), Outcome("finished", None, None, 0, 0, None, 0.1), keeps_text=False,
    )  # fmt: skip
    log.offer(made)
    log.offer(replace(made, request_id="other", deployment="vectors"))
    assert ("old", "stable") in house.rows("line")
    log._tidied = None  # an hour is over
    house.gateway.notify()
    rows = house.rows("line")
    assert ("today", "stable") in rows
    assert ("old", "stable") not in rows
    assert ("other", "stable") in house.rows("vectors")
    house.gateway.traffic.set_logs("line", 0, keep_days=30)


def test_how_long_records_are_kept_is_a_part_of_the_policy(house: House) -> None:
    def put(**body: Any) -> httpx.Response:
        return httpx.put(f"{house.url}/api/deployments/line/logs", json=body)

    assert put(share=0.5, keep_days=7).json()["log_keep_days"] == 7
    assert put(share=0.25).json()["log_keep_days"] == 7
    assert put(share=0.25, keep_days=0).status_code == 400
    assert put(share=0, keep_days=30).json()["log_keep_days"] == 30
