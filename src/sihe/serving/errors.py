"""What can go wrong while serving, and who must act.

TooLarge       └── ContextTooLong        the prompt has more tokens than the model's context
InvalidInput   └── UnsupportedParameter  the protocol knows it, this server does not (yet)
Busy           └── QueueFull             too many requests wait: come back later
UserError      └── NoMemory              weights and cache do not fit in memory            (MemoryError)
TransientError ├── NotReady              the deployment has no replica that serves yet
               ├── EngineClosed          this engine takes no more requests; another one may
               └── EngineDead            the engine's thread stopped on an error
InternalError  └── GenerationFailed      this one request could not be computed
"""

from __future__ import annotations

from sihe.core.errors import Busy, InternalError, InvalidInput, TooLarge, TransientError, UserError


class ContextTooLong(TooLarge):
    """The prompt has `actual` tokens and the context holds `limit`, of which one must remain for the answer."""

    def __init__(self, *, limit: int, actual: int) -> None:
        super().__init__(
            f"the context holds {limit} tokens, of which at least one is for the answer, and the prompt has {actual}: "
            "shorten it",
            limit=limit,
            actual=actual,
            unit="tokens",
        )


class UnsupportedParameter(InvalidInput):
    """The protocol has `parameter`, and this server does not support the value that came."""

    def __init__(self, parameter: str, value: object, *, hint: str = "leave it out") -> None:
        super().__init__(f"{parameter}={value!r} is not supported: {hint}")
        self.parameter = parameter


class QueueFull(Busy):
    """As many requests wait as the engine is told to hold."""

    def __init__(self, waiting: int, *, retry_after_s: float) -> None:
        super().__init__(
            f"{waiting} requests wait already: retry in {retry_after_s:.0f} s, or raise max_waiting",
            retry_after_s=retry_after_s,
        )


class NoMemory(UserError, MemoryError):
    """`what` needs more memory than there is."""

    def __init__(self, what: str, *, needed_bytes: int, available_bytes: int, hint: str) -> None:
        super().__init__(
            f"{what} needs {needed_bytes / 1e6:,.0f} MB and {available_bytes / 1e6:,.0f} MB are available: {hint}"
        )
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class NotReady(TransientError):
    """The deployment exists and no replica of it serves."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"deployment {name!r} is not ready ({reason}): retry in a moment")
        self.name = name


class StreamClosed(TransientError):
    """Whoever read the stream closed it before its end; there is no whole answer."""


class EngineClosed(TransientError):
    """The engine is closed, or drains before it closes; what it had begun is finished."""


class EngineDead(TransientError):
    """The engine's thread stopped on an error, which is the cause of this one."""


class GenerationFailed(InternalError):
    """The model could not compute this request. Others in the same batch go on."""
