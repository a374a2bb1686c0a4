"""`sihe deploy arms|arm|canary|promote|rollback|pause|shadow|shadows|log|logs`: requests dealt out between versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sihe.core import terminal

if TYPE_CHECKING:
    from sihe.serving.gateway.traffic.experiment import ExperimentReport, MetricReport

_SHOWN = 200  # characters of an answer in a table: one of tensors may have thousands
_Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]
_Name = Annotated[str, typer.Argument(help="A deployment.")]
_Target = Annotated[str, typer.Argument(help="model@alias, model@3, or model for its newest version.")]


def arms(name: _Name, as_json: _Json = False) -> None:
    """Show the arms of a deployment: their shares, what they were measured by, and whether they differ."""
    from sihe.core.errors import NotFound
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        gateway = Gateway(workspace)
        policy, rollouts = gateway.traffic.policy(name), gateway.rollouts.history(name)
        note = gateway.status(name).rollout_note
        try:
            report = gateway.traffic.experiment(name)
        except NotFound:
            report = None
    if as_json:
        found = {"policy": policy.to_mapping(), "experiment": report, "rollouts": rollouts[:1], "note": note}
        terminal.emit(found, as_json=True)
        return
    if report is None:
        terminal.table(("arm", "weight"), [[arm, f"{weight:.1%}"] for arm, weight in policy.weights.items()])
    else:
        _show(report)
    if policy.shadow is not None:
        terminal.say(f"shadow {policy.shadow.target} gets copies of {policy.shadow.share:.0%}")
    if rollouts:
        latest = rollouts[0]
        where = f"step {latest.step + 1} of {len(latest.plan.steps)}, {latest.weight:.0%}" if latest.is_active else ""
        parts = (f"rollout of {latest.model}@{latest.version}: {latest.state.value}", where, latest.reason, note)
        terminal.say("; ".join(part for part in parts if part))


def arm(
    name: _Name,
    arm: Annotated[str, typer.Argument(help="The arm's name.")],
    target: Annotated[str, typer.Argument(help="What it shall answer with, as in create; left out to remove it.")] = "",
    weight: Annotated[float, typer.Option(help="Its share of requests; the rest is the stable arm's.")] = 0.5,
) -> None:
    """Give an arm a version and its share of requests, or take it away."""
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        traffic = Gateway(workspace).traffic
        policy = traffic.set_arm(name, arm, target, weight) if target else traffic.remove_arm(name, arm)
    terminal.say("  ".join(f"{arm} {weight:.1%}" for arm, weight in policy.weights.items()))


def canary(
    name: _Name,
    target: _Target,
    steps: Annotated[str, typer.Option(help="Shares of requests in per cent, growing.")] = "5,25,50",
    min_requests: Annotated[int, typer.Option(help="Requests that each step must see.")] = 50,
    min_seconds: Annotated[float, typer.Option(help="Time that each step must last.")] = 60.0,
    max_error_rate: Annotated[float, typer.Option(help="Share of its requests that may fail.")] = 0.02,
    max_slowdown: Annotated[float, typer.Option(help="95th percentiles, as a multiple of the stable ones.")] = 1.5,
    metric: Annotated[str | None, typer.Option(help="A metric of feedback that must not fall.")] = None,
    max_drop: Annotated[float, typer.Option(help="How far it may.")] = 0.0,
    as_json: _Json = False,
) -> None:
    """Bring a version in, step by step; it goes back by itself when it is worse."""
    from sihe.core.errors import InvalidInput
    from sihe.serving.gateway.gateway import Gateway
    from sihe.serving.gateway.traffic.rollout import Gates, Plan, Step

    try:
        weights = [float(part) / 100 for part in steps.split(",")]
    except ValueError as error:
        raise InvalidInput(f"--steps takes numbers with commas between them, got {steps!r}") from error
    plan = Plan(
        steps=tuple(Step(weight, min_requests, min_seconds) for weight in weights),
        gates=Gates(max_error_rate, max_slowdown, max_slowdown, metric, max_drop),
    )
    with terminal.workspace() as workspace:
        rollout = Gateway(workspace).rollouts.start(name, target, plan)
    if as_json:
        terminal.emit(rollout, as_json=True)
    else:
        terminal.say(
            f"{rollout.model}@{rollout.version} gets {rollout.weight:.1%}; watch it with  sihe deploy arms {name}"
        )


def promote(name: _Name) -> None:
    """Make the canary the stable version now."""
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        done = Gateway(workspace).rollouts.promote(name)
    terminal.say(f"{name} answers with {done.model}@{done.version}")


def rollback(name: _Name) -> None:
    """Take the canary away; the stable version was never touched."""
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        Gateway(workspace).rollouts.roll_back(name)
    terminal.say(f"{name} is rolled back")


def pause(name: _Name, resume: Annotated[bool, typer.Option("--resume", help="Go on instead.")] = False) -> None:
    """Let the canary stay at its step, whatever is seen; with --resume let it go on."""
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        found = Gateway(workspace).rollouts.pause(name, paused=not resume)
    terminal.say(f"the rollout of {name} is {found.state.value}")


def shadow(
    name: _Name,
    target: Annotated[str, typer.Argument(help="What gets the copies; left out to end them.")] = "",
    share: Annotated[float, typer.Option(help="Share of requests that are copied.")] = 1.0,
    always: Annotated[
        bool, typer.Option("--always", help="Also while callers wait, where it has processors of its own.")
    ] = False,
) -> None:
    """Send copies of requests to a version whose answers nobody gets."""
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        Gateway(workspace).traffic.set_shadow(name, target or None, share=share, only_idle=not always)
    terminal.say(f"{target} gets copies of {share:.0%}" if target else f"{name} has no shadow")


def shadows(name: _Name, as_json: _Json = False) -> None:
    """Show what copies to the shadow have shown: what has become of them, and how alike the answers are."""
    from sihe.core.errors import NotFound
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        traffic = Gateway(workspace).traffic
        policy, report = traffic.policy(name), traffic.shadow(name)
    wanted = policy.shadow
    if wanted is None:
        raise NotFound("shadow of", name, hint=f"set one with  sihe deploy shadow {name} TARGET")
    if as_json:
        terminal.emit({"shadow": policy.to_mapping()["shadow"], "report": report}, as_json=True)
        return
    terminal.say(f"shadow {wanted.target} gets copies of {wanted.share:.0%}")
    if report is None:
        terminal.say("nothing is known of its copies: no serving process has reported of them yet")
        return
    fates = ("copies", "compared", "same", "failed", "yielded", "dropped")
    row: list[Any] = [getattr(report, fate) for fate in fates]
    row += [
        "–" if report.mean_agreement is None else f"{report.mean_agreement:.4f} ({report.measure})",
        _ms(report.mean_latency_s),
        "–" if report.mean_latency_ratio is None else f"{report.mean_latency_ratio:.2f} x",
    ]
    terminal.table((*fates, "agreement", "latency", "beside the caller's"), [row])


def log(
    name: _Name,
    share: Annotated[float, typer.Argument(help="Share of requests to log; 0 ends it.")],
    text: Annotated[
        bool, typer.Option("--text", help="Keep what was asked and answered, instead of lengths and hashes.")
    ] = False,
    keep_days: Annotated[
        int | None, typer.Option(help="Days until records are removed; as before if left out, at first 30.")
    ] = None,
) -> None:
    """Log a share of requests to the lake, for evaluation."""
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        policy = Gateway(workspace).traffic.set_logs(name, share, text=text, keep_days=keep_days)
    terminal.say(
        f"{share:.1%} of the requests to {name} are logged, {'with' if text else 'without'} their text; "
        f"records are kept for {policy.logs.keep_days} days"
    )


def logs(
    name: _Name,
    arm: Annotated[str | None, typer.Option(help="Only of this arm.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, newest first.")] = 20,
    as_json: _Json = False,
) -> None:
    """Show logged requests."""
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        found = Gateway(workspace).traffic.logs(name, arm=arm, limit=limit)
    if as_json:
        terminal.emit(found, as_json=True)
        return
    rows = [
        [
            f"{row.time:%Y-%m-%d %H:%M:%S}",
            row.request_id,
            row.arm,
            row.version,
            f"{row.prompt_tokens}+{row.completion_tokens}",
            f"{row.latency_s * 1000:.0f} ms",
            row.finish_reason or row.ending,
            row.error or (row.answer or "")[:_SHOWN],
        ]
        for row in found
    ]
    terminal.table(("time", "request", "arm", "version", "tokens", "latency", "end", "answer or error"), rows)


def _show(report: ExperimentReport) -> None:
    from sihe.serving.gateway.traffic.arm_stats import BUILT_IN

    rows: list[list[Any]] = []
    for one in report.arms:
        by_name = {metric.metric: metric for metric in one.metrics}
        feedback = [metric for name, metric in by_name.items() if name not in BUILT_IN]
        rows.append(
            [
                one.arm,
                one.version,
                f"{one.weight:.1%}",
                one.requests,
                f"{one.errors} {_mark(by_name.get('error'))}".strip(),
                f"{_ms(one.latency_p95_s)} {_mark(by_name.get('latency_s'))}".strip(),
                f"{_ms(one.ttft_p95_s)} {_mark(by_name.get('ttft_s'))}".strip(),
                ", ".join(f"{metric.metric} {metric.mean:.3g} {_mark(metric)}".strip() for metric in feedback),
            ]
        )
    terminal.table(("arm", "version", "share", "requests", "errors", "p95", "p95 TTFT", "feedback"), rows)
    if report.mismatched:
        terminal.say(
            "the split is not what was asked for: requests of an arm get lost, and no difference is to be believed"
        )


def _mark(metric: MetricReport | None) -> str:
    if metric is None or metric.verdict not in ("better", "worse", "differs"):
        return ""
    return f"({metric.verdict}, p {metric.p_always:.1g})"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.0f} ms"
