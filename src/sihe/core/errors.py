"""The error tree of the house: every error that Sihe raises on purpose is one of these.

    SiheError
    ├── UserError                      the input must be fixed
    │   ├── ConfigError                a setting is unknown, unparsable or contradictory   (ValueError)
    │   ├── InvalidInput               an argument or a document has the wrong form        (ValueError)
    │   │   └── TooLarge               it is right, but over a stated limit
    │   ├── NotFound                   the named thing does not exist                      (LookupError)
    │   ├── AlreadyExists              the name is taken                                   (ValueError)
    │   ├── CorruptData                bytes on disk are not what was written              (ValueError)
    │   ├── Unauthorized               no key, or a wrong one                              (PermissionError)
    │   ├── Forbidden                  a good key that may not do this                     (PermissionError)
    │   ├── MissingExtra               an optional dependency is not installed             (ImportError)
    │   ├── NoSpace                    the disk is full; nothing was half written          (OSError)
    │   └── PortInUse                  another process listens there                       (OSError)
    ├── TransientError                 the same call may succeed later: retry
    │   ├── Busy                       a lock, a queue or a budget is taken                (TimeoutError)
    │   ├── TimedOut                   not done within the time that the caller gave       (TimeoutError)
    │   └── Unreachable                a service does not answer                           (ConnectionError)
    └── InternalError                  a bug in Sihe: please report                        (RuntimeError)

A room's own errors (`<room>/errors.py`) inherit from one of these leaves or classes, so that a caller can decide with
three `except` clauses. This file imports nothing, least of all a web framework; HTTP codes live in `core.http`.
"""

from __future__ import annotations

from pathlib import Path


class SiheError(Exception):
    """Root of the tree. The message says what was expected, what came, and what to do."""


class UserError(SiheError):
    """The caller's input or environment must change; a retry of the same call fails again."""


class TransientError(SiheError):
    """The same call may succeed later."""


class InternalError(SiheError, RuntimeError):
    """An invariant of Sihe does not hold: a bug."""


class ConfigError(UserError, ValueError):
    """A setting is unknown, unparsable or contradicts another. `key` names it."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class InvalidInput(UserError, ValueError):
    """An argument or a document has the wrong form."""


class TooLarge(InvalidInput):
    """The input has the right form and exceeds `limit` (in `unit`)."""

    def __init__(self, message: str, *, limit: int, actual: int, unit: str) -> None:
        super().__init__(message)
        self.limit = limit
        self.actual = actual
        self.unit = unit


class NotFound(UserError, LookupError):
    """No `kind` of that `name` exists."""

    def __init__(self, kind: str, name: str, *, hint: str = "") -> None:
        super().__init__(f"no {kind} named {name!r}" + (f": {hint}" if hint else ""))
        self.kind = kind
        self.name = name


class AlreadyExists(UserError, ValueError):
    """A `kind` of that `name` exists already."""

    def __init__(self, kind: str, name: str, *, hint: str = "") -> None:
        super().__init__(f"{kind} {name!r} exists already" + (f": {hint}" if hint else ""))
        self.kind = kind
        self.name = name


class CorruptData(UserError, ValueError):
    """What is stored at `path` is not what was written there."""

    def __init__(self, path: str | Path, reason: str, *, hint: str = "") -> None:
        super().__init__(f"{path} is corrupt ({reason})" + (f": {hint}" if hint else ""))
        self.path = str(path)
        self.reason = reason


class Unauthorized(UserError, PermissionError):
    """The request carries no valid key for what it asks."""


class Forbidden(UserError, PermissionError):
    """The request carries a valid key that has no right to what it asks."""


class MissingExtra(UserError, ImportError):
    """`package` is needed and comes with the optional `extra`."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package!r} is not installed: run  pip install 'sihe[{extra}]'")
        self.package = package
        self.extra = extra


class NoSpace(UserError, OSError):
    """The file system that holds `path` is full. What was there before is untouched."""

    def __init__(self, path: str | Path, *, needed_bytes: int | None = None) -> None:
        need = f" ({needed_bytes / 1e6:.0f} MB needed)" if needed_bytes is not None else ""
        super().__init__(
            f"no space left where {path} lives{need}: free some, or point SIHE_HOME at a larger disk; "
            "nothing was lost, run the same command again"
        )
        self.path = str(path)
        self.needed_bytes = needed_bytes


class PortInUse(UserError, OSError):
    """Another process listens on `host:port`."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"port {port} on {host} is in use: stop the other process or choose one with --port")
        self.host = host
        self.port = port


class Busy(TransientError, TimeoutError):
    """A lock, a queue or a budget is taken. `retry_after_s` says when to come back."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TimedOut(TransientError, TimeoutError):
    """It was not done within the time that the caller gave."""


class Unreachable(TransientError, ConnectionError):
    """The service at `url` does not answer."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} does not answer ({reason}): is it running, and is the address right?")
        self.url = url
