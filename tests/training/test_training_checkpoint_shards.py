"""What any layout over any number of ranks wrote, every other layout reads back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sihe.core.errors import CorruptData
from sihe.training.checkpoint.agreement import Agreement
from sihe.training.checkpoint.shards import FileSum, Form, read_forms, read_tensors, write_tensors
from sihe.training.ranks import Ranks
from support.forked_ranks import run_ranks
from support.sharded_states import LAYOUTS, SHAPES, local_of, replicated, whole

RECORD_BYTES = 2000  # what torch puts around one tensor, at most


def write_all(ranks: Ranks, folder: Path) -> dict[str, int]:
    """Writes each layout into a folder of its own; the bytes that this rank wrote of it."""
    agreement = Agreement(ranks)
    written = {}
    for layout in LAYOUTS:
        sums = write_tensors(folder / f"{layout.__name__}-{ranks.world_size}", layout(ranks), agreement)
        written[layout.__name__] = sum(one.size_bytes for name, one in sums.items() if name != ".metadata")
    return written


def read_all(ranks: Ranks, folder: Path) -> int:
    """Reads each folder in each layout that these ranks can have; how many."""
    count = 0
    layouts = LAYOUTS if ranks.world_size > 1 else (replicated,)
    for source in sorted(folder.iterdir()):
        for layout in layouts:
            expected = layout(ranks)
            tensors = layout(ranks)
            for tensor in tensors.values():
                local_of(tensor).fill_(float("nan"))
            read_tensors(source, tensors)
            for name, tensor in tensors.items():
                assert local_of(tensor).equal(local_of(expected[name])), (source.name, layout.__name__, name)
            count += 1
    return count


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, int]]]:
    folder = tmp_path_factory.mktemp("states")
    of_ranks = run_ranks(write_all, 4, folder)
    run_ranks(write_all, 2, folder)
    write_tensors(folder / "single", whole(), Agreement(Ranks()))
    return folder, of_ranks


@pytest.mark.parametrize("world_size", [4, 2])
def test_every_layout_reads_every_other(written: tuple[Path, list[dict[str, int]]], world_size: int) -> None:
    counts = run_ranks(read_all, world_size, written[0])
    assert counts == [(2 * len(LAYOUTS) + 1) * len(LAYOUTS)] * world_size


def test_a_single_process_reads_every_layout(written: tuple[Path, list[dict[str, int]]]) -> None:
    assert read_all(Ranks(), written[0]) == 2 * len(LAYOUTS) + 1


def test_copies_are_written_once_and_shared_out(written: tuple[Path, list[dict[str, int]]]) -> None:
    """No rank of four writes the replicated state alone, and together they write what a single process does."""
    folder, of_ranks = written
    shares = [written["replicated"] for written in of_ranks]
    alone = (folder / "single" / "__0_0.distcp").stat().st_size
    assert max(shares) < alone
    assert sum(shares) == alone
    values = sum(tensor.numel() for tensor in whole().values()) * 4
    bound = values + 4 * len(SHAPES) * RECORD_BYTES  # small tensors: mostly headers, in up to four parts
    for layout in LAYOUTS:
        assert values <= sum(share[layout.__name__] for share in of_ranks) < bound, layout.__name__


def test_sums_are_those_of_the_files(tmp_path: Path) -> None:
    sums = write_tensors(tmp_path, whole(), Agreement(Ranks()))
    assert set(sums) == {path.name for path in tmp_path.iterdir()} == {"__0_0.distcp", ".metadata"}
    for name, one in sums.items():
        one.check(tmp_path / name)
        with pytest.raises(CorruptData, match="SHA-256"):
            FileSum("0" * 64, one.size_bytes).check(tmp_path / name)
    forms = read_forms(tmp_path)
    assert forms == {name: Form(shape, "float32") for name, shape in SHAPES.items()}


def test_tensors_that_are_not_there(tmp_path: Path) -> None:
    write_tensors(tmp_path, whole(), Agreement(Ranks()))
    with pytest.raises(CorruptData, match="other"):
        read_tensors(tmp_path, {"other": torch.zeros(3)})
