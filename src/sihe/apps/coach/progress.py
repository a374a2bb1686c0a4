"""What a learner's history says about a topic: new, seen or solid. Pure.

Seen: a lab of the topic was run, or a question about it reviewed. Solid: the latest review of every question about it
was "known" or better, and of every lab the latest predictions were all close; at least one of both kinds that exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sihe.apps.coach.types import Topic, TopicState

KNOWN = 3  # 1 forgotten, 2 with effort, 3 known, 4 at once


def state_of(
    topic: Topic, questions: Sequence[str], ratings: Mapping[str, int], verdicts: Mapping[str, Sequence[str]]
) -> TopicState:
    """The state of a topic: `ratings` by question, `verdicts` of the latest finished attempt by lab."""
    touched = any(question in ratings for question in questions) or any(lab in verdicts for lab in topic.labs)
    if not touched:
        return "new"
    recalled = all(ratings.get(question, 0) >= KNOWN for question in questions)
    measured = all(verdicts.get(lab) and set(verdicts[lab]) == {"close"} for lab in topic.labs)
    return "solid" if recalled and measured else "seen"
