"""Gradients in flat float32 memory, and their sum over ranks while the backward pass still runs.

Each parameter's `.grad` is a view into one tensor. Autograd adds to the views in place, in float32 also where the
weights are bfloat16: micro-batches and ranks are summed without the rounding of eight bits of mantissa.

The parameters that a backward pass reaches first lie first, so that the memory fills from its beginning. It is sent in
buckets: each as soon as it and all before it are complete, in the same order on every rank (Li et al. 2020, arXiv
2006.15704, section 3.2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ALIGNMENT = 16  # elements: 64 bytes, one cache line and one AVX-512 register
_BUCKET = 25 * 2**20 // 4  # elements: 25 MiB, as torch's DistributedDataParallel


class GradientBuffer:
    """Owns the gradients of `parameters`. Who else sets a `.grad` to `None` takes it out until the next `zero_`."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad][::-1]
        self.ends: list[int] = []
        size = 0
        starts = []
        for parameter in self.parameters:
            starts.append(size)
            size += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            self.ends.append(size)
        self.flat = torch.zeros(size, dtype=torch.float32)
        self._views = [
            self.flat[start : start + parameter.numel()].view_as(parameter)
            for parameter, start in zip(self.parameters, starts, strict=True)
        ]
        for parameter in self.parameters:
            parameter.grad_dtype = torch.float32
        self.zero_()

    def zero_(self) -> None:
        """Starts a new sum."""
        self.flat.zero_()
        # Again each time: before its first step, torch's pipeline sets the gradients of a stage with FSDP to None.
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view


class BucketSum(Protocol):
    """How one bucket of gradients is summed over ranks."""

    def start(self, bucket: Tensor, parameters: list[nn.Parameter]) -> PendingSum:
        """Begins to replace `bucket`, the gradients of `parameters`, by its sum; nobody else touches it until then."""
        ...


class PendingSum(Protocol):
    """A sum on its way."""

    def wait(self) -> object:
        """Returns when the bucket holds the sum."""
        ...


class GradientSum:
    """Sums the gradients of a buffer over ranks, in buckets of `bucket_size` elements or one parameter."""

    def __init__(self, buffer: GradientBuffer, bucket_sum: BucketSum, *, bucket_size: int = _BUCKET) -> None:
        self._buffer = buffer
        self._sum = bucket_sum
        self._buckets = list(_cut(buffer, bucket_size))
        self._missing: list[int] = []
        self._pending: list[PendingSum] = []
        for number, (_, parameters) in enumerate(self._buckets):
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._counter(number))  # type: ignore[no-untyped-call]  # torch does not annotate it

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """The body is the last backward pass of the step: buckets leave while it runs, and are summed at its end."""
        self._missing = [len(parameters) for _, parameters in self._buckets]
        yield
        self._missing = []
        self.finish()

    def finish(self) -> None:
        """Sends what has not left yet, and waits for all sums."""
        while len(self._pending) < len(self._buckets):
            self._send()
        for pending in self._pending:
            pending.wait()
        self._pending = []

    def _counter(self, number: int) -> Callable[[Tensor], None]:
        return lambda _parameter: self._arrived(number)

    def _arrived(self, number: int) -> None:
        if not self._missing:
            return
        self._missing[number] -= 1
        while len(self._pending) < len(self._buckets) and self._missing[len(self._pending)] == 0:
            self._send()

    def _send(self) -> None:
        part, parameters = self._buckets[len(self._pending)]
        self._pending.append(self._sum.start(self._buffer.flat[part], parameters))


def _cut(buffer: GradientBuffer, size: int) -> Iterator[tuple[slice, list[nn.Parameter]]]:
    first = start = 0
    for number, end in enumerate(buffer.ends, start=1):
        if end - start >= size or number == len(buffer.ends):
            yield slice(start, end), buffer.parameters[first:number]
            first, start = number, end


class PlainSum:
    """Sums in float32, as the gradients are."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def start(self, bucket: Tensor, parameters: list[nn.Parameter]) -> PendingSum:
        """Begins the all-reduce of `bucket`."""
        work = dist.all_reduce(bucket, group=self._group, async_op=True)
        assert work is not None
        return work
