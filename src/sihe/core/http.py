"""The one place where an error becomes an HTTP status code. It knows no web framework."""

from __future__ import annotations

from sihe.core.errors import (
    AlreadyExists,
    Busy,
    Forbidden,
    NoSpace,
    NotFound,
    TimedOut,
    TooLarge,
    TransientError,
    Unauthorized,
    UserError,
)

# Most specific first: the first class that matches decides.
_STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (AlreadyExists, 409),
    (TooLarge, 413),
    (NoSpace, 507),
    (UserError, 400),
    (Busy, 429),
    (TimedOut, 504),
    (TransientError, 503),
)


def status_of(error: BaseException) -> int:
    """HTTP status of `error`; 500 for what is no `UserError` or `TransientError`."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
