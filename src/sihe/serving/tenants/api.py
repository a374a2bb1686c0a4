"""Keys, tenants and usage over HTTP, under /api. A key's secret is in the answer that makes it, and in no other."""

from __future__ import annotations

from datetime import date
from typing import Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from sihe.core.errors import Forbidden
from sihe.serving.tenants.access import Access
from sihe.serving.tenants.http import caller_of, require_caller
from sihe.serving.tenants.secret import Secret
from sihe.serving.tenants.types import DEFAULT_TENANT, ApiKey, Limits, Right, Tenant
from sihe.serving.tenants.usage import GROUPS, GroupBy
from sihe.serving.tenants.views import key_body, tenant_body


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KeyBody(_Body):
    """POST /api/keys."""

    name: str
    tenant: str = DEFAULT_TENANT
    rights: list[Right] = Field(default_factory=lambda: [Right.INFER])
    deployments: list[str] | None = Field(None, description="which may be asked; absent: all")
    limits: dict[str, int] = Field(default_factory=dict)
    expires_at: AwareDatetime | None = Field(None, description="with a time zone")


class KeyChangeBody(_Body):
    """POST /api/keys/{id}."""

    enabled: bool | None = None
    limits: dict[str, int] | None = None


class RotateBody(_Body):
    """POST /api/keys/{id}/rotate."""

    grace_s: float = Field(0.0, description="how long the old key works beside the new one")


class TenantBody(_Body):
    """PUT /api/tenants/{name}."""

    limits: dict[str, int] = Field(default_factory=dict)
    priority: int = 0
    is_isolated: bool = False
    is_disabled: bool = False


def router(access: Access) -> APIRouter:
    """The routes; who may use them, `rights.py` says."""
    routes = APIRouter(prefix="/api", tags=["tenants"], dependencies=[Depends(require_caller(access))])
    _add_keys(routes, access)
    _add_tenants(routes, access)
    _add_usage(routes, access)
    return routes


def _add_keys(routes: APIRouter, access: Access) -> None:
    @routes.get("/keys")
    def list_keys(tenant: str | None = None) -> list[dict[str, Any]]:
        """Every key, without its secret."""
        return [key_body(key) for key in access.keys.keys(tenant)]

    @routes.post("/keys", status_code=201)
    def create_key(body: KeyBody, response: Response) -> dict[str, Any]:
        """Makes a key. `key` of the answer is shown this once."""
        made, secret = access.keys.create_key(
            body.name,
            tenant=body.tenant,
            rights=frozenset(body.rights),
            deployments=None if body.deployments is None else frozenset(body.deployments),
            limits=Limits.from_mapping(body.limits),
            expires_at=body.expires_at,
        )
        return _shown_once(access, made, secret, response)

    @routes.post("/keys/{id}")
    def change_key(id: str, body: KeyChangeBody) -> dict[str, Any]:
        """Enables or disables a key, or gives it other limits."""
        store, limits = access.keys, body.limits
        if limits is not None:
            changed = store.set_limits(id, Limits.from_mapping(limits))
        if body.enabled is not None:
            changed = store.set_enabled(id, enabled=body.enabled)
        if limits is None and body.enabled is None:
            changed = store.key(id)
        access.forget()
        return key_body(changed)

    @routes.post("/keys/{id}/rotate", status_code=201)
    def rotate_key(id: str, body: RotateBody, response: Response) -> dict[str, Any]:
        """Makes a key that replaces this one, which ends after its grace."""
        made, secret = access.keys.rotate_key(id, grace_s=body.grace_s)
        return _shown_once(access, made, secret, response)


def _add_tenants(routes: APIRouter, access: Access) -> None:
    @routes.get("/tenants")
    def list_tenants() -> list[dict[str, Any]]:
        """Every tenant."""
        return [tenant_body(tenant) for tenant in access.keys.tenants()]

    @routes.put("/tenants/{name}")
    def put_tenant(name: str, body: TenantBody) -> dict[str, Any]:
        """Records a tenant, new or changed."""
        limits = Limits.from_mapping(body.limits)
        tenant = Tenant(name, limits, body.priority, body.is_isolated, body.is_disabled)
        access.keys.put_tenant(tenant)
        access.forget()
        return tenant_body(tenant)


def _add_usage(routes: APIRouter, access: Access) -> None:
    @routes.get("/usage")
    def usage(
        request: Request,
        since: date | None = None,
        until: date | None = None,
        tenant: str | None = None,
        key: str | None = None,
        by: list[GroupBy] = Query(default_factory=lambda: list(GROUPS)),  # noqa: B008 - FastAPI's form
    ) -> list[dict[str, Any]]:
        """What was used, a row for each value of what it is grouped `by`. Who may not see everybody's sees its own."""
        caller = caller_of(request)
        if not caller.may(Right.OBSERVE):
            if tenant not in (None, caller.tenant.name):
                raise Forbidden(f"this key sees the usage of tenant {caller.tenant.name!r} only")
            tenant = caller.tenant.name
        access.flush()  # what this process has not written yet is part of the truth
        rows = access.usage.read(since=since, until=until, tenant=tenant, key=key, by=tuple(dict.fromkeys(by)))
        return [row.to_mapping() for row in rows]


def _shown_once(access: Access, made: ApiKey, secret: Secret, response: Response) -> dict[str, Any]:
    access.forget()
    response.headers["Cache-Control"] = "no-store"
    return {**key_body(made), "key": secret.text}
