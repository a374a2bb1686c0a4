"""What a rank of `zero.memory` runs: a small model trained at each stage of ZeRO, and every byte that it holds counted.

Stage 0 is DistributedDataParallel. Stage 1 adds ZeroRedundancyOptimizer. Stages 2 and 3 are `fully_shard`, which either
keeps the gathered weights (2) or frees them after use (3). The optimizer is the same at every stage.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

_BATCH = 4
_STAGES = (0, 1, 2, 3)


def stages(rank: int, world_size: int, *, hidden: int, blocks: int) -> dict[str, Any]:
    """Bytes per parameter that this rank holds at each stage, and how far its gradients are from stage 0's."""
    held, gradients = [], []
    count = 0
    for stage in _STAGES:
        training = _Training(stage, hidden, blocks)
        count = training.parameters
        gradients.append(training.step(rank))
        held.append(training.held(rank))
        del training
    differences = [np.abs(gradient - gradients[0]).max() / np.abs(gradients[0]).max() for gradient in gradients]
    return {
        "stages": held,
        "gradient_difference": float(max(differences)),
        "parameters": count,
        "world_size": world_size,
    }


class MasterAdam(torch.optim.Optimizer):
    """Adam on bf16 weights with an fp32 master copy: 12 bytes of state a parameter (arXiv 1412.6980, algorithm 1)."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, no loss
        """One update from the gradients that are there."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(_local(weight), _local(weight.grad), self.state[weight], group)

    def _update(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = 0
            state["master"] = weight.detach().float()
            state["momentum"] = torch.zeros_like(state["master"])
            state["variance"] = torch.zeros_like(state["master"])
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"]
        gradient = gradient.float()
        state["momentum"].lerp_(gradient, 1 - beta1)
        state["variance"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (state["variance"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        state["master"].addcdiv_(state["momentum"] / (1 - beta1**step), scale, value=-group["lr"])
        weight.copy_(state["master"])


class _Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class _Training:
    """A model and its optimizer under one stage."""

    def __init__(self, stage: int, hidden: int, blocks: int) -> None:
        self.stage, self.hidden = stage, hidden
        self._before = _live_bytes()  # earlier stages leave nothing behind, which this makes sure of
        torch.manual_seed(0)
        model = nn.Sequential(*(_Block(hidden) for _ in range(blocks))).to(torch.bfloat16)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model: nn.Module = (
            self._shard(model) if stage >= 2 else DistributedDataParallel(model, gradient_as_bucket_view=True)
        )
        self.optimizer: torch.optim.Optimizer = (
            ZeroRedundancyOptimizer(self.model.parameters(), optimizer_class=MasterAdam)
            if stage == 1
            else MasterAdam(self.model.parameters())
        )

    def _shard(self, model: nn.Sequential) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for module in (*model, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=self.stage == 3, mp_policy=policy)
            assert isinstance(module, FSDPModule)
            module.set_reshard_after_backward(self.stage == 3)
        return model

    def backward(self, rank: int) -> None:
        """Forward and backward on this rank's share of the batch."""
        generator = torch.Generator().manual_seed(100 + rank)
        x = torch.randn(_BATCH, self.hidden, generator=generator).to(torch.bfloat16)
        self.model(x).float().pow(2).mean().backward()

    def step(self, rank: int) -> NDArray[np.float32]:
        """One whole step; the full gradients that it used, in one row, as NumPy so that they are not counted later."""
        self.backward(rank)
        self._keep_only_shards()
        gradients = torch.cat([_full(gradient).float().flatten() for gradient in self._gradients()])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return np.array(gradients.numpy(), copy=True)

    def held(self, rank: int) -> dict[str, float]:
        """Bytes per parameter by kind, in the middle of the second step: after backward, before the update.

        The total counts every live tensor storage of the process, so that a buffer which no category names still shows:
        it is put down to the weights, where FSDP2 keeps the gathered copy.
        """
        self.backward(rank)
        total = _live_bytes() - self._before
        self._keep_only_shards()
        kinds = {
            "gradients": _bytes(_local(gradient) for gradient in self._gradients()),
            "optimizer": _bytes(_state_tensors(self.optimizer)),
        }
        kinds["weights"] = total - sum(kinds.values())
        return {kind: size / self.parameters for kind, size in {**kinds, "total": total}.items()}

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def _keep_only_shards(self) -> None:
        """Brings the sharded parameters, which carry the gradients, back into place."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    inner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _live_bytes() -> int:
    """Bytes of every tensor storage that is alive in this process and that Python can reach, gradients included."""
    gc.collect()
    # `type` and not `isinstance`: the latter wakes deprecated lazy objects.
    found = (item for item in gc.get_objects() if issubclass(type(item), Tensor))
    tensors = [tensor for tensor in found if type(tensor) is not DTensor]
    # A gradient has no Python object until somebody asks for it.
    gradients = [_local(tensor.grad) for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return _bytes([*tensors, *gradients])
