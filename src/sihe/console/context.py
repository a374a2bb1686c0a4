"""What the pages share: the workspace, the rooms' services, the templates, and the sign that the server stops."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sihe.console.views import Views
from sihe.core.workspace import Workspace

if TYPE_CHECKING:
    from sihe.apps.coach.service import CoachService
    from sihe.apps.rag.service import RagService
    from sihe.serving.gateway import Gateway
    from sihe.serving.tenants import Access


@dataclass
class Console:
    """Handed to each page's `router`.

    `stopping` is set when the server begins to shut down: streams then end. `failure` is why it could not start.
    """

    workspace: Workspace
    views: Views
    gateway: Gateway
    access: Access
    rag: RagService
    coach: CoachService
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Exception | None = None
