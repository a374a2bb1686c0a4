"""AdamW with float32 master weights, for models whose weights are bfloat16.

A bfloat16 weight has 8 bits of mantissa: an update smaller than 1/256 of it is lost. So the optimizer adds updates to
a float32 copy and rounds that into the model after each step (Micikevicius et al. 2018, arXiv 1710.03740, section
3.1). Where the weights are float32 already, they are their own masters and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sihe.core.errors import ConfigError, InvalidInput


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move. Defaults as GPT-3's (Brown et al. 2020, arXiv 2005.14165, appendix B). Checks itself."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; vectors (norms) are never decayed."""
    clip_norm: float = 1.0
    """The gradients' global norm is scaled down to this; `inf` leaves them as they are."""

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are two numbers in [0, 1), got {self.betas!r}", key="betas")
        if not self.eps > 0:
            raise ConfigError(f"eps is positive, got {self.eps!r}", key="eps")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ConfigError(f"weight_decay is not negative, got {self.weight_decay!r}", key="weight_decay")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm is positive, got {self.clip_norm!r}", key="clip_norm")


@dataclass(frozen=True)
class _Slot:
    """One parameter with what the optimizer keeps for it."""

    name: str
    weight: nn.Parameter
    master: Tensor
    mean: Tensor
    variance: Tensor
    step: Tensor

    @property
    def kept(self) -> dict[str, Tensor]:
        """The tensors that are not the model's, by their names in a checkpoint."""
        own = {} if self.master.data_ptr() == self.weight.data_ptr() else {f"master.{self.name}": self.master}
        return {**own, f"mean.{self.name}": self.mean, f"variance.{self.name}": self.variance}


class MasterAdamW:
    """AdamW (Loshchilov and Hutter 2019) over the weights that a model has when this is made: load them before.

    Gradients may be float32 or of the weights' dtype, and stay where they are.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig | None = None) -> None:
        self.config = config or OptimizerConfig()
        self._slots = [_slot(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self._steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clips the gradients, moves the weights; the gradients' global norm before clipping.

        A norm that is not finite changes nothing: the caller sees it and decides.
        """
        slots = [slot for slot in self._slots if slot.weight.grad is not None]
        grads = [grad.float() for slot in slots if (grad := slot.weight.grad) is not None]
        norm = float(nn.utils.get_total_norm(grads))
        if not math.isfinite(norm):
            return norm
        if norm > self.config.clip_norm:
            # In place where the gradient is float32 (it is the model's own), on the copy where it is not.
            torch._foreach_mul_(grads, self.config.clip_norm / norm)
        for decays in (True, False):
            group = [(slot, grad) for slot, grad in zip(slots, grads, strict=True) if (slot.weight.ndim > 1) is decays]
            self._update([slot for slot, _ in group], [grad for _, grad in group], lr, decays=decays)
        rounded = [slot for slot in slots if slot.master.dtype != slot.weight.dtype]
        if rounded:
            torch._foreach_copy_([slot.weight for slot in rounded], [slot.master for slot in rounded])
        self._steps += 1
        return norm

    def zero_grad(self) -> None:
        """Sets every gradient to zero, in place."""
        grads = [slot.weight.grad for slot in self._slots if slot.weight.grad is not None]
        if grads:
            torch._foreach_zero_(grads)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a run needs besides the weights to go on bit for bit; the live tensors, not copies.

        `step`, and for each parameter `mean.*`, `variance.*` and, where the weights are not float32, `master.*`.
        """
        tensors = {name: tensor for slot in self._slots for name, tensor in slot.kept.items()}
        return {"step": torch.tensor(self._steps), **tensors}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state_tensors` gave, and rounds the masters into the model.

        Raises `InvalidInput` for the state of another model or another precision; nothing has changed then.
        """
        expected = self.state_tensors()
        for name in sorted(expected.keys() | tensors.keys()):
            want, got = expected.get(name), tensors.get(name)
            if want is None or got is None or want.shape != got.shape or want.dtype != got.dtype:
                raise InvalidInput(
                    f"optimizer state: {name!r} should be {_form(want)}, got {_form(got)}: "
                    "it belongs to another model or another precision"
                )
        self._steps = int(tensors["step"])
        for slot in self._slots:
            for name, tensor in slot.kept.items():
                tensor.copy_(tensors[name])
            slot.step.fill_(self._steps)
            if slot.master.dtype != slot.weight.dtype:
                slot.weight.copy_(slot.master)

    def _update(self, slots: list[_Slot], grads: list[Tensor], lr: float, *, decays: bool) -> None:
        if not slots:
            return
        adamw(
            [slot.master for slot in slots],
            grads,
            [slot.mean for slot in slots],
            [slot.variance for slot in slots],
            [],
            [slot.step for slot in slots],
            fused=True,
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=lr,
            weight_decay=self.config.weight_decay if decays else 0.0,
            eps=self.config.eps,
            maximize=False,
        )


def _slot(name: str, weight: nn.Parameter) -> _Slot:
    master = weight.detach().float()  # the weight's own memory when it is float32
    step = torch.zeros((), dtype=torch.float32, device=weight.device)
    return _Slot(name, weight, master, torch.zeros_like(master), torch.zeros_like(master), step)


def _form(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
