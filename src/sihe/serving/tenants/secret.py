"""The form of a key, and what is stored of it.

A key is `sihe_<id>_<secret>`: the id (60 random bits) is public and finds the row, the secret holds 256 random bits. Of
the whole key only its SHA-256 is stored. A slow password hash (bcrypt, Argon2) and a salt defend secrets that people
choose, which can be guessed or found in a table; 2^256 equally likely secrets can be neither, and a slow hash would
make each request pay, and give everybody a way to make the server work (compare RFC 6238's remark on random keys and
NIST SP 800-63B 5.1.2.2: look-up secrets of at least 112 bits of entropy may be hashed with a plain approved hash).

The regular expression for secret scanners: `sihe_[0-9a-hjkmnp-tv-z]{12}_[A-Za-z0-9_-]{43}`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import NamedTuple

_ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_ID_CHARACTERS = 12
_SECRET_BYTES = 32
MAX_TOKEN_CHARACTERS = 512  # longer ones are no key of ours, and are not hashed to find out


class Secret(NamedTuple):
    """A new key: shown once. `text` is the key, the rest is what is stored."""

    text: str
    id: str
    digest: str
    session_digest: str

    def __repr__(self) -> str:
        """The public part only: a key must not reach a log by way of a repr."""
        return f"Secret(id={self.id!r})"


def new_secret() -> Secret:
    """A random key."""
    id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_CHARACTERS))
    text = f"sihe_{id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    return Secret(text, id, digest(text), digest(session_of(text)))


def public_id(token: str) -> str | None:
    """The id inside a token that has a key's form."""
    parts = token.split("_", 2)
    is_ours = len(parts) == 3 and parts[0] == "sihe" and len(parts[1]) == _ID_CHARACTERS
    return parts[1] if is_ours else None


def digest(token: str) -> str:
    """What is stored of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def is_match(token: str, stored_digest: str) -> bool:
    """Whether a token is the one behind a digest, in a time that does not depend on where they differ."""
    return hmac.compare_digest(digest(token), stored_digest)


def session_of(token: str) -> str:
    """What a browser keeps after it showed a key: proof of the key, without the key."""
    return hmac.new(token.encode("utf-8", "surrogateescape"), b"sihe console session", hashlib.sha256).hexdigest()
