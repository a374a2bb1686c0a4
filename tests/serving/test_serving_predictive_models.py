"""Each library's models: saved, described, loaded, and equal to what the library itself says. One conformance suite."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import orjson
import pytest
import torch

from sihe.core.errors import AlreadyExists, ConfigError, CorruptData, InvalidInput, NotFound
from sihe.serving.errors import NoMemory
from sihe.serving.predictive import folder as model_folder
from sihe.serving.predictive.backends.pytorch import pickles_in
from sihe.serving.predictive.backends.trees import check_trees
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.folder import describe, example_of, is_predictive, open_backend
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.registration import save_onnx, save_sklearn, save_torch
from sihe.serving.predictive.types import InferenceRequest, ModelDescription, TensorSpec
from support.predictive_models import Scale, classifier, features, matmul_onnx, sentiment, text_onnx

Inputs = Mapping[str, Any]


def save_classifier(folder: Path) -> ModelDescription:
    return save_sklearn(classifier(), folder, example=features(3))


def classifier_says(inputs: Inputs) -> dict[str, Any]:
    estimator = classifier()
    return {"label": estimator.predict(inputs["input"]), "probabilities": estimator.predict_proba(inputs["input"])}


def save_sentiment(folder: Path) -> ModelDescription:
    return save_sklearn(sentiment(), folder, example=["a good day", ""])


def sentiment_says(inputs: Inputs) -> dict[str, Any]:
    texts = [item.decode() for item in inputs["input"]]
    labels = np.array([label.encode() for label in sentiment().predict(texts)], dtype=object)
    return {"label": labels, "probabilities": sentiment().predict_proba(texts)}


def save_scale(folder: Path) -> ModelDescription:
    example = {"x": torch.ones(2, 3), "y": torch.zeros(2, 3)}
    return save_torch(Scale(), folder, example=example, outputs=("scaled", "total"))


def scale_says(inputs: Inputs) -> dict[str, Any]:
    return {"scaled": 2 * inputs["x"] + inputs["y"], "total": inputs["x"].sum(-1)}


def save_graph(folder: Path) -> ModelDescription:
    return save_onnx(matmul_onnx(folder.with_suffix(".onnx"), factor=3.0), folder)


def graph_says(inputs: Inputs) -> dict[str, Any]:
    return {"z": 3 * inputs["x"]}


def numbers(*shape: int) -> Any:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


CASES: dict[str, tuple[Callable[[Path], ModelDescription], Callable[[Inputs], dict[str, Any]], Inputs]] = {
    "sklearn": (save_classifier, classifier_says, {"input": features(5, seed=1)}),
    "sklearn text": (save_sentiment, sentiment_says, {"input": np.array([b"so good", b"bad", "ü".encode()], object)}),
    "torch": (save_scale, scale_says, {"x": numbers(5, 3), "y": numbers(5, 3)}),
    "onnx": (save_graph, graph_says, {"x": numbers(5, 4)}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case, saved."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name, (save, _, _) in CASES.items():
        made[name] = root / name.replace(" ", "-")
        save(made[name])
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_served_model_says_what_its_library_says(case: str, folders: dict[str, Path]) -> None:
    _, says, inputs = CASES[case]
    folder = folders[case]
    assert is_predictive(folder)
    description = describe(folder)
    assert [spec.name for spec in description.inputs] == list(inputs)
    expected = says(inputs)
    with Predictor.load(folder) as predictor:
        predictor.warm()
        whole = predictor.submit(InferenceRequest(inputs, tuple(expected))).result(30).outputs
        assert list(whole) == list(expected) == [spec.name for spec in description.outputs]
        for spec in description.outputs:
            assert spec.takes(whole[spec.name].shape)
            if spec.datatype == "BYTES":
                assert whole[spec.name].tolist() == expected[spec.name].tolist()
            else:
                np.testing.assert_allclose(whole[spec.name], expected[spec.name], rtol=1e-6)
        one = predictor.submit(InferenceRequest({name: array[1:2] for name, array in inputs.items()}, tuple(expected)))
        for name, array in one.result(30).outputs.items():
            if array.dtype == object:
                assert array.tolist() == whole[name][1:2].tolist()
            else:
                np.testing.assert_allclose(array, whole[name][1:2], rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_only_wanted_outputs_are_given(case: str, folders: dict[str, Path]) -> None:
    description = describe(folders[case])
    backend = open_backend(folders[case], description, PredictiveConfig(threads=1))
    last = description.outputs[-1].name
    assert list(backend.run(example_of(folders[case], description), frozenset({last}))) == [last]
    backend.close()


def test_labels_and_platforms_are_described(folders: dict[str, Path]) -> None:
    assert describe(folders["sklearn"]) == ModelDescription(
        platform="sklearn_skops",
        file="model.skops",
        inputs=(TensorSpec("input", "FP64", (-1, 4)),),
        outputs=(TensorSpec("label", "INT64", (-1,)), TensorSpec("probabilities", "FP64", (-1, 3), ("0", "1", "2"))),
        made_with=describe(folders["sklearn"]).made_with,
    )
    assert describe(folders["torch"]).platform == "pytorch_export"
    assert describe(folders["onnx"]).outputs == (TensorSpec("z", "FP32", (-1, 4)),)


def test_a_lone_onnx_file_describes_itself(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    matmul_onnx(tmp_path / "a" / "model.onnx", length="length")
    found = describe(tmp_path / "a")
    assert found.inputs == (TensorSpec("x", "FP32", (-1, -1)),)
    assert found.batched
    matmul_onnx(tmp_path / "a" / "model.onnx", rows=2)
    assert not describe(tmp_path / "a").batched
    matmul_onnx(tmp_path / "a" / "model.onnx")
    assert describe(tmp_path / "a").batched
    assert describe(tmp_path / "a").inputs == (TensorSpec("x", "FP32", (-1, 4)),)


def test_text_goes_through_onnx(tmp_path: Path) -> None:
    save_onnx(text_onnx(tmp_path / "t.onnx"), tmp_path / "t")
    table = np.empty((2, 1), dtype=object)
    table[:, 0] = ["ü".encode(), b""]
    with Predictor.load(tmp_path / "t") as predictor:
        assert predictor.submit(InferenceRequest({"text": table}, ("same",))).result(30).outputs["same"].tolist() == [
            ["ü".encode()],
            [b""],
        ]
        table[1, 0] = b"\xff"
        with pytest.raises(InvalidInput, match="UTF-8"):
            predictor.submit(InferenceRequest({"text": table}, ("same",))).result(30)


def test_bfloat16_weights_give_bf16_tensors(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2).to(torch.bfloat16)
    example = torch.randn(2, 3).to(torch.bfloat16)
    found = save_torch(module, tmp_path / "m", example={"input": example})
    assert (found.inputs[0].datatype, found.outputs[0].datatype) == ("BF16", "BF16")
    with Predictor.load(tmp_path / "m") as predictor, torch.no_grad():
        made = predictor.submit(InferenceRequest({"input": example.float().numpy()}, ("output",))).result(30)
        np.testing.assert_array_equal(made.outputs["output"], module(example).float().numpy())


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pkl", "model.joblib", "model.pt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    joblib.dump(classifier(), tmp_path / name)
    with pytest.raises(InvalidInput, match=r"is a pickle.*save_sklearn"):
        describe(tmp_path)
    (tmp_path / "model.json").write_bytes(orjson.dumps({"platform": "sklearn_skops", "file": name}))
    with pytest.raises(InvalidInput, match="is a pickle"):
        describe(tmp_path)


class Strange:
    """A type that skops does not know."""

    def __init__(self) -> None:
        self.factor = 2.0

    def predict(self, rows: Any) -> Any:
        return rows[:, 0] * self.factor


def test_types_must_be_trusted_by_whoever_deploys(tmp_path: Path) -> None:
    name = f"{Strange.__module__}.{Strange.__qualname__}"
    with pytest.raises(InvalidInput, match=r"not trusted: .*Strange"):
        save_sklearn(Strange(), tmp_path / "s", example=features(2))
    assert not (tmp_path / "s").exists()
    save_sklearn(Strange(), tmp_path / "s", example=features(2), trusted_types=[name])
    with pytest.raises(InvalidInput, match="trusted_types="):
        Predictor.load(tmp_path / "s")
    with Predictor.load(tmp_path / "s", PredictiveConfig.from_mapping({"trusted_types": name})) as predictor:
        rows = features(2)
        answer = predictor.submit(InferenceRequest({"input": rows}, ("prediction",))).result(30)
        np.testing.assert_allclose(answer.outputs["prediction"], rows[:, 0] * 2)


def forests() -> dict[str, Any]:
    """Every kind of model with trees, nested ones too."""
    from sklearn import calibration, ensemble, pipeline, preprocessing

    forest = ensemble.RandomForestClassifier(3, max_depth=3, random_state=0)
    encoded = pipeline.make_pipeline(preprocessing.PolynomialFeatures(2), forest)
    return {
        "forest": forest,
        "boosting": ensemble.GradientBoostingClassifier(n_estimators=3),
        "histograms": ensemble.HistGradientBoostingClassifier(max_iter=3),
        "isolation": ensemble.IsolationForest(n_estimators=3, max_features=2),
        "bagging": ensemble.BaggingClassifier(forest, n_estimators=2, max_features=3),
        "voting": ensemble.VotingClassifier([("a", encoded), ("b", ensemble.AdaBoostClassifier(n_estimators=2))]),
        "calibrated": calibration.CalibratedClassifierCV(forest, cv=2),
    }


@pytest.mark.parametrize("kind", ["forest", "boosting", "histograms", "isolation", "bagging", "voting", "calibrated"])
def test_models_with_trees_need_nobodys_trust(tmp_path: Path, kind: str) -> None:
    rows = features(60)
    estimator = forests()[kind].fit(rows, rows[:, 0] > 0)
    description = save_sklearn(estimator, tmp_path / "m", example=rows[:2])
    name = description.outputs[0].name
    with Predictor.load(tmp_path / "m") as predictor:
        made = predictor.submit(InferenceRequest({"input": rows}, (name,))).result(30).outputs[name]
    assert made.tolist() == estimator.predict(rows).tolist()


@pytest.mark.parametrize("harm", ["circle", "outside", "feature", "few features"])
@pytest.mark.parametrize("kind", ["forest", "histograms"])
def test_a_tree_that_leads_astray_is_refused(kind: str, harm: str) -> None:
    rows = features(60)
    estimator = forests()[kind].fit(rows, rows[:, 0] > 0)
    check_trees(estimator)
    tree: Any = None
    if kind == "forest":
        tree = estimator.estimators_[1].tree_
        left, feature = tree.children_left, tree.feature
    else:
        nodes = estimator._predictors[1][0].nodes
        left, feature = nodes["left"], nodes["feature_idx"]
    assert left[0] > 0
    if harm == "circle":
        left[0] = 0
    elif harm == "outside":
        left[0] = 10_000
    elif harm == "feature":
        feature[0] = 4
    else:
        estimator.n_features_in_ = 0
    with pytest.raises(InvalidInput, match="not sound"):
        check_trees(estimator)


@pytest.mark.parametrize("part", ["data/sample_inputs/model.pt", "data/constants/opaque_obj_0", "config"])
def test_an_export_with_a_pickle_is_refused(tmp_path: Path, folders: dict[str, Path], part: str) -> None:
    source, target = folders["torch"] / "model.pt2", tmp_path / "model.pt2"
    assert list(pickles_in(source)) == []
    harm = io.BytesIO()
    torch.save({"x": Strange()}, harm)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if part in name and part != "config":
                data = harm.getvalue()
            if part == "config" and name.endswith("weights_config.json"):
                data = data.replace(b'"use_pickle": false', b'"use_pickle": true')
            new.writestr(name, data)
        if part.endswith("obj_0"):
            new.writestr(f"model/{part}", harm.getvalue())
    (tmp_path / "model.json").write_bytes((folders["torch"] / "model.json").read_bytes())
    with pytest.raises(InvalidInput, match="holds a pickle"):
        Predictor.load(tmp_path)


@pytest.mark.parametrize("case", ["sklearn", "torch", "onnx"])
def test_a_damaged_file_is_corrupt_data(tmp_path: Path, folders: dict[str, Path], case: str) -> None:
    description = describe(folders[case])
    whole = (folders[case] / description.file).read_bytes()
    (tmp_path / description.file).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "model.json").write_bytes((folders[case] / "model.json").read_bytes())
    with pytest.raises(CorruptData, match=description.file):
        Predictor.load(tmp_path)
    (tmp_path / description.file).unlink()
    with pytest.raises(NotFound, match=description.file):
        Predictor.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "../secret.skops"}, "own folder"),
        ({"platform": "magic"}, "platform must be one of"),
        ({"inputs": []}, "at least one"),
        ({"inputs": [{"name": "input", "datatype": "FLOAT", "shape": [-1]}]}, "datatype must be one of"),
        ({"inputs": [{"name": "input", "datatype": "FP64", "shape": [4]}]}, "first dimension"),
        ({"inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, -2]}]}, "any size"),
        ({"inputs": [{"name": "input", "datatype": "FP64", "shape": [-1], "extra": 1}]}, "a tensor has"),
        ({"surprise": 1}, "unknown key"),
        ({"batched": "yes"}, "batched"),
    ],
)
def test_a_bad_description_says_what_is_wrong(
    tmp_path: Path, folders: dict[str, Path], change: dict[str, Any], said: str
) -> None:
    values = orjson.loads((folders["sklearn"] / "model.json").read_bytes())
    (tmp_path / "model.json").write_bytes(orjson.dumps(values | change))
    with pytest.raises(CorruptData, match=said):
        describe(tmp_path)


def test_a_description_of_another_model_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    for case, change, said in (
        ("onnx", {"inputs": [{"name": "q", "datatype": "FP32", "shape": [-1, 4]}]}, "has no input 'q'"),
        ("torch", {"outputs": [{"name": "q", "datatype": "FP32", "shape": [-1]}]}, "gives 2 outputs"),
        ("sklearn", {"outputs": [{"name": "features", "datatype": "FP32", "shape": [-1]}]}, "no output 'features'"),
    ):
        folder = tmp_path / case
        folder.mkdir()
        description = describe(folders[case])
        (folder / description.file).write_bytes((folders[case] / description.file).read_bytes())
        values = orjson.loads((folders[case] / "model.json").read_bytes())
        (folder / "model.json").write_bytes(orjson.dumps(values | change))
        with pytest.raises((CorruptData, InvalidInput), match=said):
            Predictor.load(folder)


def test_a_model_without_room_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folders["onnx"] / "model.onnx").stat().st_size
    monkeypatch.setattr(model_folder, "available_bytes", lambda: 2 * size)
    Predictor.load(folders["onnx"]).close()
    monkeypatch.setattr(model_folder, "available_bytes", lambda: 2 * size - 1)
    with pytest.raises(NoMemory, match=r"model\.onnx needs"):
        Predictor.load(folders["onnx"])


def test_a_model_that_mixes_rows_is_found_when_it_is_saved(tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(0, keepdim=True)

    with pytest.raises(Exception, match='"batched": false'):
        save_torch(Mean(), tmp_path / "m", example={"x": torch.ones(2, 3)})
    assert not (tmp_path / "m").exists()
    description = save_torch(Mean(), tmp_path / "m", example={"x": torch.ones(2, 3)}, batched=False)
    assert description.inputs[0].shape == (2, 3)
    with pytest.raises(AlreadyExists):
        save_torch(Mean(), tmp_path / "m", example={"x": torch.ones(2, 3)}, batched=False)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_delay_ms": -1}, "max_delay_ms"),
        ({"wait": "never"}, "wait"),
        ({"instances": True}, "instances"),
        ({"timeout_ms": 0}, "timeout_ms"),
        ({"trusted_types": [1]}, "trusted_types"),
        ({"dtype": "float32"}, "dtype"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PredictiveConfig.from_mapping(values)
    assert caught.value.key == key


def test_settings_survive_the_records() -> None:
    config = PredictiveConfig(max_batch_size=8, trusted_types=("a.B", "c.D"), timeout_ms=5)
    assert PredictiveConfig.from_mapping(orjson.loads(orjson.dumps(config.to_mapping()))) == config
    assert PredictiveConfig().to_mapping() == {"kind": "predictive"}
