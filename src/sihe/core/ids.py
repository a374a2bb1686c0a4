"""Identifiers that sort by creation time and read well in a URL."""

from __future__ import annotations

import os
import re
import time

from sihe.core.errors import InvalidInput

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base 32: no i, l, o, u
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


def new_id(prefix: str) -> str:
    """`prefix_` and 19 characters: 45 bits of milliseconds, then 50 random bits. Sorts by time of creation."""
    value = (int(time.time() * 1000) << 50) | (int.from_bytes(os.urandom(7), "big") >> 6)
    digits = [_ALPHABET[(value >> shift) & 31] for shift in range(90, -1, -5)]
    return f"{prefix}_{''.join(digits)}"


def check_name(kind: str, name: str) -> str:
    """`name` itself when it can stand in a path and a URL; `InvalidInput` otherwise."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidInput(
            f"a {kind} name has 1 to 120 letters, digits, '.', '_' or '-' and starts with a letter or digit, "
            f"got {name!r}"
        )
    return name
