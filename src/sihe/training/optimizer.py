"""An optimizer over what a rank holds: float32 masters, clipping by the global norm, an update rule.

A bfloat16 weight has 8 bits of mantissa: an update smaller than 1/256 of it is lost. So the rule moves a float32 copy,
which is rounded into the model after each step (Micikevicius et al. 2018, arXiv 1710.03740, section 3.1). Where the
weights are float32 already, they are their own masters and nothing is copied.

Rules see local tensors only, whatever cut them; what needs the whole is here: the norm of all gradients, the rows that
ranks gather from each other under ZeRO 1, and the place of each state in a checkpoint.
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

from sihe.core.errors import ConfigError, InvalidInput
from sihe.training.optimizers.adamw import AdamW
from sihe.training.optimizers.ema import WeightAverage
from sihe.training.optimizers.matrix import matrix_of
from sihe.training.optimizers.muon import is_hidden_matrix
from sihe.training.optimizers.rule import State, UpdateRule, Weight
from sihe.training.parallel.held import Held
from sihe.training.parallel.zero import gather_rows

if TYPE_CHECKING:
    from sihe.training.parallel.mesh import ParallelMesh


_AVERAGED = "averaged"  # how many steps the average has seen


@dataclass(frozen=True)
class _Slot:
    """One parameter: how this rank holds it, the rows of its master that are this rank's, and the rule's state."""

    held: Held
    weight: Weight
    state: State

    @property
    def is_own_master(self) -> bool:
        """Whether the rule moves the model's memory itself."""
        return self.held.local.dtype == torch.float32


class MasterOptimizer:
    """Moves the weights that a model has when this is made (load them before) by `rule`, AdamW unless another is given.

    `weights` is a model, or what a rank holds of one that is spread over `mesh`. Gradients may be float32 or of the
    weights' dtype, and stay where they are; their global norm is scaled down to `clip_norm` (`inf`: never). Matrices
    decay, vectors (norms, biases) do not. With `ema_decay`, a running average follows the masters, each rank's its own.
    """

    def __init__(
        self,
        weights: nn.Module | Sequence[Held],
        rule: UpdateRule | None = None,
        *,
        clip_norm: float = 1.0,
        ema_decay: float | None = None,
        mesh: ParallelMesh | None = None,
    ) -> None:
        if not clip_norm > 0:
            raise ConfigError(f"clip_norm is positive, got {clip_norm!r}", key="clip_norm")
        self.rule: UpdateRule = rule or AdamW()
        self.clip_norm = clip_norm
        self._mesh = mesh
        held = whole(weights) if isinstance(weights, nn.Module) else weights
        self._slots = [self._slot(each) for each in held if each.parameter.requires_grad]
        self._is_split = mesh is not None and (mesh.plan.pp > 1 or any(slot.held.holders > 1 for slot in self._slots))
        self._steps = 0
        self._average: WeightAverage | None = None
        if ema_decay is not None:
            self._average = WeightAverage({slot.held.name: slot.weight.master for slot in self._slots}, ema_decay)

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
        if norm > self.clip_norm:
            # In place where the gradient is float32 (it is the model's own), on the copy where it is not.
            torch._foreach_mul_(grads, self.clip_norm / norm)
        self._steps += 1
        self.rule.update(
            [slot.weight for slot in slots],
            [slot.held.own_rows(grad) for slot, grad in zip(slots, grads, strict=True)],
            [slot.state for slot in slots],
            lr=lr,
            step=self._steps,
        )
        self._write_back(slots)
        if self._average is not None:
            self._average.update()
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
        """What a run needs to go on bit for bit, weights included; the live tensors where the rule does not pack them.

        `step`, and for each parameter `weight.*` in float32, what the rule remembers, such as `mean.*`, and `average.*`
        where there is one. A tensor of which this rank holds a part is a `DTensor` that says which, so that a
        checkpoint can be read on other ranks.
        """
        tensors = {"step": torch.tensor(self._steps)}
        for slot in self._slots:
            for kind, tensor in {"weight": slot.weight.master, **self.rule.unpacked(slot.state)}.items():
                # A matrix that is tied over stages may have both owners here: they hold the same, and the first speaks.
                tensors.setdefault(f"{kind}.{slot.held.name}", self._at_rest(slot.held, tensor))
        if self._average is not None:
            averages = self._average.state_tensors()
            tensors[_AVERAGED] = averages["step"]
            for slot in self._slots:
                name = f"average.{slot.held.name}"
                tensors.setdefault(name, self._at_rest(slot.held, averages[name]))
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state_tensors` gave, also if it was overwritten in place, and rounds masters into the model.

        Raises `InvalidInput` for the state of another model or another rule; nothing has changed then.
        """
        expected = self.state_tensors()
        for name in sorted(expected.keys() | tensors.keys()):
            want, got = expected.get(name), tensors.get(name)
            if want is None or got is None or want.shape != got.shape or want.dtype != got.dtype:
                raise InvalidInput(
                    f"optimizer state: {name!r} should be {_form(want)}, got {_form(got)}: "
                    "it belongs to another model or another optimizer"
                )
        for slot in self._slots:
            name = slot.held.name
            slot.weight.master.copy_(_local(tensors[f"weight.{name}"]))
            kinds = self.rule.unpacked(slot.state)
            self.rule.pack(slot.state, {kind: _local(tensors[f"{kind}.{name}"]) for kind in kinds})
        self._steps = int(tensors["step"])
        if self._average is not None:
            averages = {name: _local(tensor) for name, tensor in tensors.items() if name.startswith("average.")}
            self._average.load_state_tensors({"step": tensors[_AVERAGED], **averages})
        self._write_back(self._slots)

    def _slot(self, held: Held) -> _Slot:
        master = held.own_rows(held.local).float()  # the weight's own memory when it is float32
        is_hidden = self.rule.needs_whole_matrix and is_hidden_matrix(held.name, held.parameter)
        matrix = matrix_of(self._at_rest(held, master)) if is_hidden else None
        weight = Weight(held.name, master, held.parameter.ndim > 1, matrix)
        return _Slot(held, weight, self.rule.init(weight))

    def _at_rest(self, held: Held, tensor: Tensor) -> Tensor:
        return tensor if self._mesh is None else held.at_rest(tensor, self._mesh)

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
            torch._foreach_copy_(weights, [slot.weight.master for slot in rounded])
        by_axis: dict[str, list[Held]] = {}
        for slot in slots:
            if slot.held.rows is not None:
                by_axis.setdefault(slot.held.rows.name, []).append(slot.held)
        for held in by_axis.values():
            assert held[0].rows is not None
            gather_rows([each.local for each in held], held[0].rows)


def whole(model: nn.Module) -> list[Held]:
    """What the only rank of a model holds: all of it."""
    return [Held(name, parameter) for name, parameter in model.named_parameters()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _form(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
