"""Texts a second of the encoder beside transformers, in the same run on the same texts, and what bytes cost in quality.

The peer is what sentence-transformers runs: texts sorted by length, batches of 32 padded to their longest, eager
float32, mean pooling. All have the same threads (`OMP_NUM_THREADS`). The model is a BERT of MiniLM-L6's shape with
random weights, or `--model FOLDER` in the layout of sentence-transformers; the cosines are those of its weights then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch.nn import functional

from benchmarks.harness import Claim, alternate, at_least, print_table, report
from sihe.models.checkpoint import save_model
from sihe.models.config import ModelConfig
from sihe.models.encoder import Encoder
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder.engine import EncoderEngine
from sihe.serving.engine.encoder.types import EmbeddingRequest

BATCH = 32
SHAPE = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
Texts = list[tuple[int, ...]]


def main() -> None:
    """Measures and writes the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        claims = measure(options.model or _random_model(Path(folder)), options.texts, options.repeats)
    report(__file__, claims)


def measure(folder: Path, count: int, repeats: int) -> list[Claim]:
    """The claims about the model of a folder."""
    claims = []
    with (
        EncoderEngine.load(folder, EngineConfig(dtype="float32")) as exact,
        EncoderEngine.load(folder, EngineConfig(dtype="int8")) as rough,
    ):
        for name, texts in (("short", _texts(count, 8, 30)), ("mixed", _texts(count // 4, 8, 250))):
            contenders = {
                "transformers, padded": _peer(folder, texts),
                "sihe float32": _ours(exact, texts),
                "sihe int8": _ours(rough, texts),
            }
            for run in contenders.values():
                run()
            figures = alternate(contenders, repeats=repeats)
            print(f"\n{name}: {len(texts)} texts of {statistics.mean(map(len, texts)):.0f} tokens")
            print_table(figures, unit="texts/s", baseline="transformers, padded")
            middle = {key: statistics.median(values) for key, values in figures.items()}
            peer = middle["transformers, padded"]
            for kind, ratio in (("float32", 1.1), ("int8", 2.0)):
                claim = f"embedding {name} texts in {kind}, {torch.get_num_threads()} threads, beside transformers"
                claims.append(at_least(claim, middle[f"sihe {kind}"], peer, unit="texts/s", ratio=ratio))
        request = EmbeddingRequest(tuple(_texts(count, 8, 120)))
        cosines = (exact.submit(request).result().values * rough.submit(request).result().values).sum(1)
    print(f"\ncosine of int8 to float32: lowest {cosines.min():.5f}, mean {cosines.mean():.5f}")
    mean = float(cosines.mean())
    claims.append(Claim("mean cosine of int8 vectors to float32 ones", mean, None, None, "", ">= 0.999", mean >= 0.999))
    return claims


def _ours(engine: EncoderEngine, texts: Texts) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        engine.submit(EmbeddingRequest(tuple(texts))).result()
        return len(texts) / (time.perf_counter() - started)

    return run


def _peer(folder: Path, texts: Texts) -> Callable[[], float]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def run() -> float:
        started = time.perf_counter()
        ordered = sorted(texts, key=len, reverse=True)
        with torch.inference_mode():
            for start in range(0, len(ordered), BATCH):
                batch = ordered[start : start + BATCH]
                longest = len(batch[0])
                tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in batch])
                mask = (torch.arange(longest) < torch.tensor([len(text) for text in batch])[:, None]).long()
                hidden = model(tokens, attention_mask=mask).last_hidden_state
                pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                functional.normalize(pooled, dim=-1).numpy()
        return len(texts) / (time.perf_counter() - started)

    return run


def _texts(count: int, shortest: int, longest: int) -> Texts:
    """Texts whose lengths are spread as real ones are: many short, few long."""
    generator = np.random.default_rng(longest)
    lengths = np.exp(generator.uniform(np.log(shortest), np.log(longest), count)).astype(int)
    return [(101, *generator.integers(1000, 30000, length - 2).tolist(), 102) for length in lengths]


def _random_model(folder: Path) -> Path:
    torch.manual_seed(0)
    save_model(Encoder(ModelConfig.from_hf(SHAPE)), folder)
    Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    (folder / "1_Pooling").mkdir()
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("", "Normalize"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


if __name__ == "__main__":
    main()
