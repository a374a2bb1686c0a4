"""Post-training losses: hand calculations, TRL's values, and gradients.

Numbers called TRL's were made by running the statements of `trl` 1.16.0 itself (wheel from PyPI) on the inputs that
stand beside them; the file is named at each.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sihe.training.recipes import losses
from sihe.training.recipes.advantages import generalized_advantages, group_advantages, whitened

LN2 = math.log(2)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_sft_counts_only_the_assistants_tokens() -> None:
    logps_BT = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
    mask_BT = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert losses.sft_nll(logps_BT, mask_BT).item() == pytest.approx((2 + 4 + 8) / 3)
    assert losses.sft_nll(logps_BT, torch.zeros(2, 3)).item() == 0


# ---- preferences ----------------------------------------------------------------------------------------------------


def test_dpo_by_hand() -> None:
    # A policy that is its reference cannot tell the two apart: -log sigmoid(0) = log 2.
    assert losses.dpo(tensor(0.0), tensor(0.0), beta=0.1).item() == pytest.approx(LN2)
    # beta (2 - (-1)) = 1.5: -log(1 / (1 + e^-1.5)) = log(1 + e^-1.5)
    assert losses.dpo(tensor(2.0), tensor(-1.0), beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    smoothed = 0.9 * math.log(1 + math.exp(-1.5)) + 0.1 * math.log(1 + math.exp(1.5))
    assert losses.dpo(tensor(2.0), tensor(-1.0), beta=0.5, label_smoothing=0.1).item() == pytest.approx(smoothed)


def test_dpo_is_trls() -> None:
    # trl/trainer/dpo_trainer.py, loss_type "sigmoid", beta 0.25
    ours = losses.dpo(tensor(0.5, -0.2, 1.1), tensor(0.1, 0.3, -2.0), beta=0.25)
    assert ours.tolist() == pytest.approx([0.6443966627120972, 0.7575990557670593, 0.3789183795452118], abs=1e-6)


def test_the_gradient_of_dpo_grows_with_how_wrong_the_policy_is() -> None:
    # d loss / d chosen = -beta sigmoid(-beta (chosen - rejected)), equation 7's gradient in section 4
    chosen = tensor(2.0, -3.0).requires_grad_()
    losses.dpo(chosen, tensor(0.0, 0.0), beta=0.5).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-0.5 * sigmoid(-1.0), -0.5 * sigmoid(1.5)])


def test_ipo_by_hand_and_as_trl() -> None:
    # beta 0.25: the margin aims at 2. (1.5 - 0.5 - 2)^2 = 1, and at the target it is 0 with no slope.
    chosen = tensor(1.5, 2.5).requires_grad_()
    loss = losses.ipo(chosen, tensor(0.5, 0.5), beta=0.25)
    assert loss.tolist() == [1.0, 0.0]
    loss.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [-2.0, 0.0]
    # trl/trainer/dpo_trainer.py, loss_type "ipo": sums over 2, 4, 1 and 3, 1, 2 tokens, as means
    ours = losses.ipo(tensor(0.5 / 2, -0.2 / 4, 1.1), tensor(0.1 / 3, 0.3, -2.0 / 2), beta=0.25)
    assert ours.tolist() == pytest.approx([3.1802775859832764, 5.5224995613098145, 0.00999998115003109], abs=1e-6)


def test_kto_by_hand_and_as_trl() -> None:
    # At the origin both are 1 - sigmoid(0) = 1/2, whatever beta.
    assert losses.kto(tensor(0.3), tensor(0.3), tensor(0.3), beta=2.0).tolist() == [0.5, 0.5]
    # A negative estimate of the divergence counts as 0.
    assert losses.kto(tensor(1.0), tensor(), tensor(-5.0), beta=1.0).item() == pytest.approx(1 - sigmoid(1.0))
    # trl/trainer/kto_trainer.py, beta 0.5
    ours = losses.kto(
        tensor(0.4, -0.6),
        tensor(0.2, -1.5),
        tensor(0.3).squeeze(),
        beta=0.5,
        desirable_weight=1.2,
        undesirable_weight=0.8,
    )
    theirs = [0.5850031971931458, 0.7327671051025391, 0.3900020718574524, 0.2312404215335846]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-6)


def test_the_origin_of_kto_takes_no_part_in_the_gradient() -> None:
    divergence = tensor(0.3).requires_grad_()
    gained = tensor(1.0).requires_grad_()
    losses.kto(gained, tensor(0.5), divergence, beta=1.0).sum().backward()
    assert divergence.grad is None
    assert gained.grad is not None


def test_orpo_by_hand_and_as_trl() -> None:
    # p = 1/2 against p = 1/4: odds 1 against 1/3, odds ratio 3, -log(3 / (1 + 3)) = log(4 / 3)
    ours = losses.orpo(tensor(math.log(0.5)), tensor(math.log(0.25)), beta=1.0)
    assert ours.item() == pytest.approx(math.log(4 / 3))
    # trl/experimental/orpo/orpo_trainer.py, odds_ratio_loss with beta 0.3, which gives the negative
    ours = losses.orpo(tensor(-0.3, -1.5, -0.9), tensor(-2.0, -0.4, -0.95), beta=0.3)
    assert ours.tolist() == pytest.approx([0.015993714332580566, 0.626785159111023, 0.1957714706659317], abs=1e-6)


@pytest.mark.parametrize("logp", [-1e-9, -0.5, -0.6931471805599453, -3.0, -60.0])
def test_the_odds_stay_finite_at_both_ends_and_their_gradient_too(logp: float) -> None:
    chosen = tensor(logp).requires_grad_()
    loss = losses.orpo(chosen, tensor(-1.0), beta=1.0)
    loss.backward()
    assert torch.isfinite(loss).all()
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all()


def test_bradley_terry_by_hand_and_as_trl() -> None:
    assert losses.bradley_terry(tensor(1.0), tensor(1.0)).item() == pytest.approx(LN2)
    # trl/trainer/reward_trainer.py: means of three pairs, without and with margins
    chosen, rejected = tensor(1.0, 0.2, -0.5), tensor(0.4, 0.9, -3.0)
    assert losses.bradley_terry(chosen, rejected).mean().item() == pytest.approx(0.5398545861244202)
    with_margin = losses.bradley_terry(chosen, rejected, tensor(0.5, 0.0, 1.0)).mean().item()
    assert with_margin == pytest.approx(0.6496652960777283)


# ---- policy gradients -----------------------------------------------------------------------------------------------


def test_the_surrogate_by_hand() -> None:
    # ratios 2, 2, 1/2, 1/2 with clip 0.2: a gain is cut at 1.2, a loss is not; and the other way round below 1.
    logps = torch.log(tensor(2.0, 2.0, 0.5, 0.5)).requires_grad_()
    loss = losses.clipped_policy(logps, tensor(0, 0, 0, 0), tensor(1, -1, 1, -1), clip_low=0.2)
    assert loss.tolist() == pytest.approx([-1.2, 2.0, -0.5, 0.8])
    loss.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([0.0, 2.0, -0.5, 0.0])  # clipped tokens push no more


def test_grpos_loss_is_trls() -> None:
    # trl/trainer/grpo_trainer.py: epsilon 0.2 and 0.28, beta 0.04, two completions of 3 and 2 tokens
    logps_BT = torch.tensor([[-0.8, -0.9, -1.0], [-0.7, -2.0, -0.3]])
    behaviour_BT = torch.tensor([[-0.9, -0.4, -1.8], [-0.7, -1.0, -1.1]])
    reference_BT = torch.tensor([[-1.0, -0.5, -2.0], [-0.7, -1.2, -0.1]])
    mask_BT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    advantages_BT = torch.tensor([[1.5], [-0.5]]).expand(2, 3)
    surrogate_BT = losses.clipped_policy(logps_BT, behaviour_BT, advantages_BT, clip_low=0.2, clip_high=0.28)
    theirs = [-1.6577563285827637, -0.9097959995269775, -1.9199999570846558, 0.5, 0.4000000059604645, 1.112770438194275]
    assert surrogate_BT.flatten().tolist() == pytest.approx(theirs, abs=1e-6)
    k3_BT = losses.kl_k3(logps_BT, reference_BT)
    theirs = [
        0.018730759620666504,
        0.09182465076446533,
        0.36787939071655273,
        0,
        0.4255409240722656,
        0.021402716636657715,
    ]
    assert k3_BT.flatten().tolist() == pytest.approx(theirs, abs=1e-6)
    token_BT = surrogate_BT + 0.04 * k3_BT
    assert losses.masked_mean(token_BT, mask_BT).item() == pytest.approx(-0.7102786898612976, abs=1e-6)
    sequences_B = (token_BT * mask_BT).sum(1) / mask_BT.sum(1)
    assert sequences_B.mean().item() == pytest.approx(-0.5154803991317749, abs=1e-6)


def test_the_value_loss_by_hand() -> None:
    # old 0, clip 0.2. Value 1, return 1: as it is 0, held at 0.2 half of 0.64. Value 0.1 lies within: half of 0.81.
    loss = losses.clipped_value(tensor(1.0, 0.1), tensor(0.0, 0.0), tensor(1.0, 1.0), clip=0.2)
    assert loss.tolist() == pytest.approx([0.32, 0.405])


def test_the_estimates_of_kl_have_the_means_that_they_should() -> None:
    p, q = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.3, 0.5)
    exact = float((p * (p / q).log()).sum())
    logp, logq = p.log(), q.log()
    assert float((p * losses.kl_k1(logp, logq)).sum()) == pytest.approx(exact)
    assert float((p * losses.kl_k3(logp, logq)).sum()) == pytest.approx(exact)
    assert losses.kl_k2(logp, logq).tolist() == pytest.approx([0.5 * math.log(2.5) ** 2, 0, 0.5 * math.log(0.4) ** 2])
    assert (losses.kl_k3(logp, logq) >= 0).all()


def test_generalized_advantages_by_hand() -> None:
    # gamma 0.5, lambda 0.5; the first sequence has three tokens, the second two, and garbage behind them.
    rewards_BT = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 99.0]])
    values_BT = torch.tensor([[0.4, 0.2, 0.6], [1.0, 1.0, 99.0]])
    mask_BT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    advantages_BT, returns_BT = generalized_advantages(rewards_BT, values_BT, mask_BT, gamma=0.5, lam=0.5)
    # errors: 1 - 0.6 = 0.4; 0.5 * 0.6 - 0.2 = 0.1; 0.5 * 0.2 - 0.4 = -0.3, then sums with weight 1/4
    first = [-0.3 + 0.25 * (0.1 + 0.25 * 0.4), 0.1 + 0.25 * 0.4, 0.4]
    second = [0.5 * 1 - 1 + 0.25 * 1.0, 2.0 - 1.0, 0.0]
    torch.testing.assert_close(advantages_BT, torch.tensor([first, second]))
    torch.testing.assert_close(returns_BT, (advantages_BT + values_BT) * mask_BT)


def test_advantages_with_lambda_one_are_what_came_less_what_was_expected() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards_BT = torch.randn(4, 6, generator=generator)
    values_BT = torch.randn(4, 6, generator=generator)
    lengths_B = torch.tensor([6, 1, 3, 5])
    mask_BT = (torch.arange(6) < lengths_B[:, None]).float()
    advantages_BT, returns_BT = generalized_advantages(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=1.0)
    for row, length in enumerate(lengths_B.tolist()):
        for t in range(length):
            came = sum(0.9 ** (k - t) * rewards_BT[row, k].item() for k in range(t, length))
            assert advantages_BT[row, t].item() == pytest.approx(came - values_BT[row, t].item(), abs=1e-5)
            assert returns_BT[row, t].item() == pytest.approx(came, abs=1e-5)


def test_group_advantages_are_trls() -> None:
    # trl/trainer/grpo_trainer.py with nanstd of trl/trainer/utils.py, groups of 4
    rewards_BG = torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    theirs = [0.8658754229545593, -0.8658754229545593, -0.8658754229545593, 0.8658754229545593]
    theirs += [1.4997000694274902, -0.4999000132083893, -0.4999000132083893, -0.4999000132083893, 0, 0, 0, 0]
    assert group_advantages(rewards_BG).flatten().tolist() == pytest.approx(theirs, abs=1e-6)
    assert group_advantages(rewards_BG, scaled=False)[1].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_whitening_is_the_same_however_the_tokens_lie_on_ranks() -> None:
    values_BT = torch.tensor([[1.0, 2.0, 50.0], [4.0, 5.0, 6.0]])
    mask_BT = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    whole_BT = whitened(values_BT, mask_BT)
    kept = whole_BT[mask_BT > 0]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert whole_BT[0, 2] == 0
    moments = torch.stack([(values_BT * mask_BT).sum(), (values_BT**2 * mask_BT).sum(), mask_BT.sum()]).double()
    torch.testing.assert_close(whitened(values_BT[:1], mask_BT[:1], lambda _mine: moments), whole_BT[:1])


# ---- distillation ---------------------------------------------------------------------------------------------------


def test_divergences_by_hand_and_as_trl() -> None:
    # Teacher (1/2, 1/2), student (1/4, 3/4): forward 1/2 log 2 + 1/2 log(2/3), reverse 1/4 log(1/2) + 3/4 log(3/2).
    teacher, student = torch.log(tensor(0.5, 0.5))[None, None], torch.log(tensor(0.25, 0.75))[None, None]
    forward = losses.forward_kl(student, teacher).item()
    reverse = losses.reverse_kl(student, teacher).item()
    assert forward == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
    assert reverse == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-5)
    # trl/experimental/gkd/gkd_trainer.py, generalized_jsd_loss with temperature 2, which leaves out the factor 4
    student = torch.tensor([[[0.5, -1.0, 2.0], [0.0, 0.3, -0.3]]])
    teacher = torch.tensor([[[1.0, 0.0, 1.5], [-0.5, 0.8, 0.1]]])
    forward_BT = losses.forward_kl(student, teacher, temperature=2.0) / 4
    assert forward_BT.flatten().tolist() == pytest.approx([0.0468779057264328, 0.022516708821058273], abs=1e-6)
    reverse_BT = losses.reverse_kl(student, teacher, temperature=2.0) / 4
    assert reverse_BT.flatten().tolist() == pytest.approx([0.04547150433063507, 0.024099430069327354], abs=1e-6)


def test_temperature_keeps_the_gradients_size() -> None:
    # Hinton et al., section 2.1: at high temperature the gradient is (student - teacher) / V for centred logits.
    student = tensor(0.3, -0.3)[None, None].requires_grad_()
    losses.forward_kl(student, tensor(-0.2, 0.2)[None, None], temperature=1000.0).sum().backward()
    assert student.grad is not None
    assert student.grad.flatten().tolist() == pytest.approx([0.25, -0.25], rel=1e-3)
