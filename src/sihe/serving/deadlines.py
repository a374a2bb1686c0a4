"""How long a request has: by its client, whose header is for protocols whose bodies have no field for it, and by its
deployment.

A client's time counts from the moment at which the request's head was read, so it holds while the body arrives, while
the request waits, and in the middle of its stream.
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
    """A moment of the monotonic clock, `limit_s` after the request came; whether its client has set it (`is_own`)."""

    limit_s: float
    at_s: float
    is_own: bool = True

    @classmethod
    def of_deployment(cls, limit_s: float | None) -> Deadline | None:
        """The deadline of a deployment whose answers take at most `limit_s`, from now; None without one."""
        return None if limit_s is None else cls(limit_s, time.monotonic() + limit_s, is_own=False)

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
        return DeadlineExceeded(self.limit_s, begun=is_whole, is_own=self.is_own)


def earliest(*deadlines: Deadline | None) -> Deadline | None:
    """The first to pass of those that there are; of equal ones the one that is named first."""
    return min((one for one in deadlines if one is not None), key=lambda one: one.at_s, default=None)


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
