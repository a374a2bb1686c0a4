"""Memory in large pages, where the system has them: the kernels read gigabytes in long rows.

A table of 4 KiB pages for a model of a gigabyte does not fit in the processor's caches of addresses, and in a virtual
machine each miss costs two walks; nor does the processor fetch ahead beyond the end of a page.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

_LARGE = 2 << 20  # bytes of a large page on x86-64 and on ARM with 4 KiB pages


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros that become resident as they are touched; in large pages from 2 MiB on."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux: nothing to ask for
        return np.zeros(shape, kind)
    memory = mmap.mmap(-1, size + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them; the memory is as good in small pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    flat = np.frombuffer(memory, np.uint8)
    begin = -flat.ctypes.data % _LARGE
    return flat[begin : begin + size].view(kind).reshape(shape)


def moved(tensor: Tensor) -> Tensor:
    """The same numbers in large pages, where it is of that size."""
    if tensor.nbytes < _LARGE:
        return tensor
    raw = torch.from_numpy(zeros((tensor.nbytes,), np.uint8))
    target = raw.view(tensor.dtype).view(tensor.shape)
    return target.copy_(tensor)
