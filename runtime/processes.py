"""
多进程：DDP 每步只通信一次；ZeRO-2/3 用 PyTorch 的 fully_shard；停止信号由所有进程一起响应。
Several processes: DDP with one communication per optimizer step, ZeRO-2/3 by PyTorch's fully_shard,
a common stop signal.
"""

import atexit
import ctypes
import datetime
import functools
import os
import signal
import sys
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn     # noqa: F401  imported later, by DDP, it keeps the group alive
from torch.nn.parallel import DistributedDataParallel

from runtime.args import command_line
from runtime.precision import pick_device, pick_dtype


class World(NamedTuple):
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype = torch.float32      # of the matrix products


def init_distributed_mode(ddp: bool | None = None, device: str = "auto", local_rank: int = -1,
                          dtype: str = "float32") -> World:
    """One process, or as many as torchrun started: NCCL between GPUs, gloo between CPUs. None: as
    torchrun says."""
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    if ddp is None:
        ddp = "RANK" in os.environ
    if not ddp:
        if n_processes > 1:
            sys.exit(f"torchrun started {n_processes} processes that would each train alone; add "
                     "--ddp")
        device = pick_device(device)
        return World(0, 1, device, pick_dtype(dtype, device))
    if "RANK" not in os.environ:
        sys.exit(f"--ddp needs torchrun to start its processes. Type:\n"
                 f"    torchrun --nproc_per_node 2 {command_line()}")
    if sys.platform == "linux":         # PR_SET_PDEATHSIG: save and stop when torchrun is killed
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    local_rank = local_rank if local_rank >= 0 else int(os.environ["LOCAL_RANK"])
    on_gpu = pick_device(device).type == "cuda"
    device = pick_device(f"cuda:{local_rank}" if on_gpu else "cpu")     # gloo has no mps
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    atexit.register(dist.destroy_process_group)
    dist.barrier()      # a process that exits at once must not break the others' connections
    return World(dist.get_rank(), dist.get_world_size(), device, pick_dtype(dtype, device))


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def patient_group(world: World):
    """A process group whose collectives may wait for days, where NCCL gives up after ten minutes;
    None for one process. All processes call this."""
    if world.size == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


@contextmanager
def main_process_first(world: World):
    """The main process runs the block alone, then the others do: it tokenises, they find the file.
    If it fails, the others fail with the same error instead of waiting for it."""
    group = patient_group(world)        # 10 GB take longer than ten minutes
    if world.rank != 0:
        dist.barrier(group)
    try:
        yield
    finally:
        if world.rank == 0 and world.size > 1:
            dist.barrier(group)


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_process(busy: bool, device) -> bool:
    """Whether any process is busy."""
    return bool(sum_over_processes(torch.tensor(float(busy), device=device)) > 0)


# -- data parallel and sharded models -------------------------------------------------------------


def parallelize(module, world: World, shard: str = "none", units=()):
    """The module on its device, as the training loop calls it; under DDP gradients come out as
    means over processes.

    shard  none:  each process has the whole model (DistributedDataParallel)
           zero2: gradients and optimizer state are sharded
           zero3: weights too
    units  sharded: the submodules that are gathered one at a time
    """
    if shard != "none" and any(True for _ in module.parameters()):
        return fully_shard(module, world, units, zero2=shard == "zero2")
    module = module.to(world.device)
    if world.size == 1 or not any(weight.requires_grad for weight in module.parameters()):
        return module
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


def fully_shard(module, world: World, units, zero2: bool = False):
    """Shard a module's weights over the processes by rows, in place.

    The units are gathered in the dtype of the matrix products when they are called, and again for
    the gradient; under zero2 they stay gathered in between. The rest (embeddings, norms, head) is
    gathered in fp32 when the module is called and stays until the backward pass, because a loss may
    use the head outside the module. Gradients are averaged in fp32; AdamW keeps moments for this
    process's rows alone. Call the module under autocast. Rajbhandari et al. 2020 (ZeRO),
    https://arxiv.org/abs/1910.02054, Sec. 5; Zhao et al. 2023 (FSDP),
    https://arxiv.org/abs/2304.11277, Sec. 3.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = device_mesh(world)
    # Inputs are not cast: the residual stream stays fp32, as without sharding.
    precision = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=not zero2, mp_policy=precision)
    module = fully_shard(module, mesh=mesh, reshard_after_forward=False)
    module.zero2 = zero2
    return module


@functools.cache
def device_mesh(world: World):
    return dist.init_device_mesh(world.device.type, (world.size,))


def unwrapped(module):
    """The module without DDP around it."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def is_sharded(module) -> bool:
    return hasattr(module, "set_reshard_after_backward")        # of FSDPModule


@contextmanager
def sync_gradients(modules: dict, last: bool):
    """Processes communicate gradients once per optimizer step, with its last micro-batch. Around
    the forward pass."""
    with ExitStack() as stack:
        for module in modules.values():
            if isinstance(module, DistributedDataParallel) and not last:
                stack.enter_context(module.no_sync())
            elif is_sharded(module):        # gradients are sharded each time, or they fill memory
                module.set_reshard_after_backward(last or not module.zero2)
        yield


def release_gathered(modules: dict):
    """ZeRO-2/3: drop gathered weights after the optimizer's step has changed them."""
    for module in modules.values():
        if is_sharded(module):
            for part in module.modules():
                if is_sharded(part):
                    part.reshard()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor (DTensor) gathered from all processes, which must all call this; any other
    tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_rows(tensor: torch.Tensor) -> torch.Tensor:
    """This process's rows of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded_like(weight, full: torch.Tensor) -> torch.Tensor:
    """The inverse of full_tensor: a tensor that all processes have, sharded as `weight` is."""
    if not dist.is_initialized():
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(weight, DTensor):
        return full
    return distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)


# -- stopping -------------------------------------------------------------------------------------


class StopSignal:
    """Ctrl-C, SIGTERM and SIGHUP, of a terminal that closes, request a stop; the loop finishes its
    step, saves and exits. A second Ctrl-C exits at once. nohup ignores SIGHUP, and so it stays."""

    def __init__(self):
        self.requested = self.stopped = False
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.receive)          # Windows has none

    def receive(self, number, frame):
        if self.requested and number == signal.SIGINT:
            sys.exit("interrupted twice: this step is not saved")
        self.requested = True

    def agreed(self, step: int, world: World, every: int = 8) -> bool:
        """Whether to stop after this step. Processes receive a signal at different steps and must
        stop at the same one, so they compare notes every eighth step: soon enough for a person,
        rare enough to cost nothing."""
        if world.size == 1:
            self.stopped = self.requested
        elif step % every == 0:
            requested = torch.tensor(float(self.requested), device=world.device)
            self.stopped = bool(sum_over_processes(requested) > 0)
        return self.stopped
