"""Self-attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245).

    B  batch      T  time      D  hidden      N  query heads      K  key-value heads      H  head dim
    G  rows of one key-value head's group: its N / K queries, its key, its value

One matrix product gives queries, keys and values. Its rows are ordered by key-value head, each group being its query
heads, its key head and its value head, so that a contiguous share of the rows is a whole number of groups.
"""

from __future__ import annotations

from torch import Tensor, nn

from sihe.models.config import ModelConfig
from sihe.models.ports import Attend
from sihe.models.rope import Rotation


class Attention(nn.Module):
    """Projects, turns queries and keys to their positions, attends, projects back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_kv_heads = config.num_kv_heads
        self.group = config.num_heads // config.num_kv_heads
        self.head_dim = config.head_dim
        rows = config.num_kv_heads * (self.group + 2) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, rows, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend | None = None) -> Tensor:
        """What each position gathers from those before it and itself, [B, T, D]."""
        qkv_BTKGH = self.qkv(x_BTD).unflatten(-1, (-1, self.group + 2, self.head_dim))
        q_BTNH, k_BTKH, v_BTKH = rotation.apply(qkv_BTKGH)
        o_BTNH = causal(q_BTNH, k_BTKH, v_BTKH) if attend is None else attend(self.layer, q_BTNH, k_BTKH, v_BTKH)
        return self.out(o_BTNH.flatten(2))


def causal(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """Softmax attention of whole sequences, each position over those up to itself: [B, T, N, H]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    grouped = q.shape[1] != k.shape[1]
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
