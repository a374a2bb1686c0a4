"""Runs, metrics, artifacts, model versions, aliases and lineage, through MLflow's client.

By default MLflow's tables live in the records database, next to Sihe's own; `tracking.uri` points at any MLflow
server instead. Weights and artifacts live in the object store, and MLflow keeps their URLs, so its own UI works on
the same database.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from sihe.core.clock import Clock
from sihe.core.errors import Busy, InvalidInput, NoSpace, NotFound, Unreachable
from sihe.core.ids import check_name
from sihe.core.processes import is_gone, this_process
from sihe.core.records import Records
from sihe.core.records.tables import lineage
from sihe.core.storage import ObjectStore

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED", "SCHEDULED"]
_MAX_PARAM = 6000  # characters: MLflow's limit for one parameter value
_PROCESS = "sihe.process"  # who opened the run, or went on with it
_MAX_METRICS = 1000  # MLflow's limit for one batch


@dataclass(frozen=True)
class Run:
    """One run: a training, an evaluation, a lab. `metrics` holds the last value of each."""

    id: str
    name: str
    experiment: str
    status: RunStatus
    started_at: datetime
    ended_at: datetime | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def is_abandoned(self) -> bool:
        """Whether it says that it runs, and the process that ran it is gone from this machine."""
        return self.status == "RUNNING" and is_gone(self.tags.get(_PROCESS, ""))


@dataclass(frozen=True)
class MetricPoint:
    """One value of one metric at a step."""

    step: int
    value: float
    at: datetime


@dataclass(frozen=True)
class ModelVersion:
    """One immutable version of a named model. `source` is the URL of its folder in the object store."""

    name: str
    version: int
    source: str
    run_id: str | None
    created_at: datetime
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    @property
    def key(self) -> str:
        """How lineage and pages name it: `model:name@3`."""
        return f"model:{self.name}@{self.version}"


class Tracking:
    """Runs and the model registry. Safe for several processes at once."""

    def __init__(self, uri: str, records: Records, objects: ObjectStore, clock: Clock, *, cache: Path) -> None:
        self._uri = uri
        self._records = records
        self._objects = objects
        self._clock = clock
        self._cache = cache
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The `mlflow.MlflowClient` itself, for what this class does not cover."""
        if self._client is None:
            # Quiet: MLflow's start-up notes are not for users, and its telemetry must not leave the machine.
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
            from mlflow.tracking import MlflowClient

            logging.getLogger("alembic").setLevel(logging.WARNING)

            uri = self._uri
            if uri.startswith("sqlite:"):
                uri += "?timeout=30"
            elif uri.startswith("postgresql:"):
                uri = uri.replace("postgresql:", "postgresql+psycopg:", 1)
            # MLflow creates its tables when the client first speaks: one process at a time.
            with self._records._migration_lock(), _mlflow_errors(self._uri):
                client = MlflowClient(tracking_uri=uri, registry_uri=uri)
                client.search_experiments(max_results=1)
            self._client = client
        return self._client

    # ---- runs -----------------------------------------------------------------------------------------------------

    def start_run(
        self,
        experiment: str,
        name: str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Opens a run; its id."""
        with _mlflow_errors(self._uri):
            run = self.client.create_run(
                self._experiment_id(experiment),
                run_name=name,
                tags={"sihe.experiment": experiment, _PROCESS: this_process(), **(tags or {})},
            )
        run_id: str = run.info.run_id
        if params:
            self.log_params(run_id, params)
        return run_id

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Records parameters; nested ones as dotted keys."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:_MAX_PARAM]) for key, value in _flatten(params)]
        with _mlflow_errors(self._uri):
            for start in range(0, len(flat), 100):
                self.client.log_batch(run_id, params=flat[start : start + 100])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Records one value of each metric at `step`, in one write."""
        from mlflow.entities import Metric

        at_ms = int(self._clock.now().timestamp() * 1000)
        batch = [Metric(key, float(value), at_ms, step) for key, value in metrics.items()]
        with _mlflow_errors(self._uri):
            self.client.log_batch(run_id, metrics=batch)

    def log_steps(self, run_id: str, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Records the metrics of many steps in one write for each thousand values: for curves that grow quickly."""
        from mlflow.entities import Metric

        at_ms = int(self._clock.now().timestamp() * 1000)
        batch = [Metric(key, float(value), at_ms, step) for step in steps for key, value in steps[step].items()]
        with _mlflow_errors(self._uri):
            for start in range(0, len(batch), _MAX_METRICS):
                self.client.log_batch(run_id, metrics=batch[start : start + _MAX_METRICS])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags of a run."""
        from mlflow.entities import RunTag

        with _mlflow_errors(self._uri):
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_artifact(self, run_id: str, name: str, data: bytes) -> str:
        """Stores `data` as an artifact of the run; its URL."""
        return self._objects.put(f"runs/{check_name('run', run_id)}/artifacts/{name}", data)

    def artifacts(self, run_id: str) -> list[str]:
        """Names of the run's artifacts."""
        prefix = f"runs/{check_name('run', run_id)}/artifacts/"
        return [name.removeprefix(prefix) for name in self._objects.list(prefix.rstrip("/"))]

    def artifact(self, run_id: str, name: str) -> bytes:
        """The bytes of an artifact. Raises `NotFound`."""
        return self._objects.get(f"runs/{check_name('run', run_id)}/artifacts/{name}")

    def end_run(self, run_id: str, status: RunStatus = "FINISHED") -> None:
        """Closes a run. RUNNING reopens it: a resumed job goes on under its old id."""
        with _mlflow_errors(self._uri):
            if status == "RUNNING":
                self.client.update_run(run_id, status=status)
                self.client.set_tag(run_id, _PROCESS, this_process())
            else:
                self.client.set_terminated(run_id, status=status)

    def run(self, run_id: str) -> Run:
        """One run. Raises `NotFound`."""
        with _mlflow_errors(self._uri, missing=("run", run_id)):
            return _run(self.client.get_run(run_id))

    def runs(self, experiment: str | None = None, *, limit: int = 50) -> list[Run]:
        """The newest runs, newest first."""
        with _mlflow_errors(self._uri):
            if experiment is None:
                ids = [found.experiment_id for found in self.client.search_experiments()]
            else:
                found = self.client.get_experiment_by_name(experiment)
                ids = [found.experiment_id] if found else []
            if not ids:
                return []
            page = self.client.search_runs(ids, max_results=limit, order_by=["attributes.start_time DESC"])
        return [_run(item) for item in page]

    def history(self, run_id: str, metric: str) -> list[MetricPoint]:
        """Every value of a metric, by step; of a step that was repeated after a recovery, the last."""
        with _mlflow_errors(self._uri, missing=("run", run_id)):
            points = self.client.get_metric_history(run_id, metric)
        latest = {
            point.step: MetricPoint(point.step, point.value, datetime.fromtimestamp(point.timestamp / 1000, UTC))
            for point in sorted(points, key=lambda point: point.timestamp)
        }
        return [latest[step] for step in sorted(latest)]

    # ---- models ---------------------------------------------------------------------------------------------------

    def register_model(
        self, name: str, folder: Path, *, run_id: str | None = None, tags: Mapping[str, str] | None = None
    ) -> ModelVersion:
        """Copies `folder` into the object store and records it as the next version of model `name`.

        The version exists only once its files are complete.
        """
        check_name("model", name)
        from sihe.core.ids import new_id

        source = self._objects.put_tree(f"models/{name}/{new_id('weights')}", folder)
        with _mlflow_errors(self._uri):
            if not any(found.name == name for found in self.client.search_registered_models(f"name = '{name}'")):
                try:
                    self.client.create_registered_model(name)
                except Exception as error:
                    if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":  # another process was first
                        raise
            created = self.client.create_model_version(name, source=source, run_id=run_id, tags=dict(tags or {}))
        version = _version(created)
        if run_id:
            self.link(version.key, [f"run:{run_id}"])
        return version

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Points `alias` of model `name` at `version`. Raises `NotFound`."""
        check_name("alias", alias)
        with _mlflow_errors(self._uri, missing=("model version", f"{name}@{version}")):
            self.client.set_registered_model_alias(name, alias, str(version))

    def resolve(self, reference: str) -> ModelVersion:
        """The version behind `name@3`, `name@alias`, or `name` (its newest). Raises `NotFound`."""
        name, _, selector = reference.partition("@")
        check_name("model", name)
        with _mlflow_errors(self._uri, missing=("model version", reference)):
            if not selector:
                versions = self.model_versions(name)
                if not versions:
                    raise NotFound("model", name, hint="see the models with  sihe models list")
                return versions[0]
            if selector.isdigit():
                found = self.client.get_model_version(name, selector)
            else:
                found = self.client.get_model_version_by_alias(name, selector)
            return _version(found)

    def model_versions(self, name: str) -> list[ModelVersion]:
        """Every version of a model, newest first; empty for an unknown name."""
        check_name("model", name)
        with _mlflow_errors(self._uri):
            found = self.client.search_model_versions(f"name = '{name}'", max_results=1000)
        return sorted((_version(item) for item in found), key=lambda version: -version.version)

    def models(self) -> dict[str, dict[str, int]]:
        """Name → alias → version, of every registered model."""
        with _mlflow_errors(self._uri):
            found = self.client.search_registered_models()
        return {item.name: {alias: int(version) for alias, version in item.aliases.items()} for item in found}

    def download(self, version: ModelVersion) -> Path:
        """A local folder with the version's files; the object store's own folder when that is local."""
        return self._objects.get_tree(
            self._objects.name_of(version.source), self._cache / f"{version.name}@{version.version}"
        )

    # ---- lineage --------------------------------------------------------------------------------------------------

    def link(self, child: str, parents: Sequence[str]) -> None:
        """Records that `child` was made from `parents`. Keys look like `model:gpt@2`, `run:…`, `table:docs@5`."""
        for parent in parents:
            try:
                with self._records.transaction() as connection:
                    connection.execute(
                        lineage.insert().values(child=child, parent=parent, created_at=self._clock.now())
                    )
            except IntegrityError:
                continue  # the edge is there already

    def ancestors(self, key: str) -> list[tuple[str, str]]:
        """Every (child, parent) edge on the way up from `key`, nearest first."""
        return self._edges(key, upwards=True)

    def descendants(self, key: str) -> list[tuple[str, str]]:
        """Every (child, parent) edge on the way down from `key`, nearest first."""
        return self._edges(key, upwards=False)

    def _edges(self, key: str, *, upwards: bool) -> list[tuple[str, str]]:
        edges: list[tuple[str, str]] = []
        seen, frontier = {key}, [key]
        near = lineage.c.child if upwards else lineage.c.parent
        with self._records.transaction() as connection:
            while frontier:
                rows = connection.execute(select(lineage.c.child, lineage.c.parent).where(near.in_(frontier)))
                found = [(str(child), str(parent)) for child, parent in rows]
                edges += found
                frontier = sorted({parent if upwards else child for child, parent in found} - seen)
                seen.update(frontier)
        return edges

    def _experiment_id(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                created: str = self.client.create_experiment(name, artifact_location=f"{self._objects.url}/runs")
                return created
            except Exception:
                found = self.client.get_experiment_by_name(name)  # another process was first
                if found is None:
                    raise
        experiment_id: str = found.experiment_id
        return experiment_id


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _run(found: Any) -> Run:
    info, data = found.info, found.data
    return Run(
        id=info.run_id,
        name=info.run_name,
        experiment=data.tags.get("sihe.experiment", info.experiment_id),
        status=info.status,
        started_at=_time(info.start_time),
        ended_at=_time(info.end_time) if info.end_time else None,
        params=dict(data.params),
        metrics=dict(data.metrics),
        tags={key: value for key, value in data.tags.items() if not key.startswith("mlflow.")},
    )


def _version(found: Any) -> ModelVersion:
    return ModelVersion(
        name=found.name,
        version=int(found.version),
        source=found.source,
        run_id=found.run_id or None,
        created_at=_time(found.creation_timestamp),
        aliases=tuple(found.aliases),
        tags=dict(found.tags),
    )


@contextmanager
def _mlflow_errors(uri: str, *, missing: tuple[str, str] | None = None) -> Iterator[None]:
    """MLflow's exceptions as ours."""
    try:
        yield
    except Exception as error:
        code = getattr(error, "error_code", None)
        if code is None:
            raise
        if missing and code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise NotFound(*missing) from error
        if code in ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS"):
            raise InvalidInput(str(error)) from error
        if code == "TEMPORARILY_UNAVAILABLE":
            raise Unreachable(uri.rpartition("@")[2], str(error)) from error
        if "disk is full" in str(error) or "No space left" in str(error):
            raise NoSpace(uri.rpartition("@")[2]) from error
        if "database is locked" in str(error):
            raise Busy("the tracking database stayed locked: another process is writing") from error
        raise


__all__ = ["MetricPoint", "ModelVersion", "Run", "RunStatus", "Tracking"]
