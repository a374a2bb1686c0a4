"""Byte-level BPE: training it, the files that any Hugging Face library loads, and encoding large texts quickly.

Every text is encoded without loss, whatever its bytes. What looks like a special token inside a document or a message
is plain text for `TextEncoder`: only the code that composes a prompt may write special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sihe.core.errors import CorruptData, InvalidInput, NotFound

BOS, EOS = "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = (BOS, EOS, "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)
_LONGEST_TOKEN = 32  # characters: rules of dashes and other runs would otherwise take vocabulary from words

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('a role is system, user or assistant, got ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens: a small text has fewer pairs to merge. Raises `InvalidInput`.

    The merges are those of Sennrich et al. 2016 over bytes, after the word pattern of GPT-2 (Radford et al. 2019).
    Encoding with special tokens puts `<|bos|>` first, as in the training data.
    """
    if vocab_size < MIN_VOCAB:
        raise InvalidInput(f"a vocabulary holds 256 bytes and {len(SPECIAL_TOKENS)} special tokens, got {vocab_size!r}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=_LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, *, max_length: int = 1 << 20) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`, as transformers' `AutoTokenizer` loads them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": list(SPECIAL_TOKENS[2:]),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1).encode(),
    }


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a data set or model folder. Raises `NotFound`, `CorruptData`."""
    path = Path(folder) / "tokenizer.json"
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound("tokenizer", str(path), hint="a model or data set folder has a tokenizer.json") from error
    except ValueError as error:
        raise CorruptData(path, str(error).splitlines()[0], hint="copy it again from where it was made") from error


class TextEncoder:
    """Encodes long texts by encoding each distinct piece once; the ids are exactly those of the tokenizer.

    A piece is what the tokenizer's word pattern matches, or a run of characters at whose ends the pattern is sure to
    stop. Text repeats its pieces (12 MB of Python have 54,000), so most of the work of `encode_batch` falls away.
    """

    _MOST_PIECES = 2_000_000  # forgotten beyond: about 300 MB

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True  # a document that says "<|eos|>" does not end there
        self.bos, self.eos = SPECIAL_TOKENS.index(BOS), SPECIAL_TOKENS.index(EOS)  # they are the first ids of all
        self._forget()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids (int64) of each text, without special tokens."""
        if len(self._number_of) > self._MOST_PIECES:
            self._forget()
        pieces = [_pieces(text) for text in texts]
        self._learn(list({piece for found in pieces for piece in found if piece not in self._number_of}))
        return [self._join(found) for found in pieces]

    def _forget(self) -> None:
        self._number_of: dict[str, int] = {}
        self._starts = np.zeros(1, np.int64)
        self._ids = np.empty(0, np.int64)

    def _learn(self, pieces: list[str]) -> None:
        encoded = [item.ids for item in self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]
        self._number_of.update(
            zip(pieces, range(len(self._number_of), len(self._number_of) + len(pieces)), strict=True)
        )
        ends = self._starts[-1] + np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
        self._starts = np.concatenate([self._starts, ends])
        flat = [token for ids in encoded for token in ids]
        self._ids = np.concatenate([self._ids, np.array(flat, np.int64)])

    def _join(self, pieces: list[str]) -> np.ndarray:
        numbers = np.fromiter(map(self._number_of.__getitem__, pieces), np.int64, len(pieces))
        starts = self._starts[numbers]
        lengths = self._starts[numbers + 1] - starts
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if ends.size else 0
        joined: np.ndarray = self._ids[np.arange(total) + np.repeat(starts - (ends - lengths), lengths)]
        return joined


def _pieces(text: str) -> list[str]:
    """Pieces that, encoded one by one, give the tokens of the text."""
    if text.isascii():
        return _ASCII_WORD.findall(text)
    found: list[str] = []
    for run in _RUN.findall(text):
        if run.isascii():
            found += _ASCII_WORD.findall(run)
        else:
            found.append(run)
    return found


# The word pattern of GPT-2 (Radford et al. 2019), which `ByteLevel` applies, where every character is ASCII.
_ASCII_WORD = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
# A run ends where white space begins, or before the last white space character of several: there the pattern never
# looks across. White space is what Unicode says and the pattern's \s means; Python's \s would add U+001C to U+001F.
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_RUN = re.compile(rf"[{_WHITE}]+(?=[{_WHITE}][^{_WHITE}])|[{_WHITE}]?[^{_WHITE}]+|[{_WHITE}]+")
