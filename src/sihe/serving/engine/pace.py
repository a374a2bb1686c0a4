"""How much of a prompt a step may read while others wait for their next token. Pure: no clock, no threads.

A budget in tokens alone means a pause of 0.1 s with a small model and of ten with a large one.
"""

from __future__ import annotations

LEAST_TOKENS = 32
"""Read in any case: where weights come from memory so few cost little beside them, and prompts must come to an end."""
_KEPT = 0.8  # of what is known, at each step


class Pace:
    """Aims at steps of `target_s` seconds, by how long the last ones took for the tokens of prompts that they read.

    What a step takes besides (its weights, those that decode) counts as theirs too. After a step of a + b n seconds for
    n tokens the next one is given n' = target / (a / n + b), whose fixed point is the n of a step of `target_s`.
    """

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self._seconds = 0.0
        self._tokens = 0.0

    def add_step(self, tokens: int, seconds: float) -> None:
        """A step has read `tokens` of prompts and has taken `seconds`; one that read none says nothing."""
        if tokens > 0 and seconds > 0:
            self._seconds = _KEPT * self._seconds + seconds
            self._tokens = _KEPT * self._tokens + tokens

    @property
    def tokens(self) -> int | None:
        """Tokens of prompts for the next step; None while nothing is known."""
        if not self._tokens:
            return None
        return max(LEAST_TOKENS, int(self._target_s * self._tokens / self._seconds))
