"""Predictive models (scikit-learn, PyTorch, ONNX) over the Open Inference Protocol, with dynamic batching."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ModelDescription": "sihe.serving.predictive.types",
        "PredictiveConfig": "sihe.serving.predictive.config",
        "Predictor": "sihe.serving.predictive.predictor",
        "TensorSpec": "sihe.serving.predictive.types",
        "describe": "sihe.serving.predictive.folder",
        "register": "sihe.serving.predictive.registration",
        "save_onnx": "sihe.serving.predictive.registration",
        "save_sklearn": "sihe.serving.predictive.registration",
        "save_torch": "sihe.serving.predictive.registration",
    },
)
