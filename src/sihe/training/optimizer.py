"""An optimizer over what a rank holds: float32 masters, clipping by the global norm, an update rule.

A bfloat16 weight has 8 bits of mantissa: an update smaller than 1/256 of it is lost. So the rule moves a float32 copy,
which is rounded into the model after each step (Micikevicius et al. 2018, arXiv 1710.03740, section 3.1). Where the
weights are float32 already, they are their own masters and nothing is copied.

Rules see local tensors only, whatever cut them; what needs the whole is here: the norm of all gradients, and the rows
that ranks gather from each other under ZeRO 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from sihe.core.errors import ConfigError, InvalidInput
from sihe.training.parallel.held import Held
from sihe.training.parallel.zero import gather_rows

if TYPE_CHECKING:
    from sihe.training.parallel.mesh import ParallelMesh


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
    """One parameter with what the optimizer keeps for it: the rows of its master that are this rank's, and moments."""

    held: Held
    master: Tensor
    mean: Tensor
    variance: Tensor
    step: Tensor
    is_own_master: bool

    @property
    def kept(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint needs, by their names in it."""
        name = self.held.name
        return {f"weight.{name}": self.master, f"mean.{name}": self.mean, f"variance.{name}": self.variance}


class MasterAdamW:
    """AdamW (Loshchilov and Hutter 2019) over the weights that a model has when this is made: load them before.

    `weights` is a model, or what a rank holds of one that is spread over `mesh`. Gradients may be float32 or of the
    weights' dtype, and stay where they are.
    """

    def __init__(
        self,
        weights: nn.Module | Sequence[Held],
        config: OptimizerConfig | None = None,
        *,
        mesh: ParallelMesh | None = None,
    ) -> None:
        self.config = config or OptimizerConfig()
        self._mesh = mesh
        held = whole(weights) if isinstance(weights, nn.Module) else weights
        self._slots = [_slot(each) for each in held if each.parameter.requires_grad]
        self._is_split = mesh is not None and (mesh.plan.pp > 1 or any(slot.held.holders > 1 for slot in self._slots))
        self._steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clips the gradients, moves the weights; the gradients' global norm before clipping.

        A norm that is not finite changes nothing: the caller sees it and decides.
        """
        slots = [slot for slot in self._slots if slot.held.parameter.grad is not None]
        grads = [grad.float() for slot in slots if (grad := slot.held.local_grad) is not None]
        norm = self._norm(slots, grads)
        if not math.isfinite(norm):
            return norm
        if norm > self.config.clip_norm:
            # In place where the gradient is float32 (it is the model's own), on the copy where it is not.
            torch._foreach_mul_(grads, self.config.clip_norm / norm)
        self._steps += 1
        for decays in (True, False):
            group = [
                (slot, slot.held.own_rows(grad))
                for slot, grad in zip(slots, grads, strict=True)
                if (slot.held.parameter.ndim > 1) is decays
            ]
            self._update([slot for slot, _ in group], [grad for _, grad in group], lr, decays=decays)
        self._write_back(slots)
        return norm

    def zero_grad(self) -> None:
        """Starts new gradients: those that FSDP makes are dropped, the others set to zero in place."""
        flat = []
        for slot in self._slots:
            parameter = slot.held.parameter
            if isinstance(parameter, DTensor):
                parameter.grad = None
            elif parameter.grad is not None:
                flat.append(parameter.grad)
        if flat:
            torch._foreach_zero_(flat)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a run needs to go on bit for bit, weights included; the live tensors, not copies.

        `step`, and for each parameter `weight.*` in float32, `mean.*` and `variance.*`. A tensor of which this rank
        holds a part is a `DTensor` that says which, so that a checkpoint can be read on other ranks.
        """
        tensors = {
            name: tensor if self._mesh is None else slot.held.at_rest(tensor, self._mesh)
            for slot in self._slots
            for name, tensor in slot.kept.items()
        }
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
                    f"optimizer state: {name!r} should be {_form(want)}, got {_form(got)}: it belongs to another model"
                )
        for slot in self._slots:
            for name, tensor in slot.kept.items():
                given = tensors[name]
                tensor.copy_(given.to_local() if isinstance(given, DTensor) else given)
        self.loaded(int(tensors["step"]))

    @torch.no_grad()
    def loaded(self, steps: int) -> None:
        """To be called when the tensors of `state_tensors` were overwritten in place with those after `steps` steps."""
        self._steps = steps
        for slot in self._slots:
            slot.step.fill_(steps)
        self._write_back(self._slots)

    def _norm(self, slots: Sequence[_Slot], grads: Sequence[Tensor]) -> float:
        """The norm of the whole gradient: each part counts once, however many ranks hold it."""
        if not self._is_split:
            return float(nn.utils.get_total_norm(grads))
        assert self._mesh is not None
        ranks = self._mesh.plan.world_size // self._mesh.plan.pp
        norms = torch.stack(torch._foreach_norm(list(grads))).double()
        shares = [0.0 if slot.held.is_copy else slot.held.holders / ranks for slot in slots]
        total = norms.square().dot(torch.tensor(shares, dtype=torch.float64, device=norms.device))
        dist.all_reduce(total)
        return float(total.sqrt())

    def _write_back(self, slots: Sequence[_Slot]) -> None:
        """Rounds masters into the weights where they are apart, and completes rows that other ranks updated."""
        rounded = [slot for slot in slots if not slot.is_own_master]
        if rounded:
            weights = [slot.held.own_rows(slot.held.local) for slot in rounded]
            torch._foreach_copy_(weights, [slot.master for slot in rounded])
        by_axis: dict[str, list[Held]] = {}
        for slot in slots:
            if slot.held.rows is not None:
                by_axis.setdefault(slot.held.rows.name, []).append(slot.held)
        for held in by_axis.values():
            assert held[0].rows is not None
            gather_rows([each.local for each in held], held[0].rows)

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


def whole(model: nn.Module) -> list[Held]:
    """What the only rank of a model holds: all of it."""
    return [Held(name, parameter) for name, parameter in model.named_parameters()]


def _slot(held: Held) -> _Slot:
    rows = held.own_rows(held.local)
    master = rows.float()  # the weight's own memory when it is float32
    step = torch.zeros((), dtype=torch.float32, device=rows.device)
    is_own = master.dtype == rows.dtype
    return _Slot(held, master, torch.zeros_like(master), torch.zeros_like(master), step, is_own)


def _form(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
