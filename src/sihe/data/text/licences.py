"""Which licence a text is under: its own words first, then the nearest licence file. Never a guess: else "unknown"."""

from __future__ import annotations

import re
from pathlib import Path

UNKNOWN = "unknown"
_HEADER_CHARACTERS = 4096
_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+() -]{1,80})")
_FILE_NAMES = ("LICENSE", "LICENCE", "COPYING")

# Phrases that only the licence itself, or a header that grants it, contains; the first match wins, so a licence whose
# text includes another's (Python's includes several) stands before it. Compared in lower case with single spaces.
_PHRASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("PSF-2.0", ("python software foundation license version 2",)),
    ("PSF-2.0", ("licensed to psf under a contributor agreement",)),
    ("Apache-2.0", ("licensed under the apache license, version 2.0",)),
    ("Apache-2.0", ("apache license", "version 2.0, january 2004")),
    ("MPL-2.0", ("mozilla public license", "2.0")),
    ("AGPL-3.0", ("gnu affero general public license", "version 3")),
    ("LGPL-3.0", ("gnu lesser general public license", "version 3")),
    ("LGPL-2.1", ("gnu lesser general public license", "version 2.1")),
    ("GPL-3.0", ("gnu general public license", "version 3")),
    ("GPL-2.0", ("gnu general public license", "version 2")),
    ("MIT", ("permission is hereby granted, free of charge, to any person obtaining a copy",)),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "neither the name")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
    ("ISC", ("permission to use, copy, modify, and/or distribute this software for any purpose with or without fee",)),
    ("CC0-1.0", ("cc0 1.0 universal",)),
    ("CC-BY-SA-4.0", ("creative commons attribution-sharealike 4.0",)),
    ("CC-BY-4.0", ("creative commons attribution 4.0",)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
)
_TRIGGER = re.compile(r"licen[cs]e|permission|redistribution|creative commons|public domain|cc0", re.IGNORECASE)


def licence_in(text: str) -> str:
    """The SPDX identifier that the beginning of `text` declares, or "unknown"."""
    header = text[:_HEADER_CHARACTERS]
    if not _TRIGGER.search(header):
        return UNKNOWN
    tag = _TAG.search(header)
    if tag:
        return tag.group(1).strip()
    return _phrase(header)


class NearestLicence:
    """The licence file that governs a folder: its own, or that of the closest folder above, up to the `root` given.

    Above the root it looks on only inside one source repository (a folder with `.git` ends the search), because a
    licence further up belongs to something else.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[Path, str] = {}

    def of(self, folder: Path) -> str:
        """The SPDX identifier for files in `folder`, or "unknown"."""
        if folder not in self._known:
            own = _licence_file(folder)
            if own is not None:
                self._known[folder] = own
            elif folder == self._root:
                self._known[folder] = _above(folder)
            else:
                self._known[folder] = self.of(folder.parent)
        return self._known[folder]


def _above(root: Path) -> str:
    chain = [root, *root.parents]
    repository = next((index for index, folder in enumerate(chain) if (folder / ".git").exists()), 0)
    for folder in chain[1 : repository + 1]:
        found = _licence_file(folder)
        if found is not None:
            return found
    return UNKNOWN


def _licence_file(folder: Path) -> str | None:
    for stem in _FILE_NAMES:
        for suffix in ("", ".txt", ".md"):
            path = folder / (stem + suffix)
            try:
                if path.is_file():
                    text = path.read_text(encoding="utf-8", errors="replace")
                    tag = _TAG.search(text[:_HEADER_CHARACTERS])
                    return tag.group(1).strip() if tag else _phrase(text[:65536])
            except OSError:  # unreadable: as good as absent, the text stays of unknown licence
                continue
    return None


def _phrase(text: str) -> str:
    plain = re.sub(r"[\s#*/;-]+", " ", text.lower())
    for licence, phrases in _PHRASES:
        if all(re.sub(r"[\s#*/;-]+", " ", phrase) in plain for phrase in phrases):
            return licence
    return UNKNOWN
