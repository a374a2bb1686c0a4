"""Small drawings as SVG text, coloured by the page's own style sheet."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__, {"draw_lineage": "sihe.console.drawing.lineage", "draw_sparkline": "sihe.console.drawing.sparkline"}
)
