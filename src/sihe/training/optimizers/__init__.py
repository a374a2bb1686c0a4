"""Update rules: how masters move along gradients, whatever cut the model into parts; and the average of the weights."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AdamW": "sihe.training.optimizers.adamw",
        "AdamW8bit": "sihe.training.optimizers.adamw8bit",
        "Lion": "sihe.training.optimizers.lion",
        "Muon": "sihe.training.optimizers.muon",
        "PlacedMatrix": "sihe.training.optimizers.matrix",
        "SGD": "sihe.training.optimizers.sgd",
        "UpdateRule": "sihe.training.optimizers.rule",
        "Weight": "sihe.training.optimizers.rule",
        "WeightAverage": "sihe.training.optimizers.ema",
        "WholeMatrix": "sihe.training.optimizers.matrix",
        "make_rule": "sihe.training.optimizers.catalog",
    },
)
