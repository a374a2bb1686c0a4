"""Batches from several data sets in stated proportions, in an order that does not know how many ranks there are.

Sample g of a run is a pure function of the sources, the stages, the seed and g: the stage says which source it comes
from, that source's own shuffled order says which sample. So one integer resumes a run, at any world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sihe.core.errors import ConfigError, InvalidInput
from sihe.data.errors import SourceEnded, SourceTooSmall, TokenizerMismatch
from sihe.data.loading.order import SampleOrder
from sihe.data.loading.proportions import Proportions
from sihe.data.loading.samples import Batch, Samples
from sihe.data.loading.share import BatchShare

_READ_AHEAD = 4096  # samples whose places are computed at once: numpy's cost per call falls under 1 µs a sample


@dataclass(frozen=True)
class MixtureSource:
    """One data set of a mixture."""

    name: str
    samples: Samples
    max_epochs: float = math.inf
    """How often its samples may be seen; a run that would need more is refused."""

    def __post_init__(self) -> None:
        if not self.max_epochs > 0:
            raise ConfigError(
                f"max_epochs of source {self.name!r} is positive, got {self.max_epochs!r}", key="max_epochs"
            )


@dataclass(frozen=True)
class MixtureStage:
    """A part of a run with constant weights."""

    weights: Mapping[str, float]
    """By source, in any unit; a source that is not named has none."""
    until_sample: int | None = None
    """The first sample of the next stage; None in the last."""


class MixtureStream:
    """An endless iterator of this rank's `Batch`; see `SampleOrder` and `Proportions` for the order.

    `stages` follow each other, so that a curriculum changes the weights; a source goes on in its own order where the
    stage before left it. What can be known is checked when this is made, before the first step: `ConfigError` for
    stages and weights that cannot be, `TokenizerMismatch` for data sets of another tokenizer, `SourceTooSmall` for a
    source of which one global batch takes more samples than there are, and `SourceEnded` for one that would be seen
    more than its `max_epochs` before `stop_sample`. Without `stop_sample`, `SourceEnded` comes instead of the batch
    that would do it.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        stages: Sequence[MixtureStage],
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
        stop_sample: int | None = None,
    ) -> None:
        if start_sample < 0:
            raise InvalidInput(f"start_sample must not be negative, got {start_sample!r}")
        _check_sources(sources)
        self._sources = tuple(sources)
        self._share = BatchShare(global_batch, rank, world_size)
        self._stages = _timetable(self._sources, stages)
        # Sources of equal size must not be shuffled alike, nor a source's order depend on who stands beside it.
        self._orders = [SampleOrder(len(source.samples), _seed_of(seed, source.name)) for source in self._sources]
        self._check_sizes()
        if stop_sample is not None:
            self._check_epochs(stop_sample)
        self.next_sample = start_sample
        self._read_ahead = min(_READ_AHEAD, min(len(source.samples) for source in self._sources))
        self._ahead = (start_sample, np.empty(0, np.int64), np.empty(0, np.int64))

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each source so far; 1.5 is the middle of the second."""
        return self._epochs_at(self.next_sample)

    @property
    def shares(self) -> dict[str, float]:
        """Each source's share of the samples in the present stage, as it is kept."""
        stage = self._stage_of(self.next_sample)
        return {source.name: share for source, share in zip(self._sources, stage.proportions.shares, strict=True)}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        after = self.next_sample + self._share.global_batch
        self._check_epochs(after)
        sources, numbers = self._places(self.next_sample + self._share.offset, self._share.local_batch)
        batch = self._read(sources, numbers)
        self.next_sample = after
        return batch

    def _places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The source, and the sample in it, of `count` samples from number `first`."""
        begins, sources, numbers = self._ahead
        if not begins <= first <= begins + len(sources) - count:
            begins = first
            sources, numbers = self._compute(first, max(count, self._read_ahead))
            self._ahead = (begins, sources, numbers)
        piece = slice(first - begins, first - begins + count)
        return sources[piece], numbers[piece]

    def _compute(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        sources, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            stage = self._stage_of(first + done)
            length = min(count - done, stage.stop - first - done) if stage.stop is not None else count - done
            inside = first + done - stage.start
            drawn = stage.proportions.sources(inside, length)
            before = stage.counts_before + stage.proportions.counts(inside)
            sources[done : done + length] = drawn
            for index in np.unique(drawn):
                places = done + np.flatnonzero(drawn == index)
                numbers[places] = self._orders[index].samples(int(before[index]), len(places))
            done += length
        return sources, numbers

    def _read(self, sources: np.ndarray, numbers: np.ndarray) -> Batch:
        present = np.unique(sources)
        parts = [(sources == index, self._sources[index].samples.read(numbers[sources == index])) for index in present]
        if len(parts) == 1:
            return parts[0][1]
        tokens_BT1 = np.empty((len(sources), parts[0][1].tokens.shape[1]), np.int64)
        has_documents = parts[0][1].documents is not None
        documents_BT1 = np.empty_like(tokens_BT1) if has_documents else None
        for rows, part in parts:
            tokens_BT1[rows] = part.tokens
            if documents_BT1 is not None:
                documents_BT1[rows] = part.documents
        return Batch(tokens_BT1, documents_BT1)

    def _stage_of(self, sample: int) -> _Stage:
        return next(stage for stage in reversed(self._stages) if stage.start <= sample)

    def _epochs_at(self, sample: int) -> dict[str, float]:
        stage = self._stage_of(sample)
        counts = stage.counts_before + stage.proportions.counts(sample - stage.start)
        return {
            source.name: int(count) / len(source.samples) for source, count in zip(self._sources, counts, strict=True)
        }

    def _check_epochs(self, sample: int) -> None:
        needed = self._epochs_at(sample)
        for source in self._sources:
            if needed[source.name] > source.max_epochs:
                raise SourceEnded(source.name, needed=needed[source.name], allowed=source.max_epochs, sample=sample)

    def _check_sizes(self) -> None:
        for index, source in enumerate(self._sources):
            most = max(math.ceil(stage.proportions.shares[index] * self._share.global_batch) for stage in self._stages)
            if len(source.samples) < most:
                raise SourceTooSmall(source.name, samples=len(source.samples), needed=most)


@dataclass(frozen=True)
class _Stage:
    """A stage in its place: what was drawn from each source before it."""

    start: int
    stop: int | None
    proportions: Proportions
    counts_before: np.ndarray


def _timetable(sources: Sequence[MixtureSource], stages: Sequence[MixtureStage]) -> list[_Stage]:
    if not stages or stages[-1].until_sample is not None or any(s.until_sample is None for s in stages[:-1]):
        raise ConfigError("every stage of a mixture but the last has an until_sample, and the last none", key="stages")
    names = [source.name for source in sources]
    found: list[_Stage] = []
    start, counts = 0, np.zeros(len(sources), np.int64)
    for stage in stages:
        for name in stage.weights:
            if name not in names:
                raise ConfigError(f"weights name the source {name!r}, and there are {', '.join(names)}", key="weights")
        proportions = Proportions([stage.weights.get(name, 0.0) for name in names])
        found.append(_Stage(start, stage.until_sample, proportions, counts))
        if stage.until_sample is not None:
            if stage.until_sample <= start:
                raise ConfigError(
                    f"until_sample grows from stage to stage, got {stage.until_sample!r} after {start}", key="stages"
                )
            counts = counts + proportions.counts(stage.until_sample - start)
            start = stage.until_sample
    return found


def _check_sources(sources: Sequence[MixtureSource]) -> None:
    names = [source.name for source in sources]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"a mixture has sources of different names, got {names!r}", key="sources")
    first = sources[0].samples
    for source in sources[1:]:
        if source.samples.sequence_length != first.sequence_length:
            raise InvalidInput(
                f"source {source.name!r} has samples of {source.samples.sequence_length} tokens and "
                f"{sources[0].name!r} of {first.sequence_length}: a batch needs one length"
            )
        theirs, ours = source.samples.dataset, first.dataset
        tokenizers = [each.manifest.files.get("tokenizer.json") for each in (theirs, ours)]
        if tokenizers[0] != tokenizers[1] or (theirs.vocab_size, theirs.eos_token_id) != (
            ours.vocab_size,
            ours.eos_token_id,
        ):
            raise TokenizerMismatch(theirs.manifest.key, ours.manifest.key)
        if source.samples.has_documents != first.has_documents:
            raise InvalidInput(
                f"either every source of a mixture masks documents or none does, and {source.name!r} differs from "
                f"{sources[0].name!r}"
            )


def _seed_of(seed: int, name: str) -> int:
    if seed < 0:
        raise InvalidInput(f"a seed must not be negative, got {seed!r}")
    words = np.random.SeedSequence([seed, *name.encode()]).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])
