"""The values of a lab: what it asks, what it takes, what it measured, and where each number comes from.

Frozen, checked when made, no I/O and nothing heavy: a page lists the labs without loading torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from pydantic import Field, model_validator

from sihe.apps.coach.errors import LabParameterInvalid
from sihe.apps.coach.schema import Identifier, LabId, Text, Value, Words

# measured: taken on this machine in this run. modelled: computed from a formula. cited: printed by somebody else.
Provenance = Literal["measured", "modelled", "cited"]
Verdict = Literal["close", "order", "off"]


class Parameter(Value):
    """A number that a lab takes, with its bounds."""

    key: Identifier
    label: Text
    kind: Literal["int", "float"] = "int"
    default: float
    low: float
    high: float
    choices: tuple[float, ...] = Field((), description="when not empty, only these")
    unit: str = ""

    def parse(self, value: object) -> int | float:
        """`value` (a number, or text from a form) as this parameter. Raises `LabParameterInvalid`."""
        expected = f"one of {', '.join(f'{choice:g}' for choice in self.choices)}" if self.choices else ""
        expected = expected or f"{'a whole number' if self.kind == 'int' else 'a number'} {self.low:g} to {self.high:g}"
        try:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError
            number = float(value)
        except ValueError:
            number = math.nan
        allowed = number in self.choices if self.choices else self.low <= number <= self.high
        if not allowed or (self.kind == "int" and not number.is_integer()):
            raise LabParameterInvalid(f"parameter {self.key!r} takes {expected}, got {value!r}")
        return int(number) if self.kind == "int" else number


class ClaimSpec(Value):
    """A number that a lab promises. With `ask` it is one that the learner predicts before the run."""

    key: Identifier
    label: Text
    unit: str
    provenance: Provenance
    source: Text = Field(description="how it is measured, by which formula, or printed where")
    ask: Text | None = None
    tolerance: float = Field(0.1, gt=0, lt=1, description="a prediction within this share of the value is close")
    digits: int = Field(3, ge=1, le=6, description="significant digits when shown")


class Claim(Value):
    """One number with its unit and where it comes from."""

    key: Identifier
    label: Text
    value: float = Field(allow_inf_nan=False)
    unit: str
    provenance: Provenance
    source: Text
    digits: int = 3

    @property
    def shown(self) -> str:
        """The value with its unit, to its significant digits."""
        return quantity(self.value, self.unit, self.digits)


class Column(Value):
    """A column of a table: its heading, and where its numbers come from (None: no result, such as a size)."""

    label: Text
    unit: str = ""
    provenance: Provenance | None = None


class Table(Value):
    """Rows of numbers and words."""

    key: Identifier
    title: Text
    columns: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[tuple[float | int | str | None, ...], ...]

    @model_validator(mode="after")
    def _rectangular(self) -> Table:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"table {self.key!r}: every row needs {len(self.columns)} cells")
        return self


class Axis(Value):
    """What a chart shows along one side."""

    label: Text
    unit: str = ""
    log: bool = False


class Series(Value):
    """A curve. Series of one `chart` are drawn together, on the axes of the first."""

    key: Identifier
    chart: Identifier
    label: Text
    x: Axis
    y: Axis
    provenance: Provenance
    points: tuple[tuple[float, float], ...] = Field(min_length=1)


class WorkKind(Value):
    """A kind of work in a timeline, with its colour by place in the list."""

    key: Identifier
    label: Text


class Bar(Value):
    """A piece of work in a timeline: in which row, when, of which kind, and the mark on it."""

    row: int = Field(ge=0)
    start: float = Field(ge=0, allow_inf_nan=False)
    end: float = Field(allow_inf_nan=False)
    kind: Identifier
    mark: str = ""

    @model_validator(mode="after")
    def _forward(self) -> Bar:
        if self.end < self.start:
            raise ValueError(f"a bar ends after its start {self.start:g}, got {self.end:g}")
        return self


class Timeline(Value):
    """Who did what, and when: one row each (a Gantt chart)."""

    key: Identifier
    title: Text
    unit: Text
    provenance: Provenance
    rows: tuple[Text, ...] = Field(min_length=1)
    kinds: tuple[WorkKind, ...] = Field(min_length=1)
    bars: tuple[Bar, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _bars_have_places(self) -> Timeline:
        kinds = {kind.key for kind in self.kinds}
        for bar in self.bars:
            if bar.row >= len(self.rows) or bar.kind not in kinds:
                raise ValueError(f"timeline {self.key!r} has no row {bar.row} or no kind {bar.kind!r}")
        return self

    @property
    def length(self) -> float:
        """From 0 to the last end."""
        return max(bar.end for bar in self.bars)


class Lab(Value):
    """What a lab is, without running it."""

    id: LabId
    title: Text
    topics: tuple[Identifier, ...] = Field(min_length=1)
    purpose: Text
    formula: Words = Field(description="in plain Unicode, the same in both languages")
    parameters: tuple[Parameter, ...]
    claims: tuple[ClaimSpec, ...] = Field(min_length=1)
    explanation: Text = Field(description="names claims in braces: {stage3-measured} becomes the number with its unit")
    limit_s: float = Field(60.0, gt=0, description="longest run before the lab is stopped")

    @property
    def asks(self) -> tuple[ClaimSpec, ...]:
        """The numbers that a learner predicts."""
        return tuple(claim for claim in self.claims if claim.ask is not None)

    def claim(self, key: str) -> ClaimSpec:
        """The claim named `key`. Raises `LabParameterInvalid`."""
        for claim in self.claims:
            if claim.key == key:
                return claim
        raise LabParameterInvalid(
            f"lab {self.id} has no claim {key!r}: there are {', '.join(c.key for c in self.claims)}"
        )

    def resolve(self, given: Mapping[str, object] | None) -> dict[str, int | float]:
        """Every parameter with its value. Raises `LabParameterInvalid` for an unknown name or a value out of bounds."""
        known = {parameter.key: parameter for parameter in self.parameters}
        unknown = sorted(set(given or {}) - set(known))
        if unknown:
            raise LabParameterInvalid(f"lab {self.id} has no parameter {unknown[0]!r}: it takes {', '.join(known)}")
        values = {**{key: parameter.default for key, parameter in known.items()}, **(given or {})}
        return {key: known[key].parse(value) for key, value in values.items()}


class Measurement(Value):
    """What a lab's measuring function gives back: a value for each claim, and what to draw."""

    values: dict[str, float]
    tables: tuple[Table, ...] = ()
    series: tuple[Series, ...] = ()
    timelines: tuple[Timeline, ...] = ()


class Grade(Value):
    """A prediction beside the number that came out."""

    claim: Identifier
    predicted: float
    actual: float
    unit: str
    ratio: float | None = Field(description="predicted / actual; None when the actual value is 0")
    absolute_error: float
    verdict: Verdict


class LabResult(Value):
    """What a run of a lab showed. Every number says where it comes from."""

    lab: LabId
    parameters: dict[str, int | float]
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    series: tuple[Series, ...]
    timelines: tuple[Timeline, ...] = ()
    explanation: Text
    machine: dict[str, str]
    started_at: datetime
    elapsed_s: float
    run_id: str | None = None
    attempt: int | None = None
    grades: tuple[Grade, ...] = ()

    def value(self, key: str) -> float:
        """The value of the claim named `key`."""
        return next(claim.value for claim in self.claims if claim.key == key)


def quantity(value: float, unit: str, digits: int = 3) -> str:
    """`value` to its significant digits, with `unit`: `31.4 GB`, `1.50`, `16,384 B`."""
    if value == 0:
        number = "0"
    elif abs(value) >= 10**digits:
        number = f"{value:,.0f}"
    elif abs(value) < 1e-4:
        number = f"{value:.{digits - 1}e}"
    else:
        number = f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
    return f"{number} {unit}" if unit else number
