"""Stages whose layers are themselves spread over ranks, by the other dimensions of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sihe.models.architecture import LayerConfig, PositionConfig
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.parallel.context import ContextAttention, positions_of_share, share_of_sequence
from sihe.training.parallel.expert import cut_experts
from sihe.training.parallel.held import Cut
from sihe.training.parallel.mesh import ParallelMesh
from sihe.training.parallel.pipeline import Pipeline
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.parallel.stage import Stage
from sihe.training.parallel.tensor import cut_block
from sihe.training.parallel.vocabulary import VocabularyEmbedding, cut_vocabulary, vocabulary_cross_entropy
from sihe.training.parallel.zero import shard_states
from support.gloo import run_ranks

CONFIG = ModelConfig(
    vocab_size=44,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_positions=16,
)
LEARNED = replace(CONFIG, positions=PositionConfig(kind="learned"), layers=LayerConfig(norm="layer"))
MIXTURE = replace(CONFIG, num_experts=4, experts_per_token=2, expert_intermediate_size=12, balance_coefficient=0.5)
SPLIT = {"pp": 2, "stages_per_rank": 2, "microbatches": 4}
PLANS = {
    "tp": ParallelPlan(tp=2, pp=2, microbatches=2),
    "tp, backward split": ParallelPlan(tp=2, schedule="zbv", **SPLIT),
    "tp, mixture": ParallelPlan(tp=2, schedule="interleaved-zero-bubble", **SPLIT),
    "tp, learned positions": ParallelPlan(tp=2, pp=2, microbatches=2),
    "dp, documents": ParallelPlan(dp=2, pp=2, microbatches=2),
    "cp": ParallelPlan(cp=2, schedule="interleaved-1f1b", **SPLIT),
    "ep, mixture": ParallelPlan(dp=2, ep=2, schedule="dualpipe-v", **SPLIT),
    "ZeRO-3": ParallelPlan(shard=2, zero=3, pp=2, microbatches=2),
    "ZeRO-2, backward split": ParallelPlan(shard=2, zero=2, schedule="interleaved-zero-bubble", **SPLIT),
    "ZeRO-3, backward split": ParallelPlan(shard=2, zero=3, schedule="zbv", **SPLIT),
}


def model_and_batch(kind: str) -> tuple[Decoder, Tensor, Tensor, Tensor | None]:
    """A model, and of a batch the tokens, the targets and the documents, if there are any."""
    torch.manual_seed(19)
    model = Decoder(MIXTURE if "mixture" in kind else LEARNED if "learned" in kind else CONFIG)
    documents_BT = torch.randint(2, (8, 8)).cumsum(1) if "documents" in kind else None
    return model, torch.randint(44, (8, 8)), torch.randint(-1, 44, (8, 8)), documents_BT


def gradients(kinds: list[str]) -> dict[str, tuple[float, dict[str, Tensor]]]:
    return {kind: gradients_under(kind) for kind in kinds}


def gradients_under(kind: str) -> tuple[float, dict[str, Tensor]]:
    """The loss of this rank's samples; and this rank's summand of the gradient of each whole weight that it owns."""
    plan = PLANS[kind]
    mesh = ParallelMesh(plan)
    model, tokens_BT, targets_BT, documents_BT = model_and_batch(kind)
    pipeline = Pipeline(model, mesh)
    cuts = {weight: cut for stage in pipeline.stages for weight, cut in spread(stage, mesh)}
    batch, positions_BT = mesh["batch"], None
    tokens_BT, targets_BT = (x.chunk(batch.size)[batch.rank] for x in (tokens_BT, targets_BT))
    if documents_BT is not None:
        documents_BT = documents_BT.chunk(batch.size)[batch.rank]
    if plan.cp > 1:
        positions_BT = positions_of_share(tokens_BT.shape[1], mesh["cp"])
        tokens_BT, targets_BT = (share_of_sequence(x, mesh["cp"]) for x in (tokens_BT, targets_BT))
    loss = pipeline.step(tokens_BT, targets_BT, 0.5, positions_BT=positions_BT, documents_BT=documents_BT)
    pipeline.sum_tied_gradients()
    grads: dict[str, Tensor] = {}
    for name, parameter, is_copy in pipeline.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad
        if isinstance(grad, DTensor):
            grad = grad.full_tensor() / batch.size  # the sum already: one of equal summands
        if parameter in cuts:
            cut, part = cuts[parameter], grad
            shape = [size * cut.axis.size if dim == cut.dim else size for dim, size in enumerate(part.shape)]
            grad = torch.zeros(shape)
            grad.chunk(cut.axis.size, cut.dim)[cut.axis.rank].copy_(part)
        if not is_copy:
            grads[name] = grad
    return float(loss) / plan.tp, grads


def spread(stage: Stage, mesh: ParallelMesh) -> Iterator[tuple[torch.nn.Parameter, Cut]]:
    """Puts the other dimensions of the plan under a stage."""
    plan, blocks = mesh.plan, list(stage.blocks.values())
    if plan.tp > 1:
        axis = mesh["tp"]
        for block in blocks:
            yield from cut_block(block, axis)
        if stage.embedding is not None:
            yield stage.embedding.weight, cut_vocabulary(stage.embedding.weight, axis)
            stage.embedding = VocabularyEmbedding(stage.embedding, axis)
        if stage.head is not None:
            yield stage.head.weight, cut_vocabulary(stage.head.weight, axis)
        stage.criterion = partial(vocabulary_cross_entropy, axis=axis)
    if plan.ep > 1:
        for block in blocks:
            yield from cut_experts(block, mesh["ep"])
    if plan.cp > 1:
        stage.attend = ContextAttention(mesh["cp"])
    if plan.zero >= 2:
        shard_states(blocks, stage, mesh, torch.float32, experts=[])


def check(kinds: list[str]) -> None:
    by_rank = run_ranks(gradients, 4, kinds)
    for kind in kinds:
        plan = PLANS[kind]
        model, *batch = model_and_batch(kind)
        parts = plan.batch_ranks * plan.microbatches
        total = 0.0
        for part in range(parts):
            tokens_BT, targets_BT, documents_BT = (None if x is None else x.chunk(parts)[part] for x in batch)
            loss, _ = model.loss(tokens_BT, targets_BT, documents_BT=documents_BT)
            (loss * 0.5).backward()
            total += float(loss.detach())
        answers = [answer[kind] for answer in by_rank]
        assert sum(loss for loss, _ in answers) / plan.pp == pytest.approx(total, rel=1e-6), kind
        for name, weight in model.named_parameters():
            got = torch.stack([grads[name] for _, grads in answers if name in grads]).sum(0)
            assert weight.grad is not None
            largest = float(weight.grad.abs().max())
            torch.testing.assert_close(
                got, weight.grad, rtol=1e-5, atol=1e-5 * largest, msg=lambda text, k=kind, n=name: f"{k}: {n}: {text}"
            )


@pytest.mark.parametrize("kind", ["tp, backward split", "cp"])
def test_gradients_are_those_of_one_process(kind: str) -> None:
    check([kind])


@pytest.mark.slow
def test_gradients_are_those_of_one_process_in_every_composition() -> None:
    check([kind for kind in PLANS if kind not in ("tp, backward split", "cp")])
