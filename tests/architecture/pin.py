"""Writes the pinned public names anew: `make pin`."""

from __future__ import annotations

import json
from pathlib import Path

import house

if __name__ == "__main__":
    names = house.public_names(house.SOURCE)
    (Path(__file__).parent / "public_names.json").write_text(json.dumps(names, indent=2, sort_keys=True) + "\n")
