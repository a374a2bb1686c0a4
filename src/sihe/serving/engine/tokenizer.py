"""The model's own tokenizer and chat template, from the files that lie beside its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from tokenizers import Tokenizer

from sihe.core.errors import CorruptData, InvalidInput, NotFound
from sihe.serving.engine.chat_template import ChatTemplates
from sihe.serving.engine.detokenizer import ByteDecoder, MarkedDecoder, TextDecoder, WindowDecoder
from sihe.serving.engine.grammar import GrammarCompiler
from sihe.serving.engine.types import GenerationRequest, TokenLogprob
from sihe.serving.errors import ContextTooLong


class ModelTokenizer:
    """Text to token ids and back, conversations to prompts, and the ids that end an answer. Safe across threads."""

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any], *, stop_ids: frozenset[int], folder: Path) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.templates = ChatTemplates.load(folder, config)
        self._special = _special_ids(tokenizer)
        self._pieces = _byte_pieces(tokenizer)
        self._longest = _longest_piece(tokenizer) if self._pieces is not None else 0
        self.chat_stop_ids = stop_ids | self._turn_end()
        self._lock = Lock()
        self._grammars: GrammarCompiler | None = None

    @classmethod
    def load(cls, folder: Path) -> ModelTokenizer:
        """Reads tokenizer.json, tokenizer_config.json and the end-of-sequence ids. Raises `NotFound`, `CorruptData`."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise NotFound("file", str(path), hint="a model folder holds its tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise CorruptData(path, str(error)) from error
        config = _read_json(folder / "tokenizer_config.json")
        return cls(tokenizer, config, stop_ids=_stop_ids(folder, tokenizer, config), folder=folder)

    def has_tokens_of(self, other: ModelTokenizer) -> bool:
        """Whether both give every id the same token."""
        ours: dict[str, int] = self._tokenizer.get_vocab()
        theirs: dict[str, int] = other._tokenizer.get_vocab()
        return ours == theirs

    def encode(self, text: str, *, special: bool = True, limit: int | None = None) -> list[int]:
        """Token ids of `text`, with the `special` tokens that the model's post-processor adds, or without.

        Raises `ContextTooLong` at once where it cannot be fewer than `limit` tokens: megabytes take seconds to read.
        """
        self._check_size(text, limit)
        return _ids(self._tokenizer, text, add_special_tokens=special)

    def encode_chat(self, request: GenerationRequest, *, limit: int | None = None) -> list[int]:
        """Token ids of a conversation, rendered up to where the assistant speaks. The template adds what is special."""
        text = self.templates.render(request)
        self._check_size(text, limit)
        return _ids(self._tokenizer, text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of `ids`, with or without `special` tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    def token_text(self, id: int) -> str:
        """One token as text: what a list of log-probabilities shows."""
        text: str = self._tokenizer.decode([id], skip_special_tokens=False)
        return text

    def token_bytes(self, id: int) -> bytes:
        """One token's bytes, also those that are no whole character; a special token's name."""
        if self._pieces is not None and id < len(self._pieces) and self._pieces[id]:
            return self._pieces[id]
        return self.token_text(id).encode()

    def spell(self, id: int, logprob: float | None, top: Sequence[tuple[int, float]] = ()) -> TokenLogprob:
        """A token's log-probability as it is reported, and that of the likeliest ones of its place."""
        others = tuple(TokenLogprob(token, value, self.token_bytes(token)) for token, value in top)
        return TokenLogprob(id, logprob, self.token_bytes(id), others)

    def decoder(self, shown: Sequence[str] = ()) -> TextDecoder:
        """A fresh incremental decoder. Special tokens read as nothing, but for those that are `shown`."""
        marked = {id: text for text in shown if (id := self.special_id(text)) is not None}
        return MarkedDecoder(self._plain_decoder, marked) if marked else self._plain_decoder()

    def grammars(self, vocab_size: int) -> GrammarCompiler:
        """The compiler of constraints on answers by a model with `vocab_size` logits; each model has one."""
        with self._lock:
            if self._grammars is None:
                stops = sorted(self.stop_ids | self.chat_stop_ids)
                self._grammars = GrammarCompiler(self._tokenizer, vocab_size=vocab_size, stop_ids=stops)
            return self._grammars

    def _plain_decoder(self) -> TextDecoder:
        return ByteDecoder(self._pieces) if self._pieces is not None else WindowDecoder(self.decode)

    def _check_size(self, text: str, limit: int | None) -> None:
        least = len(text) // self._longest if self._longest else 0
        if limit is not None and least > limit:
            raise ContextTooLong(limit=limit, actual=least)

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written `text`, if it is one: ordinary text never becomes it."""
        id = self._tokenizer.token_to_id(text)
        return id if id in self._special else None

    def _turn_end(self) -> frozenset[int]:
        """The special token that the template writes after what the assistant says: there a chat answer ends.

        Many models name it in generation_config.json; the template is what all of them have.
        """
        if not self.templates:
            return frozenset()
        after = self.templates.ending("an answer to find again")
        return frozenset(_ids(self._tokenizer, after, add_special_tokens=False)[:1]) & self._special


def _ids(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except (UnicodeEncodeError, TypeError) as error:  # a lone surrogate, which JSON can carry
        raise InvalidInput(f"the text is not valid Unicode: {error}") from error
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptData(path, str(error)) from error
    if not isinstance(value, dict):
        raise CorruptData(path, "not a JSON object")
    return value


def _stop_ids(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> frozenset[int]:
    """Every id that ends an answer: config.json's, generation_config.json's and the tokenizer's own."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    token = config.get("eos_token")
    id = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
    return frozenset(found | ({id} if id is not None else set()))


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _longest_piece(tokenizer: Tokenizer) -> int:
    """At most so many characters of a text become one token of a byte-level vocabulary, whose names have a character
    for each byte. Where the text is normalised before, up to four of its characters may have become one (Unicode's
    composition, UAX #15)."""
    longest = max((len(name) for name in tokenizer.get_vocab(with_added_tokens=True)), default=0)
    return longest * (1 if tokenizer.normalizer is None else 4)


def _byte_pieces(tokenizer: Tokenizer) -> list[bytes] | None:
    """Each id's bytes when the vocabulary is byte-level; None when it is not. Special tokens read as nothing."""
    if type(tokenizer.decoder).__name__ != "ByteLevel":
        return None
    byte_of = {character: byte for byte, character in _byte_alphabet().items()}
    special = _special_ids(tokenizer)
    pieces: list[bytes] = []
    for id in range(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1):
        token = tokenizer.id_to_token(id)
        if token is None or id in special:
            pieces.append(b"")
        elif all(character in byte_of for character in token):
            pieces.append(bytes(byte_of[character] for character in token))
        else:
            pieces.append(token.encode("utf-8"))
    return pieces


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else the next character from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet)
    return alphabet | {byte: chr(0x100 + index) for index, byte in enumerate(others)}
