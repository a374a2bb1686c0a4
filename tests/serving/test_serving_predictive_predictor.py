"""The predictor: batches that form by themselves, rows that come back to their request, errors that stay with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
import pytest

from sihe.core.errors import InternalError, InvalidInput
from sihe.serving.errors import EngineClosed, EngineDead, Expired, InferenceFailed, QueueFull
from sihe.serving.predictive import predictor
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.ports import BatchStats, Outcome
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.types import Array, InferenceRequest, InferenceResult, ModelDescription, TensorSpec

DESCRIPTION = ModelDescription(
    platform="onnx_onnxv1",
    file="model.onnx",
    inputs=(TensorSpec("x", "FP64", (-1, -1)),),
    outputs=(TensorSpec("double", "FP64", (-1, -1)), TensorSpec("total", "FP64", (-1,))),
)


class Arithmetic:
    """A backend that notes what it is asked, holds still when told to, and refuses some numbers."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], frozenset[str]]] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.closed = False
        self.answer: Callable[[Any], Mapping[str, Array]] = lambda rows: {"double": rows * 2, "total": rows.sum(1)}

    def run(self, inputs: Mapping[str, Array], outputs: frozenset[str]) -> Mapping[str, Array]:
        rows: Any = inputs["x"]
        self.calls.append((rows.shape, outputs))
        self.entered.release()
        assert self.open.wait(30)
        if (rows == -1).any():
            raise ZeroDivisionError("minus one")
        if (rows == -2).any():
            raise InvalidInput("minus two is not for me")
        return self.answer(rows)

    def close(self) -> None:
        self.closed = True


class Notes:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.batches: list[BatchStats] = []
        self.outcomes: list[Outcome] = []
        self.closed = 0

    def on_batch(self, stats: BatchStats) -> None:
        self.batches.append(stats)

    def on_request(self, outcome: Outcome, queue_s: float | None) -> None:
        assert (queue_s is None) == (outcome in ("expired", "refused", "aborted"))
        self.outcomes.append(outcome)

    def on_close(self) -> None:
        self.closed += 1


class House:
    """A predictor over `Arithmetic`, watched."""

    def __init__(self, **settings: Any) -> None:
        self.backend, self.notes = Arithmetic(), Notes()
        self.predictor = Predictor(
            self.backend,
            DESCRIPTION,
            PredictiveConfig.from_mapping({"max_delay_ms": 0, **settings}),
            name="m@1",
            example={"x": np.ones((1, 2))},
            observer=self.notes,
        )

    def __enter__(self) -> House:
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.open.set()
        self.predictor.close()
        assert self.backend.closed
        assert self.notes.closed == 1
        assert self.predictor.num_sequences == 0

    def hold(self) -> Future[InferenceResult]:
        """Keeps the worker inside a batch, so that what comes next waits together."""
        self.backend.open.clear()
        first = self.ask([[0.0]])
        assert self.backend.entered.acquire(timeout=30)
        return first

    def ask(self, rows: Any, *, outputs: tuple[str, ...] = ("double", "total"), **fields: Any) -> Any:
        return self.predictor.submit(InferenceRequest({"x": np.array(rows, float)}, outputs, **fields))


def test_what_waits_is_computed_together_and_split_back() -> None:
    with House() as house:
        house.hold()
        asked = [house.ask([[number, 1.0]] * (1 + number % 3)) for number in range(6)]
        house.backend.open.set()
        for number, future in enumerate(asked):
            result = future.result(30)
            assert result.outputs["double"].tolist() == [[2.0 * number, 2.0]] * (1 + number % 3)
            assert result.outputs["total"].tolist() == [number + 1.0] * (1 + number % 3)
            assert result.batch_rows == 12
        assert house.backend.calls[1][0] == (12, 2)
        assert [(stats.requests, stats.rows) for stats in house.notes.batches] == [(1, 1), (6, 12)]
        assert house.notes.outcomes == ["ok"] * 7


def test_shapes_are_computed_apart_and_outputs_that_nobody_wants_are_not_asked_for() -> None:
    with House() as house:
        house.hold()
        narrow = [house.ask([[1.0]], outputs=("total",)) for _ in range(2)]
        wide = house.ask([[1.0, 2.0, 3.0]], outputs=("double",))
        house.backend.open.set()
        assert [list(future.result(30).outputs) for future in narrow] == [["total"], ["total"]]
        assert wide.result(30).outputs["double"].tolist() == [[2.0, 4.0, 6.0]]
        assert house.backend.calls[1:] == [((2, 1), frozenset({"total"})), ((1, 3), frozenset({"double"}))]


def test_a_request_above_the_bound_is_computed_in_parts() -> None:
    with House(max_batch_size=4) as house:
        rows = np.arange(10.0)[:, None]
        assert house.ask(rows).result(30).outputs["double"].tolist() == (rows * 2).tolist()
        assert [shape for shape, _ in house.backend.calls] == [(4, 1), (4, 1), (2, 1)]
        assert house.notes.outcomes == ["ok"]


def test_others_have_their_turn_between_the_parts_of_a_large_request() -> None:
    with House(max_batch_size=4) as house:
        house.hold()
        large, small = house.ask(np.arange(10.0)[:, None]), house.ask([[1.0]])
        house.backend.open.set()
        assert large.result(30).outputs["total"].tolist() == np.arange(10.0).tolist()
        assert small.done(), "it did not wait for the whole of the other"
        assert [shape for shape, _ in house.backend.calls] == [(1, 1), (4, 1), (1, 1), (4, 1), (2, 1)]
        assert small.result().queue_s <= large.result().queue_s + large.result().compute_s


def test_the_rest_of_a_large_request_is_not_computed_for_a_caller_that_has_left() -> None:
    with House(max_batch_size=4) as house:
        house.backend.open.clear()
        large = house.ask(np.arange(400.0)[:, None])
        assert house.backend.entered.acquire(timeout=30)
        assert large.cancel()
        house.backend.open.set()
        assert house.ask([[1.0]]).result(30).outputs["total"].tolist() == [1.0]
        assert len(house.backend.calls) == 2
        assert house.notes.outcomes == ["aborted", "ok"]


def test_an_error_in_one_part_ends_a_large_request() -> None:
    with House(max_batch_size=2) as house:
        with pytest.raises(InferenceFailed, match="minus one"):
            house.ask([[1.0], [2.0], [-1.0], [3.0], [4.0]]).result(30)
        assert [shape for shape, _ in house.backend.calls] == [(2, 1), (2, 1)]
        house.backend.answer = lambda rows: {"double": np.ones((2, len(house.backend.calls))), "total": rows.sum(1)}
        with pytest.raises(InferenceFailed, match="dimensions"):
            house.ask([[1.0], [2.0], [3.0], [4.0]]).result(30)
        assert house.predictor.is_alive


def test_only_the_culprits_fail() -> None:
    with House() as house:
        house.hold()
        good, bad, worse, fine = (house.ask([[number]]) for number in (1.0, -1.0, -2.0, 3.0))
        house.backend.open.set()
        assert good.result(30).outputs["double"].tolist() == [[2.0]]
        assert fine.result(30).outputs["double"].tolist() == [[6.0]]
        with pytest.raises(InferenceFailed, match="minus one") as caught:
            bad.result(30)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(InvalidInput, match="minus two"):
            worse.result(30)
        assert sorted(house.notes.outcomes) == ["failed", "invalid", "ok", "ok", "ok"]


def test_what_is_too_late_is_not_computed() -> None:
    with House() as house:
        first = house.hold()
        patient = house.ask([[2.0]], timeout_s=100)
        late = house.ask([[1.0]], timeout_s=1e-6)
        with pytest.raises(Expired, match="deadline passed"):
            late.result(30)  # at once, although the model is still busy
        house.backend.open.set()
        assert patient.result(30).outputs["double"].tolist() == [[4.0]]
        first.result(30)
        assert [shape for shape, _ in house.backend.calls] == [(1, 1), (1, 1)]
        assert "expired" in house.notes.outcomes


def test_a_deadline_beyond_what_a_lock_can_wait_for_takes_nobody_elses_away() -> None:
    with House() as house:
        house.hold()
        patient = house.ask([[2.0]], timeout_s=1e15)
        with pytest.raises(Expired):
            house.ask([[1.0]], timeout_s=1e-6).result(30)  # while the model is still busy
        house.backend.open.set()
        patient.result(30)


def test_a_deployment_can_set_the_deadline() -> None:
    with House(timeout_ms=0.001) as house, pytest.raises(Expired):
        house.ask([[1.0]]).result(30)


def test_a_full_queue_says_when_to_come_back() -> None:
    with House(max_waiting=2) as house:
        house.hold()
        waiting = [house.ask([[1.0]]) for _ in range(2)]
        with pytest.raises(QueueFull) as caught:
            house.ask([[1.0]])
        assert caught.value.retry_after_s >= 1
        house.backend.open.set()
        for future in waiting:
            future.result(30)
        assert house.notes.outcomes.count("refused") == 1


def test_large_requests_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "_LARGE_BYTES", 100)
    monkeypatch.setattr(predictor, "_MAX_WAITING_BYTES", 1000)
    with House() as house:
        house.hold()
        first = house.ask(np.ones((200, 1)))  # however large, if nobody waits
        with pytest.raises(QueueFull):
            house.ask(np.ones((13, 1)))
        small = house.ask(np.ones((12, 1)))
        house.backend.open.set()
        first.result(30)
        small.result(30)


def test_a_caller_that_goes_away_is_not_computed_for() -> None:
    with House() as house:
        house.hold()
        gone, stays = house.ask([[1.0]]), house.ask([[2.0]])
        assert gone.cancel()
        assert house.predictor.num_sequences == 2
        house.backend.open.set()
        assert stays.result(30).batch_rows == 1
        with pytest.raises(CancelledError):
            gone.result(30)
        assert house.notes.outcomes.count("aborted") == 1


def test_urgent_requests_overtake() -> None:
    with House(max_batch_size=1) as house:
        house.hold()
        later, sooner = house.ask([[1.0]], priority=9), house.ask([[2.0]], priority=1)
        house.backend.open.set()
        later.result(30)
        assert sooner.done()


def test_several_instances_compute_at_once() -> None:
    with House(instances=2, max_batch_size=1) as house:
        house.backend.open.clear()
        both = [house.ask([[1.0]]), house.ask([[2.0]])]
        for _ in both:
            assert house.backend.entered.acquire(timeout=30), "both are inside the model"
        house.backend.open.set()
        assert [future.result(30).outputs["total"].tolist() for future in both] == [[1.0], [2.0]]


def test_a_model_that_is_not_batched_gets_its_requests_one_by_one() -> None:
    backend = Arithmetic()
    description = ModelDescription(
        platform="onnx_onnxv1",
        file="m",
        inputs=(TensorSpec("x", "FP64", (2, 1)),),
        outputs=DESCRIPTION.outputs,
        batched=False,
    )
    with Predictor(backend, description, PredictiveConfig(), name="m", example={"x": np.ones((2, 1))}) as predictor:
        predictor.warm()
        backend.open.clear()
        asked = [
            predictor.submit(InferenceRequest({"x": np.full((2, 1), float(number))}, ("total",))) for number in range(3)
        ]
        backend.open.set()
        assert [future.result(30).outputs["total"].tolist() for future in asked] == [[0, 0], [1, 1], [2, 2]]
    assert [shape for shape, _ in backend.calls] == [(2, 1)] * 4


def test_rows_that_do_not_match_are_an_error_of_the_model() -> None:
    with House() as house:
        house.backend.answer = lambda rows: {"double": rows[:1], "total": rows.sum(1)}
        with pytest.raises(InferenceFailed, match='"batched": false'):
            house.ask([[1.0], [2.0]]).result(30)
        house.backend.answer = lambda rows: {"triple": rows * 3}
        with pytest.raises(InferenceFailed, match="gave no output") as caught:
            house.predictor.warm()
        assert isinstance(caught.value.__cause__, InternalError)


def test_warming_asks_for_two_rows_and_for_one_of_them_alone() -> None:
    with House() as house:
        house.predictor.warm()
        assert [shape for shape, _ in house.backend.calls] == [(2, 2), (1, 2), (1, 2)]


def test_a_model_that_mixes_rows_is_found_when_it_is_warmed() -> None:
    with House() as house:
        house.backend.answer = lambda rows: {"double": rows * 2, "total": rows.sum(1) / len(rows)}
        with pytest.raises(InvalidInput, match="'total' for a row when another row is beside it"):
            house.predictor.warm()


def test_a_model_that_answers_at_random_is_not_taken_for_one_that_mixes_rows() -> None:
    random = np.random.default_rng(0)
    with House() as house:
        house.backend.answer = lambda rows: {"double": rows * 2, "total": random.normal(size=len(rows))}
        house.predictor.warm()


def test_draining_finishes_what_waits_and_takes_nothing_new() -> None:
    with House(max_delay_ms=60_000, wait="always") as house:
        first = house.ask([[1.0]])
        assert house.predictor.is_alive
        house.predictor.close()  # does not wait for the minute that the batch may be held back
        assert first.result(0).outputs["total"].tolist() == [1.0]
        assert not house.predictor.is_alive
        with pytest.raises(EngineClosed):
            house.ask([[1.0]])


def test_closing_at_once_ends_what_waits() -> None:
    with House(max_delay_ms=60_000, wait="always") as house:
        waiting = house.ask([[1.0]])
        house.predictor.close(drain=False)
        with pytest.raises(EngineClosed):
            waiting.result(0)
        assert house.notes.outcomes == ["aborted"]


def test_a_thread_that_dies_says_so_to_everyone() -> None:
    def die(rows: Array) -> Mapping[str, Array]:
        raise SystemExit("killed")

    with House() as house:
        first = house.hold()
        waiting = house.ask([[1.0]])
        house.backend.answer = die
        house.backend.open.set()
        for future in (first, waiting):
            with pytest.raises(EngineDead, match="killed"):
                future.result(30)
        house.predictor.close()
        with pytest.raises(EngineDead, match="killed"):
            house.ask([[1.0]])


def test_many_callers_get_their_own_rows() -> None:
    with House(max_batch_size=16, max_delay_ms=0.2, instances=2) as house:
        wrong: list[object] = []

        def call(caller: int) -> None:
            for number in range(50):
                rows = [[float(caller), float(number)]] * (1 + number % 4)
                result = house.ask(rows).result(30)
                if result.outputs["double"].tolist() != [[2.0 * caller, 2.0 * number]] * len(rows):
                    wrong.append(rows)

        callers = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
        assert wrong == []
        assert sum(stats.requests for stats in house.notes.batches) == 400
        assert max(stats.rows for stats in house.notes.batches) <= 16


@pytest.mark.parametrize("fields", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"priority": -1}, {"priority": 1.5}])
def test_bad_requests_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        InferenceRequest({"x": np.ones((1, 1))}, ("total",), **fields)
