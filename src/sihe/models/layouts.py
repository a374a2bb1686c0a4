"""Names and shapes of a model's tensors in a checkpoint, family by family, as views of the model's own weights.

    D  hidden      N  query heads      K  key-value heads      H  head dim      G  rows of one key-value head's group
    R  rotary dims

A view may have its dims in another order than the weight: copying into it or out of it is the whole translation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sihe.models.attention import Attention
from sihe.models.encoder import Encoder
from sihe.models.latent import LatentAttention
from sihe.models.mlp import GatedMLP, PlainMLP
from sihe.models.moe import MixtureOfExperts
from sihe.models.transformer import Block, Transformer

_DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "embeddings.position_ids")
"""Ends of names of what old checkpoints carry and the configuration says as well: angles, masks, a count."""
_OLD = ("bert.pooler.", "roberta.pooler.", "cls.seq_relationship.")
"""Beginnings of names of what the first checkpoints of BERT and RoBERTa carry beside the task that they are for."""
_HEADS = ("lm_head.", "score.", "cls.", "classifier.", "pooler.", "pre_classifier.", "vocab_", "qa_outputs.")
"""Beginnings of names of what lies behind the hidden states."""
_ENCODERS = ("bert", "roberta", "distilbert")


@dataclass(frozen=True)
class Slot:
    """A tensor of the checkpoint and the part of our weights that it is.

    `view` has the checkpoint's numbers in its order, but for its shape, and for the order of its rows where `rows` says
    which row of ours each is.
    """

    name: str
    shape: tuple[int, ...]
    view: Tensor
    rows: Tensor | None = None

    def stored(self) -> Tensor:
        """The tensor as the checkpoint has it."""
        tensor = self.view.detach().reshape(self.shape)
        return (tensor if self.rows is None else tensor[self.rows]).contiguous()

    @torch.no_grad()
    def fill(self, tensor: Tensor) -> None:
        """Copies the checkpoint's tensor, of this shape, to its place."""
        if self.rows is not None:
            tensor = torch.empty_like(tensor).index_copy_(0, self.rows, tensor)
        self.view.copy_(tensor.reshape(self.view.shape))


def slots(model: Transformer) -> Iterator[Slot]:
    """Every tensor of the checkpoint of `model`, in order, with its place in the model."""
    yield from _LAYOUTS.get(_family(model), _own)(model)


def canonical(model: Transformer, name: str) -> str:
    """The name of a stored tensor as `slots` has it: old files spell some otherwise."""
    family = _family(model)
    if family in ("gpt2", "bloom") and not name.startswith(("transformer.", "lm_head.")):
        name = f"transformer.{name}"
    elif family in _ROTARY and name.startswith(("embed_tokens.", "layers.", "norm.")):
        name = f"model.{name}"  # saved as the bare model, which has no head
    elif family in _ENCODERS and not _root(model):
        name = name.removeprefix(f"{family}.")  # saved with a head
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def repeats(model: Transformer) -> dict[str, Tensor]:
    """Names under which a checkpoint may have a tensor a second time, with what it must equal."""
    names: dict[str, Tensor] = {}
    if getattr(model, "head", None) is None:
        for name in ("lm_head.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight"):
            names[name] = model.embedding.weight
    if isinstance(model, Encoder) and model.masked is not None:
        for name in ("cls.predictions.decoder.bias", "lm_head.decoder.bias"):
            names[name] = model.masked.bias
    return names


def is_dispensable(name: str) -> bool:
    """Whether a stored tensor says nothing that the model needs."""
    return name.endswith(_DERIVED) or name.startswith(_OLD)


def is_head(name: str) -> bool:
    """Whether a stored tensor, by its name in `slots`, lies behind the hidden states of its model."""
    return name.startswith(_HEADS)


def _family(model: Transformer) -> str:
    return str(model.config.to_hf()["model_type"])


def _whole(name: str, weight: Tensor) -> Slot:
    return Slot(name, tuple(weight.shape), weight)


def _module(name: str, module: nn.Module) -> Iterator[Slot]:
    """Weight, and bias if there is one, of a linear map, a norm or an embedding; not what others hung onto it."""
    for key, weight in module.named_parameters(recurse=False):
        yield _whole(f"{name}.{key}", weight)


def _own(model: Transformer) -> Iterator[Slot]:
    """Our own names, each parameter and buffer whole."""
    with torch.device("meta"):
        names = type(model)(model.config).state_dict().keys()
    tensors = model.state_dict(keep_vars=True)
    yield from (_whole(name, tensors[name]) for name in names)


def _blocks(model: Transformer) -> Iterator[tuple[int, Block]]:
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        yield layer, block


def _head(model: Transformer, name: str = "lm_head") -> Iterator[Slot]:
    head = getattr(model, "head", None)
    if head is not None:
        yield from _module(name, head)


# ---- Llama, Mistral, Qwen, Mixtral, DeepSeek-V2 --------------------------------------------------------------------


def _rotary(model: Transformer) -> Iterator[Slot]:
    yield from _module("model.embed_tokens", model.embedding)
    for layer, block in _blocks(model):
        prefix = f"model.layers.{layer}"
        yield from _module(f"{prefix}.input_layernorm", block.attention_norm)
        if isinstance(block.attention, Attention):
            yield from _attention(f"{prefix}.self_attn", block.attention)
        else:
            yield from _latent(f"{prefix}.self_attn", block.attention)
        yield from _module(f"{prefix}.post_attention_layernorm", block.mlp_norm)
        if isinstance(block.mlp, MixtureOfExperts):
            yield from _mixture(f"{prefix}.block_sparse_moe", block.mlp)
        else:
            assert isinstance(block.mlp, GatedMLP)
            gate, up = block.mlp.gate_up.weight
            yield _whole(f"{prefix}.mlp.gate_proj.weight", gate)
            yield _whole(f"{prefix}.mlp.up_proj.weight", up)
            yield from _module(f"{prefix}.mlp.down_proj", block.mlp.down)
    yield from _module("model.norm", model.norm)
    yield from _head(model)


def _attention(prefix: str, attention: Attention) -> Iterator[Slot]:
    for letter, kind, view in _parts(attention):
        yield Slot(f"{prefix}.{letter}_proj.{kind}", (view.shape[:3].numel(), *view.shape[3:]), view)
    for name, norm in (("q_norm", attention.q_norm), ("k_norm", attention.k_norm)):
        if norm is not None:
            yield from _module(f"{prefix}.{name}", norm)
    yield from _module(f"{prefix}.o_proj", attention.out)


def _parts(attention: Attention) -> Iterator[tuple[str, str, Tensor]]:
    """Queries, keys and values of the one product: letter, weight or bias, [K, heads of the group, H, …]."""
    for kind, tensor in attention.qkv.named_parameters(recurse=False):
        rows = tensor.view(-1, attention.group + 2, attention.head_dim, *tensor.shape[1:])
        for letter, view in zip("qkv", torch.split(rows, [attention.group, 1, 1], dim=1), strict=True):
            yield letter, kind, view


def _mixture(prefix: str, mixture: MixtureOfExperts) -> Iterator[Slot]:
    yield from _module(f"{prefix}.gate", mixture.router)
    for expert in range(mixture.num_experts):
        gate, up = mixture.gate_up[expert]
        yield _whole(f"{prefix}.experts.{expert}.w1.weight", gate)
        yield _whole(f"{prefix}.experts.{expert}.w2.weight", mixture.down[expert])
        yield _whole(f"{prefix}.experts.{expert}.w3.weight", up)


def _latent(prefix: str, attention: LatentAttention) -> Iterator[Slot]:
    name = "q_proj"
    if attention.q_down is not None and attention.q_norm is not None:
        yield from _module(f"{prefix}.q_a_proj", attention.q_down)
        yield from _module(f"{prefix}.q_a_layernorm", attention.q_norm)
        name = "q_b_proj"
    yield _neighbours(f"{prefix}.{name}.weight", attention.q_up.weight, attention.head_dim, attention.rotary_dim)
    down = attention.kv_down.weight
    yield _neighbours(f"{prefix}.kv_a_proj_with_mqa.weight", down, len(down), attention.rotary_dim)
    yield from _module(f"{prefix}.kv_a_layernorm", attention.kv_norm)
    yield from _module(f"{prefix}.kv_b_proj", attention.kv_up)
    yield from _module(f"{prefix}.o_proj", attention.out)


def _neighbours(name: str, weight: Tensor, head_dim: int, rotary_dim: int) -> Slot:
    """Rows of heads that end in rotary dims: DeepSeek turns neighbours, here dims turn with those R / 2 away."""
    turned_R = torch.arange(rotary_dim).view(2, -1).T.flatten() + head_dim - rotary_dim
    head_H = torch.cat((torch.arange(head_dim - rotary_dim), turned_R))
    rows_NH = torch.arange(0, len(weight), head_dim)[:, None] + head_H
    return Slot(name, tuple(weight.shape), weight, rows_NH.flatten().to(weight.device))


# ---- GPT-2, BLOOM --------------------------------------------------------------------------------------------------


def _gpt2(model: Transformer) -> Iterator[Slot]:
    assert model.position_embedding is not None
    yield from _module("transformer.wte", model.embedding)
    yield from _module("transformer.wpe", model.position_embedding)
    for layer, block in _blocks(model):
        prefix = f"transformer.h.{layer}"
        assert isinstance(block.attention, Attention)
        assert isinstance(block.mlp, PlainMLP)
        yield from _module(f"{prefix}.ln_1", block.attention_norm)
        for kind, tensor in block.attention.qkv.named_parameters(recurse=False):
            view = tensor.view(-1, 3, block.attention.head_dim, *tensor.shape[1:]).movedim(1, 0)
            view = view if tensor.ndim == 1 else view.movedim(3, 0)
            yield Slot(f"{prefix}.attn.c_attn.{kind}", (*tensor.shape[1:], tensor.shape[0]), view)
        yield from _transposed(f"{prefix}.attn.c_proj", block.attention.out)
        yield from _module(f"{prefix}.ln_2", block.mlp_norm)
        yield from _transposed(f"{prefix}.mlp.c_fc", block.mlp.up)
        yield from _transposed(f"{prefix}.mlp.c_proj", block.mlp.down)
    yield from _module("transformer.ln_f", model.norm)
    yield from _head(model)


def _transposed(name: str, linear: nn.Linear) -> Iterator[Slot]:
    for key, weight in linear.named_parameters(recurse=False):
        yield _whole(f"{name}.{key}", weight.T if weight.ndim == 2 else weight)


def _bloom(model: Transformer) -> Iterator[Slot]:
    assert model.embedding_norm is not None
    yield from _module("transformer.word_embeddings", model.embedding)
    yield from _module("transformer.word_embeddings_layernorm", model.embedding_norm)
    for layer, block in _blocks(model):
        prefix = f"transformer.h.{layer}"
        assert isinstance(block.attention, Attention)
        assert isinstance(block.mlp, PlainMLP)
        yield from _module(f"{prefix}.input_layernorm", block.attention_norm)
        # Its rows are ordered as ours: of each head query, key, value.
        yield from _module(f"{prefix}.self_attention.query_key_value", block.attention.qkv)
        yield from _module(f"{prefix}.self_attention.dense", block.attention.out)
        yield from _module(f"{prefix}.post_attention_layernorm", block.mlp_norm)
        yield from _module(f"{prefix}.mlp.dense_h_to_4h", block.mlp.up)
        yield from _module(f"{prefix}.mlp.dense_4h_to_h", block.mlp.down)
    yield from _module("transformer.ln_f", model.norm)
    yield from _head(model)


# ---- BERT, RoBERTa, DistilBERT -------------------------------------------------------------------------------------


def _bert(model: Transformer) -> Iterator[Slot]:
    assert isinstance(model, Encoder)
    root = _root(model)
    yield from _embeddings(root, model)
    for layer, block in _blocks(model):
        prefix = f"{root}encoder.layer.{layer}"
        assert isinstance(block.attention, Attention)
        assert isinstance(block.mlp, PlainMLP)
        yield from _projections(f"{prefix}.attention.self", block.attention, ("query", "key", "value"))
        yield from _module(f"{prefix}.attention.output.dense", block.attention.out)
        yield from _module(f"{prefix}.attention.output.LayerNorm", block.attention_norm)
        yield from _module(f"{prefix}.intermediate.dense", block.mlp.up)
        yield from _module(f"{prefix}.output.dense", block.mlp.down)
        yield from _module(f"{prefix}.output.LayerNorm", block.mlp_norm)
    if _family(model) == "roberta":
        yield from _roberta_head(model)
    else:
        yield from _bert_head(root, model)


def _bert_head(root: str, model: Encoder) -> Iterator[Slot]:
    if model.pooler is not None:
        yield from _module(f"{root}pooler.dense", model.pooler)
    if model.classifier is not None:
        yield from _module("classifier", model.classifier)
    if model.masked is not None:
        yield from _module("cls.predictions", model.masked)
        yield from _module("cls.predictions.transform.dense", model.masked.dense)
        yield from _module("cls.predictions.transform.LayerNorm", model.masked.norm)
    yield from _head(model, "cls.predictions.decoder")


def _roberta_head(model: Encoder) -> Iterator[Slot]:
    if model.pooler is not None:
        yield from _module("pooler.dense" if model.classifier is None else "classifier.dense", model.pooler)
    if model.classifier is not None:
        yield from _module("classifier.out_proj", model.classifier)
    if model.masked is not None:
        yield from _module("lm_head", model.masked)
        yield from _module("lm_head.dense", model.masked.dense)
        yield from _module("lm_head.layer_norm", model.masked.norm)
    yield from _head(model, "lm_head.decoder")


def _distilbert(model: Transformer) -> Iterator[Slot]:
    yield from _embeddings("", model)
    for layer, block in _blocks(model):
        prefix = f"transformer.layer.{layer}"
        assert isinstance(block.attention, Attention)
        assert isinstance(block.mlp, PlainMLP)
        yield from _projections(f"{prefix}.attention", block.attention, ("q_lin", "k_lin", "v_lin"))
        yield from _module(f"{prefix}.attention.out_lin", block.attention.out)
        yield from _module(f"{prefix}.sa_layer_norm", block.attention_norm)
        yield from _module(f"{prefix}.ffn.lin1", block.mlp.up)
        yield from _module(f"{prefix}.ffn.lin2", block.mlp.down)
        yield from _module(f"{prefix}.output_layer_norm", block.mlp_norm)


def _root(model: Transformer) -> str:
    """What the names of an encoder's trunk begin with: nothing where the trunk is all there is."""
    return "" if model.config.task in ("pooled", "hidden") else f"{_family(model)}."


def _embeddings(root: str, model: Transformer) -> Iterator[Slot]:
    embeddings = {
        "word_embeddings": model.embedding,
        "position_embeddings": model.position_embedding,
        "token_type_embeddings": model.type_embedding,
        "LayerNorm": model.embedding_norm,
    }
    for name, module in embeddings.items():
        if module is not None:
            yield from _module(f"{root}embeddings.{name}", module)


def _projections(prefix: str, attention: Attention, names: tuple[str, str, str]) -> Iterator[Slot]:
    """Queries, keys and values under names of their own."""
    named = dict(zip("qkv", names, strict=True))
    for letter, kind, view in _parts(attention):
        yield Slot(f"{prefix}.{named[letter]}.{kind}", (view.shape[:3].numel(), *view.shape[3:]), view)


_ROTARY = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "deepseek_v2")
_LAYOUTS: dict[str, Callable[[Transformer], Iterator[Slot]]] = {
    **dict.fromkeys(_ROTARY, _rotary),
    "gpt2": _gpt2,
    "bloom": _bloom,
    "bert": _bert,
    "roberta": _bert,
    "distilbert": _distilbert,
}
