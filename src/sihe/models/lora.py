"""Low-rank adapters put onto a decoder from outside (LoRA: Hu et al. 2021, arXiv 2106.09685).

    B  batch      T  time      D  inputs of a product      O  its outputs
    M  tokens of the batch      R  ranks of all adapted parts of a product together

The base stays as it is, module for module and name for name: an adapter is a child of the product that it changes
(`blocks.0.attention.qkv.lora`), and a hook adds what it says to the product's output. So checkpoints of the base,
products with quantised weights and the decoder itself need to know nothing of adapters.

Queries, keys and values are one product here and three matrices in a checkpoint, as are gate and up. Their A matrices
stand on top of each other, so that the input is read once; their B matrices are laid into one matrix with blocks of
zeros, so that the update is added to the output by the same product that computes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sihe.core.errors import AlreadyExists, ConfigError, InternalError, InvalidInput, NotFound
from sihe.models.attention import Attention
from sihe.models.decoder import Decoder
from sihe.models.lora_config import LoraConfig
from sihe.models.mlp import GatedMLP
from sihe.models.quantised import QuantisedLinear

_CHILD = "lora"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Layout:
    """Which parts of a checkpoint the output rows of one product are.

    The rows are groups of `group_rows` (None: one group of all rows), and each group holds the parts in turn, in the
    proportion of `shares`. Counted from the rows that are there, so that it also holds for a rank's cut of a product.
    """

    parts: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    group_rows: int | None = None

    def widths(self, rows: int) -> tuple[int, ...]:
        """Rows of each part in one group."""
        unit = (self.group_rows or rows) // sum(self.shares)
        return tuple(unit * share for share in self.shares)

    def groups(self, rows: int) -> int:
        """How often the parts repeat."""
        return rows // (self.group_rows or rows)


class Adapter(nn.Module):
    """One adapter of one product: A [R, D], the parts' matrices on top of each other, and B [O of the part, rank] each.

    Kept in float32, as updates are small against the weights, and applied in the dtype of the input. A product that is
    cut by rows cuts each B along dim 0; one that is cut by columns cuts A along dim 1.
    """

    def __init__(self, config: LoraConfig, layout: Layout, rows: int, columns: int, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.parts = tuple(part for part in layout.parts if part in config.targets)
        sizes = dict(zip(layout.parts, layout.widths(rows), strict=True))
        a_RD = torch.empty(len(self.parts) * config.rank, columns, device=device)
        # The product starts as zero, and A as torch starts a linear layer (paper, section 4.1: A random, B zero).
        nn.init.uniform_(a_RD, -(columns**-0.5), columns**-0.5)
        self.a = nn.Parameter(a_RD)
        self.b = nn.ParameterDict(
            {
                part: nn.Parameter(torch.zeros(layout.groups(rows) * sizes[part], config.rank, device=device))
                for part in self.parts
            }
        )

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """`output` [..., O] plus the update of `x` [..., D]."""
        low = functional.dropout(x, self.config.dropout, self.training) if self.config.dropout else x
        low_MR = functional.linear(low, self.a.to(x.dtype)).flatten(0, -2)
        b_OR = self.rows_of_b(output.shape[-1]).to(x.dtype)
        return torch.addmm(output.flatten(0, -2), low_MR, b_OR.T, alpha=self.config.scale).view_as(output)

    def rows_of_b(self, rows: int) -> Tensor:
        """The B matrices in the order of the product's rows, each in the columns of its own part's A."""
        if len(self.layout.parts) == 1:
            return self.b[self.parts[0]]
        rank, groups = self.config.rank, self.layout.groups(rows)
        blocks = []
        for part, width in zip(self.layout.parts, self.layout.widths(rows), strict=True):
            if part in self.parts:
                before = self.parts.index(part) * rank
                block = self.b[part].unflatten(0, (groups, width))
                blocks.append(functional.pad(block, (before, (len(self.parts) - 1) * rank - before)))
            else:
                blocks.append(self.a.new_zeros(groups, width, len(self.parts) * rank))
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def matrices(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each adapted part with its A [rank, D] and B [O of the part, rank], as views."""
        for part, a in zip(self.parts, torch.split(self.a, self.config.rank), strict=True):
            yield part, a, self.b[part]


@dataclass
class _Choice:
    """Which adapter runs, shared by all products of a model."""

    active: str | None = None
    merged: str | None = None
    segments: tuple[tuple[str, Tensor], ...] | None = None
    """Instead of `active`: adapters with the rows of the batch, flattened to `index_dims` less one, that they serve."""
    index_dims: int = 1


class Adapters(nn.Module):
    """The adapters of one product by name."""

    def __init__(self, layout: Layout, choice: _Choice) -> None:
        super().__init__()
        self.layout = layout
        self.choice = choice
        self.by_name = nn.ModuleDict()

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """The product's output with the update of the adapters that were chosen."""
        if self.choice.segments is not None:
            return self._by_row(x, output)
        name = self.choice.active
        if name is None or name == self.choice.merged or name not in self.by_name:
            return output
        updated: Tensor = self.by_name[name](x, output)
        return updated

    def _by_row(self, x: Tensor, output: Tensor) -> Tensor:
        """Rows of one adapter are gathered, updated and put back: the work does not depend on how many are loaded."""
        last = self.choice.index_dims - 1
        rows_x, rows = x.flatten(0, last), output.flatten(0, last)
        for name, index in self.choice.segments or ():
            if name in self.by_name:
                rows = rows.index_copy(0, index, self.by_name[name](rows_x[index], rows[index]))
        return rows.view_as(output)


def _add_update(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The hook. A plain function that finds its adapters in the module, so that a deep copy of a model has its own."""
    updated: Tensor = module.get_submodule(_CHILD)(args[0], output)
    return updated


@dataclass(frozen=True)
class _Product:
    """A module that multiplies by a matrix, with its adapters."""

    name: str
    module: nn.Module
    adapters: Adapters
    hook: Any = field(repr=False)


class Lora:
    """The adapters of one model, from `apply_lora`. At most one is active, or a batch chooses by row.

    They live on `device`, by default each beside the weights that it changes.
    """

    def __init__(self, model: Decoder, device: torch.device | None = None) -> None:
        self._device = device
        self._choice = _Choice()
        self._configs: dict[str, LoraConfig] = {}
        self._products = []
        for block_name, block in model.blocks.named_children():
            for name, module, layout in _products(block):
                adapters = Adapters(layout, self._choice)
                module.add_module(_CHILD, adapters)
                hook = module.register_forward_hook(_add_update)
                self._products.append(_Product(f"model.layers.{block_name}.{name}", module, adapters, hook))

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the order in which they came: their places are the indices of `by_row`."""
        return tuple(self._configs)

    @property
    def active(self) -> str | None:
        """The adapter that runs, merged or not."""
        return self._choice.active

    def config(self, name: str) -> LoraConfig:
        """The settings of an adapter. Raises `NotFound`."""
        if name not in self._configs:
            raise NotFound("adapter", name, hint=f"this model has {', '.join(self._configs) or 'none'}")
        return self._configs[name]

    def add(self, name: str, config: LoraConfig) -> None:
        """A new adapter that changes nothing yet, drawn from torch's random state; `use` makes it the active one.

        Raises `AlreadyExists`, and `ConfigError` for a name or a target that this model cannot have.
        """
        if name in self._configs:
            raise AlreadyExists("adapter", name, hint="remove it first or take another name")
        if not _NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
            raise ConfigError(f"an adapter's name is letters, digits, '-' and '_', got {name!r}", key="lora.name")
        parts = {part for product in self._products for part in product.adapters.layout.parts}
        absent = [target for target in config.targets if target not in parts]
        if absent:
            raise ConfigError(
                f"lora.targets names {', '.join(absent)}, and this model has {', '.join(sorted(parts))} to adapt",
                key="lora.targets",
            )
        for product in self._products:
            layout = product.adapters.layout
            if any(part in config.targets for part in layout.parts):
                rows, columns, device = _shape(product.module)
                adapter = Adapter(config, layout, rows, columns, self._device or device)
                product.adapters.by_name[name] = adapter.train(product.module.training).requires_grad_(False)
        self._configs[name] = config

    def remove(self, name: str) -> None:
        """Drops an adapter and its memory; a merged one is taken out of the weights first. Raises `NotFound`."""
        self.config(name)
        if name == self._choice.merged:
            self.unmerge()
        if name == self._choice.active:
            self.use(None)
        for adapters in self._having(name):
            del adapters.by_name[name]
        del self._configs[name]

    def use(self, name: str | None) -> None:
        """Makes an adapter the one that runs and learns; None: the base alone. Raises `NotFound`."""
        if name is not None:
            self.config(name)
        self._refuse_merged(f"use {name!r}")
        self._choice.active = name
        for other in self._configs:
            for parameter in self.parameters(other):
                parameter.requires_grad_(other == name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone while the block runs, as a reference policy wants it. Raises `InvalidInput` while merged."""
        self._refuse_merged("run the base alone")
        former, self._choice.active = self._choice.active, None
        try:
            yield
        finally:
            self._choice.active = former

    @contextmanager
    def by_row(self, adapters: Tensor) -> Iterator[None]:
        """Several adapters in one batch while the block runs, as a server of many fine-tunes wants it.

        `adapters` holds places in `names`, or -1 for the base alone: one a row [B], or one a token [B, T] where
        requests are packed into rows. Raises `InvalidInput` for another place, or while merged.
        """
        self._refuse_merged("choose adapters by row")
        chosen = [int(place) for place in torch.unique(adapters)]
        if any(not -1 <= place < len(self._configs) for place in chosen):
            raise InvalidInput(f"places of adapters lie in -1..{len(self._configs) - 1}, got {chosen}")
        former = (self._choice.active, self._choice.segments, self._choice.index_dims)
        if len(chosen) == 1:  # nothing to gather
            self._choice.active = self.names[chosen[0]] if chosen[0] >= 0 else None
        else:
            flat = adapters.flatten()
            rows = ((self.names[place], (flat == place).nonzero().flatten()) for place in chosen if place >= 0)
            self._choice.segments, self._choice.index_dims = tuple(rows), adapters.ndim
        try:
            yield
        finally:
            self._choice.active, self._choice.segments, self._choice.index_dims = former

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The weights of an adapter, by default of the active one: those that training changes. Raises `NotFound`."""
        name = name if name is not None else self._choice.active
        if name is None:
            return []
        self.config(name)
        return [weight for adapters in self._having(name) for weight in adapters.by_name[name].parameters()]

    def matrices(self, name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each matrix that the adapter changes, as `model.layers.0.self_attn.q_proj`, with A and B as views."""
        self.config(name)
        for product in self._products:
            if name in product.adapters.by_name:
                adapter = _adapter(product.adapters, name)
                yield from ((f"{product.name}.{part}", a, b) for part, a, b in adapter.matrices())

    def adapters(self, name: str) -> Iterator[tuple[int, Adapter]]:
        """What the adapter is of each product that it changes, with the number of its layer. Raises `NotFound`."""
        self.config(name)
        for product in self._products:
            if name in product.adapters.by_name:
                yield int(product.name.split(".")[2]), _adapter(product.adapters, name)

    def merge(self) -> None:
        """Adds the active adapter to the weights: it then costs nothing to run, and `save_model` writes the sum.

        Raises `InvalidInput` if none is active, one is merged already, or a weight is quantised.
        """
        if self._choice.active is None:
            raise InvalidInput("merge needs an active adapter: call use(name) first")
        self._refuse_merged("merge another")
        self._change_weights(self._choice.active, 1.0)
        self._choice.merged = self._choice.active

    def unmerge(self) -> None:
        """Takes the merged adapter out of the weights again, to the rounding of their dtype."""
        if self._choice.merged is None:
            raise InvalidInput("unmerge needs a merged adapter: none is")
        self._change_weights(self._choice.merged, -1.0)
        self._choice.merged = None

    def detach(self) -> None:
        """Removes every adapter and hook; the model is as before `apply_lora`, but for what is merged and frozen."""
        for product in self._products:
            product.hook.remove()
            delattr(product.module, _CHILD)
        self._products.clear()
        self._configs.clear()
        self._choice.active = self._choice.merged = None

    def _having(self, name: str) -> list[Adapters]:
        return [product.adapters for product in self._products if name in product.adapters.by_name]

    def _refuse_merged(self, wish: str) -> None:
        if self._choice.merged is not None:
            raise InvalidInput(f"adapter {self._choice.merged!r} is merged into the weights: unmerge it to {wish}")

    def _change_weights(self, name: str, sign: float) -> None:
        changed = [product for product in self._products if name in product.adapters.by_name]
        for product in changed:
            if not isinstance(getattr(product.module, "weight", None), nn.Parameter):
                raise InvalidInput(
                    "the weights are quantised and cannot take an adapter in: dequantise the model first"
                )
        with torch.no_grad():
            for product in changed:
                adapter = _adapter(product.adapters, name)
                weight_OD = product.module.get_parameter("weight").flatten(0, -2)
                update_OD = adapter.rows_of_b(weight_OD.shape[0]) @ adapter.a
                weight_OD.add_(update_OD.to(weight_OD.dtype), alpha=sign * adapter.config.scale)


def apply_lora(model: Decoder, config: LoraConfig, name: str = "default") -> Lora:
    """Freezes `model` and gives it one adapter, active and learning: `[p for p in model.parameters() if
    p.requires_grad]` are its weights. The output is the same until it has learnt.

    Raises `AlreadyExists` if the model carries adapters (`Lora.add` takes more), `ConfigError` for a target that the
    model does not have.
    """
    if any(isinstance(module, Adapters) for module in model.modules()):
        raise AlreadyExists("adapter", name, hint="this model carries adapters: add to them with Lora.add")
    model.requires_grad_(False)
    lora = Lora(model)
    try:
        lora.add(name, config)
    except ConfigError:
        lora.detach()
        raise
    lora.use(name)
    return lora


def _products(block: nn.Module) -> Iterator[tuple[str, nn.Module, Layout]]:
    """The products of a block that adapters can change, under the checkpoint's name of their layer."""
    attention, mlp = block.get_submodule("attention"), block.get_submodule("mlp")
    if isinstance(attention, Attention):
        shares, rows = (attention.group, 1, 1), (attention.group + 2) * attention.head_dim
        yield "self_attn", attention.qkv, Layout(("q_proj", "k_proj", "v_proj"), shares, rows)
        yield "self_attn", attention.out, Layout(("o_proj",))
    if isinstance(mlp, GatedMLP):
        yield "mlp", mlp.gate_up, Layout(("gate_proj", "up_proj"), (1, 1))
        yield "mlp", mlp.down, Layout(("down_proj",))


def _shape(module: nn.Module) -> tuple[int, int, torch.device]:
    """Outputs and inputs of a product, and where it computes."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.shape[:-1].numel(), weight.shape[-1], weight.device
    if isinstance(module, QuantisedLinear):
        return torch.Size(module.shape[:-1]).numel(), module.shape[-1], module.codes.device
    raise InternalError(f"{type(module).__name__} multiplies by no matrix that is known here")


def _adapter(adapters: Adapters, name: str) -> Adapter:
    adapter = adapters.by_name[name]
    assert isinstance(adapter, Adapter)
    return adapter
