"""Data sets by name, by version and by folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sihe.core.errors import InvalidInput, NotFound
from sihe.data.loading import write_dataset
from sihe.data.loading.catalog import find_dataset


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    for version, day in (("b1", 1), ("a2", 3), ("c3", 2)):
        made = {"created_at": f"2026-01-0{day}T00:00:00+00:00", "vocab_size": 10, "eos_token_id": 0}
        with write_dataset(tmp_path / "toy" / version, name="toy", version=version, **made) as writer:
            writer.append("train", np.arange(5))
    (tmp_path / "toy" / "unfinished").mkdir()
    return tmp_path


def test_a_name_is_its_newest_version(datasets: Path) -> None:
    assert find_dataset("toy", datasets) == datasets / "toy" / "a2"


def test_a_version_is_itself(datasets: Path) -> None:
    assert find_dataset("toy@c3", datasets) == datasets / "toy" / "c3"


def test_a_folder_is_itself(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert find_dataset(str(datasets / "toy" / "b1"), elsewhere) == datasets / "toy" / "b1"


@pytest.mark.parametrize("reference", ["toys", "toy@d4", "toy@unfinished", "toy/missing", "../toy"])
def test_what_is_absent_is_not_found(datasets: Path, reference: str) -> None:
    with pytest.raises(NotFound, match="sihe text prepare"):
        find_dataset(reference, datasets)


@pytest.mark.parametrize("reference", ["", "*", "toy@*", "..", "toy@.."])
def test_a_pattern_is_no_name(datasets: Path, reference: str) -> None:
    with pytest.raises(InvalidInput):
        find_dataset(reference, datasets)
