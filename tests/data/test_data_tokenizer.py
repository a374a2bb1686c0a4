"""The tokenizer loses nothing, is the same everywhere, and no text can smuggle a special token in."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sihe.core.errors import CorruptData, InvalidInput, NotFound
from sihe.data.text import packing
from sihe.data.text.tokenizer import SPECIAL_TOKENS, TextEncoder, load_tokenizer, tokenizer_files, train_tokenizer
from sihe.data.text.types import Document

SOURCE = Path(packing.__file__).parent
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.py"))] + [
    "张量并行把一层的权重切到多张卡上。" * 5
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 700)


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> TextEncoder:
    return TextEncoder(tokenizer)


def plain(tokenizer: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy


SPACES = "\t\n\v\f\r \x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u200a\u200b\u2028\u202f\u205f\u3000\ufeff\u180e"
mixed = st.text(
    alphabet=st.one_of(st.sampled_from(SPACES + "ab1'sß张,!_<|eos>٣\u0301"), st.characters(codec="utf-8")), max_size=40
)


@settings(max_examples=500, deadline=None)
@given(text=st.one_of(mixed, st.text(alphabet=st.sampled_from("' \n\t\x0b\x1c\0astrevml19.(_<|>"), max_size=40)))
@example(text="  \n\n  x")
@example(text="a \x1c b\x1c\x1d c")
@example(text="<|eos|> <|user|>\n")
@example(text="it's they'll   \t end  ")
@example(text="('self' 'll''re'VE")
@example(text="it’s naïve é's x's")
def test_pieces_give_the_tokens_of_the_whole_text(tokenizer: Tokenizer, encoder: TextEncoder, text: str) -> None:
    expected = plain(tokenizer).encode(text, add_special_tokens=False).ids
    assert encoder.encode([text])[0].tolist() == expected


def test_real_text_is_encoded_as_by_the_tokenizer(tokenizer: Tokenizer, encoder: TextEncoder) -> None:
    expected = [item.ids for item in plain(tokenizer).encode_batch(TEXTS, add_special_tokens=False)]
    assert [ids.tolist() for ids in encoder.encode(TEXTS)] == expected
    assert [ids.tolist() for ids in encoder.encode(TEXTS)] == expected  # every piece known by now


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_nothing_is_lost(tokenizer: Tokenizer, encoder: TextEncoder, text: str) -> None:
    assert tokenizer.decode(encoder.encode([text])[0].tolist(), skip_special_tokens=False) == text


def test_pieces_are_forgotten_when_there_are_too_many(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextEncoder, "_MOST_PIECES", 10)
    small = TextEncoder(tokenizer)
    for text in (*TEXTS, *TEXTS):
        assert tokenizer.decode(small.encode([text])[0].tolist()) == text


def test_a_document_cannot_write_special_tokens(encoder: TextEncoder) -> None:
    for text in SPECIAL_TOKENS:
        assert min(encoder.encode([f"a {text} b"])[0]) >= len(SPECIAL_TOKENS)


def test_special_tokens_come_first_and_bos_is_put_in_front(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.encode("x").ids[0] == 0
    assert tokenizer.get_vocab_size() == 700


def test_training_is_the_same_in_every_process(tokenizer: Tokenizer) -> None:
    code = (
        "import hashlib, sys; from pathlib import Path; from sihe.data.text.tokenizer import train_tokenizer\n"
        f"texts = [p.read_text(encoding='utf-8') for p in sorted(Path({str(SOURCE)!r}).glob('*.py'))]\n"
        "texts += ['张量并行把一层的权重切到多张卡上。' * 5]\n"
        "print(hashlib.sha256(train_tokenizer(texts, 700).to_str().encode()).hexdigest())"
    )
    expected = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    for threads in ("1", "4"):
        environment = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, env=environment, text=True
        )
        assert found.stdout.strip() == expected


def test_a_small_text_gives_a_small_vocabulary() -> None:
    assert train_tokenizer(["abab"], 5000).get_vocab_size() < 300


def test_a_vocabulary_too_small_for_bytes() -> None:
    with pytest.raises(InvalidInput, match="256 bytes"):
        train_tokenizer(["x"], 261)


def test_transformers_loads_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, data in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_bytes(data)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token, loaded.eos_token) == ("<|bos|>", "<|eos|>")
    assert loaded(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0]).ids
    assert loaded.decode(loaded(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Why?"},
    ]
    shown = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == (
        "<|bos|><|system|>\nBe brief.<|end|>\n<|user|>\n你好<|end|>\n<|assistant|>\nHi.<|end|>\n"
        "<|user|>\nWhy?<|end|>\n<|assistant|>\n"
    )
    with pytest.raises(Exception, match="a role is system, user or assistant, got tool"):
        loaded.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_a_damaged_or_missing_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    for damage in (b"", b"{", b"{}", tokenizer.to_str().encode()[:-100], b"\xff\x00"):
        (tmp_path / "tokenizer.json").write_bytes(damage)
        with pytest.raises(CorruptData, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_files(tokenizer)["tokenizer.json"])
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert json.loads(tokenizer_files(tokenizer)["tokenizer_config.json"])["pad_token"] == "<|eos|>"


# ---- packing --------------------------------------------------------------------------------------------------------


def test_documents_are_framed(encoder: TextEncoder) -> None:
    documents = [Document(f"{i}", text, "code", "python", "unknown", "0") for i, text in enumerate(TEXTS)]
    packed = list(packing.tokenize(documents, encoder))
    assert len(packed) == len(TEXTS)
    for tokens, ids in zip(packed, encoder.encode(TEXTS), strict=True):
        assert (tokens[0], tokens[-1]) == (0, 1)
        assert np.array_equal(tokens[1:-1], ids)


def digests(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(300, 1500), st.integers(0, 500))
def test_adding_documents_moves_none_to_the_other_split(before: int, more: int) -> None:
    old, new = packing.choose_held_out(digests(before), 0.05), packing.choose_held_out(digests(before + more), 0.05)
    assert old == new & set(digests(before))
    assert abs(len(old) - 0.05 * before) < 5 * np.sqrt(0.05 * before)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_small_corpus_has_both_splits(count: int, share: float) -> None:
    assert 0 < len(packing.choose_held_out(digests(count), share)) < count


def test_nothing_held_out() -> None:
    assert packing.choose_held_out(digests(50), 0.0) == set()
    assert packing.choose_held_out(digests(1), 0.5) == set()


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan")])
def test_a_share_out_of_range(share: float) -> None:
    with pytest.raises(InvalidInput, match="held_out"):
        packing.choose_held_out([], share)
