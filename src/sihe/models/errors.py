"""What can be wrong with a model that a user hands in."""

from __future__ import annotations

from pathlib import Path

from sihe.core.errors import CorruptData, InvalidInput


class UnsupportedModel(InvalidInput):
    """The checkpoint asks for something that the decoder does not compute; `key` is the entry of config.json."""

    def __init__(self, key: str, value: object, supported: str) -> None:
        super().__init__(
            f"config.json asks for {key} = {value!r}, and the decoder supports {supported}: use another model"
        )
        self.key = key
        self.value = value


class CheckpointMismatch(CorruptData):
    """The weights in `path` do not fit their configuration; `tensor` is the first that does not."""

    def __init__(self, path: str | Path, tensor: str, reason: str) -> None:
        super().__init__(
            path, f"tensor {tensor!r} {reason}", hint="config.json and the weights must come from the same model"
        )
        self.tensor = tensor


class UnsupportedAdapter(InvalidInput):
    """The adapter asks for something that ours do not compute; `key` is the entry of adapter_config.json."""

    def __init__(self, key: str, value: object, supported: str) -> None:
        super().__init__(
            f"adapter_config.json asks for {key} = {value!r}, and ours support {supported}: use another adapter"
        )
        self.key = key
        self.value = value
