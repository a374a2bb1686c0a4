"""What the demo shows while it runs: a heading a stage, a moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from sihe.core.terminal import say

_QUIET_S = 10.0  # between two progress lines where nobody can rewrite them


class Screen:
    """Writes to standard output; the moving line only where that is a terminal."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._last_s = 0.0
        self._moving = False

    def heading(self, number: int, count: int, title: str) -> None:
        """A stage begins."""
        self.line(f"\n[{number}/{count}] {title}")

    def line(self, text: str) -> None:
        """One line that stays."""
        self._clear()
        say(text)

    def detail(self, text: str) -> None:
        """One indented line that stays."""
        self.line(f"      {text}")

    def progress(self, text: str) -> None:
        """A line that the next one replaces; on a log, one every ten seconds."""
        now_s = time.monotonic()
        if self._live:
            sys.stdout.write(f"\r\x1b[K      {text}")
            sys.stdout.flush()
            self._moving = True
        elif now_s - self._last_s >= _QUIET_S:
            say(f"      {text}")
            self._last_s = now_s

    def write(self, text: str) -> None:
        """Text as it comes, such as a stream of tokens."""
        self._clear()
        sys.stdout.write(text)
        sys.stdout.flush()

    def _clear(self) -> None:
        if self._moving:
            sys.stdout.write("\r\x1b[K")
            self._moving = False
