"""Where tensors live, and in which precision networks run."""

from contextlib import AbstractContextManager, nullcontext

import torch

from medseg_diff.errors import UserError


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name, else CUDA where there is one, else the CPU. Raises UserError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"--device {name}", "there is no such device here", "Use cpu, cuda, or leave it out."
        ) from error
    return device


def fast_in_bf16(device: torch.device) -> bool:
    """Whether bfloat16 convolutions beat float32 ones: CUDA since Ampere, processors with instructions for it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """`precision` is auto, fp32 or bf16."""
    if precision == "bf16" or (precision == "auto" and fast_in_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
