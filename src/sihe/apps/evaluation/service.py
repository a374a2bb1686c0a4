"""Evaluations of models, each tracked as a run with its lineage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sihe.apps.evaluation.types import Perplexity
from sihe.apps.evaluation.vocabulary import check_vocabulary
from sihe.core.errors import InvalidInput, TooLarge
from sihe.data.errors import DatasetTooSmall

if TYPE_CHECKING:
    from sihe.core.workspace import Workspace
    from sihe.data.loading import TokenDataset

EXPERIMENT = "evaluation"
_SPLIT = "held_out"
_TOKENS_AT_ONCE = 4096  # tokens of one forward pass: large enough for full speed on a CPU


class EvaluationService:
    """Measures models of a workspace on its data sets."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def perplexity(
        self,
        model_ref: str | Path,
        dataset_folder: str | Path,
        *,
        sequence_length: int | None = None,
        stride: int | None = None,
        batch: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Perplexity:
        """Perplexity on the held-out split, in float32; the same figures each time.

        `model_ref` is a model folder (a `Path`, or text with a `/` in it) or a registered model: `name`, `name@3`,
        `name@alias`. `dataset_folder` is a folder, `name` or `name@version`. `sequence_length` defaults to the model's
        `max_positions`, `stride` to `sequence_length`; `batch` is how many windows go through the model at once.

        Raises `NotFound`, `CorruptData`, `VocabularyMismatch`, `DatasetTooSmall`, `TooLarge`, `InvalidInput`; all of
        them before the first forward pass.
        """
        from tokenizers import Tokenizer

        from sihe.apps.evaluation.perplexity import negative_log_likelihood, text_bytes
        from sihe.data.loading import TokenDataset
        from sihe.data.loading.catalog import find_dataset
        from sihe.models.checkpoint import load_config, load_model

        folder, model_key = self._model(model_ref)
        dataset = TokenDataset.open(find_dataset(str(dataset_folder), self._workspace.path("datasets")))
        config = load_config(folder)
        sequence_length = config.max_positions if sequence_length is None else sequence_length
        stride = sequence_length if stride is None else stride
        _check_windows(sequence_length, stride, batch, config.max_positions)
        tokens = dataset.num_tokens(_SPLIT)
        if tokens < 2:
            raise DatasetTooSmall(dataset.folder, _SPLIT, tokens=tokens, needed=2)
        check_vocabulary(folder, model_key, config.vocab_size, dataset)

        run_id = self._start(model_key, dataset, sequence_length=sequence_length, stride=stride)
        tracking = self._workspace.tracking
        try:
            nats, counted = negative_log_likelihood(
                load_model(folder),
                dataset.split(_SPLIT),
                sequence_length=sequence_length,
                stride=stride,
                batch=batch or max(1, _TOKENS_AT_ONCE // sequence_length),
                on_progress=on_progress,
            )
            tokenizer = Tokenizer.from_file(str(dataset.folder / "tokenizer.json"))
            size = text_bytes(dataset.split(_SPLIT), tokenizer, dataset.eos_token_id)
            key = dataset.manifest.key
            result = Perplexity(model_key, key, run_id, sequence_length, stride, counted, size, nats)
            tracking.log_metrics(run_id, result.figures)
        except BaseException:
            tracking.end_run(run_id, "FAILED")
            raise
        tracking.end_run(run_id)
        return result

    def _model(self, reference: str | Path) -> tuple[Path, str]:
        """A local model folder and the name that lineage gives it."""
        if isinstance(reference, Path) or "/" in reference:
            folder = Path(reference).absolute()
            return folder, f"folder:{folder}"
        version = self._workspace.tracking.resolve(reference)
        return self._workspace.tracking.download(version), version.key

    def _start(self, model: str, dataset: TokenDataset, **params: int) -> str:
        tracking = self._workspace.tracking
        key = dataset.manifest.key
        run_id = tracking.start_run(
            EXPERIMENT, f"perplexity of {model}", params={"model": model, "dataset": key, "split": _SPLIT, **params}
        )
        tracking.link(f"run:{run_id}", [model, key])
        return run_id


def _check_windows(sequence_length: int, stride: int, batch: int | None, max_positions: int) -> None:
    if sequence_length < 1 or not 1 <= stride <= sequence_length or (batch is not None and batch < 1):
        raise InvalidInput(
            "sequence_length and batch must be positive, and stride between 1 and sequence_length, "
            f"got sequence_length={sequence_length!r}, stride={stride!r}, batch={batch!r}"
        )
    if sequence_length > max_positions:
        raise TooLarge(
            f"the model takes sequences of at most {max_positions} tokens, got sequence_length={sequence_length}",
            limit=max_positions,
            actual=sequence_length,
            unit="tokens",
        )
