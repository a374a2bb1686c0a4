"""The web door: one FastAPI application that mounts every room's routes and shows the house in pages."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"create_app": "sihe.console.app", "serve": "sihe.console.server"},
)
