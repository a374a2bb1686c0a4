"""`sihe keys …`: who may use the server, how much, and what was used. A running `sihe up` sees a change in a second."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sihe.core import terminal

if TYPE_CHECKING:
    from sihe.core.workspace import Workspace
    from sihe.serving.tenants.secret import Secret
    from sihe.serving.tenants.store import TenantStore
    from sihe.serving.tenants.types import ApiKey, Limits

app = typer.Typer(no_args_is_help=True, help="Keys, tenants, limits and usage.")

_Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]
_Limit = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="NAME=N",
        help="requests_per_min, tokens_per_min, tokens_per_day, tokens_per_month or concurrency.",
    ),
]
_MAX_DAYS = 36_500.0
_Id = Annotated[str, typer.Argument(help="The key's id: the part of it between the underscores.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    tenant: Annotated[str, typer.Option(help="Whose key it is.")] = "default",
    right: Annotated[list[str] | None, typer.Option(help="infer (default), observe, deploy or admin.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A deployment that it may ask; by default all.")] = None,
    limit: _Limit = None,
    days: Annotated[
        float | None, typer.Option(min=0.001, max=_MAX_DAYS, help="How long it works; by default for ever.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Make a key. It is printed once and cannot be read again."""
    from sihe.serving.tenants.types import parse_rights

    with terminal.workspace() as workspace:
        made, secret = _store(workspace).create_key(
            name,
            tenant=tenant,
            rights=parse_rights(right or ["infer"]),
            deployments=frozenset(model) if model else None,
            limits=_limits(limit),
            expires_at=_end(workspace.clock.now(), days),
        )
    _show_once(made, secret, as_json=as_json)


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None, as_json: _Json = False
) -> None:
    """Show every key, without its secret."""
    from sihe.serving.tenants.views import key_body

    with terminal.workspace() as workspace:
        keys = _store(workspace).keys(tenant)
        now = workspace.clock.now()
    if as_json or not keys:
        terminal.emit([key_body(key) for key in keys], as_json=as_json)
        return
    columns = ("id", "name", "tenant", "rights", "models", "limits", "state", "last used")
    terminal.table(columns, [_cells(key, now) for key in keys])


@app.command()
def rotate(
    id: _Id,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for which the old key goes on to work.")] = 0.0,
    as_json: _Json = False,
) -> None:
    """Make a key that replaces another."""
    with terminal.workspace() as workspace:
        made, secret = _store(workspace).rotate_key(id, grace_s=grace)
    _show_once(made, secret, as_json=as_json)


@app.command()
def disable(id: _Id) -> None:
    """Stop a key from working, within a second, everywhere."""
    with terminal.workspace() as workspace:
        key = _store(workspace).set_enabled(id, enabled=False)
    terminal.say(f"disabled {key.id} ({key.name})")


@app.command()
def enable(id: _Id) -> None:
    """Let a disabled key work again."""
    with terminal.workspace() as workspace:
        key = _store(workspace).set_enabled(id, enabled=True)
    terminal.say(f"enabled {key.id} ({key.name})")


@app.command()
def limit(id: _Id, limits: Annotated[list[str] | None, typer.Argument(metavar="[NAME=N]...")] = None) -> None:
    """Give a key these limits and no others."""
    with terminal.workspace() as workspace:
        key = _store(workspace).set_limits(id, _limits(limits))
    terminal.say(f"{key.id}: {_text(key.limits.to_mapping()) or 'no limits'}")


@app.command()
def tenants(as_json: _Json = False) -> None:
    """Show every tenant."""
    from sihe.serving.tenants.views import tenant_body

    with terminal.workspace() as workspace:
        found = _store(workspace).tenants()
    if as_json:
        terminal.emit([tenant_body(item) for item in found], as_json=True)
        return
    columns = ("tenant", "limits", "priority", "isolated", "disabled")
    rows = [(it.name, _text(it.limits.to_mapping()), it.priority, it.is_isolated, it.is_disabled) for it in found]
    terminal.table(columns, rows)


@app.command()
def tenant(
    name: Annotated[str, typer.Argument(help="The tenant.")],
    limit: _Limit = None,
    priority: Annotated[int, typer.Option(help="Added to that of each request; lower goes first.")] = 0,
    isolated: Annotated[bool, typer.Option(help="Share no cached prefix with other tenants.")] = False,
    disabled: Annotated[bool, typer.Option(help="None of its keys works.")] = False,
) -> None:
    """Record a tenant as these options say it, new or changed."""
    from sihe.serving.tenants.types import Tenant

    with terminal.workspace() as workspace:
        recorded = Tenant(name, _limits(limit), priority, is_isolated=isolated, is_disabled=disabled)
        _store(workspace).put_tenant(recorded)
    terminal.say(f"recorded {name}")


@app.command()
def usage(
    since: Annotated[str | None, typer.Option(metavar="DAY", help="First day (UTC), such as 2026-11-01.")] = None,
    until: Annotated[str | None, typer.Option(metavar="DAY", help="Last day.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    by: Annotated[list[str] | None, typer.Option(help="day, tenant, key or deployment; by default all four.")] = None,
    as_json: _Json = False,
) -> None:
    """Show what was used: requests and tokens."""
    from sihe.serving.tenants.usage import GROUPS, UsageStore

    wanted = tuple(name for name in GROUPS if not by or name in by)
    for name in by or ():
        if name not in GROUPS:
            raise typer.BadParameter(f"--by takes {', '.join(GROUPS)}, got {name!r}")
    with terminal.workspace() as workspace:
        rows = UsageStore(workspace.records).read(since=_day(since), until=_day(until), tenant=tenant, by=wanted)
    hidden = set(GROUPS) - set(wanted)
    shown = [{name: value for name, value in row.to_mapping().items() if name not in hidden} for row in rows]
    terminal.emit(shown, as_json=as_json)


def _store(workspace: Workspace) -> TenantStore:
    from sihe.serving.tenants.store import TenantStore

    return TenantStore(workspace.records, workspace.clock)


def _show_once(made: ApiKey, secret: Secret, *, as_json: bool) -> None:
    from sihe.serving.tenants.views import key_body

    if as_json:
        terminal.emit({**key_body(made), "key": secret.text}, as_json=True)
        return
    terminal.say(secret.text)
    typer.echo(f"key {made.id} of tenant {made.tenant}: keep it now, it is shown this once", err=True)


def _limits(items: list[str] | None) -> Limits:
    from sihe.serving.tenants.types import Limits

    values: dict[str, Any] = {}
    for item in items or ():
        name, equals, number = item.partition("=")
        if not equals or not number.strip().isdigit():
            raise typer.BadParameter(f"a limit is NAME=N with a whole number, got {item!r}")
        values[name.strip()] = int(number)
    return Limits.from_mapping(values)


def _cells(key: ApiKey, now: datetime) -> list[str]:
    state = "disabled" if key.disabled_at else "good" if key.opens_at(now) else "expired"
    used = key.last_used_at.strftime("%Y-%m-%d %H:%M") if key.last_used_at else "never"
    models = "all" if key.deployments is None else " ".join(sorted(key.deployments))
    return [key.id, key.name, key.tenant, " ".join(sorted(key.rights)), models, _text(key.limits.to_mapping()), state,
            used]  # fmt: skip


def _text(limits: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in limits.items())


def _end(now: datetime, days: float | None) -> datetime | None:
    if days is None:
        return None
    if not days <= _MAX_DAYS:  # NaN, which lies in every range for click
        raise typer.BadParameter(f"--days takes 0.001 to {_MAX_DAYS:.0f}, got {days!r}")
    return now + timedelta(days=days)


def _day(text: str | None) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise typer.BadParameter(f"a day is YYYY-MM-DD, got {text!r}") from None
