"""What can go wrong while serving, and who must act.

TooLarge       ├── ContextTooLong        the prompt has more tokens than the model's context
               ├── InputTooLong          one text of a request is longer than the encoder reads
               └── OverLimit             the request is larger than all that its tenant may ask for in a minute
InvalidInput   ├── UnsupportedParameter  the protocol knows it, this server does not (yet)
               ├── InvalidRequest        a field of a request has the wrong form
               ├── ContentRefused        a guard does not let this prompt pass
               ├── WrongCapability       this model generates, embeds or reranks, and something else was asked of it
               └── BadConstraint         no answer can obey it, or finding out would cost too much
Busy           ├── QueueFull             too many requests wait: come back later
               ├── RateLimited           this tenant, or this key, asks too often or for too much
               └── QuotaExceeded         this tenant, or this key, has used what it may in this day or month
UserError      ├── NoMemory              weights and cache do not fit in memory            (MemoryError)
               └── SlowBody              a request's body did not come in time
TransientError ├── NotReady              the deployment has no replica that serves yet
               ├── NoRoom                no machine has room for a replica now
               ├── EngineClosed          this engine takes no more requests; another one may
               ├── EngineDead            the engine's thread stopped on an error
               └── ReplicaLost           the process or machine of a replica is gone, or does not answer
TimedOut       ├── DeadlineExceeded      the answer was not there in time
               └── Expired               the deadline passed while the request waited, and nothing was computed
InternalError  ├── GenerationFailed      this one request could not be computed
               ├── GuardFailed           the guard over prompts and answers raised: nothing passes
               ├── EncodingFailed        the same, by an encoder
               └── InferenceFailed       the same, by a predictive model
"""

from __future__ import annotations

from collections.abc import Mapping

from sihe.core.errors import Busy, InternalError, InvalidInput, TimedOut, TooLarge, TransientError, UserError


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


class InvalidRequest(InvalidInput):
    """A field of a request has the wrong form; `parameter` names it."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class InputTooLong(TooLarge):
    """One text of a request is longer than the model reads; `parameter` and `index` say which."""

    def __init__(self, parameter: str, index: int | None, *, limit: int, actual: int) -> None:
        where = parameter if index is None else f"{parameter}[{index}]"
        super().__init__(
            f"{where} has {actual} tokens and the model reads {limit}: shorten it, or cut it in parts",
            limit=limit,
            actual=actual,
            unit="tokens",
        )
        self.parameter = parameter
        self.index = index


class WrongCapability(InvalidInput):
    """What `name` serves does something else than what was asked of it."""

    def __init__(self, name: str, *, wanted: str, has: str) -> None:
        super().__init__(f"{name} is for {has}, and {wanted} was asked of it: choose another model")
        self.parameter = "model"
        self.wanted = wanted
        self.has = has


class BadConstraint(InvalidInput):
    """What an answer must look like (a schema, an expression, a grammar) cannot be used, for `reason`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"the {kind.replace('_', ' ')} that the answer must obey cannot be used: {reason}")
        self.kind = kind


class ContentRefused(InvalidInput):
    """A guard does not let this prompt pass; `parameter` names where it stands."""

    def __init__(self, message: str, *, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class QueueFull(Busy):
    """As many requests wait as the engine is told to hold."""

    def __init__(self, waiting: int, *, retry_after_s: float) -> None:
        super().__init__(
            f"{waiting} requests wait already: retry in {retry_after_s:.0f} s, or raise max_waiting",
            retry_after_s=retry_after_s,
        )


class OverLimit(TooLarge):
    """A request that needs more than the bucket `name` can ever hold: no waiting helps."""

    def __init__(self, name: str, *, limit: int, actual: int) -> None:
        super().__init__(
            f"{name} may be {limit} a minute, and this request alone needs {actual}: lower max_tokens or shorten the "
            "prompt",
            limit=limit,
            actual=actual,
            unit="tokens",
        )


class RateLimited(Busy):
    """A limit of the caller's is reached; `counts` says which kind. `headers` are OpenAI's `x-ratelimit-*`."""

    def __init__(self, message: str, *, counts: str, retry_after_s: float, headers: Mapping[str, str]) -> None:
        super().__init__(f"rate limit reached: {message}: retry in {retry_after_s:.1f} s", retry_after_s=retry_after_s)
        self.counts = counts
        self.headers = headers


class QuotaExceeded(Busy):
    """What the caller may use in a day or a month (`period`) is used up."""

    def __init__(self, message: str, *, period: str, retry_after_s: float, headers: Mapping[str, str]) -> None:
        super().__init__(f"quota exceeded: {message}", retry_after_s=retry_after_s)
        self.period = period
        self.headers = headers


class NoMemory(UserError, MemoryError):
    """`what` needs more memory than there is."""

    def __init__(self, what: str, *, needed_bytes: int, available_bytes: int, hint: str) -> None:
        super().__init__(
            f"{what} needs {needed_bytes / 1e6:,.0f} MB and {available_bytes / 1e6:,.0f} MB are available: {hint}"
        )
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class SlowBody(UserError):
    """A client began a request and did not send the rest of it in time."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the body of the request did not arrive within {timeout_s:.0f} s: send it faster, or less")


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


class NoRoom(TransientError):
    """No machine has room for a replica of `what` now."""

    def __init__(self, what: str, *, needed: str, there: str) -> None:
        super().__init__(f"no room for {what}: it needs {needed}, and there is {there}; it is tried again")


class ReplicaLost(TransientError):
    """A replica's process or machine is gone, or does not answer; what it had begun ends here."""


class DeadlineExceeded(TimedOut):
    """A request was not answered within the time that it had: by its client's own limit (`is_own`), or by another."""

    def __init__(self, limit_s: float, *, begun: bool, is_own: bool = False) -> None:
        what = "the whole answer" if begun else "the first token"
        advice = "allow more time" if is_own else "retry later"
        super().__init__(f"{what} was not there within {round(max(0.0, limit_s), 3):g} s: {advice}, or ask for less")
        self.limit_s = limit_s
        self.is_own = is_own
        # OpenAI's clients send what ended with a 5xx again by themselves: who set the limit has given up.
        self.headers = {"x-should-retry": "false"} if is_own else {}


class Expired(TimedOut):
    """The request waited until its deadline, and nothing was computed for it."""

    def __init__(self, waited_s: float) -> None:
        super().__init__(
            f"the request waited {waited_s * 1000:.0f} ms and its deadline passed before it was computed: allow more "
            "time, or send less"
        )
        self.waited_s = waited_s


class GenerationFailed(InternalError):
    """The model could not compute this request. Others in the same batch go on."""


class EncodingFailed(InternalError):
    """The model could not compute one text of a request. Others in the same batch go on."""

    def __init__(self, parameter: str, index: int, reason: str) -> None:
        super().__init__(f"{parameter}[{index}] could not be encoded: {reason}")
        self.parameter = parameter
        self.index = index


class GuardFailed(InternalError):
    """The guard that judges prompts and answers raised: nothing passes."""


class InferenceFailed(InternalError):
    """The predictive model could not compute this request. Others in the same batch go on."""
