"""The GPUs and models that profiles ship for, and the figures that no timing table has."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
EFFECTIVE_LINK = 0.8  # of the nominal rate: what large copies reach over NVLink, InfiniBand and PCIe
LINK_LATENCY_S = 20e-6  # 10 us point to point (aiconfigurator's figure for every system) and 10 us to start a copy
HOST_KV_BYTES = 128 * GIB  # per device: half of a 2 TB host shared by 8 devices
DEVICES_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`system` names the timing tables. With `scaled`, their times are moved to another device by its roofline."""

    name: str
    device: str
    system: str
    memory_bytes: int
    peak_flops: float  # bf16 dense, per second
    memory_bytes_per_s: float
    intra_node_bytes_per_s: float  # nominal, per device and direction, as are the two below
    inter_node_bytes_per_s: float
    host_bytes_per_s: float
    scaled: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """`config` is the model's name in aiconfigurator. Head counts are of the whole model."""

    name: str
    config: str
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    context_note: str
    experts: int = 0
    active_experts: int = 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers in bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


GPUS = (
    Gpu(
        name="a100",
        device="NVIDIA A100 SXM 80 GB",
        system="a100_sxm",
        memory_bytes=80 * GIB,
        peak_flops=312e12,
        memory_bytes_per_s=2.039e12,
        intra_node_bytes_per_s=300e9,
        inter_node_bytes_per_s=25e9,
        host_bytes_per_s=32e9,
    ),
    Gpu(
        name="h100",
        device="NVIDIA H100 SXM 80 GB",
        system="h100_sxm",
        memory_bytes=80 * GIB,
        peak_flops=989e12,
        memory_bytes_per_s=3.35e12,
        intra_node_bytes_per_s=450e9,
        inter_node_bytes_per_s=50e9,
        host_bytes_per_s=64e9,
    ),
    Gpu(
        name="h200",
        device="NVIDIA H200 SXM 141 GB",
        system="h200_sxm",
        memory_bytes=141 * GIB,
        peak_flops=989e12,
        memory_bytes_per_s=4.8e12,
        intra_node_bytes_per_s=450e9,
        inter_node_bytes_per_s=50e9,
        host_bytes_per_s=64e9,
    ),
    Gpu(
        name="h20",
        device="NVIDIA H20 96 GB",
        system="h100_sxm",
        memory_bytes=96 * GIB,
        peak_flops=148e12,
        memory_bytes_per_s=4.0e12,
        intra_node_bytes_per_s=450e9,
        inter_node_bytes_per_s=25e9,
        host_bytes_per_s=64e9,
        scaled=True,
    ),
)

MODELS = (
    Model(
        name="qwen3-32b",
        config="Qwen/Qwen3-32B",
        layers=64,
        kv_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_context_tokens=131_072,
        context_note="the model's config says 40,960; 131,072 needs YaRN scaling, which costs no time",
    ),
    Model(
        name="llama-3.1-70b",
        config="meta-llama/Meta-Llama-3.1-70B",
        layers=80,
        kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        max_context_tokens=131_072,
        context_note="the model's config",
    ),
    Model(
        name="mixtral-8x7b",
        config="mistralai/Mixtral-8x7B-v0.1",
        layers=32,
        kv_heads=8,
        head_dim=128,
        vocab_size=32_000,
        max_context_tokens=32_768,
        context_note="the model's config: 32,768",
        experts=8,
        active_experts=2,
    ),
)
