"""A guard in the path of answers: what it refuses never leaves, however it is cut, and what it passes is whole."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.serving.engine.stream import GenerationStream, Heard, wake_readers
from sihe.serving.engine.tools import ToolCallDelta
from sihe.serving.engine.types import ChatMessage, Generation, GenerationEvent, GenerationRequest, Usage
from sihe.serving.errors import ContentRefused, GenerationFailed, GuardFailed, StreamClosed
from sihe.serving.guarded import Window, guarded, judge_prompts
from sihe.serving.ports import GuardContext, Refusal

CONTEXT = GuardContext("acme", "chat")


@dataclass
class DenyList:
    """A guard that lets no text pass with one of some phrases in it."""

    phrases: tuple[str, ...]
    window_chars: int = 8
    overlap_chars: int = 6
    judged: list[tuple[str, bool]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def judge_prompt(self, request: GenerationRequest, context: GuardContext) -> Refusal | None:
        texts = [message.content for message in request.messages or ()] or [str(request.prompt)]
        return self._judge(" ".join(texts))

    def judge_answer(self, text: str, context: GuardContext, *, is_end: bool) -> Refusal | None:
        self.judged.append((text, is_end))
        self.threads.add(threading.get_ident())
        return self._judge(text)

    def _judge(self, text: str) -> Refusal | None:
        hit = any(phrase in text for phrase in self.phrases)
        return Refusal("denied", "this is not talked about here") if hit else None


class Broken(DenyList):
    """A guard that raises."""

    def _judge(self, text: str) -> Refusal | None:
        raise RuntimeError(f"cannot judge {text}")


def events_of(pieces: list[str]) -> list[GenerationEvent]:
    last = len(pieces) - 1
    return [
        GenerationEvent(piece, (number,), Usage(3, number + 1), "stop" if number == last else None)
        for number, piece in enumerate(pieces)
    ]


def new_stream(aborted: list[int] | None = None) -> GenerationStream:
    return GenerationStream(7, "m@1", abort=(aborted if aborted is not None else []).append)


def deliver(stream: GenerationStream, event: GenerationEvent | Exception) -> None:
    """As the engine does: the event or error, and a word to who waits for it."""
    wake = stream.deliver(event) if isinstance(event, GenerationEvent) else stream.fail(event)
    wake_readers([wake] if wake else [])


def read(pieces: list[str], guard: DenyList, aborted: list[int] | None = None) -> Generation:
    async def run() -> Generation:
        inner = new_stream(aborted)
        outer = guarded(inner, guard, CONTEXT)
        for event in events_of(pieces):
            deliver(inner, event)
            await asyncio.sleep(0)
        return await outer.result_async()

    return asyncio.run(run())


# ---- the window ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.text("abc ", max_size=9), min_size=1, max_size=30), st.integers(1, 20), st.integers(0, 20))
def test_a_window_gives_everything_in_order_and_keeps_its_overlap(pieces: list[str], size: int, overlap: int) -> None:
    window, out, seen = Window(size, overlap), [], ""
    for event in events_of(pieces):
        seen += event.text
        due = window.add(event)
        sent = "".join(item.text for item in out)
        assert sent + window.text == seen
        if due:
            out += window.passed()
            if event.finish_reason is None:
                kept = len(seen) - sum(len(item.text) for item in out)
                assert kept >= min(overlap, len(seen))
        else:
            assert len(seen) - len(sent) < size + overlap + max(map(len, pieces))  # what is held back is bounded
    assert out == events_of(pieces)


@settings(deadline=None)
@given(st.text("ab", max_size=30), st.data())
def test_no_part_of_a_denied_phrase_leaves_however_it_is_cut(before: str, data: st.DataObject) -> None:
    phrase = "secret"
    text = before + phrase + data.draw(st.text("ab", max_size=20))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=15)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    window, sent = Window(data.draw(st.integers(1, 12)), len(phrase)), ""
    for event in events_of(pieces):
        if window.add(event):
            if phrase in window.text:
                break
            sent += "".join(item.text for item in window.passed())
    else:
        pytest.fail("the phrase was never judged")
    assert before.startswith(sent)


@pytest.mark.parametrize("numbers", [(0, 1), (1, -1)])
def test_a_window_has_a_size(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="window"):
        Window(*numbers)


# ---- streams -------------------------------------------------------------------------------------------------------


def test_what_passes_is_whole_and_judged_elsewhere() -> None:
    guard = DenyList(("secret",))
    pieces = ["the ", "quick ", "brown ", "fox ", "jumps"]
    whole = read(pieces, guard)
    assert (whole.text, whole.finish_reason, whole.usage) == ("".join(pieces), "stop", Usage(3, 5))
    assert whole.token_ids == (0, 1, 2, 3, 4)
    assert [is_end for _, is_end in guard.judged][-1]
    assert threading.get_ident() not in guard.threads  # never on the event loop's


def test_a_refused_answer_ends_with_content_filter_and_is_computed_no_further() -> None:
    aborted: list[int] = []
    whole = read(["aaaaaaaa", "bbbbbbbb", "cc sec", "ret dd"], DenyList(("secret",)), aborted)
    assert whole.finish_reason == "content_filter"
    assert "aaaaaaaabbbbbbbbcc ".startswith(whole.text)
    assert aborted == []  # the engine had ended it by itself

    async def run() -> str:
        inner = new_stream(aborted)
        outer = guarded(inner, DenyList(("secret",)), CONTEXT)
        deliver(inner, GenerationEvent("a secret, and more", (1,), Usage(3, 1)))
        return str((await outer.result_async()).finish_reason)

    assert asyncio.run(run()) == "content_filter"
    assert aborted == [7]


def test_tool_calls_are_judged_too() -> None:
    async def run() -> Generation:
        inner = new_stream()
        outer = guarded(inner, DenyList(("rm -rf",)), CONTEXT)
        delta = ToolCallDelta(0, '{"command": "rm -rf /"}', "call_1", "shell")
        deliver(inner, GenerationEvent("", (1,), Usage(3, 1), tool_calls=(delta,)))
        deliver(inner, GenerationEvent("", (2,), Usage(3, 2), "tool_calls"))
        return await outer.result_async()

    whole = asyncio.run(run())
    assert (whole.finish_reason, whole.tool_calls) == ("content_filter", ())


def test_a_guard_that_raises_lets_nothing_pass_and_tells_no_text() -> None:
    with pytest.raises(GuardFailed) as caught:
        read(["personal text, long enough"], Broken(()))
    assert "personal" not in str(caught.value)
    with pytest.raises(GuardFailed) as caught:
        judge_prompts(Broken(()), [GenerationRequest(prompt="personal")], CONTEXT)
    assert "personal" not in str(caught.value)


def test_an_error_of_the_engine_reaches_the_reader() -> None:
    async def run() -> None:
        inner = new_stream()
        outer = guarded(inner, DenyList(()), CONTEXT)
        deliver(inner, GenerationEvent("some text that passes", (1,), Usage(3, 1)))
        deliver(inner, GenerationFailed("broken"))
        await outer.result_async()

    with pytest.raises(GenerationFailed, match="broken"):
        asyncio.run(run())


@pytest.mark.parametrize("who", ["reader", "engine's side"])
def test_closing_either_end_ends_both(who: str) -> None:
    aborted: list[int] = []
    heard: list[Heard] = []

    async def run() -> None:
        inner = new_stream(aborted)
        outer = guarded(inner, DenyList(()), CONTEXT)
        inner.watch(heard.append)
        reading = asyncio.ensure_future(outer.result_async())
        await asyncio.sleep(0)
        (outer if who == "reader" else inner).close()
        with pytest.raises(StreamClosed):
            await reading

    asyncio.run(run())
    assert (aborted, heard) == ([7], [None])


def test_prompts_are_judged_before_anything_is_computed() -> None:
    guard = DenyList(("secret",))
    judge_prompts(guard, [GenerationRequest(prompt="a question")], CONTEXT)
    with pytest.raises(ContentRefused) as caught:
        judge_prompts(guard, [GenerationRequest(prompt="fine"), GenerationRequest(prompt="the secret")], CONTEXT)
    assert caught.value.parameter == "prompt"
    with pytest.raises(ContentRefused) as caught:
        judge_prompts(guard, [GenerationRequest(messages=(ChatMessage("user", "the secret"),))], CONTEXT)
    assert caught.value.parameter == "messages"


def test_without_a_guard_a_stream_is_itself() -> None:
    stream = new_stream()
    assert guarded(stream, None, CONTEXT) is stream
