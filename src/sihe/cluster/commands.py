"""`sihe plan`: memory and time of a training step, predicted; the best layout, searched; axes laid out on links."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from sihe.core import terminal

if TYPE_CHECKING:
    from sihe.cluster.planner.search import Found
    from sihe.cluster.planner.step import StepEstimate
    from sihe.cluster.planner.types import ClusterSpec, Layout, Precision, TransformerShape

app = typer.Typer(
    help="Predict memory and time of training; search the best plan.",
    invoke_without_command=True,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Model = Annotated[str, typer.Option(help="A network, as  sihe plan presets  lists them.")]
Cluster = Annotated[str, typer.Option(help="A kind of cluster, as  sihe plan presets  lists them.")]
Devices = Annotated[int, typer.Option(min=1, help="How many devices of it.")]
Batch = Annotated[int, typer.Option("--global-batch", min=1, help="Samples of one step, over all devices.")]
Sequence = Annotated[int | None, typer.Option(min=1, help="Tokens of a sample, if not the network's own.")]
PrecisionName = Annotated[str, typer.Option("--precision", help="fp32, bf16 or fp16.")]
LayoutText = Annotated[str | None, typer.Option("--layout", help="Predict this one: tp=8,pp=4,microbatches=16,…")]
Measure = Annotated[bool, typer.Option("--measure", help="Measure this machine, and plan for its cores.")]


@app.callback()
def plan(
    context: typer.Context,
    model: Model = "llama-7b",
    cluster: Cluster = "a100-80g",
    devices: Devices = 8,
    global_batch: Batch = 64,
    sequence: Sequence = None,
    precision: PrecisionName = "bf16",
    layout: LayoutText = None,
    measure: Measure = False,
    runners_up: Annotated[int, typer.Option(min=0, help="How many of the layouts that lost to show.")] = 5,
    as_json: AsJson = False,
) -> None:
    """The fastest layout that fits into memory, and why others lost; with --layout, what that one takes."""
    if context.invoked_subcommand is not None:
        return
    from sihe.cluster.planner.search import search_layouts
    from sihe.cluster.planner.step import estimate_step

    shape, spec = _subjects(model, cluster, devices, sequence, measure=measure)
    if layout is not None:
        estimate = estimate_step(shape, _layout(layout, precision, shape, spec), spec)
        if as_json:
            terminal.emit(_described(estimate), as_json=True)
        else:
            _show_estimate(shape, spec, estimate)
        return
    found = search_layouts(
        shape, spec, global_batch=global_batch, precision=_precision(precision), runners_up=runners_up
    )
    if as_json:
        terminal.emit(_found_as_value(found), as_json=True)
    else:
        _show_estimate(shape, spec, found.best)
        _show_runners_up(found)


@app.command("topology")
def topology(
    model: Model = "llama-7b",
    cluster: Cluster = "a100-80g",
    devices: Devices = 16,
    global_batch: Batch = 64,
    layout: LayoutText = None,
    precision: PrecisionName = "bf16",
    size_mb: Annotated[float, typer.Option("--size-mb", min=0.001, help="Of the all-reduce over all devices.")] = 100.0,
    as_json: AsJson = False,
) -> None:
    """Which axis belongs on which links, and how long an all-reduce takes by each algorithm."""
    from sihe.cluster.planner.search import search_layouts
    from sihe.cluster.planner.step import estimate_step
    from sihe.cluster.planner.topology import Topology, all_reduces, demands, placements

    shape, spec = _subjects(model, cluster, devices, None, measure=False)
    if layout is None:
        estimate = search_layouts(shape, spec, global_batch=global_batch, precision=_precision(precision)).best
    else:
        estimate = estimate_step(shape, _layout(layout, precision, shape, spec), spec)
    links = Topology.of(spec)
    placed = placements(demands(estimate.layout, estimate.traffic), links)
    sums = all_reduces(links, size_mb * 1e6)
    if as_json:
        value = {
            "layout": str(estimate.layout),
            "placements": [asdict(placement) | {"total_s": placement.total_s} for placement in placed],
            "all_reduce": {name: asdict(cost) for name, cost in sums.items()},
        }
        terminal.emit(value, as_json=True)
        return
    terminal.say(f"{estimate.layout} on {spec.devices} x {spec.name}: orders of the axes, the outermost first")
    rows = [
        [
            " > ".join(placement.order) or "one device",
            *(f"{placement.levels[axis]}, {_duration(placement.seconds[axis])}" for axis in sorted(placement.order)),
            _duration(placement.total_s),
        ]
        for placement in placed[:8]
    ]
    terminal.table(["order", *sorted(placed[0].order), "in the open"], rows)
    terminal.say(f"\nall-reduce of {size_mb:g} MB over {spec.devices} devices, modelled")
    costs = [[name, _duration(cost.seconds), cost.rounds, _bytes(cost.sent_bytes)] for name, cost in sums.items()]
    terminal.table(["algorithm", "time", "rounds", "most sent by a device"], costs)


@app.command("presets")
def presets(as_json: AsJson = False) -> None:
    """The networks and clusters that have names."""
    from sihe.cluster.planner.presets import CLUSTERS, MODELS

    models: list[dict[str, Any]] = [
        {"model": name, "parameters": shape.parameters, "layers": shape.layers, "hidden": shape.hidden}
        | {"heads": shape.heads, "kv_heads": shape.kv_heads, "sequence": shape.sequence, "family": shape.family}
        for name, shape in MODELS.items()
    ]
    clusters = [{"cluster": name, "node": asdict(made(1))} for name, made in CLUSTERS.items()]
    if as_json:
        terminal.emit({"models": models, "clusters": clusters}, as_json=True)
        return
    terminal.emit([model | {"parameters": f"{model['parameters'] / 1e9:.4g} B"} for model in models], as_json=False)
    terminal.say("")
    columns = ["cluster", "memory", "bf16 peak", "in a node", "between nodes"]
    rows = []
    for name, made in CLUSTERS.items():
        node = made(1)
        links = [f"{link.bandwidth / 1e9:.0f} GB/s" for link in (node.inside, node.between)]
        rows.append([name, _bytes(node.memory_bytes), f"{node.peak_flops['bf16'] / 1e12:.0f} TFLOP/s", *links])
    terminal.table(columns, rows)


# ---- input ----------------------------------------------------------------------------------------------------------


def _subjects(
    model: str, cluster: str, devices: int, sequence: int | None, *, measure: bool
) -> tuple[TransformerShape, ClusterSpec]:
    from sihe.cluster.planner import presets

    shape = presets.model(model)
    shape = shape if sequence is None else replace(shape, sequence=sequence)
    if not measure:
        return shape, presets.cluster(cluster, devices)
    from sihe.cluster.planner.measurement import measure_machine

    return shape, measure_machine()


def _precision(text: str) -> Precision:
    from sihe.cluster.planner.types import Layout

    return Layout(precision=text).precision  # type: ignore[arg-type]  # checked there


def _layout(text: str, precision: str, shape: TransformerShape, cluster: ClusterSpec) -> Layout:
    """The layout behind `tp=8,pp=4`. Raises `ConfigError` that names the key."""
    from sihe.cluster.planner.search import check
    from sihe.cluster.planner.types import Layout
    from sihe.core.errors import ConfigError

    known = {item.name: get_type_hints(Layout)[item.name] for item in fields(Layout)}
    values: dict[str, Any] = {"precision": precision}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.partition("=")
        if key not in known or not value:
            raise ConfigError(f"a layout is written as key=value with {', '.join(known)}, got {part!r}", key=key)
        values[key] = int(value) if value.isdigit() else value == "true" if value in ("true", "false") else value
    try:
        layout = Layout(**values)
    except TypeError as error:
        raise ConfigError(f"the layout {text!r} has a word where a number belongs: {error}", key="layout") from error
    check(shape, layout, cluster)
    return layout


# ---- output ---------------------------------------------------------------------------------------------------------


def _described(estimate: StepEstimate) -> dict[str, Any]:
    return {
        "layout": asdict(estimate.layout),
        "seconds": estimate.seconds,
        "parts": estimate.parts(),
        "mfu": estimate.mfu,
        "tokens_per_s": estimate.tokens_per_s,
        "memory_bytes": asdict(estimate.memory) | {"total": estimate.memory.total},
        "traffic": [asdict(axis) for axis in estimate.traffic],
    }


def _found_as_value(found: Found) -> dict[str, Any]:
    return {
        "best": _described(found.best),
        "runners_up": [_described(lost.estimate) | {"reason": lost.reason} for lost in found.runners_up],
        "considered": found.considered,
        "too_large": found.too_large,
    }


def _show_estimate(shape: TransformerShape, cluster: ClusterSpec, estimate: StepEstimate) -> None:
    layout = estimate.layout
    terminal.say(
        f"{shape.name} ({shape.parameters / 1e9:.4g} B) on {layout.world_size} x {cluster.name}, "
        f"{layout.global_batch} samples of {shape.sequence} tokens, {layout.precision}"
    )
    terminal.say(f"{layout}\n")
    facts = {
        "step": _duration(estimate.seconds),
        "tokens/s": f"{estimate.tokens_per_s:,.0f}",
        "MFU": f"{estimate.mfu:.1%}",
        "memory": f"{_bytes(estimate.memory.total)} of {_bytes(cluster.memory_bytes)} a device",
    }
    for name, value in facts.items():
        terminal.say(f"{name:<10}{value}")
    terminal.say("")
    _show_shares("time", estimate.parts(), _duration)
    terminal.say("")
    _show_shares("memory", asdict(estimate.memory), _bytes)
    if estimate.traffic:
        terminal.say("")
        rows = [
            [axis.axis, axis.collective, _bytes(axis.sent_bytes), _duration(axis.seconds), _duration(axis.exposed_s)]
            for axis in estimate.traffic
        ]
        terminal.table(["axis", "collective", "sent by a device", "time", "in the open"], rows)


def _show_shares(title: str, parts: Mapping[str, float], written: Callable[[float], str]) -> None:
    whole = sum(parts.values())
    rows = [
        [name, written(part), f"{part / whole:.1%}", "█" * round(part / whole * 30)] for name, part in parts.items()
    ]
    terminal.table([title, "", "share", ""], rows)


def _show_runners_up(found: Found) -> None:
    rows = []
    for lost in found.runners_up:
        estimate = lost.estimate
        rows.append([str(estimate.layout), _duration(estimate.seconds), _bytes(estimate.memory.total), lost.reason])
    if rows:
        terminal.say("")
        terminal.table(["lost", "step", "memory", "why"], rows)
    terminal.say(f"\n{found.considered} layouts considered, {found.too_large} of them too large")


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return "0" if seconds == 0 else f"{seconds / 1e-6:.2g} µs"


def _bytes(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.4g} B"
