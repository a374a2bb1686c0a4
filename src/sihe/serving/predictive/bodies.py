"""Bodies of requests and answers: their compression, and their bounds. Nothing here trusts a header about a size."""

from __future__ import annotations

import zlib

from sihe.core.errors import InvalidInput, TooLarge

MAX_BODY_BYTES = 64 * 2**20
_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}  # RFC 9110, 8.4.1: deflate is zlib's format
_LEVEL = 1  # tensors compress badly: the fastest
_MIN_COMPRESSED_BYTES = 1024


def too_large(size_bytes: int) -> TooLarge:
    """The error for a body above the bound."""
    return TooLarge(
        f"a body has at most {MAX_BODY_BYTES} bytes: send fewer rows at a time",
        limit=MAX_BODY_BYTES,
        actual=size_bytes,
        unit="bytes",
    )


def decompressed(body: bytes, encoding: str) -> bytes:
    """The body under its Content-Encoding: identity, gzip or deflate. Raises `InvalidInput`, `TooLarge`.

    It stops at the bound, so that a small body cannot grow into all of the memory.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _WINDOW:
        raise InvalidInput(f"Content-Encoding must be gzip, deflate or identity, got {encoding!r:.100}")
    stream = zlib.decompressobj(_WINDOW[name])
    try:
        plain = stream.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error as error:
        raise InvalidInput(f"the body is no {name}: {error}") from error
    if len(plain) > MAX_BODY_BYTES:
        raise too_large(len(plain))
    if not stream.eof or stream.unused_data:
        raise InvalidInput(f"the body's {name} data is cut off, or something follows it")
    return plain


def compressed(body: bytes, accept: str) -> tuple[bytes, str | None]:
    """The body as the client asks for it, and the name of its coding.

    Only who accepts exactly one coding, gzip or deflate, gets it: clients that list all they know, as a habit, would
    wait for work that saves them nothing.
    """
    name = accept.strip().lower()
    if name not in _WINDOW or len(body) < _MIN_COMPRESSED_BYTES:
        return body, None
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW[name])
    return stream.compress(body) + stream.flush(), name
