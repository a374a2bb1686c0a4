"""Networks and clusters by name.

Sizes of networks are those of their papers: GPT from table 3 of arXiv 2205.05198; Llama 2 from arXiv 2307.09288, Llama
3.1 405B from arXiv 2407.21783, table 3; Mixtral from arXiv 2401.04088, table 1. `nano-10m` is the network of this
house's own throughput benchmark.

Clusters: data sheets for peaks (A100 80 GB: 312 TFLOP/s in bf16, 2.039 TB/s; H100 SXM: 989 TFLOP/s dense, 3.35 TB/s).
NVLink 3 has 300 GB/s a direction, NVLink 4 450. Between nodes 200 Gbit/s (A100) or 400 Gbit/s (H100) of InfiniBand for
each device. What is reached of these is in the constants below, which hold for all clusters of GPUs.
"""

from __future__ import annotations

from dataclasses import replace

from sihe.cluster.collectives.costs import Link
from sihe.cluster.planner.types import ClusterSpec, Precision, TransformerShape
from sihe.core.errors import InvalidInput, NotFound

MATMUL_EFFICIENCY = 0.73
"""Fitted on the two rows of GPT-175B in table 5 of arXiv 2205.05198, as the only constant that is; a test repeats the
fit and predicts the other six rows."""
MEMORY_EFFICIENCY = 0.80
"""Assumed, of elementwise kernels on tensors of 10 to 100 MB; not fitted."""
LINK_EFFICIENCY = 0.77
"""Assumed, for all links: 230 of NVLink 3's 300 GB/s, what all-reduces of large messages reach in one node of 8 A100;
not fitted."""
_NVLINK_LATENCY_S = 5e-6  # assumed, a kernel's start and one hop; messages of tensor parallelism are far above it
_INFINIBAND_LATENCY_S = 1e-5  # assumed, a round through both network cards


def _gpt(name: str, layers: int, hidden: int, heads: int) -> TransformerShape:
    return TransformerShape(
        name, layers, hidden, heads, heads, hidden // heads, 4 * hidden, vocab=51200, sequence=2048, family="gpt"
    )


MODELS = {
    shape.name: shape
    for shape in (
        TransformerShape("nano-10m", 6, 384, 6, 6, 64, 1024, vocab=8192, sequence=256),
        TransformerShape("llama-7b", 32, 4096, 32, 32, 128, 11008, vocab=32000, sequence=4096, tied=False),
        TransformerShape("llama-70b", 80, 8192, 64, 8, 128, 28672, vocab=32000, sequence=4096, tied=False),
        TransformerShape("llama-405b", 126, 16384, 128, 8, 128, 53248, vocab=128256, sequence=8192, tied=False),
        TransformerShape(
            *("mixtral-8x7b", 32, 4096, 32, 8, 128, 14336, 32000, 4096),
            tied=False,
            experts=8,
            experts_per_token=2,
        ),
        _gpt("gpt-22b", 48, 6144, 64),
        _gpt("gpt-175b", 96, 12288, 96),
        _gpt("gpt-530b", 105, 20480, 128),
        _gpt("gpt-1t", 128, 25600, 160),
    )
}


def _gpus(
    name: str, nodes: int, *, memory_bandwidth: float, half: float, single: float, nvlink: float, infiniband: float
) -> ClusterSpec:
    peaks: dict[Precision, float] = {"bf16": half, "fp16": half, "fp32": single}
    return ClusterSpec(
        name,
        nodes,
        per_node=8,
        memory_bytes=80e9,
        memory_bandwidth=memory_bandwidth,
        peak_flops=peaks,
        inside=Link(_NVLINK_LATENCY_S, nvlink * LINK_EFFICIENCY),
        between=Link(_INFINIBAND_LATENCY_S, infiniband * LINK_EFFICIENCY),
        matmul_efficiency=MATMUL_EFFICIENCY,
        memory_efficiency=MEMORY_EFFICIENCY,
    )


def a100(nodes: int) -> ClusterSpec:
    """Nodes of 8 A100 80 GB, NVLink 3 inside, 200 Gbit/s a device between."""
    return _gpus(
        "a100-80g", nodes, memory_bandwidth=2.039e12, half=312e12, single=19.5e12, nvlink=300e9, infiniband=25e9
    )


def h100(nodes: int) -> ClusterSpec:
    """Nodes of 8 H100 SXM, NVLink 4 inside, 400 Gbit/s a device between."""
    return _gpus("h100", nodes, memory_bandwidth=3.35e12, half=989e12, single=67e12, nvlink=450e9, infiniband=50e9)


CLUSTERS = {"a100-80g": a100, "h100": h100}


def model(name: str) -> TransformerShape:
    """The network called `name`. Raises `NotFound`."""
    if name not in MODELS:
        raise NotFound("model of the planner", name, hint=f"there are {', '.join(MODELS)}")
    return MODELS[name]


def cluster(name: str, devices: int) -> ClusterSpec:
    """So many devices of the cluster called `name`, in nodes of 8, or one node of fewer. Raises `NotFound`."""
    if name not in CLUSTERS:
        raise NotFound("cluster of the planner", name, hint=f"there are {', '.join(CLUSTERS)}")
    if devices < 1 or (devices > 8 and devices % 8):
        raise InvalidInput(f"devices come as 1 to 8, or as whole nodes of 8, got {devices!r}")
    return replace(CLUSTERS[name](max(1, devices // 8)), per_node=min(devices, 8))
