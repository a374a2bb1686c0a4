"""LoRA adapters of a running engine: their weights, and the places that they take in the model.

An adapter is read and checked on the caller's thread, put into a free place between two steps, and taken out when the
last request that uses it has ended. A batch may hold requests of any of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol

import torch

from sihe.core.errors import AlreadyExists, Busy, InvalidInput, NotFound
from sihe.models.config import ModelConfig
from sihe.models.decoder import empty_decoder
from sihe.models.lora import Lora
from sihe.models.lora_files import load_adapter

ADAPTER = "served"
"""The name under which the weights of `read_adapter` hold their one adapter."""


def read_adapter(folder: Path, config: ModelConfig) -> Lora:
    """The adapter of a PEFT folder for a model of this shape, on the CPU. Raises what is wrong with the folder."""
    lora = Lora(empty_decoder(config), torch.device("cpu"))
    load_adapter(lora, folder, ADAPTER)
    return lora


@dataclass(slots=True)
class AdapterPlace:
    """One loaded adapter. `key` is never used again, so that nothing cached of it outlives it."""

    name: str
    number: int  # of its place in the model, from 1; 0 is the model alone
    key: bytes
    uses: int = 0
    is_leaving: bool = False


_NONE = AdapterPlace("", 0, b"")


@dataclass(slots=True)
class AdapterShelf:
    """Which adapters are loaded and how many requests use each. Thread-safe."""

    places: int
    _by_name: dict[str, AdapterPlace] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _serial: count[int] = field(default_factory=lambda: count(1))

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that requests may name."""
        with self._changed:
            return tuple(place.name for place in self._by_name.values() if not place.is_leaving)

    def reserve(self, name: str) -> AdapterPlace:
        """A free place for `name`, not yet to be used. Raises `AlreadyExists`, `Busy` where none is free."""
        if not name or len(name) > 128 or not name.isprintable():
            raise InvalidInput(f"an adapter's name has 1 to 128 printable characters, got {name!r}")
        with self._changed:
            if name in self._by_name:
                raise AlreadyExists("adapter", name, hint="unload it first or take another name")
            taken = {place.number for place in self._by_name.values()}
            free = next((number for number in range(1, self.places + 1) if number not in taken), None)
            if free is None:
                raise Busy(f"all {self.places} places for adapters are taken: unload one, or raise max_adapters")
            place = AdapterPlace(name, free, f"{name} {next(self._serial)}".encode(), is_leaving=True)
            self._by_name[name] = place
            return place

    def open(self, place: AdapterPlace) -> None:
        """Its weights are there: requests may use it."""
        with self._changed:
            place.is_leaving = False

    def hold(self, name: str) -> AdapterPlace:
        """The adapter that a request names, kept until `release`. Raises `NotFound`."""
        if not name:
            return _NONE
        with self._changed:
            place = self._by_name.get(name)
            if place is None or place.is_leaving:
                known = ", ".join(other for other, at in self._by_name.items() if not at.is_leaving)
                raise NotFound("adapter", name, hint=f"this model has {known or 'none'}")
            place.uses += 1
            return place

    def release(self, place: AdapterPlace) -> None:
        """A request has ended."""
        if place.number:
            with self._changed:
                place.uses -= 1
                self._changed.notify_all()

    def leave(self, name: str, timeout_s: float | None) -> AdapterPlace:
        """Lets no new request use `name`, and waits for those that do. Raises `NotFound`, `Busy` after `timeout_s`."""
        with self._changed:
            place = self._by_name.get(name)
            if place is None or place.is_leaving:
                raise NotFound("adapter", name, hint=f"this model has {', '.join(self._by_name) or 'none'}")
            place.is_leaving = True
            if not self._changed.wait_for(lambda: place.uses == 0, timeout_s):
                place.is_leaving = False
                raise Busy(f"{place.uses} requests use adapter {name!r}: it stays; try again later")
            return place

    def forget(self, place: AdapterPlace) -> None:
        """Its place is free."""
        with self._changed:
            del self._by_name[place.name]


class AdapterTarget(Protocol):
    """What takes adapters in: a runner."""

    def set_adapter(self, number: int, lora: Lora | None) -> None:
        """Puts an adapter in its place, or takes it out."""
        ...


class EngineAdapters:
    """The adapters of a running engine: `load` and `unload` from any thread, beside whatever runs."""

    def __init__(
        self,
        shelf: AdapterShelf,
        config: ModelConfig,
        between_steps: Callable[[Callable[[AdapterTarget], None]], None],
    ) -> None:
        self._shelf = shelf
        self._config = config
        self._between_steps = between_steps

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that requests may name."""
        return self._shelf.names

    def load(self, name: str, folder: Path) -> None:
        """Serves the PEFT adapter of `folder` as `name`.

        Raises `AlreadyExists`, `Busy` where no place is free, `EngineClosed`, and what is wrong with the folder.
        """
        place = self._shelf.reserve(name)
        try:
            lora = read_adapter(folder, self._config)
            self._between_steps(lambda target: target.set_adapter(place.number, lora))
        except BaseException:
            self._shelf.forget(place)
            raise
        self._shelf.open(place)

    def unload(self, name: str, *, timeout_s: float | None = 60.0) -> None:
        """Lets no new request use `name`, waits for those that do, and frees its place.

        Raises `NotFound`, `Busy` when they have not ended within `timeout_s` (it then stays), `EngineClosed`.
        """
        place = self._shelf.leave(name, timeout_s)
        self._between_steps(lambda target: target.set_adapter(place.number, None))
        self._shelf.forget(place)
