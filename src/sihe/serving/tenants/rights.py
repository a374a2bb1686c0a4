"""Which right a request needs, by its method and path. Pure, and closed by default: what is not named needs ADMIN."""

from __future__ import annotations

import re

from sihe.serving.tenants.types import Right

_READS = {"GET", "HEAD"}
_INFERENCE = re.compile(r"/v1/.*|/v2(/.*)?|/(de)?tokenize|/api/deployments/[^/]+/feedback")
_DEPLOYMENTS = re.compile(r"/api/deployments(/.*)?|/api/models/[^/]+/aliases/[^/]+")
_OBSERVED = re.compile(r"/metrics|/api/usage")


def needed_rights(method: str, path: str) -> frozenset[Right]:
    """Any one of these opens `path` (ADMIN does too)."""
    if _INFERENCE.fullmatch(path):
        return frozenset({Right.INFER})
    if path == "/api/usage" and method in _READS:
        return frozenset(Right)  # the route shows each caller its own
    if _OBSERVED.fullmatch(path) and method in _READS:
        return frozenset({Right.OBSERVE})
    if _DEPLOYMENTS.fullmatch(path):
        return frozenset({Right.DEPLOY, Right.OBSERVE} if method in _READS else {Right.DEPLOY})
    return frozenset({Right.ADMIN})
