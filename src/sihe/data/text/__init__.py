"""From files to token data sets: read, filter, deduplicate, tokenise, pack."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Document": "sihe.data.text.types",
        "NearDuplicates": "sihe.data.text.dedupe",
        "PreparedDataset": "sihe.data.text.types",
        "Progress": "sihe.data.text.types",
        "Skipped": "sihe.data.text.types",
        "TextService": "sihe.data.text.service",
        "Verdict": "sihe.data.text.types",
        "judge": "sihe.data.text.filters",
        "load_tokenizer": "sihe.data.text.tokenizer",
        "read_documents": "sihe.data.text.documents",
        "train_tokenizer": "sihe.data.text.tokenizer",
    },
)
