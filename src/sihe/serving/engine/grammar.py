"""Answers that obey a schema, an expression or a grammar: which tokens may come next, by `llguidance`.

A constraint is compiled on the caller's thread, one at a time and within stated sizes, and kept for the next request
with the same one; a sequence gets a copy (some microseconds). What a hostile text could cost is bounded three times: by
its length here, by the library's limits on what it builds (`_LIMITS`), and by those on one step. A text that passes and
turns out too complex later fails its own request.

Refuses to guess: a keyword of JSON Schema that the library does not implement is an error, not ignored.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sihe.core.errors import InvalidInput
from sihe.serving.engine.types import Constraint
from sihe.serving.errors import BadConstraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# Measured with llguidance 1.9.1: 64 KiB of properties compile in under 2 s, time grows with the square; 5,000
# terminals of a Lark grammar in 0.1 s, 100,000 in 45 s.
MAX_SOURCE = {
    "json_object": 1 << 10,
    "json_schema": 64 << 10,
    "regex": 16 << 10,
    "choice": 64 << 10,
    "grammar": 32 << 10,
    "tools": 128 << 10,
}
MAX_CHOICES = 1024
_CACHED = 64  # compiled constraints that are kept for each tokenizer
_MESSAGE = 300  # characters of the library's message that a client sees
# A state costs 1 to 2 kB (llguidance's documentation of LLParserLimits): at most about 40 MB a constraint.
_MAX_LEXER_STATES = 20_000
# What one token's mask may cost: some 7 ms at the most (measured on expressions made to explode), once, as the request
# fails with it. Usual masks take 10 to 100 µs.
_STEP_FUEL = 60_000
_STEP_ITEMS = 20_000
# Between the parts of a document: without a bound a model that has lost its way writes white space for ever.
_SPACED: JsonCompileOptions = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}"}


class GrammarCompiler:
    """Compiles constraints for one tokenizer, whose model has `vocab_size` logits. Safe across threads.

    The library's own form of the tokenizer is made when the first constraint comes: it takes about a second for 32,000
    tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = _ends(tokenizer, stop_ids)
        self._compiling = threading.Lock()  # one at a time: the others would take the model's cores
        self._made: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def start(self, constraint: Constraint) -> Grammar:
        """The state of an answer that has not begun. Raises `BadConstraint` where no answer could obey."""
        check_source(constraint)
        with self._compiling:
            matcher = self._compiled.get(constraint)
            if matcher is None:
                matcher = self._compile(constraint)
            self._compiled[constraint] = matcher
            self._compiled.move_to_end(constraint)
            while len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
            return Grammar(constraint, matcher.deep_copy(), self._vocab_size, ends=self._ends)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher

        try:
            source = _grammar(constraint)
            matcher = LLMatcher(self._library_tokenizer(), source, log_level=0, limits=_limits())
        except ValueError as error:
            raise BadConstraint(constraint.kind, _short(str(error))) from error
        # The first mask builds most of what later ones need, and shows what can never be obeyed.
        Grammar(constraint, matcher, self._vocab_size, ends=self._ends).mask()
        return matcher

    def _library_tokenizer(self) -> LLTokenizer:
        if self._made is None:
            from llguidance import LLTokenizer

            try:
                self._made = LLTokenizer(
                    self._tokenizer.to_str(),
                    n_vocab=max(self._vocab_size, self._tokenizer.get_vocab_size()),
                    eos_token=sorted(self._ends),
                )
            except ValueError as error:
                raise InvalidInput(f"this model's tokenizer cannot be constrained: {_short(str(error))}") from error
        return self._made


class Grammar:
    """Where an answer stands in what it must obey. Used by one thread.

    `mask` says what may come, `accept` takes what came; `rollback` takes tokens back. `is_complete` means that nothing
    can follow, so that the answer ends. `ends` are the tokens that end it where more could follow; they are no text.
    """

    def __init__(self, constraint: Constraint, matcher: LLMatcher, vocab_size: int, *, ends: frozenset[int]) -> None:
        self.ends = ends
        self._constraint = constraint
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    @property
    def is_complete(self) -> bool:
        """Whether the answer obeys and nothing more may come."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def is_satisfied(self) -> bool:
        """Whether the answer obeys if it ends here."""
        return self._matcher.is_accepting()

    def mask(self) -> NDArray[np.int32]:
        """One bit a token, set where it may come next. Raises `BadConstraint` where that became too complex."""
        words = np.zeros(self._words, dtype=np.int32)
        bits = self._matcher.compute_bitmask()
        self._check()
        found = np.frombuffer(bits, dtype=np.int32)[: self._words]
        words[: len(found)] = found
        return words

    def masks(self, drafted: Sequence[int]) -> list[NDArray[np.int32]]:
        """The masks before each of the `drafted` tokens and after the last, as if they came; nothing is accepted.

        After a token that may not come there is nothing to say: the rest repeats the mask that forbids it.
        """
        found = [self.mask()]
        taken = 0
        for token in drafted:
            if taken == len(found) - 1 and not self._matcher.is_stopped() and self._allows(found[-1], token):
                self._matcher.consume_token(token)
                taken += 1
            found.append(self.mask() if taken == len(found) else found[-1])
        if taken:
            self.rollback(taken)
        return found

    def accept(self, token: int) -> None:
        """The answer goes on with `token`. Raises `BadConstraint` when the constraint became too complex."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def rollback(self, count: int) -> None:
        """Takes back the last `count` accepted tokens."""
        self._matcher.rollback(count)
        self._check()

    def _allows(self, mask: NDArray[np.int32], token: int) -> bool:
        return token // 32 < len(mask) and bool(mask[token // 32] >> (token % 32) & 1)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadConstraint(self._constraint.kind, _short(self._matcher.get_error()))


def _ends(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> frozenset[int]:
    """The tokens that end an answer. A model without any still needs one where a constraint leaves the end open: a
    special token, or its last one, which then is no text."""
    size = tokenizer.get_vocab_size()
    known = [id for id in stop_ids if id < size]
    special = [id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    return frozenset(known or special[:1] or [size - 1])


def check_source(constraint: Constraint) -> None:
    """Refuses a constraint by its size, before anything is built. Raises `BadConstraint`."""
    limit = MAX_SOURCE[constraint.kind]
    size = len(constraint.source.encode("utf-8", errors="replace"))
    if size > limit:
        raise BadConstraint(constraint.kind, f"it has {size} bytes and may have {limit}")


def _grammar(constraint: Constraint) -> str:
    """The library's form of a constraint."""
    from llguidance import LLMatcher

    if constraint.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_SPACED)
    if constraint.kind == "json_schema":
        _ = _read(constraint)
        return LLMatcher.grammar_from_json_schema(constraint.source, defaults=_SPACED)
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.source)
    if constraint.kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in _choices(constraint)))
    return LLMatcher.grammar_from_lark(constraint.source)


def _choices(constraint: Constraint) -> list[str]:
    choices = _read(constraint)
    if not isinstance(choices, list) or not choices or len(choices) > MAX_CHOICES:
        raise BadConstraint(constraint.kind, f"it is a list of 1 to {MAX_CHOICES} strings")
    if not all(isinstance(text, str) and text for text in choices):
        raise BadConstraint(constraint.kind, "its strings are not empty")
    return list(dict.fromkeys(choices))


def _read(constraint: Constraint) -> object:
    try:
        return json.loads(constraint.source)
    except (ValueError, RecursionError) as error:
        raise BadConstraint(constraint.kind, f"it is no JSON: {error}") from error


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES,
        step_lexer_fuel=_STEP_FUEL,
        step_max_items=_STEP_ITEMS,
        verbose_errors=False,
    )


def _short(message: str) -> str:
    """What of the library's message helps: not its traces, which follow on further lines in angle brackets."""
    if "NoExtension" in message:
        return "no answer can obey it"
    if message.startswith("panic"):
        return "it is too large"
    message = message.partition("<")[0].strip()
    return message[:_MESSAGE] or "it cannot be read"
