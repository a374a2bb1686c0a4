"""Which replica a request goes to. Pure: what is random comes from the caller.

1. Requests that begin alike go to the same replica, so that its cache has their prefix: the one that ranks first for
   the prefix by rendezvous hashing (Thaler and Ravishankar, IEEE/ACM ToN 6(1), 1998), so that a replica that comes or
   goes moves only its own share.
2. Unless that one is overloaded: it may have at most `_SLACK` times the mean work, and a few requests more (consistent
   hashing with bounded loads: Mirrokni, Thorup, Zadimoghaddam, SODA 2018, arXiv:1608.01350).
3. Else the less loaded of two drawn at random (Mitzenmacher, IEEE TPDS 12(10), 2001): with several gateways, each of
   which knows only its own requests, the least loaded of all would draw a herd.

Replicas whose breaker is open are left out, unless all are: then the breakers are not believed (Envoy's "panic
threshold"), since a deployment that answers some requests is better than one that answers none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from sihe.serving.engine.types import GenerationRequest

_SLACK = 1.25
_REQUESTS_MORE = 4.0  # they run in one batch with those that are there, and find their prefix
_PREFIX_CHARACTERS = 256  # about four KV blocks of sixteen tokens: what is worth finding again
_PREFIX_TOKENS = 64
_CHARACTERS_PER_TOKEN = 4.0  # of English text; only the ratio between requests matters
_USUAL_ANSWER_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """One READY replica: who it is, the work that it has in hand, and whether its breaker lets requests through."""

    id: int
    outstanding: float
    is_allowed: bool = True


def choose(
    candidates: Sequence[Candidate], prefix: bytes | None, draw: random.Random, *, work: float = 1.0
) -> int | None:
    """The `id` of the replica for a request of so much `work` that begins with `prefix`; None when there is none.

    O(candidates).
    """
    allowed = [candidate for candidate in candidates if candidate.is_allowed] or list(candidates)
    if len(allowed) < 2:
        return allowed[0].id if allowed else None
    if prefix is not None:
        home = max(allowed, key=lambda candidate: _rank(prefix, candidate.id))
        mean = sum(candidate.outstanding for candidate in allowed) / len(allowed)
        if home.outstanding <= _SLACK * mean + _REQUESTS_MORE * work:
            return home.id
    first, second = draw.sample(allowed, 2)
    return first.id if first.outstanding <= second.outstanding else second.id


def prefix_of(request: GenerationRequest) -> bytes | None:
    """What requests that share a cached prefix have in common; None when there is too little of it to be cached."""
    if request.messages is not None:
        text = "\x00".join(f"{message.role}\x01{message.content}" for message in request.messages)
    elif isinstance(request.prompt, str):
        text = request.prompt
    else:
        tokens = request.prompt or ()
        if len(tokens) < _PREFIX_TOKENS:
            return None
        return b"".join(token.to_bytes(4, "little") for token in tokens[:_PREFIX_TOKENS] if 0 <= token < 2**32)
    return text[:_PREFIX_CHARACTERS].encode("utf-8", "replace") if len(text) >= _PREFIX_CHARACTERS else None


def work_of(request: GenerationRequest) -> float:
    """About how many tokens a request will cost: its prompt, and of its answer at most a usual one."""
    if request.messages is not None:
        prompt = sum(len(message.content or "") for message in request.messages) / _CHARACTERS_PER_TOKEN
    elif isinstance(request.prompt, str):
        prompt = len(request.prompt) / _CHARACTERS_PER_TOKEN
    else:
        prompt = float(len(request.prompt or ()))
    return 1.0 + prompt + min(request.max_tokens or _USUAL_ANSWER_TOKENS, _USUAL_ANSWER_TOKENS)


def _rank(prefix: bytes, id: int) -> bytes:
    return blake2b(prefix, digest_size=8, salt=id.to_bytes(8, "little", signed=True)).digest()
