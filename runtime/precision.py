"""
设备、精度与随机种子。
Device, dtype of the matrix products, and random seeds.
"""

import functools
import random
import sys
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist


def pick_device(name: str = "auto") -> torch.device:
    """auto: cuda, mps (Apple's GPU) or cpu, the first that this machine has. Exits if it has no
    such device."""
    here = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()),
            "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, n in here.items() if n))
    kind, _, number = name.partition(":")
    if not (number or "0").isdecimal() or int(number or 0) >= here.get(kind, 0):
        known = [f"{kind}:{i}" if n > 1 else kind for kind, n in here.items() for i in range(n)]
        sys.exit(f"--device {name}: this machine has {', '.join(known)}")
    return torch.device(name)


def sum_dtype(device) -> torch.dtype:
    """Of long sums: float64, which Apple's GPUs lack."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


@functools.cache
def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype. bfloat16 becomes float32, with one message, where the hardware would
    emulate it slowly. auto: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, name)
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        has_bf16 = False            # autocast and GradScaler are CUDA's; fp32 works everywhere
    else:
        has = torch.cpu.get_capabilities()
        has_bf16 = any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if dtype == torch.bfloat16 and not has_bf16:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{device} has no bfloat16 arithmetic: matrix products run in "
                  "float32", flush=True)
        return torch.float32
    if dtype == torch.float16 and device.type != "cuda":
        sys.exit("--dtype float16 needs a GPU with CUDA; elsewhere use --dtype float32")
    return dtype


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in `dtype`; weights, losses and the optimizer stay in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def seed_of(*numbers: int) -> int:
    """A seed that depends on these numbers alone, not on processes or time."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*seed: int):
    """Seed Python, NumPy and PyTorch from one or several integers."""
    mixed = seed_of(*seed)
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
