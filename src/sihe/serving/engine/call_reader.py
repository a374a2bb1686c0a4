"""Reads one call of a tool, a JSON object with a name and arguments, from text that comes in pieces."""

from __future__ import annotations

import json

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


class CallReader:
    """Feed it text that begins with `{`; `name` and `take()` have what is known, long before the object ends.

    With a `name` given the object is the arguments themselves. `is_done` at the closing brace; `is_broken` where the
    text is no such object. O(1) a character.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.is_done = False
        self.is_broken = False
        self.is_told = False  # for whoever reads the calls: whether this one's beginning was handed on
        self._is_bare = name is not None
        self._out: list[str] = []
        self._key = ""
        self._value: list[str] = []
        self._step = self._start
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._has_arguments = False

    def take(self) -> str:
        """The arguments' text that came since the last call of this."""
        out, self._out = "".join(self._out), []
        return out

    def push(self, text: str) -> int:
        """Reads on; how many characters of `text` belong to the object."""
        for at, character in enumerate(text):
            if self.is_done or self.is_broken:
                return at
            self._step(character)
        return len(text)

    # ---- steps: what the next character may be -----------------------------------------------------------------------

    def _start(self, character: str) -> None:
        if self._is_bare:
            self._key = _ARGUMENTS[0]
            self._begin_value(character)
        elif character == "{":
            self._step = self._before_key
        else:
            self.is_broken = True

    def _before_key(self, character: str) -> None:
        if character == '"':
            self._value = [character]
            self._step = self._in_key
        elif character == "}":
            self._end()
        elif character not in _SPACE and character != ",":
            self.is_broken = True

    def _in_key(self, character: str) -> None:
        self._value.append(character)
        if self._string_ends(character):
            self._key = _text(self._value)
            self._step = self._before_value

    def _before_value(self, character: str) -> None:
        if character in _SPACE or character == ":":
            return
        self._begin_value(character)

    def _begin_value(self, character: str) -> None:
        self._value = []
        self._depth = 0
        self._in_string = False
        is_text = character == '"'
        self._step = self._in_text if is_text else self._in_scalar if character not in "{[" else self._in_nested
        if is_text:
            self._value.append(character)
        else:
            self._step(character)

    def _in_text(self, character: str) -> None:
        self._value.append(character)
        if self._string_ends(character):
            text = _text(self._value)
            if self._key == "name":
                self.name = text
            elif self._key in _ARGUMENTS:
                self._add_arguments(text)  # some models write the arguments as text that holds JSON
            self._step = self._before_key

    def _in_nested(self, character: str) -> None:
        if self._key in _ARGUMENTS:
            self._add_arguments(character)
        if self._in_string:
            self._in_string = not self._string_ends(character)
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._step = self._before_key
                self.is_done = self._is_bare

    def _in_scalar(self, character: str) -> None:
        if character not in ",}" and character not in _SPACE:
            self._value.append(character)
            return
        if self._key in _ARGUMENTS and "".join(self._value) != "null":
            self._add_arguments("".join(self._value))
        self._step = self._before_key
        self._before_key(character)

    def _string_ends(self, character: str) -> bool:
        if self._escaped:
            self._escaped = False
            return False
        self._escaped = character == "\\"
        return character == '"'

    def _add_arguments(self, text: str) -> None:
        self._has_arguments = True
        self._out.append(text)

    def _end(self) -> None:
        if self.name is None:
            self.is_broken = True
            return
        if not self._has_arguments:
            self._out.append("{}")
        self.is_done = True


def _text(pieces: list[str]) -> str:
    try:
        return str(json.loads("".join(pieces), strict=False))
    except ValueError:  # an escape that JSON does not have
        return "".join(pieces)[1:-1]
