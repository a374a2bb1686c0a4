"""Dialogues that people wrote and judged (HH-RLHF, harmless half): masks, and DPO on them. Skipped where absent."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import torch

from sihe.models.decoder import Decoder
from sihe.training.recipes import losses
from sihe.training.recipes.chat import ChatTokenizer, Message
from sihe.training.recipes.heads import frozen
from sihe.training.recipes.logprobs import next_token_logprobs
from sihe.training.recipes.sequences import Padded, padded
from support.data import shared_data
from support.tiny_models import TEMPLATE, tiny_config, tiny_tokenizer

_TURN = re.compile(r"\n\n(Human|Assistant): ?(.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.DOTALL)
_ROLES = {"Human": "user", "Assistant": "assistant"}


def conversation(text: str) -> list[Message]:
    return [{"role": _ROLES[speaker], "content": said} for speaker, said in _TURN.findall(text)]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[list[Message], list[Message]]]:
    with gzip.open(shared_data("preference/hh_harmless_half.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(60)]
    return [(conversation(row["chosen"]), conversation(row["rejected"])) for row in rows]


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer(), TEMPLATE, {"bos_token": "<|bos|>"})


def test_the_mask_holds_every_word_of_the_assistant_and_no_other(
    pairs: list[tuple[list[Message], list[Message]]], chat: ChatTokenizer
) -> None:
    for chosen, _ in pairs:
        encoded = chat.encode(chosen)
        kept = [token for token, counts in zip(encoded.token_ids, encoded.mask, strict=True) if counts]
        said = [message["content"] for message in chosen if message["role"] == "assistant"]
        assert chat.tokenizer.decode(kept, skip_special_tokens=False) == "".join(f"{text}<|end|>" for text in said)


def test_dpo_tells_the_judged_answers_apart(
    pairs: list[tuple[list[Message], list[Message]]], chat: ChatTokenizer
) -> None:
    short = [pair for pair in pairs if all(len(chat.encode(talk).token_ids) <= 256 for talk in pair)][:8]
    assert len(short) == 8
    chosen, rejected = (padded([chat.encode(pair[side]) for pair in short]) for side in (0, 1))
    torch.manual_seed(0)
    policy = Decoder(tiny_config(max_positions=256))
    reference = frozen(policy)

    def log_ratio(of: Padded) -> torch.Tensor:
        with torch.no_grad():
            theirs_BT = next_token_logprobs(reference, of.tokens)
        return ((next_token_logprobs(policy, of.tokens) - theirs_BT) * of.target_mask).sum(1)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        losses.dpo(log_ratio(chosen), log_ratio(rejected), beta=0.1).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        assert int((log_ratio(chosen) > log_ratio(rejected)).sum()) >= 7
