"""Messages between the ranks of a group, numbered 0 .. size - 1, with a count of the bytes that go out."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from sihe.core.errors import InvalidInput


class Peers:
    """Some ranks of the default process group, in the order of `ranks` (all of them by default); this one is there.

    Messages arrive in the order in which they were sent, between two ranks and with one tag. Empty ones are not sent:
    both sides know the length.
    """

    def __init__(self, ranks: Sequence[int] | None = None) -> None:
        self.ranks = tuple(range(dist.get_world_size()) if ranks is None else ranks)
        if dist.get_rank() not in self.ranks or len(set(self.ranks)) != len(self.ranks):
            raise InvalidInput(f"ranks are different and rank {dist.get_rank()} is one of them, got {self.ranks!r}")
        self.rank = self.ranks.index(dist.get_rank())
        self.size = len(self.ranks)
        self.sent_bytes = 0

    def send(self, tensor: Tensor, to: int, *, tag: int = 0) -> list[dist.Work]:
        """Starts a message; `tensor` may not change until `wait`."""
        if tensor.numel() == 0:
            return []
        self.sent_bytes += tensor.numel() * tensor.element_size()
        work = dist.isend(tensor, self.ranks[to], tag=tag)
        assert work is not None
        return [work]

    def receive(self, tensor: Tensor, source: int, *, tag: int = 0) -> None:
        """Fills `tensor` with the next message from `source`."""
        if tensor.numel():
            dist.recv(tensor, self.ranks[source], tag=tag)

    def exchange(self, outgoing: Tensor, to: int, incoming: Tensor, source: int) -> None:
        """Sends and receives at the same time."""
        sending = self.send(outgoing, to)
        self.receive(incoming, source)
        wait(sending)

    def among(self, members: Sequence[int]) -> Peers:
        """Those of these ranks with the numbers `members`, as a group of their own."""
        return Peers([self.ranks[member] for member in members])


def wait(sending: list[dist.Work]) -> None:
    """Returns when the messages have left."""
    for work in sending:
        work.wait()


def check(tensor: Tensor) -> None:
    """Raises `InvalidInput` unless `tensor` is one contiguous row of numbers."""
    if tensor.ndim != 1 or not tensor.is_contiguous():
        raise InvalidInput(
            f"an all-reduce takes a contiguous tensor of one dim, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}: pass  tensor.flatten()"
        )
