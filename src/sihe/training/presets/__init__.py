"""Configurations that ship with the house."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "load_config": "sihe.training.presets.reader",
        "parse_override": "sihe.training.presets.reader",
        "preset_names": "sihe.training.presets.reader",
    },
)
