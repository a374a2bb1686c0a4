"""Settings, resolved once: default < `sihe.toml` < `SIHE_*` < flag. An unknown key is an error that names it.

`sihe.toml` is looked for in the current folder and then in the home folder. A key `url` of the section `records` is
`[records] url = …` in the file, `SIHE_RECORDS_URL` in the environment and `--set records.url=…` as a flag. (pydantic
checks the values; pydantic-settings is not used because it lets unknown `SIHE_*` names pass in silence.)
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sihe.core.errors import ConfigError

FILE_NAME = "sihe.toml"
PREFIX = "SIHE_"
# An address in brackets (RFC 3986, section 3.2.2) or a network: a colon outside of quotes, which no JSON list has.
_BRACKETED_HOST = re.compile(r"\s*\[[0-9a-fA-F.]*:[0-9a-fA-F:.]*(?:/[0-9]+)?\]")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class RecordsSettings(_Section):
    """Where records, runs and the model registry live."""

    url: str | None = Field(None, description="SQLAlchemy URL; by default SQLite in the home folder")


class ObjectsSettings(_Section):
    """Where models, artifacts and reports live."""

    url: str | None = Field(None, description="fsspec URL (file://, s3://, memory://); by default the home folder")


class TrackingSettings(_Section):
    """Where runs and model versions are logged."""

    uri: str | None = Field(None, description="URI of an MLflow server; by default the records database")


class ServerSettings(_Section):
    """The HTTP server."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8484, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_keys: tuple[str, ...] = Field((), description="keys that clients must send as Bearer tokens; none: no check")
    drain_s: float = Field(
        30.0, ge=0, le=86400, description="how long running requests may take once the server is told to stop"
    )
    linger_s: float = Field(
        0.0, ge=0, le=3600, description="how long it still accepts then, not ready: for balancers that take their time"
    )


class ServingSettings(_Section):
    """What deployments may do."""

    backend_hosts: tuple[str, ...] = Field(
        (),
        description="where a deployment's backend.url may be: names (*.gpu.example too), addresses and networks, each "
        "with a :port or without; none: anywhere, but over HTTP for administrators only",
    )


class TenantsSettings(_Section):
    """Who may use the server, and how much (`sihe keys`)."""

    require_key: bool = Field(False, description="ask for a key even before the first one was created")
    redis_url: str | None = Field(
        None, description="Redis that several server processes share to count rates; none: each process counts alone"
    )


class ClusterSettings(_Section):
    """Where the ranks of a training run."""

    launcher: Literal["local", "ray"] = Field("local", description="ranks as processes here, or on a Ray cluster")
    ray_address: str = Field("auto", description="host:port of the Ray cluster; auto: the one of this machine")
    ray_placement: Literal["pack", "spread"] = Field("pack", description="ranks on few nodes of the cluster or on many")


class LlmSettings(_Section):
    """An OpenAI-compatible endpoint that writes answers; without one they are extracts."""

    base_url: str | None = Field(None, description="such as http://127.0.0.1:8484/v1")
    model: str | None = Field(None, description="model or deployment name at that endpoint")
    api_key: str | None = Field(None, repr=False, description="sent as a Bearer token")
    timeout_s: float = Field(60.0, gt=0, description="longest wait for one answer")


class LogSettings(_Section):
    """Structured logs, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("warning", description="least severe level shown")
    format: Literal["text", "json"] = Field("text", description="for people or for machines")


class Settings(_Section):
    """The resolved configuration; frozen, and stored with every run (`public()`)."""

    home: Path = Field(Path(".sihe"), description="folder that holds everything in embedded use")
    locale: Literal["en", "zh"] = Field("en", description="language of command-line answers and console pages")
    records: RecordsSettings = RecordsSettings()
    objects: ObjectsSettings = ObjectsSettings()
    tracking: TrackingSettings = TrackingSettings()
    server: ServerSettings = ServerSettings()
    serving: ServingSettings = ServingSettings()
    tenants: TenantsSettings = TenantsSettings()
    cluster: ClusterSettings = ClusterSettings()
    llm: LlmSettings = LlmSettings()
    log: LogSettings = LogSettings()

    @property
    def records_url(self) -> str:
        """SQLAlchemy URL of the records database."""
        return self.records.url or f"sqlite:///{self.home.absolute() / 'sihe.db'}"

    @property
    def objects_url(self) -> str:
        """fsspec URL of the object store."""
        return self.objects.url or f"file://{self.home.absolute() / 'objects'}"

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking and registry URI."""
        return self.tracking.uri or self.records_url

    def public(self) -> dict[str, Any]:
        """The settings as plain values, secrets masked: what a run stores and a page may show."""
        values: dict[str, Any] = self.model_dump(mode="json")
        values["server"]["api_keys"] = ["***"] * len(self.server.api_keys)
        values["llm"]["api_key"] = "***" if self.llm.api_key else None
        for section, key in (("records", "url"), ("tracking", "uri"), ("objects", "url"), ("tenants", "redis_url")):
            values[section][key] = _without_password(values[section][key])
        return values


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Settings:
    """The settings from all four sources. `flags` are dotted (`{"records.url": …}`) and win; `None` values are unset.

    Raises `ConfigError` that names the key and its source.
    """
    environment = os.environ if environ is None else environ
    from_environment = _read_environment(environment)
    from_flags = {key: value for key, value in (flags or {}).items() if value is not None}
    home = Path(from_flags.get("home") or from_environment.get("home") or Settings.model_fields["home"].default)
    merged: dict[str, tuple[Any, str]] = {}
    for file in ((directory or Path.cwd()) / FILE_NAME, home / FILE_NAME):
        if file.is_file():
            merged.update({key: (value, str(file)) for key, value in _read_file(file).items()})
            break
    merged.update({key: (value, environment_name(key)) for key, value in from_environment.items()})
    merged.update({key: (value, f"flag {key}") for key, value in from_flags.items()})
    return _build(merged)


def known_keys() -> dict[str, str]:
    """Every dotted key and its description, in order."""
    keys: dict[str, str] = {}
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            for key, inner in field.annotation.model_fields.items():
                keys[f"{name}.{key}"] = inner.description or ""
        else:
            keys[name] = field.description or ""
    return keys


def environment_name(key: str) -> str:
    """`records.url` → `SIHE_RECORDS_URL`."""
    return PREFIX + key.replace(".", "_").upper()


def _read_file(path: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    _refuse_unknown(flat, lambda key: f"{key!r} in {path}")
    return flat


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    names = {environment_name(key): key for key in known_keys()}
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in names)
    if unknown:
        raise ConfigError(
            f"unknown setting {unknown[0]} in the environment: known are {', '.join(sorted(names))}", key=unknown[0]
        )
    return {key: environ[name] for name, key in names.items() if name in environ}


def _refuse_unknown(flat: Mapping[str, Any], where: Any) -> None:
    known = known_keys()
    for key in flat:
        if key not in known:
            raise ConfigError(f"unknown setting {where(key)}: known are {', '.join(known)}", key=key)


def _build(merged: Mapping[str, tuple[Any, str]]) -> Settings:
    _refuse_unknown({key: value for key, (value, _) in merged.items()}, lambda key: repr(key))
    tree: dict[str, Any] = {}
    for key, (value, _) in merged.items():
        section, _, inner = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[inner] = _parse(key, value)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        # An item of a list adds its index to the location: the key is what comes before it.
        key = ".".join(str(part) for part in first["loc"][:2] if not isinstance(part, int))
        value, source = merged[key]
        raise ConfigError(f"setting {key!r} from {source}: {first['msg'].lower()}, got {value!r}", key=key) from error


def _parse(key: str, value: Any) -> Any:
    """Text for a list setting becomes a list: JSON, or items between commas, of which the first may be an address in
    brackets. Everything else is pydantic's work."""
    if key in ("server.api_keys", "serving.backend_hosts") and isinstance(value, str):
        is_host = key == "serving.backend_hosts" and _BRACKETED_HOST.match(value)
        if value.lstrip().startswith("[") and not is_host:
            try:
                return json.loads(value)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"setting {key!r} begins with '[' and is not a JSON list ({error}): give a JSON list of texts, or "
                    "items with commas between them",
                    key=key,
                ) from error
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _without_password(url: str | None) -> str | None:
    if url is None:
        return None
    url = re.sub(r"([?&]password=)[^&]*", r"\1***", url)
    if "@" not in url or "://" not in url:
        return url
    scheme, _, rest = url.partition("://")
    credentials, _, host = rest.rpartition("@")
    return f"{scheme}://{credentials.partition(':')[0]}:***@{host}"
