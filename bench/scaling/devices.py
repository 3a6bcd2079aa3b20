"""Machines of the study and what a dependent phase costs on them.

Bandwidths, memory and arithmetic are published figures, or follow from published ones; shares and latencies are
fixed here, before anything is compared, and each says where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phases:
    """Dependent phases of a step: what must end before the next can begin.

    dense: of a layer without a router. always, run, skip: of a routed layer, for all rows, for those that run it and
    for those that skip it. token: of what stands before and behind the layers.
    """

    dense: int
    always: int
    run: int
    skip: int
    token: int


# As the two engines of this package go through a layer.
CPU_PHASES = Phases(dense=5, always=1, run=5, skip=2, token=1)
CUDA_PHASES = Phases(dense=5, always=3, run=3, skip=0, token=5)


@dataclass(frozen=True)
class Latency:
    """Microseconds of a phase with work, and of one of the path that no row takes: CUDA kernels that find no row and
    leave, nothing at all on a CPU, which branches around them."""

    phase_us: float
    idle_us: float


CPU_LATENCY = Latency(2.5, 0.0)  # a barrier of a few spinning threads: 2 to 3 us
ONE_THREAD = Latency(0.0, 0.0)  # nobody to wait for
# 2.4 to 2.8 us over pure bytes follow from published figures of small models; an idle kernel takes about 1 us.
CUDA_LATENCY = Latency(2.6, 1.0)
CPU_SHARE = 0.90  # of the bandwidth: llama.cpp is reported at 85 to 95 %
GPU_SHARE = 0.90  # assumed: what plain copies reach of the published figure
FLOP_SHARE = 0.5  # assumed, of published arithmetic: prompts only


@dataclass(frozen=True)
class Device:
    """A machine. bandwidth in GB/s, memory in GB, arithmetic (16-bit inputs, float32 sums) in TFLOP/s."""

    name: str
    bandwidth: float
    memory: float
    teraflops: float
    share: float
    phases: Phases
    latency: Latency
    source: str


LAPTOP = Device(
    "laptop CPU", 89.6, 32, 1.0, CPU_SHARE, CPU_PHASES, CPU_LATENCY,
    "two channels of DDR5-5600; 8 cores of 32 FLOP a cycle at 4 GHz, float32 (AVX2); 32 GB is a choice",
)  # fmt: skip
RTX_4090 = Device(
    "RTX 4090", 1008, 24, 165.2, GPU_SHARE, CUDA_PHASES, CUDA_LATENCY,
    "NVIDIA Ada architecture whitepaper, tensor cores without sparsity",
)  # fmt: skip
H100 = Device(
    "H100 SXM", 3350, 80, 989.4, GPU_SHARE, CUDA_PHASES, CUDA_LATENCY,
    "NVIDIA H100 data sheet, tensor cores without sparsity",
)  # fmt: skip
H200 = Device(
    "H200", 4800, 141, 989.4, GPU_SHARE, CUDA_PHASES, CUDA_LATENCY,
    "NVIDIA H200 data sheet, tensor cores without sparsity",
)  # fmt: skip
# Not studied: published dense figures exist for it.
A100 = Device(
    "A100 SXM 80 GB", 2039, 80, 312, GPU_SHARE, CUDA_PHASES, CUDA_LATENCY,
    "NVIDIA A100 data sheet, tensor cores without sparsity",
)  # fmt: skip
STUDIED = (LAPTOP, RTX_4090, H100, H200)
