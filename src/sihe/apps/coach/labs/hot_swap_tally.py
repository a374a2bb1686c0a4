"""What became of the requests of `serve.hot_swap`, counted from what each of them saw. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

BUCKET_S = 0.2
BEFORE_S, AFTER_S = 0.6, 3.0  # of the first order, in the picture


@dataclass(slots=True)
class Asked:
    """One request: when it was sent, what came when, from which version, and how it ended. Times are of one clock."""

    sent_s: float
    pieces: list[tuple[float, int]] = field(default_factory=list)  # when, and how many tokens
    versions: set[str] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    is_whole: bool = False
    error: str = ""

    @property
    def was_refused(self) -> bool:
        """Whether it ended before anything came."""
        return bool(self.error) and not self.pieces

    @property
    def was_cut(self) -> bool:
        """Whether it ended in the middle of its answer."""
        return bool(self.error) and bool(self.pieces)


@dataclass(frozen=True, slots=True)
class Order:
    """A change of version: when it was asked for, and when the call for it came back."""

    version: str
    ordered_s: float
    done_s: float


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts, and times in seconds."""

    sent: int
    completed: int
    refused: int
    cut: int
    most_versions: int  # within one answer
    wrong: int  # whole answers that are not, token for token, what their version says alone
    first_s: float  # from the order to the first token of the new version, the median of the orders
    away_s: float  # from the order until its call came back, all orders together
    calm_wait_s: float  # for the first token, of those that no order met: the median
    met_wait_s: float  # of those sent between an order and the new version's first token: the 95th percentile
    rate: list[tuple[float, float]]  # tokens per second around the first order, seconds from it

    def to_mapping(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def tally(asked: Sequence[Asked], orders: Sequence[Order], alone: Mapping[str, Sequence[int]]) -> Tally:
    """What a run came to. `alone` has what each version answers when nobody else asks. Raises nothing."""
    whole = [one for one in asked if one.is_whole]
    spans = [(order.ordered_s, first_token_s(asked, order)) for order in orders]
    met = [one for one in asked if any(start <= one.sent_s < end for start, end in spans)]
    calm = [one for one in asked if one not in met]
    return Tally(
        sent=len(asked),
        completed=len(whole),
        refused=sum(one.was_refused for one in asked),
        cut=sum(one.was_cut for one in asked),
        most_versions=max((len(one.versions) for one in asked), default=0),
        wrong=sum(not any(one.tokens == list(alone[name]) for name in one.versions) for one in whole),
        first_s=median(end - start for start, end in spans),
        away_s=sum(order.done_s - order.ordered_s for order in orders),
        calm_wait_s=_share(_waits(calm), 0.5),
        met_wait_s=_share(_waits(met), 0.95),
        rate=_rates(asked, orders[0].ordered_s),
    )


def first_token_s(asked: Sequence[Asked], order: Order) -> float:
    """When the first token of the ordered version came; when the order was done, if none ever did."""
    times = [time_s for one in asked if order.version in one.versions for time_s, _ in one.pieces]
    return min((time_s for time_s in times if time_s >= order.ordered_s), default=order.done_s)


def _waits(asked: Sequence[Asked]) -> list[float]:
    return sorted(one.pieces[0][0] - one.sent_s for one in asked if one.pieces)


def _share(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _rates(asked: Sequence[Asked], from_s: float) -> list[tuple[float, float]]:
    counts = [0] * round((BEFORE_S + AFTER_S) / BUCKET_S)
    for one in asked:
        for time_s, tokens in one.pieces:
            place = int((time_s - from_s + BEFORE_S) // BUCKET_S)
            if 0 <= place < len(counts):
                counts[place] += tokens
    return [(round((place + 0.5) * BUCKET_S - BEFORE_S, 3), count / BUCKET_S) for place, count in enumerate(counts)]
