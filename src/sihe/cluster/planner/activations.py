"""What one layer keeps for its backward pass, by family, and what stands above and below the layers.

    s  tokens of a sample      b  samples of a micro-batch      h  hidden      a  heads      t, c  tensor, context ranks

`gpt` is Megatron's layer as Korthikanti et al. count it (2022, arXiv 2205.05198, equations 1 to 6): 2-byte values,
1-byte dropout masks, attention scores kept. `llama` is our own decoder's, counted tensor by tensor: what its autograd
functions save, with attention that keeps one number a row instead of scores.

Of our decoder, *full* recomputation keeps the input of each block; *selective* keeps the input of each block's
attention and runs that again, with its products: its kernel keeps no scores that could be left out alone.
"""

from __future__ import annotations

from sihe.cluster.planner.types import ELEMENT_BYTES, Layout, Recompute, TransformerShape

_FLOAT = 4  # bytes of what is float32 whatever the weights are: scales of norms, log-sum-exps, losses
_INDEX = 8  # bytes of a token, int64
_LOSS_CHUNK = 512  # tokens whose logits our loss has at a time


def layer_bytes(shape: TransformerShape, layout: Layout, recompute: Recompute | None = None) -> float:
    """Bytes that one layer keeps of one micro-batch on one rank, under the layout's policy or another."""
    policy = recompute or layout.recompute
    return _gpt_layer(shape, layout, policy) if shape.family == "gpt" else _llama_layer(shape, layout, policy)


def _gpt_layer(shape: TransformerShape, layout: Layout, policy: Recompute) -> float:
    tokens = shape.sequence // layout.cp
    sbh = tokens * layout.micro_batch * shape.hidden
    apart = layout.tp if layout.sequence_parallel else 1
    if policy == "full":
        return 2 * sbh / apart
    scores = 5 * shape.heads * shape.sequence / shape.hidden
    return sbh * (10 / apart + (24 + (scores if policy == "none" else 0.0)) / layout.tp)


def _llama_layer(shape: TransformerShape, layout: Layout, policy: Recompute) -> float:
    """Per token: both norms keep their unit vectors and what they put out; attention keeps turned queries and keys,
    all of qkv (the values are a view of it) and its output; the gated layer keeps gate and up, the activation and the
    product."""
    tokens = tokens_of_rank(shape, layout)
    tp, size = layout.tp, ELEMENT_BYTES[layout.precision]
    spread = tp if layout.sequence_parallel else 1
    stream = stream_bytes(shape, layout)
    if policy == "full":
        return tokens * stream
    # What norms put out is gathered over the tensor ranks before the products: each keeps all of it.
    norm = stream + size * shape.hidden + _FLOAT / spread
    rows = (2 * shape.heads + shape.kv_heads) * shape.head_dim  # turned queries and keys, the output
    rows += (shape.heads + 2 * shape.kv_heads) * shape.head_dim  # queries, keys and values together
    kept_rows = size * rows
    if layout.widened:  # queries, keys, values and the output in float32, and the output rounded; nothing else
        kept_rows = shape.head_dim * (_FLOAT * 2 * (shape.heads + shape.kv_heads) + size * shape.heads)
    attention = (kept_rows + _FLOAT * shape.heads) / tp
    kept = 2 * norm + mlp_bytes_per_token(shape, layout)
    return tokens * (kept if policy == "selective" else kept + attention)


def mlp_bytes_per_token(shape: TransformerShape, layout: Layout) -> float:
    """Of our decoder: gate and up, silu(gate) and their product, at every place where a token is worked on.

    In a mixture each choice also has a copy of the token, of its result before and after it is put back in order, and
    routing weights; a shared expert is a gated layer more.
    """
    size = ELEMENT_BYTES[layout.precision]
    gated = size * 4 / layout.tp
    if not shape.experts:
        return gated * shape.ffn
    choice = gated * shape.ffn + size * 2 * shape.hidden
    routing = 2 * _FLOAT * shape.experts + shape.experts_per_token * (2 * _INDEX + _FLOAT)
    return shape.experts_per_token * choice + gated * shape.shared_ffn + routing


def stream_bytes(shape: TransformerShape, layout: Layout) -> float:
    """One token's vector between two layers, or a rank's share of it."""
    return ELEMENT_BYTES[layout.precision] * shape.hidden / (layout.tp if layout.sequence_parallel else 1)


def tokens_of_rank(shape: TransformerShape, layout: Layout) -> int:
    """Tokens of one micro-batch that a rank's attention starts from."""
    return shape.sequence // layout.cp * layout.micro_batch


def below_bytes(shape: TransformerShape, layout: Layout) -> float:
    """What the embedding keeps of one micro-batch: dropout's mask, or the tokens."""
    tokens = tokens_of_rank(shape, layout)
    if shape.family == "gpt":
        return tokens * shape.hidden / (layout.tp if layout.sequence_parallel else 1)
    return tokens * _INDEX


def loss_bytes(shape: TransformerShape, layout: Layout) -> float:
    """What the last norm, the head and the loss need at their worst moment.

    Megatron: 4 s b h (1 + V / h) / t (section 4.3 of the paper: inputs of norm and head, and float32 logits). Ours
    keeps the norm's unit vectors and what it put out, the gradients of both factors of the logits, and of one chunk of
    tokens the logits, their log-softmax, and the gradients of the chunk before.
    """
    tokens = tokens_of_rank(shape, layout)
    if shape.family == "gpt":
        return 4 * tokens * (shape.hidden + shape.vocab) / layout.tp
    chunks = 3 if tokens > _LOSS_CHUNK else 2
    logits = chunks * _FLOAT * min(tokens, _LOSS_CHUNK) * shape.vocab
    factors = _FLOAT * shape.hidden * (tokens + shape.vocab / layout.tp) if layout.widened else 0.0
    return kept_loss_bytes(shape, layout) + logits / layout.tp + factors


def kept_loss_bytes(shape: TransformerShape, layout: Layout) -> float:
    """What the last norm and the loss keep for their backward pass."""
    tokens = tokens_of_rank(shape, layout)
    if shape.family == "gpt":
        return loss_bytes(shape, layout)
    size = ELEMENT_BYTES[layout.precision]
    gradient = _FLOAT if layout.widened else size
    vectors = tokens * ((2 * size + gradient) * shape.hidden + _FLOAT)
    return vectors + _FLOAT * shape.vocab * shape.hidden / layout.tp


def block_bytes(shape: TransformerShape, layout: Layout) -> float:
    """What the backward pass of one layer needs at its worst moment, besides what the layers keep.

    What is computed again, and the gradients on their way. Ours, in the feed-forward half: those of the stream twice,
    and of the gated layer those of gate and up, of the product, and a factor of them, as many bytes as it has saved.
    In attention, when what the other half has saved is gone: the stream twice, and twice queries, keys and values.
    """
    again = layer_bytes(shape, layout, "none") if layout.recompute == "full" else 0.0
    if shape.family == "gpt":
        return again
    tokens, stream = tokens_of_rank(shape, layout), 2 * stream_bytes(shape, layout)
    mlp = mlp_bytes_per_token(shape, layout)
    if layout.recompute != "selective":
        return again + tokens * (stream + mlp)
    rows = 2 * shape.head_dim * (shape.heads + 2 * shape.kv_heads) * ELEMENT_BYTES[layout.precision] / layout.tp
    attention = layer_bytes(shape, layout, "none") - layer_bytes(shape, layout)
    return max(tokens * (stream + mlp), attention + tokens * (stream + rows - mlp))
