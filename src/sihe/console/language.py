"""The two languages of the pages: which one a request gets, and what each sentence is in it.

The sentences live in `i18n/en.yaml` and `i18n/zh.yaml` under the same dotted keys; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal, TypeGuard, get_args

import yaml

from sihe.core.errors import InternalError

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
TAGS: Mapping[Language, str] = {"en": "en", "zh": "zh-CN"}  # what `<html lang>` says: browsers choose glyphs by it


def is_language(value: str | None) -> TypeGuard[Language]:
    """Whether `value` is one of the two."""
    return value in LANGUAGES


def choose(*, query: str | None, cookie: str | None, accept: str | None, default: Language) -> Language:
    """The language of a request: asked for, chosen before, preferred by the browser, or the setting."""
    if is_language(query):
        return query
    if is_language(cookie):
        return cookie
    return _accepted(accept or "") or default


def translate(language: Language, key: str, /, **values: object) -> str:
    """The sentence `key` with its `{placeholders}` filled. Raises `InternalError` for an unknown key."""
    try:
        sentence = catalogue(language)[key]
    except KeyError as error:
        raise InternalError(f"the {language} catalogue has no sentence {key!r}") from error
    return sentence.format(**values) if values else sentence


@cache
def catalogue(language: Language) -> Mapping[str, str]:
    """Every sentence of a language under its dotted key."""
    text = (Path(__file__).parent / "i18n" / f"{language}.yaml").read_text(encoding="utf-8")
    # BaseLoader: everything is text. Otherwise YAML would take Off, yes and no for truth values.
    return dict(_flat(yaml.load(text, Loader=yaml.BaseLoader)))


def _flat(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return pairs


def _accepted(header: str) -> Language | None:
    """The known language with the highest weight in an Accept-Language header (RFC 9110, section 12.5.4)."""
    best: tuple[float, Language | None] = (0.0, None)
    for item in header.split(","):
        tag, _, parameter = item.strip().partition(";")
        primary = tag.split("-")[0].lower()
        try:
            weight = float(parameter.strip().removeprefix("q=")) if parameter else 1.0
        except ValueError:
            continue
        if is_language(primary) and weight > best[0]:
            best = (weight, primary)
    return best[1]
