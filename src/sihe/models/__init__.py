"""Networks and their checkpoints. Knows nothing of parallelism, training or serving."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Attend": "sihe.models.ports",
        "CheckpointMismatch": "sihe.models.errors",
        "Decoder": "sihe.models.decoder",
        "Encoder": "sihe.models.encoder",
        "Exchange": "sihe.models.ports",
        "LoraConfig": "sihe.models.lora_config",
        "ModelConfig": "sihe.models.config",
        "RecomputeConfig": "sihe.models.recompute_config",
        "UnsupportedModel": "sihe.models.errors",
        "apply_lora": "sihe.models.lora",
        "has_bf16": "sihe.models.precision",
        "load_config": "sihe.models.checkpoint",
        "load_encoder": "sihe.models.checkpoint",
        "load_model": "sihe.models.checkpoint",
        "native_bf16": "sihe.models.precision",
        "save_model": "sihe.models.checkpoint",
    },
)
