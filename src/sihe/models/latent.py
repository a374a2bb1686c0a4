"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434, section 2.1).

    B  batch      T  time      D  hidden      N  heads      H  width of a query or key, content and then position
    C  content dims, H - R      R  rotary dims      V  width of a value

Keys and values of all heads come from one narrow vector of each token, which is all that a cache would have to hold,
beside one rotary key for all heads: a rotation between the two products would keep them from being one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sihe.models.attention import Mixing
from sihe.models.config import ModelConfig
from sihe.models.norm import RMSNorm
from sihe.models.places import Places
from sihe.models.ports import Attend
from sihe.models.products import Linear

_NORM_EPS = 1e-6  # of DeepSeek's own code, whatever the eps of the other norms


class LatentAttention(nn.Module):
    """Projects down and up again, turns the rotary dims, attends, projects back.

    `q_up`, `kv_up` and `out` are ordered by head, so that a contiguous share is a whole number of heads.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        latent = config.attention.latent
        assert latent is not None
        heads, hidden = config.num_heads, config.hidden_size
        self.head_dim = config.head_dim
        self.rotary_dim = latent.rotary_dim
        self.content_dim = config.head_dim - latent.rotary_dim
        self.value_dim = latent.value_dim
        self.q_down = Linear(hidden, latent.q_rank, bias=False) if latent.q_rank else None
        self.q_norm = RMSNorm(latent.q_rank, _NORM_EPS) if latent.q_rank else None
        self.q_up = Linear(latent.q_rank or hidden, heads * config.head_dim, bias=False)
        self.kv_down = Linear(hidden, latent.kv_rank + latent.rotary_dim, bias=False)
        self.kv_norm = RMSNorm(latent.kv_rank, _NORM_EPS)
        self.kv_up = Linear(latent.kv_rank, heads * (self.content_dim + latent.value_dim), bias=False)
        self.out = Linear(heads * latent.value_dim, hidden, bias=False)
        self.mix = Mixing(config, layer)

    def forward(self, x_BTD: Tensor, places: Places, attend: Attend | None = None) -> Tensor:
        """What each position gathers from those that it sees, [B, T, D]."""
        assert places.rotation is not None
        narrow = x_BTD if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x_BTD))
        q_BTNH = self.q_up(narrow).unflatten(-1, (-1, self.head_dim))
        q_BTNC, q_BTNR = torch.split(q_BTNH, [self.content_dim, self.rotary_dim], dim=-1)
        latent, k_BTR = torch.split(self.kv_down(x_BTD), [self.kv_norm.weight.shape[0], self.rotary_dim], dim=-1)
        kv = self.kv_up(self.kv_norm(latent)).unflatten(-1, (-1, self.content_dim + self.value_dim))
        k_BTNC, v_BTNV = torch.split(kv, [self.content_dim, self.value_dim], dim=-1)
        k_BTNR = places.rotation.turn(k_BTR.unsqueeze(2)).expand(-1, -1, k_BTNC.shape[2], -1)
        q_BTNH = torch.cat((q_BTNC, places.rotation.turn(q_BTNR)), dim=-1)
        k_BTNH = torch.cat((k_BTNC, k_BTNR), dim=-1)
        return self.out(self.mix(q_BTNH, k_BTNH, v_BTNV, places, attend).flatten(2))
