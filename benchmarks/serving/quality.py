"""What a precision costs in quality: perplexity of a trained model in bf16, int8, int4 and with an int8 cache beside
float32.

The model is trained here, by the house's own training, on the sources of Python's library, and kept for the next run.
Perplexity is over held-out text and comes out of the serving engine itself (log-probabilities of echoed prompts), so it
measures what is served: quantised weights, quantised activations and the cache's precision.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.harness import Claim, report

if TYPE_CHECKING:
    from sihe.core.workspace import Workspace

MODEL, DATASET, VOCABULARY, LENGTH = "quality", "quality", 8192, 256
REFERENCE = {"dtype": "float32"}
WAYS: dict[str, dict[str, object]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "int8, cache int8": {"dtype": "int8", "kv_dtype": "int8"},
    "int4": {"dtype": "int4"},
}
# How much worse than float32 a precision may be. int8's bound is the goal; int4's is what a scale every 32 weights
# costs small models, whose weights have little to spare (llama.cpp's own table has Q4_0 at 4 % on 7 B parameters:
# https://github.com/ggml-org/llama.cpp/discussions/2094).
BOUNDS = {"bfloat16": 0.01, "int8": 0.01, "int8, cache int8": 0.01, "int4": 0.10}
_EXCLUDED = (
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "pydoc_data",
    "encodings",
)


def trained(home: Path, preset: str, steps: int) -> tuple[Path, Path]:
    """Folders of the model and of its data set; trains where that was not done with that preset and number of steps."""
    from sihe.core import settings
    from sihe.core.workspace import Workspace

    kept = home / f"trained-{preset}-{steps}.json"
    if not kept.exists():
        with Workspace(settings.load({"home": str(home)}, environ={}, directory=home)) as workspace:
            kept.write_text(json.dumps([str(path) for path in _train(workspace, preset, steps)]))
    model, dataset = json.loads(kept.read_text())
    return Path(model), Path(dataset)


def _train(workspace: Workspace, preset: str, steps: int) -> tuple[Path, Path]:
    from sihe.data.text.service import TextService
    from sihe.training.presets.reader import load_config
    from sihe.training.service import TrainingService

    sources = [Path(sysconfig.get_paths()["stdlib"])]
    prepared = TextService(workspace).prepare(DATASET, sources, vocab_size=VOCABULARY, exclude=_EXCLUDED)
    changed = {"dataset": str(prepared.folder), "model_name": MODEL, "max_steps": steps, "sequence_length": LENGTH}
    changed |= {"warmup_steps": max(1, steps // 10), "checkpoint_every": max(1, steps // 4), "world_size": 1}
    result = TrainingService(workspace).train(load_config(preset, changed))
    print(f"trained {result.steps} steps to a loss of {result.final_loss:.3f}", flush=True)
    return workspace.tracking.download(result.model_version), prepared.folder


def held_out(dataset: Path, most: int) -> list[tuple[int, ...]]:
    """At most `most` windows of the held-out split, which do not overlap."""
    from sihe.data.loading import TokenDataset

    split = TokenDataset.open(dataset).split("held_out")
    starts = np.arange(0, len(split) - LENGTH, LENGTH)[:most]
    return [tuple(int(token) for token in row) for row in split.windows(starts, LENGTH)]


def perplexity(folder: Path, settings: dict[str, object], windows: list[tuple[int, ...]]) -> float:
    """Of every token of the windows but their first."""
    from sihe.serving.engine.config import EngineConfig
    from sihe.serving.engine.engine import Engine
    from sihe.serving.engine.types import GenerationRequest

    nats, counted = 0.0, 0
    with Engine.load(folder, EngineConfig.from_mapping({**settings, "max_context": LENGTH + 1})) as engine:
        streams = [
            engine.submit(GenerationRequest(prompt=window, max_tokens=0, echo=True, logprobs=0, temperature=0))
            for window in windows
        ]
        for stream in streams:
            scores = [scored.logprob for scored in stream.result().logprobs if scored.logprob is not None]
            nats -= sum(scores)
            counted += len(scores)
    if counted != len(windows) * (LENGTH - 1):
        raise ValueError(f"expected {len(windows) * (LENGTH - 1)} log-probabilities, got {counted}")
    return math.exp(nats / counted)


def main() -> int:
    """Trains where need be, measures each precision, and claims what it costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano-10m", help="what is trained: sihe train presets")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--windows", type=int, default=200, help=f"of {LENGTH} held-out tokens")
    parser.add_argument("--home", type=Path, default=Path("build/benchmarks/quality"), help="where the model is kept")
    chosen = parser.parse_args()
    home = chosen.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    model, dataset = trained(home, chosen.preset, chosen.steps)
    windows = held_out(dataset, chosen.windows)
    reference = perplexity(model, REFERENCE, windows)
    print(f"{'float32':16} perplexity {reference:.4f} over {len(windows) * (LENGTH - 1):,} held-out tokens")
    claims = []
    for way, settings in WAYS.items():
        found, bound = perplexity(model, settings, windows), BOUNDS[way]
        change = found / reference - 1
        print(f"{way:16} perplexity {found:.4f}, {change:+.2%}", flush=True)
        name = f"perplexity in {way} against float32"
        claims.append(Claim(name, found, reference, found / reference, "", f"<= {1 + bound:g} x", change <= bound))
    report(__file__, claims)
    return 0


if __name__ == "__main__":
    sys.exit(main())
