"""Where the last tokens of a text came before."""

from __future__ import annotations

from collections.abc import Sequence as Items

_SIZES = (3, 2)  # tokens that must agree before what followed them is proposed again; the longest match counts


class PromptIndex:
    """The text of one sequence, by what its last tokens were: O(1) a token.

    (Prompt lookup decoding: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding.)
    """

    def __init__(self, tokens: Items[int] = ()) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where the latest occurrence of some tokens ends
        self._match = 0  # where what followed an earlier occurrence of the last tokens begins; 0: there is none
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Items[int]) -> None:
        """The text goes on with `tokens`."""
        known, ends = self._tokens, self._ends
        for token in tokens:
            known.append(token)
            match = 0
            for size in _SIZES:
                if len(known) >= size:
                    key = tuple(known[-size:])
                    match = match or ends.get(key, 0)
                    ends[key] = len(known)
            self._match = match

    def next(self, most: int) -> tuple[int, ...]:
        """What followed the last tokens when they came before, at most `most` tokens."""
        return tuple(self._tokens[self._match : self._match + most]) if self._match else ()
