"""Requests between versions, on a gateway that serves: arms, canaries that arrive and that go back, shadows, logs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file, save_file

from sihe.core.errors import AlreadyExists, InvalidInput, NotFound
from sihe.core.workspace import Workspace
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.types import Generation, GenerationRequest
from sihe.serving.errors import NotReady
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.traffic.rollout import Gates, Plan, RolloutState, Step
from sihe.serving.gateway.traffic.types import Sender
from support.tiny_models import tiny_config, tiny_model

POISON = 77  # a token on which the broken version computes NaN
REQUEST = GenerationRequest(prompt=(POISON, 5, 6), max_tokens=4, temperature=0)
QUICK = Gates(max_latency_ratio=None, max_ttft_ratio=None)  # what times are worth on a busy machine is not tested here


def ask(
    gateway: Gateway, id: str, session: str | None = None, request: GenerationRequest = REQUEST
) -> tuple[str, str, Generation]:
    """The arm, the version and the answer of one request."""
    stream = gateway.generate("tiny", request, Sender(id, session))
    answer = stream.result(30)
    return stream.arm, stream.served_by, answer


def until(gateway: Gateway, holds: Callable[[], bool]) -> None:
    """Lets the gateway look at the world until something holds."""
    for _ in range(1000):
        gateway.notify()
        if holds():
            gateway.notify()  # what was seen just now is also measured from here on
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to hold")


def arm_is_ready(gateway: Gateway, arm: str) -> Callable[[], bool]:
    return lambda: any(one.name == arm and one.version is not None for one in gateway.status("tiny").arms)


@pytest.fixture
def gateway(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    yield gateway
    monkeypatch.undo()
    if any(rollout.is_active for rollout in gateway.rollouts.history("tiny")):
        gateway.rollouts.roll_back("tiny")
    for arm in gateway.traffic.policy("tiny").arms:
        gateway.traffic.remove_arm("tiny", arm.name)
    gateway.traffic.set_shadow("tiny", None)
    gateway.traffic.set_logs("tiny", 0)


@pytest.fixture(scope="module")
def broken(house: object, tmp_path_factory: pytest.TempPathFactory) -> int:
    """A version that loads and warms, and fails on the poison."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "nan", seed=1, config=tiny_config(eos=False))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    version = house.workspace.tracking.register_model("tiny", folder)  # type: ignore[attr-defined]
    return int(version.version)


# ---- arms ------------------------------------------------------------------------------------------------------------


def test_senders_are_split_by_weight_and_stay_on_their_arm(gateway: Gateway) -> None:
    gateway.traffic.set_arm("tiny", "b", "tiny@2", 0.5)
    until(gateway, arm_is_ready(gateway, "b"))
    first = {f"s{number}": ask(gateway, f"a{number}", f"s{number}")[:2] for number in range(40)}
    again = {f"s{number}": ask(gateway, f"b{number}", f"s{number}")[:2] for number in range(40)}
    assert first == again
    assert set(first.values()) == {("stable", "tiny@1"), ("b", "tiny@2")}
    report = gateway.traffic.experiment("tiny")
    assert {arm.arm: arm.version for arm in report.arms} == {"stable": 1, "b": 2}
    assert sum(arm.requests for arm in report.arms) == 80
    moved = [session for session, (arm, _) in first.items() if arm == "b"]
    gateway.traffic.set_arm("tiny", "b", "tiny@2", 0.7)
    assert {ask(gateway, f"c{session}", session)[0] for session in moved} == {"b"}  # a weight that grows keeps its own
    gateway.traffic.remove_arm("tiny", "b")
    assert {ask(gateway, f"d{session}", session)[1] for session in moved} == {"tiny@1"}


def test_an_arm_is_checked_when_it_is_made(gateway: Gateway) -> None:
    with pytest.raises(NotFound):
        gateway.traffic.set_arm("tiny", "b", "tiny@99", 0.5)
    with pytest.raises(NotFound):
        gateway.traffic.set_arm("absent", "b", "tiny@2", 0.5)
    for weight in (0, 1.1):
        with pytest.raises(InvalidInput):
            gateway.traffic.set_arm("tiny", "b", "tiny@2", weight)
    with pytest.raises(InvalidInput):
        gateway.traffic.remove_arm("tiny", "stable")
    with pytest.raises(NotFound):
        gateway.traffic.remove_arm("tiny", "b")


def test_feedback_reaches_the_arm(gateway: Gateway) -> None:
    arm, _, _ = ask(gateway, "judged")
    assert gateway.traffic.feedback("tiny", "judged", {"helpful": 1.0}) == arm
    with pytest.raises(AlreadyExists):
        gateway.traffic.feedback("tiny", "judged", {"helpful": 1.0})
    with pytest.raises(NotFound):
        gateway.traffic.feedback("tiny", "unheard", {"helpful": 1.0})


# ---- canaries --------------------------------------------------------------------------------------------------------


def test_an_unready_canary_gets_no_traffic_at_all(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go = threading.Event(), threading.Event()
    load = Engine.load.__func__  # type: ignore[attr-defined]

    def held_load(cls: type[Engine], folder: Path, *args: object, **fields: object) -> Engine:
        loading.set()
        assert go.wait(30)
        return load(cls, folder, *args, **fields)  # type: ignore[no-any-return]

    monkeypatch.setattr(Engine, "load", classmethod(held_load))
    gateway.rollouts.start("tiny", "tiny@2", Plan(steps=(Step(0.9, 1000),)))
    assert loading.wait(30)
    assert {ask(gateway, f"early{number}")[1] for number in range(40)} == {"tiny@1"}
    gateway.notify()
    (rollout,) = [found for found in gateway.rollouts.history("tiny") if found.is_active]
    assert rollout.state is RolloutState.RUNNING
    assert "cannot serve yet" in gateway.status("tiny").rollout_note
    go.set()
    until(gateway, arm_is_ready(gateway, "canary"))
    served = [ask(gateway, f"late{number}")[1] for number in range(40)]
    assert served.count("tiny@2") > 20


def test_a_failing_canary_harms_nobody_and_goes_back(gateway: Gateway, broken: int) -> None:
    expected = ask(gateway, "before")[2].text
    gateway.rollouts.start("tiny", f"tiny@{broken}", Plan(steps=(Step(0.5, 1000),), gates=QUICK))
    until(gateway, arm_is_ready(gateway, "canary"))  # it loads and warms: only the requests show what it is
    for number in range(40):
        arm, served_by, answer = ask(gateway, f"r{number}")
        assert (arm, served_by, answer.text) == ("stable", "tiny@1", expected)
    until(gateway, lambda: not gateway.traffic.policy("tiny").arms)
    (last, *_) = gateway.rollouts.history("tiny")
    assert last.state is RolloutState.ROLLED_BACK
    assert "requests failed" in last.reason
    status = gateway.status("tiny")
    assert (status.version, status.error) == (1, None)
    assert gateway.workspace.tracking.resolve("tiny@live").version == 1
    assert {ask(gateway, f"after{number}")[1] for number in range(20)} == {"tiny@1"}


def test_a_canary_that_cannot_be_loaded_goes_back(gateway: Gateway, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "corrupt", seed=3)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    corrupt = gateway.workspace.tracking.register_model("tiny", folder).version
    gateway.rollouts.start("tiny", f"tiny@{corrupt}", Plan(ready_s=1))
    until(gateway, lambda: not gateway.traffic.policy("tiny").arms)
    last = gateway.rollouts.history("tiny")[0]
    assert last.state is RolloutState.ROLLED_BACK
    assert "corrupt" in last.reason
    assert ask(gateway, "x")[1] == "tiny@1"


def test_a_good_canary_climbs_and_becomes_the_stable_version(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = Engine.load.__func__  # type: ignore[attr-defined]

    def counted_load(cls: type[Engine], folder: Path, *args: object, **fields: object) -> Engine:
        loaded.append(str(fields["name"]))
        return load(cls, folder, *args, **fields)  # type: ignore[no-any-return]

    monkeypatch.setattr(Engine, "load", classmethod(counted_load))
    plan = Plan(steps=(Step(0.3, 10, 0), Step(0.6, 10, 0)), gates=QUICK)
    gateway.rollouts.start("tiny", "tiny@2", plan)
    with pytest.raises(AlreadyExists):
        gateway.rollouts.start("tiny", "tiny@2", plan, arm="other")
    with pytest.raises(InvalidInput):
        gateway.traffic.set_arm("tiny", "canary", "tiny@2", 0.9)
    number = 0
    weights = set()
    while gateway.rollouts.history("tiny")[0].is_active:
        weights.add(gateway.traffic.policy("tiny").weights.get("canary"))
        number += 1
        assert number < 3000
        ask(gateway, f"g{number}")
    assert weights >= {0.3, 0.6}
    assert gateway.rollouts.history("tiny")[0].state is RolloutState.PROMOTED
    assert gateway.workspace.tracking.resolve("tiny@live").version == 2  # the deployment follows it, so it says so
    until(gateway, lambda: gateway.status("tiny").arms == ())
    assert {ask(gateway, f"h{number}")[:2] for number in range(20)} == {("stable", "tiny@2")}
    assert loaded == ["tiny@2"]  # its replica went over: nothing was loaded twice


def test_another_process_promotes_pauses_and_rolls_back(gateway: Gateway) -> None:
    with Workspace(gateway.workspace.settings) as elsewhere:
        editor = Gateway(elsewhere)
        editor.rollouts.start("tiny", "tiny@2", Plan(steps=(Step(0.5, 1, 0),), gates=QUICK))
        editor.rollouts.pause("tiny")
        until(gateway, arm_is_ready(gateway, "canary"))
        for number in range(60):
            ask(gateway, f"q{number}")
        gateway.notify()
        assert gateway.rollouts.history("tiny")[0].state is RolloutState.PAUSED
        editor.rollouts.roll_back("tiny")
        until(gateway, lambda: gateway.status("tiny").arms == ())
        with pytest.raises(NotFound):
            editor.rollouts.roll_back("tiny")
        gateway.deploy("tiny", "tiny@1", settings=gateway._store.get("tiny").settings)
        editor.rollouts.start("tiny", "tiny@2", Plan(steps=(Step(0.1, 1000),)))
        until(gateway, arm_is_ready(gateway, "canary"))
        editor.rollouts.promote("tiny")
        until(gateway, lambda: gateway.status("tiny").version == 2 and gateway.status("tiny").arms == ())
        assert gateway.status("tiny").target == "tiny@2"  # it followed a version, so it follows the next one
        with pytest.raises(NotReady):
            editor.traffic.feedback("tiny", "q1", {"helpful": 1.0})


def test_a_promotion_that_was_cut_off_is_finished(gateway: Gateway) -> None:
    rollout = gateway.rollouts.start("tiny", "tiny@2", Plan(steps=(Step(0.1, 1000),)))
    until(gateway, arm_is_ready(gateway, "canary"))
    gateway.rollouts.advance(rollout, state=RolloutState.PROMOTING, reason="and then the power failed")
    until(gateway, lambda: gateway.rollouts.history("tiny")[0].state is RolloutState.PROMOTED)
    assert gateway.workspace.tracking.resolve("tiny@live").version == 2
    until(gateway, lambda: gateway.status("tiny").version == 2)


def test_measurements_and_rollouts_go_on_after_a_restart(tmp_path: Path, gateway: Gateway) -> None:
    with Workspace(gateway.workspace.settings) as opened:
        first = Gateway(opened, poll_interval_s=60, registry=CollectorRegistry())
        first.deploy("again", "tiny@1")
        with first:
            first.wait_ready("again", timeout_s=30)
            first.rollouts.start("again", "tiny@2", Plan(steps=(Step(0.5, 1000),), gates=QUICK))
            until(first, lambda: _versions(first, "again") == {1, 2})
            for number in range(30):
                first.generate("again", REQUEST, Sender(f"r{number}")).result(30)
            before = first.traffic.experiment("again")
        second = Gateway(opened, poll_interval_s=60, registry=CollectorRegistry())
        with second:
            second.wait_ready("again", timeout_s=30)
            until(second, lambda: _versions(second, "again") == {1, 2})
            after = second.traffic.experiment("again")
            assert after == before
            assert sum(arm.requests for arm in after.arms) == 30
            assert second.rollouts.history("again")[0].is_active
            second.remove("again")


def _versions(gateway: Gateway, name: str) -> set[int | None]:
    """What the arms serve in this process."""
    return {arm.version for status in gateway.served() if status.name == name for arm in status.arms}


# ---- shadows ---------------------------------------------------------------------------------------------------------


def test_a_shadow_answers_copies_and_nobody_hears_it(gateway: Gateway, registry: CollectorRegistry) -> None:
    gateway.traffic.set_shadow("tiny", "tiny@2", only_idle=False)
    gateway.traffic.set_logs("tiny", 1.0)
    until(gateway, arm_is_ready(gateway, "shadow"))
    assert {ask(gateway, f"s{number}")[:2] for number in range(5)} == {("stable", "tiny@1")}
    until(gateway, lambda: _shadow(gateway, "compared") == 5)
    report = gateway.traffic.shadow("tiny")
    assert report is not None
    assert (report.failed, report.same) == (0, 0)  # the two versions say different things
    assert report.mean_agreement is not None
    assert report.mean_agreement < 1
    assert report.mean_latency_ratio is not None
    gateway._request_log.flush()  # type: ignore[union-attr]
    rows = {row.request_id: row for row in gateway.traffic.logs("tiny", arm="shadow")}
    assert rows["s3"].version == "tiny@2"
    assert rows["s3"].agreement is not None
    stats = gateway.traffic.experiment("tiny")
    assert [arm.arm for arm in stats.arms] == ["stable"]  # copies count nowhere


def test_the_same_version_as_a_shadow_agrees(gateway: Gateway) -> None:
    gateway.traffic.set_shadow("tiny", "tiny@1", only_idle=False)
    until(gateway, arm_is_ready(gateway, "shadow"))
    for number in range(4):
        ask(gateway, f"t{number}")
    until(gateway, lambda: _shadow(gateway, "compared") == 4)
    report = gateway.traffic.shadow("tiny")
    assert report is not None
    assert (report.same, report.mean_agreement, report.target) == (4, 1.0, "tiny@1")
    gateway._next_report_s = 0.0  # it is time for the report of every five seconds
    elsewhere = Gateway(gateway.workspace)  # one that does not serve
    until(gateway, lambda: elsewhere.traffic.shadow("tiny") == report)
    gateway.traffic.set_shadow("tiny", None)
    assert elsewhere.traffic.shadow("tiny") is None


def test_a_broken_shadow_is_a_finding_and_no_trouble(gateway: Gateway, broken: int) -> None:
    gateway.traffic.set_shadow("tiny", f"tiny@{broken}", only_idle=False)
    until(gateway, arm_is_ready(gateway, "shadow"))
    assert {ask(gateway, f"u{number}")[:2] for number in range(6)} == {("stable", "tiny@1")}
    until(gateway, lambda: _shadow(gateway, "failed") == 6)
    assert gateway.status("tiny").version == 1


def _shadow(gateway: Gateway, what: str) -> int:
    report = gateway.traffic.shadow("tiny")
    return int(getattr(report, what)) if report is not None else -1


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_requests_are_logged_without_their_text_unless_it_is_asked_for(gateway: Gateway) -> None:
    secret = GenerationRequest(prompt="the lazy dog", max_tokens=3, temperature=0, tenant="acme")
    gateway.traffic.set_logs("tiny", 1.0)
    _, _, answer = ask(gateway, "quiet", "someone", secret)
    ask(gateway, "quiet2", "someone", secret)
    gateway.traffic.set_logs("tiny", 1.0, text=True)
    ask(gateway, "open", None, secret)
    gateway.traffic.set_logs("tiny", 0.0)
    ask(gateway, "unlogged", None, secret)
    gateway._request_log.flush()  # type: ignore[union-attr]
    rows = {row.request_id: row for row in gateway.traffic.logs("tiny", limit=None)}
    quiet, open_ = rows["quiet"], rows["open"]
    assert (quiet.prompt, quiet.answer) == (None, None)
    assert (open_.prompt, open_.answer) == ("the lazy dog", answer.text)
    assert (quiet.prompt_characters, quiet.answer_characters) == (12, len(answer.text))
    assert quiet.prompt_hash == rows["quiet2"].prompt_hash == open_.prompt_hash
    assert quiet.session == rows["quiet2"].session != "someone"
    assert (quiet.arm, quiet.version, quiet.tenant, quiet.finish_reason) == ("stable", "tiny@1", "acme", "length")
    assert (quiet.prompt_tokens, quiet.completion_tokens) == (answer.usage.prompt_tokens, 3)
    assert quiet.latency_s >= (quiet.ttft_s or 0) > 0
    assert "unlogged" not in rows
