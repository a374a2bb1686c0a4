"""Finding a data set by the name that a person types."""

from __future__ import annotations

from pathlib import Path

from sihe.core.errors import NotFound
from sihe.core.ids import check_name
from sihe.data.loading.manifest import FILE_NAME, read_manifest


def find_dataset(reference: str, datasets: Path) -> Path:
    """The folder behind `reference`: a data set's folder, `name` (its newest version) or `name@version`.

    Names are looked up under `datasets`. Raises `NotFound`.
    """
    folder = Path(reference)
    if (folder / FILE_NAME).is_file():
        return folder.absolute()
    hint = f"neither a data set's folder nor a name under {datasets}; make one with  sihe text prepare"
    name, _, version = reference.partition("@")
    if "/" in reference:
        raise NotFound("data set", reference, hint=hint)
    check_name("data set", name)
    wanted = check_name("data set version", version) if version else "*"
    found = [path.parent for path in datasets.glob(f"{name}/{wanted}/{FILE_NAME}")]
    if not found:
        raise NotFound("data set", reference, hint=hint)
    return max(found, key=lambda path: read_manifest(path).created_at)
