"""Gradients made smaller on their way between replicas, at the price of their precision.

M, N  rows and columns of one gradient      R  rank of its approximation
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sihe.training.gradients import PlainSum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sihe.training.gradients import BucketSum, PendingSum
    from sihe.training.parallel.plan import ParallelPlan


def bucket_sum(plan: ParallelPlan, group: dist.ProcessGroup, parameters: Sequence[nn.Parameter]) -> BucketSum:
    """How `plan` sums the gradients of `parameters` over `group`."""
    match plan.compression:
        case "none":
            return PlainSum(group)
        case "bf16":
            return HalfSum(group, torch.bfloat16)
        case "fp16":
            return HalfSum(group, torch.float16)
        case "powersgd":
            return PowerSum(group, plan.powersgd_rank, parameters)


class HalfSum:
    """Sends and adds 16 bits a number: half the bytes, 8 (bf16) or 11 (fp16) bits of mantissa."""

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self._group = group
        self._dtype = dtype

    def start(self, bucket: Tensor, parameters: list[nn.Parameter]) -> PendingSum:
        """Begins the all-reduce of the rounded `bucket`."""
        scale = self._scale(bucket)
        small = (bucket * scale).to(self._dtype)
        work = dist.all_reduce(small, group=self._group, async_op=True)
        assert work is not None
        return _Widened(work, small, bucket, scale)

    def _scale(self, bucket: Tensor) -> float:
        """A power of two that brings the largest sum near the top of fp16's range, lest small numbers vanish."""
        if self._dtype != torch.float16:
            return 1.0
        largest = bucket.abs().amax()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        if not largest.isfinite() or largest == 0:
            return 1.0
        room = torch.finfo(torch.float16).max / (largest * dist.get_world_size(self._group))
        return float(2.0 ** torch.floor(torch.log2(room)).clamp(-126, 126))


class _Widened:
    """The sum in 16 bits, written back to the float32 bucket."""

    def __init__(self, work: dist.Work, small: Tensor, bucket: Tensor, scale: float) -> None:
        self._work, self._small, self._bucket, self._scale = work, small, bucket, scale

    def wait(self) -> None:
        """Returns when the bucket holds the sum."""
        self._work.wait()
        self._bucket.copy_(self._small).div_(self._scale)


class PowerSum:
    """PowerSGD (Vogels et al. 2019, arXiv 1905.13727, algorithm 1): each matrix is sent as a product of rank R.

    What the approximation leaves out is added to the next step's gradient (error feedback), so that it is late and not
    lost. The right factor of one step is the starting point of the next. Both are this rank's own, in a checkpoint too:
    on other ranks they start anew. Vectors, and matrices that would not get smaller, are sent as they are.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, parameters: Sequence[nn.Parameter]) -> None:
        self._group = group
        self._states: dict[nn.Parameter, _Factor] = {}
        for parameter in parameters:
            if parameter.ndim > 1 and rank * (len(parameter) + parameter[0].numel()) < parameter.numel():
                shape = (len(parameter), parameter[0].numel())
                self._states[parameter] = _Factor(shape, rank, len(self._states), parameter.device)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept for `parameter` from step to step: the live tensors; none for one that is sent as it is."""
        state = self._states.get(parameter)
        return {} if state is None else {"error": state.error_MN, "right": state.right_NR}

    def reset(self) -> None:
        """Starts anew, as before the first step."""
        for state in self._states.values():
            state.reset()

    def start(self, bucket: Tensor, parameters: list[nn.Parameter]) -> PendingSum:
        """Sums `bucket`; two rounds of messages, the second of which needs the first, so nothing is left pending."""
        matrices, rest = [], []
        for parameter in parameters:
            assert parameter.grad is not None
            if parameter in self._states:
                matrices.append((parameter.grad.flatten(1), self._states[parameter]))
            else:
                rest.append(parameter.grad)
        replicas = dist.get_world_size(self._group)
        left_MR = [(grad_MN + state.error_MN) @ state.right_NR for grad_MN, state in matrices]
        self._sum([*left_MR, *rest])
        if not all(bool(left.isfinite().all()) for left in left_MR):
            for grad_MN, _ in matrices:
                grad_MN.fill_(torch.inf)  # on every rank alike; what is kept stays clean for the step's next try
            return _Done()
        for grad_MN, state in matrices:
            grad_MN += state.error_MN
        left_MR = [torch.linalg.qr(left).Q for left in left_MR]
        right_NR = [grad_MN.T @ left for (grad_MN, _), left in zip(matrices, left_MR, strict=True)]
        own = [right.clone() for right in right_NR]
        self._sum(right_NR)
        for (grad_MN, state), left, right, mine in zip(matrices, left_MR, right_NR, own, strict=True):
            torch.addmm(grad_MN, left, mine.T, alpha=-1, out=state.error_MN)
            state.right_NR.copy_(right / replicas)
            torch.mm(left, right.T, out=grad_MN)
        return _Done()

    def _sum(self, tensors: list[Tensor]) -> None:
        if not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self._group)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


class _Factor:
    """What is kept for one matrix from step to step."""

    def __init__(self, shape: tuple[int, int], rank: int, number: int, device: torch.device) -> None:
        self._number = number
        self.error_MN = torch.zeros(shape, device=device)
        self.right_NR = torch.empty(shape[1], rank, device=device)
        self.reset()

    def reset(self) -> None:
        """No error yet, and a random right factor, the same on each rank."""
        self.error_MN.zero_()
        self.right_NR.copy_(torch.randn(self.right_NR.shape, generator=torch.Generator().manual_seed(self._number)))


class _Done:
    """Nothing is on its way."""

    def wait(self) -> None:
        """Returns at once."""
