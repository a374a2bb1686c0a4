"""What a rank of `tp.split` runs: one layer of a decoder, whole and cut in two ways, every message and byte counted.

    B  batch      T  time      S  this rank's share of the time, T / ranks      D  hidden

With sequence parallelism the cut is that of the trainer (`sihe.training.parallel.tensor`). Without it, it is Megatron's
first one (Shoeybi et al. 2019, arXiv 1909.08053, section 3): the whole sequence on every rank, an all-reduce after each
of the two sublayers forward, and before each backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.transformer import Transformer
from sihe.training.parallel.held import Cut
from sihe.training.parallel.mesh import Axis, ParallelMesh
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.parallel.tensor import cut_block

_BATCH = 2
_CUTS = {"attention.qkv.weight": 0, "attention.out.weight": 1, "mlp.gate_up.weight": 1, "mlp.down.weight": 1}


def layer(_rank: int, world_size: int, *, shape: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Of one layer, whole and cut: bytes of weights and saved activations, messages, and the differences."""
    config = ModelConfig(**shape)
    axis = ParallelMesh(ParallelPlan(tp=world_size))["tp"]
    whole = _Run(config, tokens)
    plain = _Run(config, tokens, axis, cut_whole_sequence)
    sequence = _Run(config, tokens, axis, cut_block, is_share=True)
    answer = {
        name: {
            "weights": run.weight_bytes,
            "saved": run.saved_bytes,
            "sent": run.messages.sent_bytes,
            "messages": run.messages.count,
        }
        for name, run in (("whole", whole), ("plain", plain), ("sequence", sequence))
    }
    for name, run in (("plain", plain), ("sequence", sequence)):
        answer[name]["difference"] = run.difference(whole)
    return answer


class MessageCount(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Within it: how many collectives this rank joined, and the bytes that it sends for them in a ring.

    Of N ranks each sends, of S bytes, (N - 1) / N · S for an all-gather or a reduce-scatter and twice that for an
    all-reduce (Thakur, Rabenseifner and Gropp 2005, section 4); with two ranks no algorithm can send less.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the same
        self._ranks = ranks
        self.count = 0
        self.sent_bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.count += 1
            others = self._ranks - 1
            match func.overloadpacket.__name__:
                case "allreduce_":
                    self.sent_bytes += 2 * others / self._ranks * sum(_bytes(tensor) for tensor in args[0])
                case "_allgather_base_":
                    self.sent_bytes += others * _bytes(args[1])
                case "_reduce_scatter_base_":
                    self.sent_bytes += others / self._ranks * _bytes(args[1])
                case name:
                    raise ValueError(f"no layer here sends by {name}")
        return func(*args, **(kwargs or {}))


class _Run:
    """One layer's forward and backward pass, whole or cut by `cut`; with `is_share` on a share of the sequence."""

    def __init__(
        self,
        config: ModelConfig,
        tokens: int,
        axis: Axis | None = None,
        cut: Callable[[nn.Module, Axis], Iterator[tuple[nn.Parameter, Cut]]] | None = None,
        *,
        is_share: bool = False,
    ) -> None:
        torch.manual_seed(7)
        model: Transformer = Decoder(config)
        self._axis = axis
        self._is_share = is_share
        x_BTD, self._pull_BTD = torch.randn(2, _BATCH, tokens, config.hidden_size)
        self.block = model.blocks[0]
        self._cuts = dict(cut(self.block, axis)) if cut is not None and axis is not None else {}
        self._x = self._share(x_BTD).requires_grad_()
        places = model.places.prefix(tokens, x_BTD.device, x_BTD.dtype)
        self.saved_bytes = 0
        self._known = {weight.untyped_storage().data_ptr() for weight in self.block.parameters()}
        if places.rotation is not None:
            self._known |= {value.untyped_storage().data_ptr() for value in _tensors(places.rotation)}
        self.messages = MessageCount(axis.size if axis else 1)
        with self.messages:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved):
                self._y = self.block(self._x, places)
            self._y.backward(self._share(self._pull_BTD))

    @property
    def weight_bytes(self) -> int:
        """Of this rank's weights of the layer."""
        return sum(_bytes(weight) for weight in self.block.parameters())

    def difference(self, whole: _Run) -> float:
        """The largest difference from the whole layer's output and gradients, relative to the largest of each."""
        assert whole._x.grad is not None
        assert self._x.grad is not None
        pairs = [(self._y, self._share(whole._y)), (self._x.grad, self._share(whole._x.grad))]
        for mine, theirs in zip(self.block.parameters(), whole.block.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            gradient = mine.grad
            if mine in self._cuts:
                pairs.append((gradient, self._cuts[mine].part_of(theirs.grad)))
                continue
            if self._is_share and self._axis is not None:  # a norm has seen a share of the sequence
                dist.all_reduce(gradient, group=self._axis.group)
            pairs.append((gradient, theirs.grad))
        return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)

    def _share(self, x_BTD: Tensor) -> Tensor:
        if not self._is_share or self._axis is None:
            return x_BTD.detach().clone()
        return x_BTD.detach().chunk(self._axis.size, 1)[self._axis.rank].clone()

    def _save(self, tensor: Tensor) -> Tensor:
        """Counts what autograd keeps, each memory once, weights and tables of positions left out."""
        place = tensor.untyped_storage().data_ptr()
        if place not in self._known:
            self._known.add(place)
            self.saved_bytes += tensor.untyped_storage().nbytes()
        return tensor


class _ToAll(torch.autograd.Function):
    """Megatron's f: what all ranks have already; back, the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.axis.group)
        return total, None


class _FromAll(torch.autograd.Function):
    """Megatron's g: the sum over ranks; back, the gradient as it is."""

    @staticmethod
    def forward(_ctx: Any, x_BTD: Tensor, axis: Axis) -> Tensor:
        total = x_BTD.clone()
        dist.all_reduce(total, group=axis.group)
        return total

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def cut_whole_sequence(block: nn.Module, axis: Axis) -> Iterator[tuple[nn.Parameter, Cut]]:
    """Cuts the matrices of a block as `cut_block` does, and leaves the sequence whole."""
    for name, dim in _CUTS.items():
        weight = block.get_parameter(name)
        cut = Cut(axis, dim)
        weight.data = cut.part_of(weight.data)
        yield weight, cut
    for name in ("attention", "mlp"):
        sublayer = block.get_submodule(name)
        sublayer.register_forward_pre_hook(lambda _layer, args: (_ToAll.apply(args[0], axis), *args[1:]))  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        sublayer.register_forward_hook(lambda _layer, _args, output: _FromAll.apply(output, axis))  # type: ignore[no-untyped-call]  # the same


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: object) -> Iterator[Tensor]:
    yield from (item for item in vars(value).values() if isinstance(item, Tensor))
