"""Text out of tokens, piece by piece, is the text of all tokens at once; stop strings never leak."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from sihe.serving.engine.detokenizer import ByteDecoder, StopFilter, TextDecoder, WindowDecoder
from sihe.serving.engine.tokenizer import _byte_pieces
from support.tiny_models import tiny_tokenizer


def byte_level() -> TextDecoder:
    pieces = _byte_pieces(tiny_tokenizer())
    assert pieces is not None
    return ByteDecoder(pieces)


def windowed() -> TextDecoder:
    return WindowDecoder(lambda ids: tiny_tokenizer().decode(list(ids), skip_special_tokens=True))


def sentencepiece() -> Tokenizer:
    """A Llama-2-like vocabulary: metaspace, bytes for what it lacks, a leading space dropped at the start."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁fox", "x", "é", "世"]
    tokenizer = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def read(decoder: TextDecoder, ids: list[int]) -> str:
    return "".join([*(decoder.push(id) for id in ids), decoder.flush()])


@pytest.mark.parametrize("make", [byte_level, windowed])
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_any_tokens_read_as_the_tokenizer_reads_them(make: object, ids: list[int]) -> None:
    assert callable(make)
    assert read(make(), ids) == tiny_tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("make", [byte_level, windowed])
@given(text=st.text(max_size=40))
def test_text_comes_back_and_never_as_half_characters(make: object, text: str) -> None:
    assert callable(make)
    decoder = make()
    ids = tiny_tokenizer().encode(text).ids
    pieces = [decoder.push(id) for id in ids]
    assert "".join(pieces) + decoder.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(words=st.lists(st.sampled_from(["▁the", "▁fox", "▁", "x", "é", "世", "🙂", "ñ", "\n"]), max_size=25))
def test_another_kind_of_vocabulary(words: list[str]) -> None:
    tokenizer = sentencepiece()
    ids: list[int] = []
    for word in words:
        known = tokenizer.token_to_id(word)
        ids += [1 + byte for byte in word.encode()] if known is None else [known]
    decoder = WindowDecoder(lambda window: tokenizer.decode(list(window)))
    pieces = [decoder.push(id) for id in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_space_inside_a_text_is_kept() -> None:
    tokenizer = sentencepiece()
    the, fox = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("▁fox")
    decoder = WindowDecoder(lambda window: tokenizer.decode(list(window)))
    assert [decoder.push(the), decoder.push(fox), decoder.push(fox)] == ["the", " fox", " fox"]


def test_ids_past_the_vocabulary_read_as_nothing() -> None:
    assert read(byte_level(), [100_000]) == ""


def test_endless_half_characters_are_given_out_in_the_end() -> None:
    continuation = tiny_tokenizer().token_to_id("Ģ")  # the byte 0x80, which begins no character
    decoder = windowed()
    assert any(decoder.push(continuation) for _ in range(200))


STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


@given(pieces=st.lists(st.text(alphabet="abcd", max_size=5), max_size=12), stops=STOPS)
def test_a_stop_string_cuts_where_it_first_begins(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    filter = StopFilter(stops)
    shown = ""
    for piece in pieces:
        shown += filter.push(piece)
        assert text.startswith(shown)
        if filter.is_stopped:
            break
    shown += filter.flush()
    assert shown == (text[: min(found)] if found else text)
    assert filter.is_stopped == bool(found)


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    filter = StopFilter(["</end>"])
    assert filter.push("text <") == "text "
    assert filter.push("/e") == ""
    assert filter.push("x") == "</ex"
    assert filter.push("</end>more") == ""
    assert filter.is_stopped
    assert filter.push("never") == ""
