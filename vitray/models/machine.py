"""What this machine offers a model: device, CPUs, the meaning of `auto`, and the roofline.

Importing this imports neither torch nor transformers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from vitray.cpus import cores
from vitray.errors import ModelError, count
from vitray.models.checkpoint import read_config
from vitray.models.checkpoint_store import locate
from vitray.schema import ModelSpec

# Images above which compiling pays. CPU: two Zen 4 cores took 48 s at the first start and 6 s at
# the next ones, and saved 5% of a ViT-Tiny's time. Accelerators: an estimate.
COMPILE_PAYS = {"cpu": 100_000, "cuda": 200_000}
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0

ROOFLINE_S = 2.0  # of measuring
CPU_PRODUCT = (4096, 768, 3072)  # rows, inputs, outputs
DEVICE_PRODUCT = (8192, 8192, 8192)  # large enough to fill an H200


def resolve_device(device: str) -> str:
    """cuda, xpu, mps or cpu, of a job's `device`; imports torch only where it is needed.

    Raises ModelError when the device is not available.
    """
    if device == "cpu":
        return device
    import torch

    present = "cpu"
    if torch.accelerator.is_available():
        present = str(torch.accelerator.current_accelerator().type)
    if device in ("auto", present):
        return present
    raise ModelError(
        f"device {device} is not available here (torch {torch.__version__} sees {present}). "
        "Set device: auto."
    )


def usable_gpus(device: str) -> int:
    """The number of accelerators of a resolved device on this machine; 0 for cpu."""
    if device == "cpu":
        return 0
    import torch

    return int(torch.accelerator.device_count())


def require_hardware(device: str, precision: str) -> None:
    """Raise ModelError when the device lacks the hardware for fp8."""
    if precision != "fp8":
        return
    import torch

    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    if capability is None or capability < FP8_CAPABILITY:
        present = device
        if capability is not None:
            present = f"a GPU of compute capability {capability[0]}.{capability[1]}"
        raise ModelError(
            f"precision fp8 needs a GPU of compute capability 8.9 or more, and this is {present}. "
            "Set precision: auto."
        )


def require_decoder(device: str, decode: str) -> None:
    """Raise ModelError when images cannot be decoded on the device."""
    if decode in ("gpu", "hybrid"):
        from vitray.models.gpu_decode import require

        require(device)


def auto_precision(device: str) -> str:
    """The fastest precision that the hardware computes natively."""
    import torch

    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    if device == "cpu":
        return "bf16" if _cpu_has_bf16() else "fp32"
    return "fp16" if device == "mps" else "bf16"


def auto_batch_size(device: str, dimension: int) -> int:
    """Images in a forward pass. dimension: of the model's embedding."""
    if device == "cpu":
        return 16 if dimension < 1024 else 8
    return 256 if device == "cuda" else 64


def compiles(choice: str, images: int, device: str) -> bool:
    """Whether a model that will see so many images is compiled. choice: the job's `compile`."""
    if choice == "auto":
        return images >= COMPILE_PAYS.get(device, COMPILE_PAYS["cuda"])
    return choice == "on"


def describe_compile(engine: str, choice: str, images: int) -> str:
    """A text for people: whether a run over so many images compiles the model.

    engine: as in the job. choice: the job's `compile`.
    """
    if engine not in ("auto", "torch"):
        return f"off: engine {engine} compiles by itself"
    if choice != "auto":
        return choice
    cpu, gpu = COMPILE_PAYS["cpu"], COMPILE_PAYS["cuda"]
    is_off = images < min(cpu, gpu)
    decision = "off" if is_off else "on where a machine or a GPU gets enough of them"
    return (
        f"auto: {decision} "
        f"({count(images, 'image')}; on from {cpu:,} images per machine or {gpu:,} per GPU in "
        "one run)"
    )


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """A block after which torch has as many threads as before it.

    A model on the CPU leaves torch with one thread.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
            flags = next((line for line in stream if line.startswith("flags")), "").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


# ---------------------------------------------------------------- the roofline


def roofline(spec: ModelSpec, device: str) -> tuple[float, float]:
    """Images/s if this machine only multiplied matrices, and the operations/s behind that.

    Measures for 2 s.
    """
    rate = matmul_flops(spec.precision, device)
    return rate / flop_per_image(spec), rate


def flop_per_image(spec: ModelSpec) -> float:
    """Floating-point operations for one image; ViT-B/16: 35.13e9.

    They are the patch embedding, the projections, attention's two products, and the MLP.
    """
    config = read_config(locate(spec.model, spec.revision))
    vision = getattr(config.hf, "vision_config", config.hf)
    width = spec.dimension
    # DINOv2's config has a ratio
    inner = int(getattr(vision, "intermediate_size", 0) or width * vision.mlp_ratio)
    height, side = spec.pixels.shape
    patches = (height // config.patch_size) * (side // config.patch_size)
    tokens = patches + spec.prefix_tokens
    block = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
    return 2.0 * (spec.layers * block + patches * 3 * config.patch_size**2 * width)


def matmul_flops(precision: str, device: str) -> float:
    """Operations/s of the fastest product of one matrix shape, on all cores or the whole device."""
    import torch

    from vitray.models.blocks import PackedLinear, can_pack
    from vitray.models.forward import DTYPES

    dtype = DTYPES.get(precision, torch.bfloat16)
    rows, inputs, outputs = CPU_PRODUCT if device == "cpu" else DEVICE_PRODUCT
    layer = torch.nn.Linear(inputs, outputs, device=device, dtype=dtype)
    run = PackedLinear(layer, None) if device == "cpu" and can_pack(dtype) else layer
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    best = float("inf")
    with torch_threads_kept(), torch.inference_mode():
        torch.set_num_threads(cores())
        end = time.perf_counter() + ROOFLINE_S
        while time.perf_counter() < end:
            started = time.perf_counter()
            run(x)
            if device != "cpu":
                torch.accelerator.synchronize()
            best = min(best, time.perf_counter() - started)
    return 2.0 * rows * inputs * outputs / best
