"""Which launcher a workspace uses, by its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sihe.cluster.ports import Launcher
    from sihe.core.settings import ClusterSettings


def chosen(settings: ClusterSettings) -> Launcher:
    """The launcher that `settings` name. What it needs is loaded when it runs: `MissingExtra` comes then."""
    if settings.launcher == "ray":
        from sihe.cluster.launchers.ray.launcher import RayLauncher

        return RayLauncher(address=settings.ray_address, placement=settings.ray_placement)
    from sihe.cluster.launchers.local import LocalLauncher

    return LocalLauncher()
