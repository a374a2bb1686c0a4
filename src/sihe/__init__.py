"""Sihe (四合): train, serve, retrieve and explain AI infrastructure, out of one folder.

Each room is a package of its own (`sihe.training`, `sihe.serving`, `sihe.data`, `sihe.vectors` …); importing this
one loads none of them.
"""

from sihe.version import __version__

__all__ = ["__version__"]
