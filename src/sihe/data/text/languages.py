"""What a file is written in: the programming language by its suffix, the natural language by its script."""

from __future__ import annotations

import re

from sihe.data.text.types import Kind

_CODE = {
    "bash": (".sh", ".bash"),
    "c": (".c", ".h"),
    "cpp": (".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh"),
    "csharp": (".cs",),
    "css": (".css",),
    "go": (".go",),
    "haskell": (".hs",),
    "java": (".java",),
    "javascript": (".js", ".mjs", ".jsx"),
    "julia": (".jl",),
    "kotlin": (".kt",),
    "lua": (".lua",),
    "make": (".mk",),
    "perl": (".pl", ".pm"),
    "php": (".php",),
    "proto": (".proto",),
    "python": (".py", ".pyi", ".pyx"),
    "r": (".r",),
    "ruby": (".rb",),
    "rust": (".rs",),
    "scala": (".scala",),
    "sql": (".sql",),
    "swift": (".swift",),
    "toml": (".toml",),
    "typescript": (".ts", ".tsx"),
    "yaml": (".yaml", ".yml"),
}
_LANGUAGE_OF = {suffix: language for language, suffixes in _CODE.items() for suffix in suffixes}
_LANGUAGE_OF_NAME = {"makefile": "make", "dockerfile": "docker"}
_PROSE = {".md", ".markdown", ".rst", ".txt", ".text", ".tex", ".org", ".adoc"}
_PROSE_NAMES = {"readme", "license", "licence", "copying", "authors", "changelog", "news", "contributing"}

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")
_KANA_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
_LATIN = re.compile(r"[A-Za-z]")
_LETTER = re.compile(r"[^\W\d_]")
_SAMPLE_CHARACTERS = 20_000
_CHINESE_SHARE = 0.2  # of the letters: technical Chinese is full of Latin names, English text has no Han at all
_LATIN_SHARE = 0.8


def classify(file_name: str) -> tuple[Kind, str | None] | None:
    """("code", language), ("prose", None: its script decides), or None for what is not text to learn from."""
    name = file_name.lower()
    stem, dot, suffix = name.rpartition(".")
    if dot and stem:
        if dot + suffix in _LANGUAGE_OF:
            return "code", _LANGUAGE_OF[dot + suffix]
        return ("prose", None) if dot + suffix in _PROSE else None
    if name in _LANGUAGE_OF_NAME:
        return "code", _LANGUAGE_OF_NAME[name]
    return ("prose", None) if name in _PROSE_NAMES else None


def natural_language(text: str) -> str:
    """ "zh", "en" or "other", by the share of each script among the letters of a sample.

    Script alone tells neither English from French nor Chinese from kanji without kana; a later stage may.
    """
    sample = text[:_SAMPLE_CHARACTERS]
    letters = len(_LETTER.findall(sample))
    if not letters:
        return "other"
    han, latin = len(_HAN.findall(sample)), len(_LATIN.findall(sample))
    if han >= _CHINESE_SHARE * letters and len(_KANA_HANGUL.findall(sample)) < 0.1 * han:
        return "zh"
    return "en" if latin >= _LATIN_SHARE * letters else "other"
