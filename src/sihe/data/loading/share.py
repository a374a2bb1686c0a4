"""Which part of each global batch a rank reads."""

from __future__ import annotations

from dataclasses import dataclass

from sihe.core.errors import InvalidInput


@dataclass(frozen=True)
class BatchShare:
    """Rank `rank` of `world_size` reads an equal, contiguous part of `global_batch` samples. Checks itself."""

    global_batch: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise InvalidInput(f"global_batch must be positive, got {self.global_batch!r}")
        if not 0 <= self.rank < self.world_size:
            raise InvalidInput(
                f"rank must lie in [0, world_size), got rank={self.rank!r}, world_size={self.world_size!r}"
            )
        if self.global_batch % self.world_size:
            raise InvalidInput(
                f"global_batch must be a multiple of world_size, got {self.global_batch} over {self.world_size} ranks"
            )

    @property
    def local_batch(self) -> int:
        """Samples of this rank in each batch."""
        return self.global_batch // self.world_size

    @property
    def offset(self) -> int:
        """The first of them, counted from the first of the batch."""
        return self.rank * self.local_batch
