"""Post-training recipes: from a base model to one that follows instructions, preferences and rewards."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ChatTokenizer": "sihe.training.recipes.chat",
        "Objective": "sihe.training.recipes.ports",
        "RecipeConfig": "sihe.training.recipes.config",
        "RecipeResult": "sihe.training.recipes.types",
        "RecipeService": "sihe.training.recipes.service",
        "Rollout": "sihe.training.recipes.ports",
        "WeightSync": "sihe.training.recipes.weight_sync",
        "load_recipe": "sihe.training.recipes.reader",
    },
)
