"""The LoRA adapters that replicas hold, made what the records want: a new replica begins with all of them.

`wanted` are pairs of an adapter's name and of the place in the object store where its files are. Adapters that a
deployment's settings name are the engine's own business and left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from sihe.serving.errors import UnsupportedParameter
from sihe.serving.gateway.replicas.replica import Replica

if TYPE_CHECKING:
    from sihe.serving.engine.adapters import EngineAdapters

Adapters = tuple[tuple[str, str], ...]
FolderOf = Callable[[str], Path]
"""A local folder with the files of a place."""


def adapters_of(replica: Replica) -> EngineAdapters:
    """Where adapters of a replica are loaded. Raises `EngineClosed`, `UnsupportedParameter` where it takes none."""
    from sihe.serving.engine.adapters import EngineAdapters

    found = getattr(replica.held(), "adapters", None)
    if not isinstance(found, EngineAdapters):
        raise UnsupportedParameter("adapter", replica.served_by, hint="its replicas take no adapters at run time")
    return found


def bring_up_to_date(
    replica: Replica, wanted: Callable[[], Adapters], folder_of: FolderOf, *, gone: Collection[str] = ()
) -> None:
    """Unloads what is `gone`, and loads what is wanted at the end of it, which may change meanwhile. Blocks.

    Raises what prevents it: what is wrong with an adapter for this model, or that no place is free for it.
    """
    if not wanted() and not gone:
        return
    adapters = adapters_of(replica)
    with replica.changing_adapters:
        for name in gone:
            if name in adapters.names:
                adapters.unload(name)
        while missing := [(name, place) for name, place in wanted() if name not in adapters.names]:
            name, place = missing[0]
            adapters.load(name, folder_of(place))
