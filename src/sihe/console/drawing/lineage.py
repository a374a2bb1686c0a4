"""What was made from what, drawn from left (sources) to right (results)."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from urllib.parse import quote

from markupsafe import Markup, escape

_BOX_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 46, 44, 14, 2
_MOST_CHARACTERS = 26
_PIXELS_PER_CHARACTER = 7.4

_Place = tuple[float, float, float]
"""Left, top and width of a box."""


def draw_lineage(
    edges: Sequence[tuple[str, str]],
    key: str,
    kind_name: Callable[[str], str],
    label: str,
    *,
    names: Mapping[str, str] | None = None,
) -> Markup:
    """The graph of `edges` (child, parent) with the node `key` marked.

    `kind_name` translates `run`, `model`, …; `names` are shown instead of a node's own. Nodes are layered by their
    longest path from a source; edges that would close a circle are left out.
    """
    shown = {node: (names or {}).get(node, node.partition(":")[2]) for edge in edges for node in edge}
    shown[key] = (names or {}).get(key, key.partition(":")[2])
    layers = _layers(sorted(shown), edges)
    paths = [_path(parent, child, layers) for child, parent in edges if layers[parent] < layers[child]]
    columns = _columns(layers, paths)
    widths = [
        max(_box_width(shown[node], kind_name(node.partition(":")[0])) for node in column if node in shown)
        for column in columns
    ]
    height = max(len(column) for column in columns) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y
    places: dict[str, _Place] = {}
    left = float(_MARGIN)
    for column, width in zip(columns, widths, strict=True):
        top = _MARGIN + (height - (len(column) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y)) / 2
        for index, node in enumerate(column):
            places[node] = (left, top + index * (_BOX_HEIGHT + _GAP_Y), width)
        left += width + _GAP_X
    width_total = left - _GAP_X + _MARGIN
    drawn = [_line([places[node] for node in path]) for path in paths]
    drawn += [_node(node, shown[node], places[node], kind_name, is_self=node == key) for node in sorted(shown)]
    return Markup(
        f'<svg class="lineage" viewBox="0 0 {width_total:.0f} {height + 2 * _MARGIN}" width="{width_total:.0f}" '
        f'height="{height + 2 * _MARGIN}" role="group" aria-label="{escape(label)}">{"".join(drawn)}</svg>'
    )


def page_of(key: str) -> str | None:
    """Where the console shows the node, if it does."""
    kind, _, name = key.partition(":")
    if kind == "run":
        return f"/runs/{quote(name)}"
    if kind == "model":
        return f"/models#{quote(name.partition('@')[0])}"
    return None


def _layers(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    parents: dict[str, list[str]] = {node: [] for node in nodes}
    for child, parent in edges:
        parents[child].append(parent)
    depth: dict[str, int] = {}

    def visit(node: str, trail: frozenset[str]) -> int:
        if node not in depth:
            above = [visit(parent, trail | {node}) for parent in parents[node] if parent not in trail]
            depth[node] = max(above, default=-1) + 1
        return depth[node]

    for node in nodes:
        visit(node, frozenset({node}))
    return depth


def _path(parent: str, child: str, layers: dict[str, int]) -> list[str]:
    """The nodes of an edge, with an empty place in every layer that it passes, so that no box hides it."""
    between = [f"{parent}>{child}>{layer}" for layer in range(layers[parent] + 1, layers[child])]
    return [parent, *between, child]


def _columns(layers: dict[str, int], paths: Sequence[Sequence[str]]) -> list[list[str]]:
    """The nodes and empty places of each layer, each beside what it comes from."""
    columns: list[list[str]] = [[] for _ in range(max(layers.values()) + 1)]
    for node, layer in layers.items():
        columns[layer].append(node)
    above: dict[str, list[str]] = {}
    for path in paths:
        for offset, (left, right) in enumerate(pairwise(path), start=1):
            above.setdefault(right, []).append(left)
            if right not in layers:
                columns[layers[path[0]] + offset].append(right)
    for before, column in pairwise(columns):
        row = {node: index for index, node in enumerate(before)}
        height = len(before)
        column.sort(key=lambda node: fmean([row.get(parent, height) for parent in above.get(node, [])] or [height]))
    return columns


def _box_width(name: str, kind: str) -> float:
    return 24 + _PIXELS_PER_CHARACTER * max(_cells(_shorten(name)), _cells(kind))


def _cells(text: str) -> int:
    """Width in half-width cells: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _shorten(name: str) -> str:
    return name if len(name) <= _MOST_CHARACTERS else f"{name[: _MOST_CHARACTERS - 7]}…{name[-6:]}"


def _line(places: Sequence[_Place]) -> str:
    drawn = ""
    for (x1, y1, width), (x2, y2, _) in pairwise(places):
        start, end = x1 + width, x2
        y1, y2, middle = y1 + _BOX_HEIGHT / 2, y2 + _BOX_HEIGHT / 2, (start + end) / 2
        # The first part starts at its box, the next ones at the empty places that they cross.
        bend = f"C{middle:.1f} {y1:.1f} {middle:.1f} {y2:.1f} {end:.1f} {y2:.1f}"
        drawn += f"{'L' if drawn else 'M'}{start:.1f} {y1:.1f}{bend}"
    return f'<path d="{drawn}"/>'


def _node(node: str, name: str, place: _Place, kind_name: Callable[[str], str], *, is_self: bool) -> str:
    kind = node.partition(":")[0]
    left, top, width = place
    box = (
        f"<title>{escape(node)}</title>"
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_BOX_HEIGHT}" rx="7"/>'
        f'<text class="kind" x="{left + 12:.1f}" y="{top + 18:.1f}">{escape(kind_name(kind))}</text>'
        f'<text x="{left + 12:.1f}" y="{top + 35:.1f}">{escape(_shorten(name))}</text>'
    )
    page = page_of(node)
    if is_self or page is None:
        return f'<g class="{"self" if is_self else "node"}">{box}</g>'
    return f'<a href="{escape(page)}" class="node">{box}</a>'
