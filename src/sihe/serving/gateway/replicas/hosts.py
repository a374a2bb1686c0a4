"""Loads versions where their backend says: into this process, an actor of a Ray cluster, or a server of its own."""

from __future__ import annotations

from typing import cast

from sihe.core.errors import ConfigError
from sihe.core.tracking import ModelVersion
from sihe.core.workspace import Workspace
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.ports import EngineObserver, RequestStats, StepStats
from sihe.serving.gateway.replicas.config import Backend, LocalBackend, OpenAiBackend, RayBackend
from sihe.serving.gateway.replicas.ports import Served
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.ports import PredictorObserver


class Observers:
    """Several observers of one engine."""

    def __init__(self, *observers: EngineObserver) -> None:
        self._observers = observers

    def on_step(self, stats: StepStats) -> None:
        """Tells each."""
        for observer in self._observers:
            observer.on_step(stats)

    def on_request(self, stats: RequestStats) -> None:
        """Tells each."""
        for observer in self._observers:
            observer.on_request(stats)

    def on_close(self) -> None:
        """Tells each."""
        for observer in self._observers:
            observer.on_close()


def load(
    workspace: Workspace, version: ModelVersion, settings: EngineConfig, backend: Backend, observer: EngineObserver
) -> Served:
    """What serves `version` on `backend`. Raises what is wrong with it, `NoMemory`, `NoRoom`, `MissingExtra`."""
    if isinstance(backend, RayBackend):
        from sihe.serving.gateway.replicas.ray.host import load as load_on_ray

        return cast(Served, load_on_ray(workspace, version, settings, backend, observer))
    if isinstance(backend, OpenAiBackend):
        from sihe.serving.gateway.replicas.openai.host import load as load_behind

        return load_behind(workspace, version, settings, backend, observer)
    from sihe.serving.engine.encoder.engine import EncoderEngine
    from sihe.serving.engine.encoder.runner import is_encoder
    from sihe.serving.engine.engine import Engine

    folder = workspace.tracking.download(version)
    engine: type[EncoderEngine] | type[Engine] = EncoderEngine if is_encoder(folder) else Engine
    return engine.load(folder, settings, name=f"{version.name}@{version.version}", observer=observer)


def load_predictor(
    workspace: Workspace,
    version: ModelVersion,
    settings: PredictiveConfig,
    backend: Backend,
    observer: PredictorObserver,
) -> Served:
    """What serves a predictive `version` in this process. Raises what is wrong with it, `MissingExtra`."""
    from sihe.serving.predictive.predictor import Predictor

    if not isinstance(backend, LocalBackend):
        raise ConfigError(
            f"predictive models run in this process, not on backend {backend.kind!r}: use local", key="backend"
        )
    folder = workspace.tracking.download(version)
    return Predictor.load(folder, settings, name=f"{version.name}@{version.version}", observer=observer)
