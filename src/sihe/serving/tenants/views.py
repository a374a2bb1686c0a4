"""Keys and tenants as plain values, for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sihe.serving.tenants.types import ApiKey, Tenant


def key_body(key: ApiKey) -> dict[str, Any]:
    """A key: all that is known of it, which is not the key."""
    return {
        **asdict(key),
        "rights": sorted(key.rights),
        "deployments": None if key.deployments is None else sorted(key.deployments),
        "limits": key.limits.to_mapping(),
    }


def tenant_body(tenant: Tenant) -> dict[str, Any]:
    """A tenant."""
    return {**asdict(tenant), "limits": tenant.limits.to_mapping()}
