"""A request and its answer as those see them who stand beside its path: the shadow, and the log of requests.

Each kind of model that does not generate has its own pair of these. On the caller's thread they are only made, which
holds on to what is there; asked again, compared and written down they are by whoever wants that, on threads of their
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

MAX_CHARACTERS = 65_536  # of the texts of one question, or one answer, that a record keeps
MAX_NUMBERS = 4_096  # and of numbers: about as many characters of JSON
_SMALL_BYTES = 65_536
Measure = Literal["tokens", "outputs", "cosine", "order"]


@dataclass(frozen=True, slots=True)
class Written:
    """A question or an answer as a record has it.

    `text` is at most about `MAX_CHARACTERS` long; `size` (characters, or bytes of tensors) and `whole`, which is what
    is hashed, are of all of it.
    """

    text: str
    size: int
    whole: Sequence[bytes] = field(repr=False)

    @classmethod
    def of(cls, text: str) -> Written:
        """A text that is kept as it is."""
        return cls(text, len(text), (text.encode("utf-8", "surrogatepass"),))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a shadow's answer is the caller's: `share` is 1 where it is, by a `measure` of its kind of model.

    `tokens`: the share of them before the two part. `outputs`: the share of equal ones. `cosine`: the mean over the
    vectors. `order`: the share of pairs of documents in the same order. `is_same` says whether anybody would notice.
    """

    share: float
    is_same: bool
    measure: Measure


class Running(Protocol):
    """A question that is being answered."""

    def result(self) -> Answer:
        """Blocks. Raises `StreamClosed` once closed, and why there is no answer."""
        ...

    def close(self) -> None:
        """Nobody wants the answer any more: what has not begun will not. From any thread, and at once."""
        ...


class Question(Protocol):
    """A request to a model that does not generate."""

    @property
    def kind(self) -> str:
        """What was asked for, such as `embeddings`."""
        ...

    @property
    def tenant(self) -> str:
        """Who asked."""
        ...

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        ...

    def begin(self, served: object) -> Running:
        """Asks another version, as the least urgent of its requests. Raises why that cannot answer."""
        ...

    def written(self) -> Written:
        """For a record."""
        ...


class Answer(Protocol):
    """What came of it."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens that were read; 0 where a model knows none."""
        ...

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        ...

    def agreement(self, other: Answer) -> Agreement:
        """How far another version's answer to the same question is this one."""
        ...

    def written(self) -> Written:
        """For a record."""
        ...


def apart(array: Array) -> Array:
    """The array without what it is a part of, where that is cheap: a row must not keep a whole batch in memory."""
    return array if array.base is None or array.nbytes > _SMALL_BYTES else array.copy()


def held_bytes(array: Array) -> int:
    """What an array of numbers keeps in memory, with what it is a part of."""
    base = array.base
    return max(array.nbytes, int(getattr(base, "nbytes", 0)))


def fitting(texts: Sequence[str], room: int = MAX_CHARACTERS) -> list[str]:
    """The first of the texts, the last of them cut, which together have at most `room` characters."""
    kept: list[str] = []
    for text in texts:
        if len(text) >= room:
            return [*kept, text[:room]] if room > 0 else kept
        kept.append(text)
        room -= len(text)
    return kept
