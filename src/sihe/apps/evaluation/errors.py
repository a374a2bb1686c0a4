"""What can be wrong with a pair of model and data set."""

from __future__ import annotations

from sihe.core.errors import InvalidInput


class VocabularyMismatch(InvalidInput):
    """The data set's token ids do not mean to the model what they meant when the text was tokenized."""

    def __init__(self, model: str, dataset: str, reason: str) -> None:
        super().__init__(
            f"model {model} cannot be evaluated on {dataset}: {reason}. "
            "Prepare the text again with the model's tokenizer, or choose the data set that the model was trained on"
        )
        self.model = model
        self.dataset = dataset
