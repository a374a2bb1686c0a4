"""The one door: who is calling, what they may, whether their limits let one more request in, and what it cost.

Everything here may block for a read of the records or for Redis; `identify_async` is for the event loop and blocks it
for neither.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING

from sihe.core.clock import Clock
from sihe.core.errors import Forbidden, Unauthorized
from sihe.core.telemetry import logger
from sihe.core.workspace import Workspace
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import RateLimited
from sihe.serving.tenants import limits
from sihe.serving.tenants.brakes import Brakes
from sihe.serving.tenants.counter import LocalCounter
from sihe.serving.tenants.directory import Directory
from sihe.serving.tenants.ledger import Ledger
from sihe.serving.tenants.metrics import TenantMetrics
from sihe.serving.tenants.ports import Demand, RateCounter
from sihe.serving.tenants.rights import needed_rights
from sihe.serving.tenants.store import TenantStore
from sihe.serving.tenants.types import Caller, Right
from sihe.serving.tenants.usage import Outcome, Tally, UsageStore

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

SESSION_COOKIE = "sihe_session"


class Access:
    """Keys, rights, limits and usage of one server process. `close` it after the last request."""

    def __init__(self, workspace: Workspace, *, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import REGISTRY

        settings, clock = workspace.settings, workspace.clock
        self._workspace = workspace
        self._clock: Clock = clock
        self._log = logger("serving")
        self._metrics = TenantMetrics.on(registry or REGISTRY)
        self._brakes = Brakes(clock)
        self._directory = Directory(
            lambda: self.keys,
            configured=settings.server.api_keys,
            require_key=settings.tenants.require_key,
            clock=clock,
        )
        self._ledger = Ledger(
            lambda: self.usage, clock, take_used=self._directory.take_used, touch=lambda used: self.keys.touch(used)
        )
        self._counter = _counter(workspace, self._metrics)
        self._promising = threading.Lock()
        self._promised: dict[limits.Scope, int] = {}  # tokens of requests that run, for quotas

    @property
    def keys(self) -> TenantStore:
        """Tenants and keys, to be read and changed."""
        return TenantStore(self._workspace.records, self._clock)

    @property
    def usage(self) -> UsageStore:
        """What was used, as recorded."""
        return UsageStore(self._workspace.records)

    # ---- who, and may they ------------------------------------------------------------------------------------------

    def identify(self, headers: Mapping[str, str], address: str, *, sessions: bool = False) -> Caller:
        """Who sends a request with these headers from that address. A browser's session counts where `sessions` do.

        Raises `Unauthorized` for no key or a wrong one, and `RateLimited` where wrong ones came too often.
        """
        self._directory.refresh()
        return self._known(headers, address, sessions=sessions)

    def _known(self, headers: Mapping[str, str], address: str, *, sessions: bool) -> Caller:
        token, session = bearer(headers), session_of_cookie(headers) if sessions else ""
        wait_s = self._brakes.wait_s(address)
        try:
            caller = self._directory.known(token, session, trust_short_keys=wait_s == 0)
        except Unauthorized:
            self._metrics.denied("throttled" if wait_s else "wrong" if token or session else "none")
            if not token and not session:
                raise
            if wait_s:
                raise RateLimited(
                    "too many wrong keys came from this address", counts="keys", retry_after_s=wait_s, headers={}
                ) from None
            self._brakes.failed(address)
            raise
        if caller.key_id:
            self._ledger.start()
        return caller

    async def identify_async(self, headers: Mapping[str, str], address: str, *, sessions: bool = False) -> Caller:
        """The same on an event loop: from memory, or on a thread when the memory is too old."""
        if not self._directory.is_fresh:
            from starlette.concurrency import run_in_threadpool

            await run_in_threadpool(self._directory.refresh)
        return self._known(headers, address, sessions=sessions)

    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return self._directory.is_open

    def require(self, caller: Caller, method: str, path: str) -> None:
        """Raises `Forbidden` when the caller has no right to that path."""
        needed = needed_rights(method, path)
        if not any(caller.may(right) for right in needed):
            self._metrics.refused(caller.tenant.name, "right")
            raise Forbidden(
                f"this key has no right to {method} {path[:200]}: it needs one of {', '.join(sorted(needed))}"
            )

    def open_session(self, key: str, address: str) -> str:
        """What a browser keeps after it showed a key that opens pages. Raises as `identify`, and `Forbidden`."""
        caller = self.identify({"authorization": f"Bearer {key}"}, address)
        if not caller.may(Right.ADMIN):
            raise Forbidden("this key opens no pages: they need the right 'admin'")
        return self._directory.open_session(key)

    def forget(self) -> None:
        """Keys changed in this process: the next request sees it."""
        self._directory.refresh(now=True)

    # ---- how much ---------------------------------------------------------------------------------------------------

    def admit(
        self,
        caller: Caller,
        deployment: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        is_guess: bool = False,
    ) -> Admission:
        """Lets a request in that will cost about so many tokens; `finish` the admission when it has ended.

        Where the length of the answer `is_guess`, no more is taken for it than the limits can ever give, or than is
        left of a quota. Raises `Forbidden`, `RateLimited`, `QuotaExceeded`, `OverLimit`.
        """
        if not caller.may_use(deployment):
            self._metrics.refused(caller.tenant.name, "deployment")
            raise Forbidden(f"this key may not use model {deployment!r}: ask for one that it is made for")
        room = limits.largest_request(caller) if is_guess else None
        promised, estimate = self._promise(caller, prompt_tokens, completion_tokens, room)
        demand = limits.demand_of(caller, estimate)
        try:
            decision = self._counter.take(demand)
            error = limits.refusal(demand, decision)
            if error is not None:
                self._metrics.refused(caller.tenant.name, getattr(error, "counts", "size"))
                raise error
        except BaseException:
            self._release(promised, estimate)
            raise
        said = limits.headers(demand, decision)
        return Admission(self, caller, deployment, demand, decision.lease, promised, prompt_tokens, estimate, said)

    def finished(self, admission: Admission, tally: Tally, outcome: Outcome, charged: int) -> None:
        """Records what an admission cost; called by it, once."""
        caller = admission.caller
        self._ledger.add(caller.tenant.name, caller.key_id, admission.deployment, tally)
        self._release(admission.promised, admission.estimate)
        refund = float(admission.estimate - charged)
        refunds = {meter.name: refund for meter in admission.demand.meters if meter.counts == "tokens"}
        self._counter.settle(admission.demand, admission.lease, refunds)
        self._metrics.ended(caller.tenant.name, outcome, tally)

    def flush(self) -> None:
        """Writes usage now."""
        self._ledger.flush()

    def close(self) -> None:
        """Writes usage and ends what runs in the background. Safe to call again."""
        self._counter.close()
        self._ledger.close()

    def _promise(
        self, caller: Caller, prompt: int, completion: int, room: float | None
    ) -> tuple[tuple[limits.Scope, ...], int]:
        """Sets tokens aside under each quota: whose, and how many. Raises `QuotaExceeded`.

        With `room` the completion is a guess, and takes no more than that, or than a quota has left.
        """
        now = self._clock.now()
        quotas = list(limits.quotas_of(caller, now))
        for quota in quotas:
            self._ledger.look_up(quota.scope, quota.since)
        with self._promising:
            # Under the lock: what ends meanwhile is counted as spent before it stops to count as promised.
            spent = [self._ledger.spent(quota.scope, quota.since) for quota in quotas]
            left = [
                quota.limit - used - self._promised.get(quota.scope, 0)
                for quota, used in zip(quotas, spent, strict=True)
            ]
            if room is not None:
                completion = max(1, int(min(completion, room - prompt, *(rest - prompt for rest in left))))
            estimate = prompt + completion
            for quota, rest in zip(quotas, left, strict=True):
                gone = quota.limit - rest
                if gone + estimate > quota.limit:
                    self._metrics.refused(caller.tenant.name, quota.period)
                    raise limits.exceeded(quota, gone, estimate, now)
            promised = tuple({quota.scope for quota in quotas})
            for scope in promised:
                self._promised[scope] = self._promised.get(scope, 0) + estimate
        return promised, estimate

    def _release(self, promised: tuple[limits.Scope, ...], estimate: int) -> None:
        with self._promising:
            for scope in promised:
                left = self._promised.pop(scope, 0) - estimate
                if left > 0:
                    self._promised[scope] = left


class Admission:
    """A request that was let in. `headers` go with its answer; `finish` exactly when it has ended, however it did."""

    def __init__(
        self,
        access: Access,
        caller: Caller,
        deployment: str,
        demand: Demand,
        lease: str,
        promised: tuple[limits.Scope, ...],
        prompt_tokens: int,
        estimate: int,
        headers: Mapping[str, str],
    ) -> None:
        self.caller = caller
        self.deployment = deployment
        self.demand = demand
        self.lease = lease
        self.promised = promised
        self.estimate = estimate
        self.headers = headers
        self._access = access
        self._prompt_tokens = prompt_tokens
        self._ending = threading.Lock()
        self._ended = False

    def apply(self, request: GenerationRequest) -> GenerationRequest:
        """The request in its caller's name: whose it is, how urgent, and who may share its cached prefix."""
        return replace(
            request,
            tenant=self.caller.tenant.name,
            priority=self.caller.priority(request.priority),
            cache_salt=self.caller.cache_salt(request.cache_salt),
        )

    def finish(self, tally: Tally | None, outcome: Outcome) -> None:
        """Settles what the request has cost: nothing where `tally` is None, but for the prompt of a client that left.

        (Reading a prompt costs the same whether somebody waits for the answer or not.) Only the first call counts.
        """
        with self._ending:
            if self._ended:
                return
            self._ended = True
        charged = tally.tokens if tally else self._prompt_tokens if outcome == "aborted" else 0
        self._access.finished(self, tally or Tally(requests=1, failed=int(outcome == "failed")), outcome, charged)


def bearer(headers: Mapping[str, str]) -> str:
    """The token of an Authorization header; empty when there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def session_of_cookie(headers: Mapping[str, str]) -> str:
    """The console's session in a Cookie header; empty when there is none."""
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(SESSION_COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie else ""


def _counter(workspace: Workspace, metrics: TenantMetrics) -> RateCounter:
    url = workspace.settings.tenants.redis_url
    local = LocalCounter(workspace.clock)
    if url is None:
        return local
    from sihe.serving.tenants.redis_counter import RedisCounter

    return RedisCounter(url, local, workspace.clock, on_alone=metrics.counted_alone)
