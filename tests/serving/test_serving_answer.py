"""What a request asks of its answer, through a whole engine: constraints, penalties, tools, echo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sihe.core.errors import InvalidInput
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.tools import Tool
from sihe.serving.engine.types import ChatMessage, Constraint, Generation, GenerationRequest
from sihe.serving.errors import BadConstraint, ContextTooLong
from support.tiny_models import tiny_config, tiny_model, tiny_tokenizer

PROMPT = "the quick brown fox"
TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}<|assistant|>"
)
ADD = Tool(
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["x"],
                "additionalProperties": False,
            },
        },
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_model(tmp_path_factory.mktemp("models") / "tools", config=tiny_config(max_positions=512))
    file = made / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return made


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder, EngineConfig(max_batch_size=8, token_budget=24)) as loaded:
        yield loaded


def answer(engine: Engine, **fields: object) -> Generation:
    given = {"prompt": PROMPT, "max_tokens": 40, "seed": 3, **fields}
    if "messages" in given:
        del given["prompt"]
    return engine.submit(GenerationRequest(**given)).result(60)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_a_constraint_is_obeyed_at_any_temperature(served: Engine, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    found = answer(
        served,
        constraint=Constraint("json_schema", json.dumps(schema)),
        temperature=2.0,
        seed=seed,
        max_tokens=300,
        logit_bias=tuple((id, -50.0) for id in range(320) if not tiny_tokenizer().decode([id]).strip()),
    )
    value = json.loads(found.text)
    assert set(value) == {"ok", "n"}
    assert 0 <= value["n"] <= 99
    assert found.finish_reason == "stop"


def test_a_constraint_ends_the_answer_also_where_nothing_else_would(served: Engine) -> None:
    found = answer(served, constraint=Constraint("choice", '["fox", "dog"]'), ignore_eos=True, min_tokens=30)
    assert found.text in ("fox", "dog")
    assert found.finish_reason == "stop"


def test_requests_with_and_without_constraints_share_steps(served: Engine) -> None:
    alone = answer(served, temperature=0.0)
    streams = [
        served.submit(
            GenerationRequest(
                prompt=PROMPT,
                max_tokens=40,
                temperature=0.0,
                constraint=Constraint("regex", f"[a-{last}]{{4}}") if last else None,
            )
        )
        for last in ("", "c", "", "f", "")
    ]
    texts = [stream.result(60).text for stream in streams]
    assert texts[0] == texts[2] == texts[4] == alone.text
    assert len(texts[1]) == len(texts[3]) == 4
    assert set(texts[1]) <= set("abc")


def test_what_cannot_be_obeyed_is_refused_at_once(served: Engine) -> None:
    with pytest.raises(BadConstraint):
        answer(served, constraint=Constraint("regex", "("))
    assert served.num_sequences == 0


@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_tool_is_called_with_arguments_that_obey(served: Engine, parallel: bool) -> None:
    found = answer(
        served,
        messages=(ChatMessage("user", "fox"),),
        tools=(ADD,),
        tool_choice="required",
        parallel_tool_calls=parallel,
        temperature=1.0,
        max_tokens=350,
        logit_bias=tuple((id, -50.0) for id in range(320) if not tiny_tokenizer().decode([id]).strip()),
    )
    assert found.finish_reason == "tool_calls"
    assert found.text == ""
    assert 1 <= len(found.tool_calls) <= (8 if parallel else 1)
    for call in found.tool_calls:
        assert call.name == "add"
        assert 0 <= json.loads(call.arguments)["x"] <= 9


def test_tools_that_nobody_calls_leave_text_alone(served: Engine) -> None:
    fields = {"messages": (ChatMessage("user", "fox"),), "tools": (ADD,), "temperature": 0.0, "max_tokens": 30}
    found = answer(served, **fields)
    assert (found.tool_calls, found.finish_reason) == ((), "length")
    assert found.text == tiny_tokenizer().decode(list(found.token_ids), skip_special_tokens=True)


def test_bias_forces_and_forbids(served: Engine) -> None:
    fox = tiny_tokenizer().encode("fox").ids[-1]
    found = answer(served, logit_bias=((fox, 100.0),), max_tokens=3, temperature=1.0)
    assert found.token_ids == (fox, fox, fox)
    plain = answer(served, temperature=0.0, max_tokens=1).token_ids[0]
    assert answer(served, temperature=0.0, max_tokens=1, logit_bias=((plain, -100.0),)).token_ids[0] != plain


def test_a_strong_penalty_says_nothing_twice(served: Engine) -> None:
    found = answer(served, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0, max_tokens=40, ignore_eos=True)
    plain = answer(served, temperature=0.0, max_tokens=40, ignore_eos=True)
    assert len(set(found.token_ids)) > len(set(plain.token_ids))
    unlike = answer(served, temperature=0.0, repetition_penalty=100.0, max_tokens=12, ignore_eos=True)
    assert len(set(unlike.token_ids)) == 12
    assert not set(unlike.token_ids) & set(tiny_tokenizer().encode(PROMPT).ids)


def test_stop_tokens_and_the_least_length(served: Engine) -> None:
    plain = answer(served, temperature=0.0, max_tokens=20, ignore_eos=True)
    stop = plain.token_ids[4]
    first = plain.token_ids.index(stop)
    stopped = answer(served, temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    assert stopped.token_ids == plain.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    longer = answer(served, temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=(stop,), min_tokens=10)
    assert stop not in longer.token_ids[:10]


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("length", [1, 2, 24, 25, 100])
def test_an_echo_brings_the_models_own_log_probabilities(
    served: Engine, folder: Path, max_tokens: int, length: int
) -> None:
    """Prompts shorter and longer than a step, beside transformers on the whole text at once."""
    prompt = tuple((7 * at + 11) % 300 for at in range(length))
    found = answer(
        served, prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0.0, ignore_eos=True
    )
    tokens = [*prompt, *found.token_ids]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert [item.token_id for item in found.logprobs] == tokens
    assert (found.logprobs[0].logprob, found.logprobs[0].top) == (None, ())
    exact = [float(logprobs[at, token]) for at, token in enumerate(tokens[1:])]
    assert [item.logprob for item in found.logprobs[1:]] == pytest.approx(exact, abs=2e-4)
    for at, item in enumerate(found.logprobs[1:]):
        assert [other.token_id for other in item.top] == logprobs[at].topk(2).indices.tolist()
    assert found.text == tiny_tokenizer().decode(tokens, skip_special_tokens=True)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (length, max_tokens)
    assert found.finish_reason == "length"


def test_an_echo_of_a_cached_prompt_is_whole(served: Engine) -> None:
    prompt = tuple(range(10, 90))
    once = answer(served, prompt=prompt, echo=True, logprobs=0, max_tokens=1)
    again = answer(served, prompt=prompt, echo=True, logprobs=0, max_tokens=1)
    assert [item.logprob for item in once.logprobs[:80]] == [item.logprob for item in again.logprobs[:80]]
    assert len(again.logprobs) == 81


def test_an_echo_without_log_probabilities_is_the_text(served: Engine) -> None:
    found = answer(served, prompt="fox 你好", echo=True, max_tokens=4, temperature=0.0)
    assert found.text.startswith("fox 你好")
    assert found.logprobs == ()
    whole = answer(served, prompt="fox 你好", max_tokens=4, temperature=0.0)
    assert found.text == "fox 你好" + whole.text


def test_a_prompt_may_fill_the_context_where_nothing_is_generated(served: Engine) -> None:
    full = (5,) * served.context_tokens
    assert answer(served, prompt=full, echo=True, max_tokens=0, logprobs=0).usage.completion_tokens == 0
    with pytest.raises(ContextTooLong):
        answer(served, prompt=full, max_tokens=1)
    with pytest.raises(InvalidInput):
        GenerationRequest(prompt=full, max_tokens=0)


def test_an_open_end_is_no_text(tmp_path: Path) -> None:
    """A model without an end-of-sequence token, under a constraint that could go on."""
    made = tiny_model(tmp_path / "endless", config=tiny_config(eos=False))
    with Engine.load(made, EngineConfig(max_batch_size=2, token_budget=24)) as endless:
        for seed in range(4):
            found = answer(endless, constraint=Constraint("regex", "[ab]+"), temperature=2.0, seed=seed, max_tokens=60)
            assert found.text
            assert set(found.text) <= {"a", "b"}


@pytest.mark.parametrize(
    "fields",
    [
        {"constraint": Constraint("regex", "(abcab|bca){3,9}")},
        {
            "constraint": Constraint(
                "json_schema", '{"type": "array", "items": {"enum": ["fox", "box"]}, "minItems": 5}'
            )
        },
        {"frequency_penalty": 0.4, "repetition_penalty": 1.2, "prompt": "fox box fox box fox box"},
        {"logit_bias": ((70, 3.0),), "min_tokens": 30, "prompt": "dozen jugs dozen jugs"},
    ],
)
def test_speculation_changes_nothing_of_what_is_asked(served: Engine, folder: Path, fields: dict[str, object]) -> None:
    plain = answer(served, temperature=0.0, max_tokens=60, logprobs=0, **fields)
    with Engine.load(folder, EngineConfig(max_batch_size=4, token_budget=24, speculation="ngram")) as guessing:
        guessed = answer(guessing, temperature=0.0, max_tokens=60, logprobs=0, **fields)
    assert guessed.token_ids == plain.token_ids
    assert guessed.text == plain.text
    assert guessed.finish_reason == plain.finish_reason
