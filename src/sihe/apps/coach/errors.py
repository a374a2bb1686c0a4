"""What can go wrong in the coach.

InvalidInput
├── ContentInvalid      a map, a question or a chapter has not the promised form
├── LabParameterInvalid a lab parameter is unknown, of the wrong type or out of bounds
└── AttemptClosed       a prediction that comes after the run it should have preceded
InternalError
└── LabFailed           a lab stopped, or its ranks did; the message carries what they said
Busy
└── LabTimeout          a lab took longer than it may; its processes are gone
"""

from __future__ import annotations

from sihe.core.errors import Busy, InternalError, InvalidInput


class ContentInvalid(InvalidInput):
    """Content that ships with the coach, or that an author is writing, breaks its form. `where` names the file."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


class LabParameterInvalid(InvalidInput):
    """A lab was asked to run with a parameter that it does not take."""


class AttemptClosed(InvalidInput):
    """A prediction is made before the run. This attempt has run already."""


class LabFailed(InternalError):
    """A lab, or one of its ranks, failed."""


class LabTimeout(Busy):
    """A lab was stopped at its time limit."""
