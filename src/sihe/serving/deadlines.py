"""How long a client gives its own request: a header, for protocols whose bodies have no field for it.

The time counts from the moment at which the request's head was read, so it holds while the body arrives, while the
request waits, and in the middle of its stream.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from sihe.serving.errors import DeadlineExceeded, InvalidRequest

TIMEOUT_HEADER = "x-sihe-timeout-ms"
MAX_TIMEOUT_MS = 24 * 3600 * 1000
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of the monotonic clock, `limit_s` after the request came."""

    limit_s: float
    at_s: float

    @property
    def has_passed(self) -> bool:
        """Whether nothing is left of the time."""
        return time.monotonic() >= self.at_s

    def left_s(self, *, is_whole: bool = False) -> float:
        """What is left of the time. Raises `DeadlineExceeded` where nothing is; `is_whole` for what does not stream."""
        left_s = self.at_s - time.monotonic()
        if left_s <= 0:
            raise self.exceeded(is_whole=is_whole)
        return left_s

    def exceeded(self, *, is_whole: bool = False) -> DeadlineExceeded:
        """That nothing is left of the time."""
        return DeadlineExceeded(self.limit_s, begun=is_whole, is_own=True)


def deadline_of(headers: Mapping[str, str]) -> Deadline | None:
    """The deadline that a request's headers set, from now; None without one. Raises `InvalidRequest`."""
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    text = given.strip()
    if not _NUMBER.fullmatch(text) or not 0 < float(text) <= MAX_TIMEOUT_MS:
        raise InvalidRequest(
            TIMEOUT_HEADER,
            f"{TIMEOUT_HEADER} is a number of milliseconds above 0, up to {MAX_TIMEOUT_MS}, got {given!r:.50}",
        )
    limit_s = float(text) / 1000
    return Deadline(limit_s, time.monotonic() + limit_s)
