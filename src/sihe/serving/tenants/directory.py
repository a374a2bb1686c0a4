"""Who a token belongs to, from memory, which is never older than a second while the records answer.

One row of the records holds a number that every change of a key or a tenant raises. A directory reads that number at
most twice a second and everything else only when it has grown, so that asking costs a hash and a look-up, a token that
was made up costs the database nothing, and a key that was disabled anywhere stops working within `STALE_AFTER_S`.
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sihe.core.clock import Clock
from sihe.core.errors import SiheError, Unauthorized, Unreachable
from sihe.core.telemetry import logger
from sihe.serving.tenants.secret import MAX_TOKEN_CHARACTERS, digest, public_id, session_of
from sihe.serving.tenants.store import StoredKey, TenantStore
from sihe.serving.tenants.types import ANYBODY, DEFAULT_TENANT, Caller, Right, Tenant

STALE_AFTER_S = 0.5
_GRACE_S = 30.0  # how long the last known keys go on to work while the records do not answer
_PATIENCE_S = 5.0  # after it, how long a request waits for records that another one asks already
_NOBODY = digest("")  # compared where there is no such key, so that the time tells nothing
_NEEDED = "a valid key is needed: send it as  Authorization: Bearer …"


@dataclass(frozen=True, slots=True)
class _View:
    """Everything as of one revision."""

    revision: int
    tenants: Mapping[str, Tenant]
    keys: Mapping[str, StoredKey]


@dataclass(frozen=True, slots=True)
class _Configured:
    """A key of `server.api_keys`, by its hashes: all rights, of the default tenant."""

    id: str
    digest: str
    session_digest: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """A view, when it was last asked for, and when the records last answered."""

    view: _View
    at_s: float
    answered_s: float


class Directory:
    """Finds the caller behind a token. `store` opens the records when they are first needed. Thread-safe."""

    def __init__(
        self, store: Callable[[], TenantStore], *, configured: Sequence[str], require_key: bool, clock: Clock
    ) -> None:
        self._store = store
        self._clock = clock
        self._require_key = require_key
        self._configured = [
            _Configured(f"settings.{number}", digest(key), digest(session_of(key)))
            for number, key in enumerate(configured, 1)
        ]
        self._reading = threading.Lock()
        self._seen: _Seen | None = None
        self._failure: tuple[float, SiheError] | None = None
        self._using = threading.Lock()
        self._used: dict[str, datetime] = {}
        self._log = logger("serving")

    @property
    def is_fresh(self) -> bool:
        """Whether what is in memory is young enough, so that the next call does not read the records."""
        seen = self._seen
        return seen is not None and self._clock.monotonic_s() - seen.at_s < STALE_AFTER_S

    def refresh(self, *, now: bool = False) -> None:
        """Reads what has changed, if it is time or `now`. Raises what the records raise, once they failed for long.

        One thread reads. The others do not wait for it as long as what is known may go on to count: a database that
        hangs would take them all.
        """
        if self.is_fresh and not now:
            return
        seen = self._seen
        is_usable = not now and seen is not None and self._clock.monotonic_s() - seen.answered_s <= _GRACE_S
        if not (self._reading.acquire(blocking=False) if is_usable else self._reading.acquire(timeout=_PATIENCE_S)):
            if is_usable:
                return
            raise Unreachable("the records database", f"nothing came for {_PATIENCE_S:.0f} s")
        try:
            if not self.is_fresh or now:
                self._read()
        finally:
            self._reading.release()

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key: none is configured, none was ever created, and none is required.

        A key that was disabled counts: taking the last one away must not open the door.
        """
        self.refresh()
        return self._is_open()

    def caller(self, token: str, *, trust_short_keys: bool = True) -> Caller:
        """Who sends `token`: anybody, where no key is asked for. Raises `Unauthorized`, which does not tell why.

        Keys made here are too long to guess. Those of `server.api_keys` may be short: without `trust_short_keys` they
        do not count.
        """
        self.refresh()
        return self.known(token, "", trust_short_keys=trust_short_keys)

    def caller_of_session(self, session: str, *, trust_short_keys: bool = True) -> Caller:
        """Who holds a session that `session_of` a key made and `open_session` wrote. Raises `Unauthorized`."""
        self.refresh()
        return self.known("", session, trust_short_keys=trust_short_keys)

    def known(self, token: str, session: str, *, trust_short_keys: bool) -> Caller:
        """Who sends `token`, or, without one, holds `session`: from memory alone, for an event loop, which must not
        wait for the records. `refresh` comes before it. Raises `Unauthorized`."""
        if self._is_open():
            return ANYBODY
        is_session = bool(session) and not token
        return self._caller(session if is_session else token, session=is_session, trust_short_keys=trust_short_keys)

    def open_session(self, token: str) -> str:
        """What a browser shall keep for a good token: its public id, if it has one, and the proof of the key."""
        self.caller(token)
        id = public_id(token)
        known = id is not None and id in self._view.keys
        return f"{id if known else ''}.{session_of(token)}"

    def take_used(self) -> dict[str, datetime]:
        """When keys were last used since this was last asked."""
        with self._using:
            used, self._used = self._used, {}
            return used

    # ---- looking up -------------------------------------------------------------------------------------------------

    def _is_open(self) -> bool:
        return not (self._require_key or self._configured or self._view.keys)

    def _caller(self, shown: str, *, session: bool, trust_short_keys: bool) -> Caller:
        if len(shown) > MAX_TOKEN_CHARACTERS:
            raise Unauthorized(_NEEDED)
        id, proof = (_split_session(shown)) if session else (public_id(shown), shown)
        found, hashed = self._view.keys.get(id or ""), digest(proof)
        stored = (found.session_digest if session else found.digest) if found else _NOBODY
        is_ours = hmac.compare_digest(hashed, stored) and found is not None and bool(proof)
        # Every configured key is compared, and in constant time, so that the delay tells nothing about them.
        matching = [
            key
            for key in self._configured
            if hmac.compare_digest(hashed, key.session_digest if session else key.digest) and proof
        ]
        if is_ours and found is not None:
            return self._of_key(found)
        if matching and trust_short_keys:
            return Caller(self._tenant(DEFAULT_TENANT), matching[0].id, frozenset(Right))
        raise Unauthorized(_NEEDED)

    def _of_key(self, stored: StoredKey) -> Caller:
        key, now = stored.key, self._clock.now()
        tenant = self._tenant(key.tenant)
        if not key.opens_at(now) or tenant.is_disabled:
            raise Unauthorized(_NEEDED)
        with self._using:
            self._used[key.id] = now
        return Caller(tenant, key.id, key.rights, key.deployments, key.limits)

    def _tenant(self, name: str) -> Tenant:
        return self._view.tenants.get(name) or Tenant(name)

    # ---- reading ----------------------------------------------------------------------------------------------------

    @property
    def _view(self) -> _View:
        seen = self._seen
        assert seen is not None, "refresh comes first"
        return seen.view

    def _read(self) -> None:
        seen, now_s = self._seen, self._clock.monotonic_s()
        if self._failure is not None and now_s - self._failure[0] < STALE_AFTER_S:
            # Who waits in line for a database that is away need not each try it. (A traceback would grow with each.)
            raise self._failure[1].with_traceback(None)
        try:
            store = self._store()
            if seen is not None and store.revision() == seen.view.revision:
                view = seen.view
            else:
                revision, tenants, keys = store.everything()
                view = _View(revision, {item.name: item for item in tenants}, {item.key.id: item for item in keys})
        except SiheError as error:
            # While the records do not answer nobody can disable a key either: what was known goes on, for a while.
            if seen is None or now_s - seen.answered_s > _GRACE_S:
                self._failure = (now_s, error)
                raise
            if seen.at_s == seen.answered_s:
                self._log.warning("keys_not_read", error=repr(error))
            self._seen = _Seen(seen.view, now_s, seen.answered_s)
            return
        self._seen, self._failure = _Seen(view, now_s, now_s), None


def _split_session(shown: str) -> tuple[str | None, str]:
    id, _, proof = shown.partition(".")
    return id or None, proof
