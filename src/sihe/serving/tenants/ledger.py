"""Usage on its way to the records: written in batches by a thread of its own, so that no request waits for it.

What a killed process loses is the usage of requests that ended in its last `FLUSH_S`, plus the time of one write, and
what had been generated of those that ran. An orderly end (`close`) writes everything. While the records do not answer,
usage adds up here, in as many sums as there are rows, and nothing is lost.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta

from sihe.core.clock import Clock
from sihe.core.errors import SiheError, Unreachable
from sihe.core.telemetry import logger
from sihe.serving.tenants.limits import Scope
from sihe.serving.tenants.usage import Account, Tally, UsageStore

FLUSH_S = 1.0
_RETRY_S = (1.0, 2.0, 5.0, 15.0)
_SPENT_AGE_S = 2.0  # how long what other processes wrote may go unseen by a quota
_PATIENCE_S = 5.0  # for records that another thread writes to, before a request is told that they are away
_TOUCH_S = 60.0  # how exactly it is known when a key was last used

Touch = Callable[[Mapping[str, datetime]], None]


class Ledger:
    """Adds up usage. `store` opens the records when they are first needed. Thread-safe.

    `touch` hears once a minute, and at the end, when keys were last used, as `take_used` tells it.
    """

    def __init__(
        self,
        store: Callable[[], UsageStore],
        clock: Clock,
        *,
        take_used: Callable[[], Mapping[str, datetime]],
        touch: Touch,
    ) -> None:
        self._store = store
        self._clock = clock
        self._take_used = take_used
        self._touch = touch
        self._log = logger("serving")
        self._writing = threading.Lock()  # one write, or one sum that must not overlap with a write
        self._changed = threading.Condition()
        self._pending: dict[Account, Tally] = {}
        self._spent: dict[tuple[Scope, date], tuple[int, float]] = {}  # what the records say, and when they said it
        self._touch_at_s = clock.monotonic_s() + _TOUCH_S
        self._closing = False
        self._thread: threading.Thread | None = None

    def add(self, tenant: str, key: str, deployment: str, tally: Tally) -> None:
        """Takes in what a request has used. Returns at once; only after `close` it writes itself."""
        account = Account(self._clock.now().date(), tenant, key, deployment)
        with self._changed:
            self._pending[account] = self._pending.get(account, Tally()) + tally
            is_late = self._closing
            self._changed.notify()
        if is_late:
            self._write_last()
        else:
            self.start()

    def start(self) -> None:
        """Begins to write in the background, once."""
        if self._thread is not None:
            return
        with self._changed:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
                self._thread.start()
                atexit.register(self.close)

    def spent(self, scope: Scope, since: date) -> int:
        """Tokens of a scope from a day on, from memory: what `look_up` found recorded, and what has come since."""
        with self._changed:
            recorded = self._spent[scope, since][0]
            return recorded + sum(
                tally.tokens for account, tally in self._pending.items() if _is_in(account, scope, since)
            )

    def flush(self) -> None:
        """Writes what has come so far. Raises what the records raise; nothing is lost then."""
        with self._writing:
            with self._changed:
                batch, self._pending = self._pending, {}
                held = dict(self._spent)
                for (scope, since), (tokens, at_s) in held.items():  # what is being written counts as recorded already
                    own = sum(tally.tokens for account, tally in batch.items() if _is_in(account, scope, since))
                    self._spent[scope, since] = (tokens + own, at_s)
            try:
                self._store().add(batch)
            except BaseException:
                with self._changed:
                    for account, tally in batch.items():
                        self._pending[account] = self._pending.get(account, Tally()) + tally
                    self._spent.update(held)
                raise

    def close(self) -> None:
        """Writes everything and ends the thread. Safe to call again."""
        with self._changed:
            self._closing = True
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None:
            thread.join()
            atexit.unregister(self.close)
        self._write_last()

    def _write_last(self) -> None:
        try:
            self.flush()
            self._touch(self._take_used())
        except Exception as error:  # noqa: BLE001 - it may be an engine's thread that ends a request after `close`
            with self._changed:
                lost = sum(tally.tokens for tally in self._pending.values())
            self._log.error("usage_lost", tokens=lost, error=repr(error))

    # ---- the ledger's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while self._wait(FLUSH_S if failures == 0 else _RETRY_S[min(failures, len(_RETRY_S)) - 1]):
            try:
                self.flush()
                self._touch_when_due()
                failures = 0
            except Exception as error:  # noqa: BLE001 - whatever it is, requests go on and usage is kept
                failures += 1
                self._log.warning("usage_not_written", error=repr(error), attempt=failures)

    def _wait(self, seconds: float) -> bool:
        """Waits until something has come, and then as long as more may join it; false at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._pending, timeout=_TOUCH_S)
            self._changed.wait_for(lambda: self._closing, timeout=seconds)
            return not self._closing

    def _touch_when_due(self) -> None:
        now_s = self._clock.monotonic_s()
        if now_s >= self._touch_at_s:
            self._touch_at_s = now_s + _TOUCH_S
            self._touch(self._take_used())

    # ---- what was spent ---------------------------------------------------------------------------------------------

    def look_up(self, scope: Scope, since: date) -> None:
        """Sees to it that what is recorded of a scope is known, and at most two seconds old.

        What was known before goes on to count while the records are slow or away; raises what they raise when they have
        never answered.
        """
        with self._changed:
            known = self._spent.get((scope, since))
        if known is not None and self._clock.monotonic_s() - known[1] < _SPENT_AGE_S:
            return
        # A write in between would be counted twice, or not at all. Who knows something does not wait for it.
        if not self._writing.acquire(timeout=_PATIENCE_S if known is None else 0):
            if known is None:
                raise Unreachable("the records database", f"nothing came for {_PATIENCE_S:g} s")
            return
        try:
            self._read_spent(scope, since, is_known=known is not None)
        finally:
            self._writing.release()

    def _read_spent(self, scope: Scope, since: date, *, is_known: bool) -> None:
        now_s = self._clock.monotonic_s()
        try:
            tokens = self._store().tokens_since(scope, since)
        except SiheError as error:
            if not is_known:
                raise
            self._log.warning("quota_not_read", error=repr(error))
            with self._changed:
                self._spent[scope, since] = (self._spent[scope, since][0], now_s)
            return
        # What is older is asked for no more; of the last month, by requests that came before midnight, it may be.
        oldest = (since.replace(day=1) - timedelta(days=1)).replace(day=1)
        with self._changed:
            self._spent = {key: value for key, value in self._spent.items() if key[0] != scope or key[1] >= oldest}
            self._spent[scope, since] = (tokens, now_s)


def _is_in(account: Account, scope: Scope, since: date) -> bool:
    name = account.tenant if scope.kind == "tenant" else account.key
    return name == scope.name and account.day >= since
