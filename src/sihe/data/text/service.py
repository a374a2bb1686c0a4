"""From files to a token data set, in one call that may be killed at any moment and called again.

    read      files → documents, or reasons why not
    store     documents → table `documents` of the lake, under the digest of the whole input (a "snapshot")
    filter    quality rules
    dedupe    exact, then near duplicates
    tokenizer byte-level BPE on what is left
    pack      token shards, published as datasets/<name>/<version>/ in one rename

The version is the digest of the snapshot and of every setting that shapes the result. So the same input finds its data
set there; a run that was killed has left either nothing under that name or all of it; and the append to the lake
carries the snapshot as its key, so it happens once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sihe.core.ids import check_name
from sihe.core.workspace import Workspace
from sihe.data.lake.lake import Lake
from sihe.data.loading.catalog import dataset_names, dataset_versions, find_dataset
from sihe.data.loading.dataset import TokenDataset
from sihe.data.loading.manifest import DatasetManifest
from sihe.data.text.preparation import OnProgress, Preparation, Recipe
from sihe.data.text.types import PreparedDataset


class TextService:
    """Prepares and lists token data sets of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._lake = Lake(workspace.path("lake"))
        self._datasets = workspace.path("datasets")

    def prepare(
        self,
        name: str,
        paths: Sequence[Path | str],
        *,
        vocab_size: int,
        held_out: float = 0.02,
        exclude: Sequence[str] = (),
        near_threshold: float = 0.8,
        on_progress: OnProgress | None = None,
    ) -> PreparedDataset:
        """The data set `name` of the text under `paths`; the one that is there when input and settings are the same.

        Raises `NotFound` for a missing path, `InvalidInput` for a setting, `EmptyCorpus`, `NoSpace`, `CorruptData`.
        """
        check_name("data set", name)
        recipe = Recipe(vocab_size, held_out, near_threshold)
        preparation = Preparation(self._workspace, self._lake, name, recipe, on_progress or (lambda _: None))
        return preparation.run(paths, exclude, self._datasets)

    def names(self) -> list[str]:
        """Names of the data sets, sorted."""
        return dataset_names(self._datasets)

    def versions(self, name: str) -> list[DatasetManifest]:
        """Every version of a data set, newest first; empty for an unknown name. Raises `CorruptData`."""
        return dataset_versions(name, self._datasets)

    def open(self, reference: str) -> TokenDataset:
        """The data set `name@version` or the newest `name`, verified. Raises `NotFound`, `CorruptData`."""
        return TokenDataset.open(find_dataset(reference, self._datasets))
