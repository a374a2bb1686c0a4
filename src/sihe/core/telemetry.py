"""Logs (structlog) and metrics (prometheus-client) for every room.

Event names are constant and the rest are fields: `log.info("checkpoint_saved", step=120, size_bytes=…)`. Neither
secrets nor prompts nor document text at INFO.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import structlog


def configure_logs(level: Literal["debug", "info", "warning", "error"], form: Literal["text", "json"]) -> None:
    """Sends structured logs of at least `level` to standard error."""
    import structlog

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
            if form == "text"
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: structlog.PrintLogger(file=sys.stderr),  # the stream of this moment: tests swap it
        cache_logger_on_first_use=False,
    )


def logger(room: str) -> structlog.typing.FilteringBoundLogger:
    """The logger of a room; its name is a field of every event."""
    import structlog

    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger(room=room)
    return bound
