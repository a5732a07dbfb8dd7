"""What this machine can do for a model: its device, and the precision and batch size that `auto`
means on it.
"""

from __future__ import annotations

import os

from vitray.errors import ModelError

# Images. Two Zen 4 cores: 48 s at the first start, 6 s at the next ones, against 5 % of a
# ViT-Tiny's time. Accelerators: an estimate.
COMPILE_PAYS = {"cpu": 100_000, "cuda": 200_000}


def resolve_device(asked: str) -> str:
    """cuda, xpu, mps or cpu. Raises ModelError when the asked one is not there."""
    import torch

    present = (
        torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    )
    if asked in ("auto", present):
        return str(present)
    if asked != "cpu":
        raise ModelError(
            f"device {asked} is not available here (torch {torch.__version__} sees {present}). "
            f"Set device: auto."
        )
    return "cpu"


def require(device: str, precision: str, decode: str) -> None:
    """Raises ModelError where the device cannot do what is asked for by name."""
    if precision == "fp8":
        from vitray.models import fp8

        fp8.require(device)
    if decode in ("gpu", "hybrid"):
        from vitray.models import gpu_decode

        gpu_decode.require(device)


def auto_precision(device: str) -> str:
    """The fastest precision that the hardware computes natively."""
    import torch

    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    if device == "cpu":
        return "bf16" if _cpu_has_bf16() else "fp32"
    return "fp16" if device == "mps" else "bf16"


def auto_batch_size(device: str, dimension: int) -> int:
    if device == "cpu":
        return 16 if dimension < 1024 else 8
    return 256 if device == "cuda" else 64


def compiling_pays(device: str, images: int) -> bool:
    """Whether torch.compile wins back its minute over so many images of one actor. Needs no
    torch.
    """
    return images >= COMPILE_PAYS.get(device, COMPILE_PAYS["cuda"])


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
            flags = next((line for line in stream if line.startswith("flags")), "").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
