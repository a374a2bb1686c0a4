"""What was made from what, drawn from left (sources) to right (results)."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from urllib.parse import quote

from markupsafe import Markup, escape

_BOX_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 46, 44, 14, 2
_MOST_CHARACTERS = 26
_PIXELS_PER_CHARACTER = 7.4


def draw_lineage(edges: Sequence[tuple[str, str]], key: str, kind_name: Callable[[str], str], label: str) -> Markup:
    """The graph of `edges` (child, parent) with the node `key` marked. `kind_name` translates `run`, `model`, ….

    Nodes are layered by their longest path from a source; edges that would close a circle are left out.
    """
    nodes = sorted({node for edge in edges for node in edge} | {key})
    layers = _layers(nodes, edges)
    columns: list[list[str]] = [[] for _ in range(max(layers.values()) + 1)]
    for node in nodes:
        columns[layers[node]].append(node)
    widths = [max(_box_width(node, kind_name) for node in column) for column in columns]
    height = max(len(column) for column in columns) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y
    places: dict[str, tuple[float, float, float]] = {}
    left = float(_MARGIN)
    for column, width in zip(columns, widths, strict=True):
        top = _MARGIN + (height - (len(column) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y)) / 2
        for index, node in enumerate(column):
            places[node] = (left, top + index * (_BOX_HEIGHT + _GAP_Y), width)
        left += width + _GAP_X
    width_total = left - _GAP_X + _MARGIN
    drawn = [_edge(places[parent], places[child]) for child, parent in edges if layers[parent] < layers[child]]
    drawn += [_node(node, places[node], kind_name, is_self=node == key) for node in nodes]
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


def _box_width(node: str, kind_name: Callable[[str], str]) -> float:
    kind, _, name = node.partition(":")
    return 24 + _PIXELS_PER_CHARACTER * max(_cells(_shorten(name)), _cells(kind_name(kind)))


def _cells(text: str) -> int:
    """Width in half-width cells: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _shorten(name: str) -> str:
    return name if len(name) <= _MOST_CHARACTERS else f"{name[: _MOST_CHARACTERS - 7]}…{name[-6:]}"


def _edge(parent: tuple[float, float, float], child: tuple[float, float, float]) -> str:
    x1, y1 = parent[0] + parent[2], parent[1] + _BOX_HEIGHT / 2
    x2, y2 = child[0], child[1] + _BOX_HEIGHT / 2
    middle = (x1 + x2) / 2
    return f'<path d="M{x1:.1f} {y1:.1f}C{middle:.1f} {y1:.1f} {middle:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"/>'


def _node(node: str, place: tuple[float, float, float], kind_name: Callable[[str], str], *, is_self: bool) -> str:
    kind, _, name = node.partition(":")
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
