"""What the process of `rlhf.kl` runs: three estimates of a divergence, exactly and from samples, and the best policy.

V  answers      N  samples      p  the policy      q  the reference
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sihe.training.recipes import losses

ESTIMATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": losses.kl_k1,
    "k2": losses.kl_k2,
    "k3": losses.kl_k3,
}
_ANSWERS = 64
_ASCENT_STEPS = 120


def divergences(
    rank: int, world_size: int, *, distance: float, samples: int, betas: list[float], share: float
) -> dict[str, Any]:
    """Everything that the lab measures. `share` is the reference's probability of the good answers."""
    del rank, world_size
    generator = torch.Generator().manual_seed(0)
    log_q_V = torch.log_softmax(torch.randn(_ANSWERS, generator=generator, dtype=torch.float64), 0)
    shift_V = torch.randn(_ANSWERS, generator=generator, dtype=torch.float64)
    logits_V = log_q_V + distance * shift_V
    return {
        "exact": exact(logits_V, log_q_V),
        "sampled": _sampled(logits_V, log_q_V, samples, generator),
        "gradients": gradient_cosines(logits_V, log_q_V),
        "optimum": [optimum(share, beta) for beta in betas],
    }


def exact(logits_V: Tensor, log_q_V: Tensor) -> dict[str, Any]:
    """The divergence, and each estimate's bias, standard deviation and share of negative values, by summing over V."""
    log_p_V = torch.log_softmax(logits_V, 0)
    p_V = log_p_V.exp()
    kl = float((p_V * (log_p_V - log_q_V)).sum())
    found: dict[str, Any] = {"kl": kl}
    for name, estimate in ESTIMATES.items():
        value_V = estimate(log_p_V, log_q_V)
        mean = float((p_V * value_V).sum())
        found[name] = {
            "bias": mean - kl,
            "deviation": float((p_V * (value_V - mean) ** 2).sum().sqrt()),
            "negative": float(p_V[value_V < 0].sum()),
        }
    return found


def _sampled(
    logits_V: Tensor, log_q_V: Tensor, samples: int, generator: torch.Generator
) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each estimate over answers drawn from the policy."""
    log_p_V = torch.log_softmax(logits_V, 0)
    drawn_N = torch.multinomial(log_p_V.exp(), samples, replacement=True, generator=generator)
    values = {name: estimate(log_p_V[drawn_N], log_q_V[drawn_N]) for name, estimate in ESTIMATES.items()}
    return {name: {"mean": float(one.mean()), "deviation": float(one.std())} for name, one in values.items()}


def gradient_cosines(logits_V: Tensor, log_q_V: Tensor) -> dict[str, float]:
    """What each estimate does as a loss: its expected gradient (answers drawn from p, not differentiated) beside those
    of KL(p, q) and KL(q, p), as cosines; of k1 its length, over that of KL(p, q)'s gradient."""
    logits_V = logits_V.detach().requires_grad_(True)
    log_p_V = torch.log_softmax(logits_V, 0)
    drawn_V = log_p_V.detach().exp()

    def gradient(value: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(value, logits_V, retain_graph=True)
        return found

    reverse = gradient((log_p_V.exp() * (log_p_V - log_q_V)).sum())
    forward = gradient((log_q_V.exp() * (log_q_V - log_p_V)).sum())
    of = {name: gradient((drawn_V * estimate(log_p_V, log_q_V)).sum()) for name, estimate in ESTIMATES.items()}
    return {
        "k1_length": float(of["k1"].norm() / reverse.norm()),
        "k2_reverse": _cosine(of["k2"], reverse),
        "k3_reverse": _cosine(of["k3"], reverse),
        "k3_forward": _cosine(of["k3"], forward),
    }


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def optimum(share: float, beta: float) -> dict[str, float]:
    """Maximises E[reward] - beta KL(p, q) by gradient ascent from q, which gives answer 0, of reward 1, its `share`.

    With the closed form beside it: p* is proportional to q exp(reward / beta) (Rafailov et al. 2023, arXiv 2305.18290,
    equation 4).
    """
    log_q_V = torch.tensor([share, 1 - share], dtype=torch.float64).log()
    reward_V = torch.tensor([1.0, 0.0], dtype=torch.float64)
    logits_V = log_q_V.clone().requires_grad_(True)
    optimizer = torch.optim.Rprop([logits_V], lr=0.1)
    for _ in range(_ASCENT_STEPS):
        log_p_V = torch.log_softmax(logits_V, 0)
        price = (log_p_V.exp() * (log_p_V - log_q_V)).sum()
        optimizer.zero_grad()
        (beta * price - (log_p_V.exp() * reward_V).sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        log_p_V = torch.log_softmax(logits_V, 0)
        closed_V = torch.softmax(log_q_V + reward_V / beta, 0)
        price = (log_p_V.exp() * (log_p_V - log_q_V)).sum()
    return {"beta": beta, "learnt": float(log_p_V[0].exp()), "closed": float(closed_V[0]), "kl": float(price)}
