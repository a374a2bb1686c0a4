"""The losses of post-training: pure functions of log-probabilities, scores and logits.

    B  sequences      T  tokens of a completion      V  vocabulary

Each returns one value a sequence ([B]) or a token ([B, T]) and leaves the mean to the caller, who alone knows which
tokens count and how many of them the other ranks hold. Log-probabilities are natural. A *log-ratio* is the policy's
log-probability of a completion minus the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean of `values_BT` where `mask_BT` is 1; zero where it is nowhere."""
    return (values_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)


def sft_nll(logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens that the assistant says (`mask_BT` 1), in nats a token."""
    return masked_mean(-logps_BT, mask_BT)


# ---- preferences ----------------------------------------------------------------------------------------------------


def dpo(chosen_B: Tensor, rejected_B: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation, [B] (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    `chosen_B` and `rejected_B` are log-ratios summed over a completion's tokens. With `label_smoothing` a label is
    taken to be wrong with that probability (Mitchell 2023, "A note on DPO with noisy preferences", equation 3).
    """
    margin_B = beta * (chosen_B - rejected_B)
    return -(1 - label_smoothing) * logsigmoid(margin_B) - label_smoothing * logsigmoid(-margin_B)


def ipo(chosen_B: Tensor, rejected_B: Tensor, *, beta: float) -> Tensor:
    """Identity preference optimisation, [B] (Azar et al. 2023, arXiv 2310.12036, equation 17; `beta` is its tau).

    The margin is drawn to 1 / (2 beta) and no further, so that certain preferences do not drive the policy away from
    its reference. Give log-ratios as means over tokens where completions differ in length: sums would ask long ones
    for smaller steps.
    """
    return (chosen_B - rejected_B - 1 / (2 * beta)) ** 2


def kto(
    desirable_B: Tensor,
    undesirable_B: Tensor,
    divergence: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation, the desirable completions' losses and then the others', [B desirable + B other].

    Needs no pairs: the arguments are log-ratios (sums over tokens) of completions with a thumb up or down.
    `divergence` is the estimate of KL(policy, reference) that gains and losses are measured from; it takes no part in
    the gradient and counts as zero where it is negative (Ethayarajh et al. 2024, arXiv 2402.01306, section 4).
    """
    origin = divergence.detach().clamp(min=0)
    gains_B = desirable_weight * (1 - torch.sigmoid(beta * (desirable_B - origin)))
    losses_B = undesirable_weight * (1 - torch.sigmoid(beta * (origin - undesirable_B)))
    return torch.cat([gains_B, losses_B])


def orpo(chosen_B: Tensor, rejected_B: Tensor, *, beta: float) -> Tensor:
    """The odds-ratio term of ORPO, [B], to be added to the chosen completions' negative log-likelihood.

    Arguments are the policy's own log-probabilities as means over tokens, below 0; there is no reference (Hong et al.
    2024, arXiv 2403.07691, equations 4 to 7; `beta` is its lambda).
    """
    log_odds_B = (chosen_B - _log1mexp(chosen_B)) - (rejected_B - _log1mexp(rejected_B))
    return -beta * logsigmoid(log_odds_B)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by whichever form does not cancel (Maechler 2012, R package Rmpfr, equation 7)."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -0.6931471805599453
    # Each branch sees only numbers that it can differentiate: where() alone would let NaN gradients through.
    close = torch.log(-torch.expm1(torch.where(near, x, -0.5)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, close, far)


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the preferences under scores, [B] (Bradley and Terry 1952; Ouyang et al. 2022, arXiv
    2203.02155, equation 1). With `margin_B` a chosen completion must win by that much (Touvron et al. 2023, arXiv
    2307.09288, equation 2)."""
    difference_B = chosen_B - rejected_B
    return -logsigmoid(difference_B if margin_B is None else difference_B - margin_B)


# ---- policy gradients -----------------------------------------------------------------------------------------------


def clipped_policy(
    logps_BT: Tensor, behaviour_BT: Tensor, advantages_BT: Tensor, *, clip_low: float, clip_high: float | None = None
) -> Tensor:
    """PPO's clipped surrogate as a loss, [B, T] (Schulman et al. 2017, arXiv 1707.06347, equation 7).

    `behaviour_BT` are the log-probabilities by which the tokens were sampled. The ratio counts within 1 - `clip_low`
    and 1 + `clip_high` (by default the same); a wider upper bound keeps exploration alive (Yu et al. 2025, arXiv
    2503.14476, section 3.1).
    """
    ratio_BT = torch.exp(logps_BT - behaviour_BT)
    held_BT = ratio_BT.clamp(1 - clip_low, 1 + (clip_low if clip_high is None else clip_high))
    return -torch.minimum(ratio_BT * advantages_BT, held_BT * advantages_BT)


def clipped_value(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, *, clip: float) -> Tensor:
    """Half the squared error of the critic, [B, T], the worse of two: as it is, and with the values held within `clip`
    of what they were when the rollouts were made (Stiennon et al. 2020, arXiv 2009.01325, after OpenAI's baselines)."""
    held_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_BT - returns_BT) ** 2, (held_BT - returns_BT) ** 2)


def kl_k1(logps: Tensor, reference: Tensor) -> Tensor:
    """log p - log q of sampled tokens: the unbiased estimate of KL(p, q) that is often negative."""
    return logps - reference


def kl_k2(logps: Tensor, reference: Tensor) -> Tensor:
    """(log p - log q)^2 / 2: biased, never negative, of low variance, and its gradient is that of KL(p, q)."""
    return 0.5 * (logps - reference) ** 2


def kl_k3(logps: Tensor, reference: Tensor) -> Tensor:
    """q/p - 1 - log(q/p): unbiased, never negative (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""
    difference = reference - logps
    return torch.expm1(difference) - difference


# ---- distillation ---------------------------------------------------------------------------------------------------


def forward_kl(student_BTV: Tensor, teacher_BTV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher, student) of the next token, [B, T], in nats, times temperature squared.

    Both are logits, softened by `temperature`; the factor keeps the gradients' size whatever the temperature (Hinton,
    Vinyals and Dean 2015, arXiv 1503.02531, section 2).
    """
    return _kl(teacher_BTV, student_BTV, temperature)


def reverse_kl(student_BTV: Tensor, teacher_BTV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(student, teacher), [B, T], as `forward_kl`: a small student keeps to modes of the teacher instead of covering
    all of it (Gu et al. 2024, arXiv 2306.08543, section 2.1)."""
    return _kl(student_BTV, teacher_BTV, temperature)


def _kl(p_BTV: Tensor, q_BTV: Tensor, temperature: float) -> Tensor:
    log_p_BTV = torch.log_softmax(p_BTV / temperature, dim=-1, dtype=torch.float32)
    log_q_BTV = torch.log_softmax(q_BTV / temperature, dim=-1, dtype=torch.float32)
    return (log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum(-1) * temperature**2
