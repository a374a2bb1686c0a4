"""Text out of tokens as they come: no half characters, and no text that a stop string might still take back.

Two ways from tokens to text, one contract: the pieces, joined, are what the tokenizer decodes from all tokens at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"  # what decoders give for bytes that are not, or not yet, a character
_MAX_HELD = 64  # tokens: a decoder that gives no whole character for so long never will


class TextDecoder(Protocol):
    """Tokens to text, one at a time."""

    def push(self, token: int) -> str:
        """The text that is certain now that `token` is known; may be empty."""
        ...

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        ...


class ByteDecoder:
    """For byte-level vocabularies: `pieces[id]` are a token's bytes, and UTF-8 says where characters end. O(1) a token.

    Ids past the vocabulary (a model's output layer may be padded) read as nothing.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        return self._utf8.decode(self._pieces[token] if token < len(self._pieces) else b"")

    def flush(self) -> str:
        """A replacement character for bytes that never became one."""
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For every other vocabulary (such as SentencePiece's): decodes a short window again with each token.

    What a token reads as can depend on the tokens before it (a leading space is dropped at the start), so new text is
    the difference between decoding the window with and without the new tokens. (Bytes that are no UTF-8 make a
    byte-fallback decoder take back characters before them; what has been given out stays.)
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._read = 0  # tokens of the window whose text has been given out

    def push(self, token: int) -> str:
        """What the window reads more with `token`; nothing while it ends inside a character."""
        self._window.append(token)
        whole = self._decode(self._window)
        if whole.endswith(_REPLACEMENT) and len(self._window) - self._read < _MAX_HELD:
            return ""
        text = whole[len(self._decode(self._window[: self._read])) :]
        if text:
            del self._window[: self._read]
            self._read = len(self._window)
        return text

    def flush(self) -> str:
        """What the window reads more than has been given out."""
        return self._decode(self._window)[len(self._decode(self._window[: self._read])) :]


class MarkedDecoder:
    """Another decoder's text, with the tokens of `marked` written out where that one reads them as nothing."""

    def __init__(self, make: Callable[[], TextDecoder], marked: Mapping[int, str]) -> None:
        self._make = make
        self._marked = marked
        self._inner = make()

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        if token not in self._marked:
            return self._inner.push(token)
        before = self._inner.flush()
        self._inner = self._make()
        return before + self._marked[token]

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return self._inner.flush()


class StopFilter:
    """Lets text through up to the first stop string, holding back any end that could become one.

    Where several stop strings match, the one that begins first wins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown. Nothing more comes once `is_stopped`."""
        if not self._stops or self.is_stopped:
            return "" if self.is_stopped else text
        self._held += text
        # A longer stop string that began earlier may still be incomplete when a shorter one is found: wait for it.
        begins = [self._held.find(stop) for stop in self._stops]
        first = min((at for at in begins if at >= 0), default=None)
        keep = self._possible_start()
        if first is not None and first <= keep:
            shown, self._held, self.is_stopped = self._held[:first], "", True
        else:
            shown, self._held = self._held[:keep], self._held[keep:]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        first = min((at for at in (held.find(stop) for stop in self._stops) if at >= 0), default=None)
        if first is None:
            return held
        self.is_stopped = True
        return held[:first]

    def _possible_start(self) -> int:
        """The first index from which the held text to its end is a proper beginning of a stop string."""
        longest = max(len(stop) for stop in self._stops)
        size = len(self._held)
        for start in range(max(0, size - longest + 1), size):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return size
