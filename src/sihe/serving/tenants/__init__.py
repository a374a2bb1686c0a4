"""Tenants: who may use the server, how much of it, and what they have used."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Access": "sihe.serving.tenants.access",
        "ApiKey": "sihe.serving.tenants.types",
        "Caller": "sihe.serving.tenants.types",
        "Limits": "sihe.serving.tenants.types",
        "Right": "sihe.serving.tenants.types",
        "Tenant": "sihe.serving.tenants.types",
        "TenantStore": "sihe.serving.tenants.store",
    },
)
