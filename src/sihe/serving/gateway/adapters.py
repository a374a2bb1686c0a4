"""LoRA adapters of a deployment: loaded and unloaded while it serves, and remembered.

An adapter's files are copied into the object store and their place is recorded with the deployment: so it is there
after a swap and after a restart, whatever becomes of the folder that it came from. A version that cannot take all of
them is refused, as clients name them.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from sihe.core.errors import AlreadyExists, ConfigError, InvalidInput, NotFound
from sihe.core.ids import new_id
from sihe.core.telemetry import logger
from sihe.core.workspace import Workspace
from sihe.serving.engine.config import EngineConfig
from sihe.serving.errors import NotReady
from sihe.serving.gateway.live import LiveDeployment
from sihe.serving.gateway.replicas.adapters import adapters_of
from sihe.serving.gateway.settings import ModelSettings
from sihe.serving.gateway.store import DeploymentStore

if TYPE_CHECKING:
    from sihe.serving.engine.adapters import EngineAdapters

PREFIX = "adapters"


class AdapterControl:
    """`live` gives a deployment that this process serves, and `notify` brings changes about at once."""

    def __init__(
        self,
        workspace: Workspace,
        deployments: DeploymentStore,
        *,
        live: Callable[[str], LiveDeployment],
        notify: Callable[[], None],
    ) -> None:
        self._workspace = workspace
        self._deployments = deployments
        self._live = live
        self._notify = notify
        self._log = logger("serving")
        self._guard = threading.Lock()
        self._changing: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def names(self, name: str) -> list[str]:
        """The adapters that requests to every replica may name. Raises `NotFound`, `NotReady`."""
        held = [set(adapters.names) for adapters in self._of_replicas(name)]
        return sorted(set.intersection(*held))

    def load(self, name: str, adapter: str, folder: Path) -> None:
        """Serves the PEFT adapter of `folder` as `adapter`: from every replica, or from none.

        Raises `NotFound`, `NotReady`, `AlreadyExists`, `Busy` where no place is free, `UnsupportedParameter` where
        replicas take none, and what is wrong with the folder.
        """
        with self._lock_of(name):
            self._refuse_known(name, adapter)
            place = f"{PREFIX}/{name}/{new_id('adapter')}"
            loaded: list[EngineAdapters] = []
            try:
                for adapters in self._of_replicas(name):
                    adapters.load(adapter, folder if not loaded else self.folder_of(place))
                    loaded.append(adapters)
                    if len(loaded) == 1:  # it is an adapter of this model: worth keeping
                        self._keep(folder, place)
                self._deployments.add_adapter(name, adapter, place)
            except BaseException:
                for adapters in loaded:
                    self._attempt("adapter_not_unloaded", partial(adapters.unload, adapter))
                self._delete(place)
                raise
        self._notify()

    def unload(self, name: str, adapter: str) -> None:
        """Lets no new request use an adapter, waits for those that do, and forgets it.

        Raises `NotFound`, `NotReady`, `InvalidInput` for one of the deployment's settings, and `Busy` when requests
        that use it have not ended within a minute: it then stays.
        """
        with self._lock_of(name):
            deployment = self._deployments.get(name)
            if adapter in _of_settings(deployment.settings):
                raise InvalidInput(f"adapter {adapter!r} is in the settings of {name!r}: deploy it again without it")
            place = dict(deployment.adapters).get(adapter)
            if place is None:
                known = ", ".join(found for found, _ in deployment.adapters) or "none"
                raise NotFound("adapter", adapter, hint=f"{name!r} has {known}")
            left: list[EngineAdapters] = []
            try:
                for adapters in self._of_replicas(name):
                    if adapter in adapters.names:
                        adapters.unload(adapter)
                        left.append(adapters)
            except BaseException:
                for adapters in left:
                    self._attempt("adapter_not_loaded", partial(adapters.load, adapter, self.folder_of(place)))
                raise
            self._deployments.remove_adapter(name, adapter)
        self._notify()
        self._delete(place)
        shutil.rmtree(self._cache(place), ignore_errors=True)  # there is one where the object store is elsewhere

    def forget(self, name: str) -> None:
        """Deletes what is kept for a deployment that was removed."""
        self._delete(f"{PREFIX}/{name}")

    def check_places(self, name: str, settings: ModelSettings) -> None:
        """Raises `ConfigError` where settings leave no place for the adapters that a deployment has already."""
        held = self._deployments.adapters(name)
        places = settings.max_adapters - len(settings.adapters) if isinstance(settings, EngineConfig) else 0
        if len(held) > places:
            raise ConfigError(
                f"{name!r} has the adapters {', '.join(held)}, which were loaded while it "
                f"served, and max_adapters leaves room for {places}: allow more, or unload them",
                key="max_adapters",
            )

    def folder_of(self, place: str) -> Path:
        """A local folder with the adapter's files. Raises `NotFound`, `Unreachable`."""
        return self._workspace.objects.get_tree(place, self._cache(place))

    def _lock_of(self, name: str) -> threading.Lock:
        """Held while adapters of `name` change; loading may take long, and no other deployment waits for it. It is kept
        for as long as somebody has it."""
        with self._guard:
            lock = self._changing.get(name)
            if lock is None:
                lock = self._changing[name] = threading.Lock()
            return lock

    def _cache(self, place: str) -> Path:
        return self._workspace.path("serving", "adapters", place.rpartition("/")[2])

    def _refuse_known(self, name: str, adapter: str) -> None:
        deployment = self._deployments.get(name)
        if adapter in (*dict(deployment.adapters), *_of_settings(deployment.settings)):
            raise AlreadyExists("adapter", adapter, hint="unload it first or take another name")

    def _of_replicas(self, name: str) -> list[EngineAdapters]:
        """The adapters of each replica that serves, at least one."""
        replicas = [replica for replica in self._live(name).stable.replicas() if replica.is_serving]
        if not replicas:
            raise NotReady(name, "no replica of it serves now")
        return [adapters_of(replica) for replica in replicas]

    def _keep(self, folder: Path, place: str) -> None:
        from sihe.models.lora_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):  # and nothing else that lies beside them
            self._workspace.objects.put(f"{place}/{file}", (folder / file).read_bytes())

    def _delete(self, place: str) -> None:
        self._attempt("adapter_not_deleted", partial(self._workspace.objects.delete, place))

    def _attempt(self, event: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - it is about what is left over
            self._log.warning(event, error=repr(error))


def _of_settings(settings: object) -> list[str]:
    given = settings.adapters if isinstance(settings, EngineConfig) else ()
    return [item.partition("=")[0] for item in given]
