"""Memory in large pages, and where the system has none."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest
import torch

from sihe.models.config import ModelConfig
from sihe.serving.engine.kv.storage import KvPages
from sihe.serving.engine.large_pages import moved, zeros

SHAPE = (3, 1 << 19)  # 6 MiB of float32


def check() -> None:
    array = zeros(SHAPE, np.float32)
    assert array.shape == SHAPE
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert not array.any()
    array[2, -1] = 1.0
    assert array.sum() == 1.0


def test_large_memory_is_zeros_that_begin_on_a_large_page() -> None:
    check()
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert zeros(SHAPE, np.float32).ctypes.data % (2 << 20) == 0


def test_a_system_without_large_pages_has_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MADV_HUGEPAGE", "MAP_PRIVATE", "MAP_ANONYMOUS"):  # as Windows
        monkeypatch.delattr(mmap, name, raising=False)
    check()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="what is refused is Linux's")
def test_a_kernel_that_refuses_large_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 1 << 20)  # advice that no kernel knows
    with mmap.mmap(-1, 4096) as memory, pytest.raises(OSError, match="Invalid argument"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    check()


def test_memory_outlives_what_it_was_made_from() -> None:
    views = [zeros(SHAPE, np.float32)[1, 5:] for _ in range(8)]
    for number, view in enumerate(views):
        view[:] = number
    assert [float(view.min()) for view in views] == [float(view.max()) for view in views] == list(range(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_is_moved_is_the_same(dtype: torch.dtype) -> None:
    for rows in (3, 3000):  # below 2 MiB, and above in each dtype
        source = torch.randint(0, 100, (rows, 1024)).to(dtype)
        target = moved(source.T)
        assert torch.equal(target, source.T)
        assert target.is_contiguous() or rows == 3


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system, as Linux is asked")
@pytest.mark.parametrize("is_resident", [False, True])
def test_the_caches_memory_is_resident_where_that_is_asked_for(is_resident: bool) -> None:
    config = ModelConfig(
        vocab_size=8, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, max_positions=64,
        intermediate_size=8,
    )  # fmt: skip
    pages = KvPages(config, num_blocks=4096, dtype=torch.float32, is_resident=is_resident)
    assert [resident_share(part) for part in (pages.keys, pages.values)] == [float(is_resident)] * 2
    assert not pages.keys.any()


def resident_share(tensor: torch.Tensor) -> float:
    """How much of it, which begins on a page, is in memory: mincore(2)."""
    found = np.zeros(tensor.nbytes // mmap.PAGESIZE, np.uint8)
    address, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
    assert ctypes.CDLL(None).mincore(address, size, ctypes.c_void_p(found.ctypes.data)) == 0
    return float((found & 1).mean())
