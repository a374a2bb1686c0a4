"""Texts and pairs of texts to tokens, as the model's own tokenizer writes them. Safe across threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sihe.core.errors import CorruptData, NotFound
from sihe.serving.engine.encoder.types import Document, invalid


class EncoderTokenizer:
    """The tokenizer beside a model. Its files may ask for truncation and padding: neither happens here."""

    def __init__(self, tokenizer: Tokenizer, *, lower_case: bool = False) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lower_case = lower_case
        self.vocab_size: int = tokenizer.get_vocab_size()

    @classmethod
    def load(cls, folder: Path, *, lower_case: bool = False) -> EncoderTokenizer:
        """Reads tokenizer.json. Raises `NotFound`, `CorruptData`."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise NotFound("file", str(path), hint="a model folder holds its tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise CorruptData(path, str(error)) from error
        return cls(tokenizer, lower_case=lower_case)

    def texts(self, texts: Sequence[str], parameter: str) -> list[Document]:
        """Each text with its special tokens. Raises `InvalidRequest` that names the one that is not valid."""
        return [Document(found.ids) for found in self._encode([self._cased(text) for text in texts], parameter)]

    def pairs(self, query: str, documents: Sequence[str], max_document_tokens: int | None) -> list[Document]:
        """The query with each document, cut after so many of its own tokens. Raises `InvalidRequest`."""
        query, documents = self._cased(query), [self._cased(document) for document in documents]
        if max_document_tokens is not None:
            documents = self._cut(documents, max_document_tokens)
        found = self._encode([(query, document) for document in documents], "documents")
        return [Document(item.ids, item.type_ids) for item in found]

    def prefix_length(self, text: str) -> int:
        """How many tokens stand before what follows `text`: its own, and the special ones before it."""
        special = self._tokenizer.encode(self._cased(text), add_special_tokens=True).special_tokens_mask
        while special and special[-1]:
            special = special[:-1]  # at the end: these stand behind what follows
        return len(special)

    def _cased(self, text: str) -> str:
        return text.lower() if self._lower_case else text

    def _cut(self, documents: Sequence[str], limit: int) -> list[str]:
        found = self._encode(documents, "documents", special=False)
        return [
            document if len(item.ids) <= limit else document[: item.offsets[limit - 1][1]]
            for document, item in zip(documents, found, strict=True)
        ]

    def _encode(self, inputs: Sequence[Any], parameter: str, *, special: bool = True) -> list[Any]:
        encode: Callable[..., list[Any]] = self._tokenizer.encode_batch
        try:
            return encode(inputs, add_special_tokens=special)
        except (UnicodeEncodeError, TypeError):  # a lone surrogate, which JSON can carry
            for index, item in enumerate(inputs):
                try:
                    encode([item], add_special_tokens=special)
                except (UnicodeEncodeError, TypeError) as error:
                    where = index if len(inputs) > 1 or parameter == "input" else None
                    raise invalid(parameter, where, f"is not valid Unicode: {error}") from error
            raise
