"""What this machine computes on, and whether it multiplies in bf16 natively."""

from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]


def native_precision() -> Precision:
    """bf16 if the hardware supports it natively, otherwise fp32 (emulated bf16 is several times slower).

    Of ARM CPUs it is not known: fp32.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return _native_on_the_cpu()


def hardware(gpu: bool = True) -> str:
    """This machine as `model.hardware` names it: cpu, cpu+bf16, gpu or gpu+bf16.

    Args:
        gpu: False leaves the GPUs out, for what does not see them.
    """
    device = "gpu" if gpu and torch.cuda.is_available() else "cpu"
    native = native_precision() if gpu else _native_on_the_cpu()
    return f"{device}+bf16" if native == "bf16" else device


def _native_on_the_cpu() -> Precision:
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
