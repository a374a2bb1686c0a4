"""What goes wrong with planning."""

from __future__ import annotations

from sihe.core.errors import UserError


class NothingFits(UserError, ValueError):
    """No layout of the model leaves every device with enough memory. `needed` is that of the smallest one, in bytes."""

    def __init__(self, model: str, cluster: str, *, needed: float, limit: float, smallest: str) -> None:
        super().__init__(
            f"{model} does not fit on {cluster}: the smallest layout ({smallest}) needs {needed / 1e9:.1f} GB of each "
            f"device, and {limit / 1e9:.1f} GB are usable: take more devices, a shorter sequence or a smaller batch"
        )
        self.needed = needed
        self.limit = limit
