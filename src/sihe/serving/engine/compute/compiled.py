"""The blocks of a decoder in `torch.compile`: one graph for a step of one token, one for all others.

Attention over pages and mixtures of experts decide by numbers what they compute, so a graph would have to be made anew
for many a step. They stay outside: as operators that the compiler neither looks into nor moves. What lies between them
is compiled whole; where it does not compile as one graph, that is an error and not a slow engine.

The number of tokens is a symbol of the second graph, so that no step is compiled at serving time. A single token has a
graph of its own, as torch takes a size of one for a constant.

Shapes: T tokens of the step, D hidden, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import ParamSpec

import torch
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.decoder import Decoder
from sihe.models.moe import MixtureOfExperts
from sihe.models.places import Places
from sihe.models.ports import Attend
from sihe.models.rope import Rotation

Arguments = ParamSpec("Arguments")
Blocks = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class _Step:
    """What the operators of the step that runs now find outside of their graph."""

    attend: Attend
    mixtures: Sequence[MixtureOfExperts | None]


_running: ContextVar[_Step] = ContextVar("running")
_LIBRARY = torch.library.Library("sihe", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's own, as are the others
# Both allocate, and read tensors that are made for each step: nothing that a CUDA graph could play again.
for _schema in ("attend(Tensor q, Tensor k, Tensor v, int layer) -> Tensor", "mixture(Tensor x, int layer) -> Tensor"):
    _LIBRARY.define(_schema, tags=(torch.Tag.cudagraph_unsafe,))  # type: ignore[no-untyped-call]


@torch.library.impl(_LIBRARY, "attend", "CompositeExplicitAutograd")
def _attend(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int) -> Tensor:
    return _running.get().attend(layer, q_BTNH, k_BTKH, v_BTKH)


@torch.library.register_fake("sihe::attend", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _attended(q_BTNH: Tensor, _k_BTKH: Tensor, v_BTKH: Tensor, _layer: int) -> Tensor:
    return q_BTNH.new_empty((*q_BTNH.shape[:3], v_BTKH.shape[3]))


@torch.library.impl(_LIBRARY, "mixture", "CompositeExplicitAutograd")
def _mix(x_BTD: Tensor, layer: int) -> Tensor:
    mixture = _running.get().mixtures[layer]
    assert mixture is not None
    return mixture(x_BTD).contiguous()


@torch.library.register_fake("sihe::mixture", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _mixed(x_BTD: Tensor, _layer: int) -> Tensor:
    return torch.empty_like(x_BTD, memory_format=torch.contiguous_format)


class _OutsideAttention:
    """An `Attend` in the graph, whose work is done by that of the step."""

    has_bias = True

    def __init__(self, window: int | None) -> None:
        self.window = window

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        return torch.ops.sihe.attend(q_BTNH, k_BTKH, v_BTKH, layer)


class _OutsideMixture(nn.Module):
    """A mixture of experts in the graph."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor) -> Tensor:
        return torch.ops.sihe.mixture(x_BTD, self.layer)


class CompiledBlocks:
    """The blocks and the last norm of `model` as they are now, without the adapters that may come onto it later."""

    def __init__(self, model: Decoder) -> None:
        tensors = (*model.parameters(), *model.buffers())
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # its weights are the model's own
        self._mixtures: list[MixtureOfExperts | None] = []
        for layer, block in enumerate(twin.blocks):
            mlp = block.get_submodule("mlp")
            mixture = mlp if isinstance(mlp, MixtureOfExperts) else None
            self._mixtures.append(mixture)
            if mixture is not None:
                block.mlp = _OutsideMixture(layer)
        blocks = _blocks(twin)
        self._one = torch.compile(_own(blocks), fullgraph=True, dynamic=False)
        self._many = torch.compile(_own(blocks), fullgraph=True)

    def __call__(self, x_1TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """Hidden states after the last norm, [1, T, D]. Compiles when it is first called with one token, or with more.

        Raises `ConfigError` where the compiler fails.
        """
        turns = (None, None) if rotation is None else (rotation.cos, rotation.sin)
        run: Blocks = self._one
        if x_1TD.shape[1] > 1:
            run = self._many
            for tensor in (x_1TD, *turns):
                if tensor is not None:
                    torch._dynamo.mark_dynamic(tensor, 1)
        token = _running.set(_Step(attend, self._mixtures))
        try:
            return run(x_1TD, *turns)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ConfigError(
                f"torch.compile cannot compile this model: {_reason(error)}; leave compile out", key="compile"
            ) from error
        finally:
            _running.reset(token)


def check_compiler(device: torch.device) -> None:
    """Compiles a few operations on `device`. Raises `ConfigError` where that needs something that is not installed."""
    try:
        torch.compile(_own(_probe), fullgraph=True)(torch.ones(64, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ConfigError(
            "compile = true needs what torch.compile works with, a C++ compiler and Python's headers on a CPU, Triton "
            f"on a GPU: {_reason(error)}; install it, or leave compile out",
            key="compile",
        ) from error


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1


def _reason(error: Exception) -> str:
    """Of what the compiler says, pages of it, the first line."""
    cause = getattr(error, "inner_exception", error)
    return str(cause).strip().partition("\n")[0]


def _blocks(twin: Decoder) -> Blocks:
    attend = _OutsideAttention(twin.config.attention.window)

    def blocks(x_1TD: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        rotation = None if cos is None or sin is None else Rotation(cos, sin)
        places = Places(rotation)
        for block in twin.blocks:
            x_1TD = block(x_1TD, places, attend)
        return twin.norm(x_1TD)

    return blocks


def _own(function: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """The function with code of its own: torch keeps what it has compiled by code, and few versions of each.

    So a process can serve any number of models, one after the other, and what was compiled goes with its model.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
