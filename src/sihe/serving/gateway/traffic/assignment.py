"""Which arm a key gets: weighted rendezvous hashing, salted by the experiment.

Every arm draws a number from the hash of (salt, key, arm); the best one wins. The same key always gets the same arm, an
arm's share of keys is its weight's, and when a weight changes only keys that must move do: those that the grown arm
wins, or the shrunk one loses. The order of the others says where a key goes while its arm cannot serve. Another salt
deals all keys anew, so that two experiments do not meet the same users. (Thaler and Ravishankar, IEEE/ACM Trans.
Networking 6(1), 1998; the weighted form by logarithms: Schindelhauer and Schomaker, SPAA 2005.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping


def ranking(weights: Mapping[str, float], key: str, *, salt: str) -> tuple[str, ...]:
    """The arms with a weight above 0, the one that `key` gets first."""
    draws = {arm: -weight / math.log(draw(key, salt=salt, name=arm)) for arm, weight in weights.items() if weight > 0}
    return tuple(sorted(draws, key=lambda arm: (-draws[arm], arm)))


def draw(key: str, *, salt: str, name: str = "") -> float:
    """A number between 0 and 1, both excluded, that the three decide; uniform over keys."""
    parts = [part.encode("utf-8", "surrogatepass") for part in (salt, name, key)]
    # Lengths keep ("ab", "c") apart from ("a", "bc").
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    number = (
        int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 12
    )  # 52 bits, so that a half more is exact
    return (number + 0.5) / 2.0**52
