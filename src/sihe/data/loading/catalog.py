"""Finding a data set by the name that a person types, and listing what there is."""

from __future__ import annotations

from pathlib import Path

from sihe.core.errors import NotFound
from sihe.core.ids import check_name
from sihe.data.loading.manifest import FILE_NAME, DatasetManifest, read_manifest

_VISIBLE = "[!.]*"  # names that begin with a dot are data sets in the making


def find_dataset(reference: str, datasets: Path) -> Path:
    """The folder behind `reference`: a data set's folder, `name` (its newest version) or `name@version`.

    Names are looked up under `datasets`. Raises `NotFound` that names what there is, `CorruptData`.
    """
    folder = Path(reference)
    if (folder / FILE_NAME).is_file():
        return folder.absolute()
    make = "make one with  sihe text prepare"
    name, _, version = reference.partition("@")
    if "/" in reference:
        hint = f"neither a data set's folder nor a name under {datasets}; {make}"
        raise NotFound("data set", reference, hint=hint)
    versions = [manifest.version for manifest in dataset_versions(name, datasets)]
    if not versions:
        known = ", ".join(dataset_names(datasets)) or "none yet"
        raise NotFound("data set", reference, hint=f"there are: {known}; {make}")
    if version and check_name("data set version", version) not in versions:
        hint = f"{name!r} has the versions {', '.join(versions)}; {make}"
        raise NotFound("data set", reference, hint=hint)
    return datasets / name / (version or versions[0])


def dataset_names(datasets: Path) -> list[str]:
    """Names of the data sets under `datasets`, sorted."""
    return sorted({path.parent.parent.name for path in datasets.glob(f"{_VISIBLE}/{_VISIBLE}/{FILE_NAME}")})


def dataset_versions(name: str, datasets: Path) -> list[DatasetManifest]:
    """Every version of the data set `name`, newest first; empty for an unknown name. Raises `CorruptData`."""
    check_name("data set", name)
    found = [read_manifest(path.parent) for path in (datasets / name).glob(f"{_VISIBLE}/{FILE_NAME}")]
    return sorted(found, key=lambda manifest: (manifest.created_at, manifest.version), reverse=True)
