"""A copy of the training state in host memory: what a step is held up for, and what the writer reads while steps go on.

The buffers are made once and used again: fresh memory costs a page fault for every 4 KiB, several times the copy
itself. Each tensor is copied by torch, which shares the bytes out over the threads of the training. That leaves the
bandwidth of the memory as the bound: 12 bytes a parameter for float32 AdamW, read and written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class _Buffer:
    """The memory for one tensor, and that memory as a writer sees it: with its place in the whole, if it is a part."""

    local: Tensor
    seen: Tensor


class HostBuffers:
    """Memory for one snapshot at a time, page-locked where the tensors live on an accelerator."""

    def __init__(self) -> None:
        self._buffers: dict[str, _Buffer] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now. The former copy is overwritten: it must be written by then."""
        copies, asynchronous = {}, False
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            buffer = self._buffers.get(name)
            if buffer is None or not _fits(buffer, tensor, local):
                buffer = self._buffers[name] = _buffer_for(tensor, local)
            buffer.local.copy_(local, non_blocking=local.is_cuda)
            asynchronous |= local.is_cuda
            copies[name] = buffer.seen
        if asynchronous:
            torch.cuda.synchronize()
        return copies


def _buffer_for(tensor: Tensor, local: Tensor) -> _Buffer:
    memory = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
    if not isinstance(tensor, DTensor):
        return _Buffer(memory, memory)
    mesh, places, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
    return _Buffer(memory, DTensor.from_local(memory, mesh, places, run_check=False, shape=shape, stride=stride))


def _fits(buffer: _Buffer, tensor: Tensor, local: Tensor) -> bool:
    if buffer.local.shape != local.shape or buffer.local.dtype != local.dtype:
        return False
    if not isinstance(tensor, DTensor):
        return buffer.seen is buffer.local
    seen = buffer.seen
    return (
        isinstance(seen, DTensor)
        and seen.shape == tensor.shape
        and seen.placements == tensor.placements
        and seen.device_mesh == tensor.device_mesh
    )
