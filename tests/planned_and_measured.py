"""
真实的一步：几个进程一起训练，量出内存、发送的字节和时间，与 scripts/plan_memory.py 的计划对照。
Real steps on one or two processes beside what scripts/plan_memory.py plans: memory, bytes sent, seconds.

    python tests/planned_and_measured.py        # Linux, two cores: planned and measured memory and seconds

Seconds are CPU time: other programs do not count, nor does waiting, and gloo's communication is CPU work.
"""

import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from distill.fused import Dense, fused_distillation_loss
from distill.losses import reverse_kl
from evaluation.tables import markdown
from interop.checkpoint import build
from model.config import LMConfig
from model.lora import add_lora, store_frozen
from runtime.log import peak_above
from runtime.optim import OPTIMIZERS, parameter_groups
from runtime.precision import autocast
from runtime.processes import World, parallelize, release_gathered, sync_gradients
from scripts.plan_memory import label, n_bytes, plan, seconds, step, total

CPU = torch.device("cpu")


class Sent(TorchDispatchMode):
    """Adds up what a ring of n processes sends for the collectives on weights and gradients: n - 1 of n parts, twice for
    DDP's allreduce."""

    def __init__(self, n):
        super().__init__()
        self.n, self.bytes = n, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "c10d" in name and ("allreduce" in name or "scatter" in name or "gather" in name):
            sizes = [each.nbytes for each in torch.utils._pytree.tree_leaves(args) if isinstance(each, torch.Tensor)]
            whole = sizes[0] * self.n if "into_tensor" in name else max(sizes)
            self.bytes += (2 if "allreduce" in name else 1) * whole * (self.n - 1) // self.n
        return function(*args, **(kwargs or {}))


def ring_rate(n) -> float:
    """Bytes per second of a ring."""
    tensor, times = torch.zeros(1 << 22), []
    for _ in range(8 if n > 1 else 0):
        start = time.process_time()
        dist.all_reduce(tensor)
        times.append(time.process_time() - start)
    return 2 * tensor.nbytes * (n - 1) / n / statistics.median(times) if times else 1.0


def real_steps(rank, meeting, config, run, n_steps) -> tuple[int, int, float, float]:
    """(peak bytes above those of Python and torch, bytes sent in the last step, median seconds of all but the first, bytes
    per second of a ring)"""
    torch.set_num_threads(1)
    n = run.get("processes", 1)
    if n > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=n)
    world, rate = World(rank, n, CPU, getattr(torch, run["dtype"])), ring_rate(n)
    # The first steps load the code of every kernel, which counts as memory too: of a small model.
    small = LMConfig(dim=16, n_layers=2, n_heads=2, vocab_size=64, qk_norm=config.qk_norm)
    train(small, run | {"max_seq_len": 8, "lora_rank": 0}, world, 2)
    with peak_above(CPU) as above:
        sent, times = train(config, run, world, n_steps)
    if n > 1:
        dist.barrier()
    return above(), sent, statistics.median(times[1:]), rate


def train(config, run, world, n_steps) -> tuple[int, list[float]]:
    """(bytes sent in the last step, seconds of each)"""
    shard, A, times = run.get("shard", "none"), run["accumulation_steps"], []
    student, teacher = build(config).train(), build(config).to(world.dtype).eval().requires_grad_(False)
    if run.get("lora_rank"):
        add_lora(student, run["lora_rank"])
        store_frozen(student, world.dtype)
    student.grad_checkpoint = run.get("grad_checkpoint", False)
    modules = {"model": parallelize(student, world, shard, student.shard_units())}
    if shard == "zero3":
        parallelize(teacher, world, shard, teacher.shard_units())
    optimizer = OPTIMIZERS[run.get("optimizer", "adamw")](parameter_groups(modules, 0.1), fused=True)
    lengths = [run["max_seq_len"]] * run["batch_size"]
    for number in range(n_steps):
        start = time.process_time()
        counting = Sent(world.size)
        with counting if number == n_steps - 1 else nullcontext():        # the last is slower
            for micro in range(A):
                tokens = torch.randint(config.vocab_size, (sum(lengths),))
                with torch.no_grad(), autocast(CPU, world.dtype):
                    states = teacher(tokens, lengths, with_logits=False).final
                with autocast(CPU, world.dtype), sync_gradients(modules, micro == A - 1):
                    out = modules["model"](tokens, lengths, with_logits=False)
                    fused = fused_distillation_loss(out.final, student.head, tokens, [Dense(states, teacher.head)], 0.5,
                                                    4.0, reverse_kl)
                (fused.loss / len(tokens)).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            release_gathered(modules)
        times.append(time.process_time() - start)
    return counting.bytes, times


def measured(config, run, n_steps=2, returned="") -> tuple[int, int, float, float]:
    """real_steps, in new processes. returned: size of blocks that glibc returns when they are freed, so that a process has
    its tensors alone."""
    n = run.get("processes", 1)
    os.environ.update({"MALLOC_MMAP_THRESHOLD_": returned} if returned else {})
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(n, mp_context=get_context("spawn")) as new:
        calls = [new.submit(real_steps, rank, f"{folder}/meeting", config, run, n_steps) for rank in range(n)]
        found = [call.result() for call in calls]
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    return found[0]


def main():
    """The rate that a pair's step reaches is taken from its first recipe, and gloo's from each run."""
    rows = [["student and teacher", "vocabulary", "recipe", "optimizer", "processes", "planned MB", "measured MB", "ratio",
             "planned s", "measured s", "ratio"]]
    for dim, n_layers, vocab_size, batch_size in ((256, 8, 6400, 4), (512, 8, 6400, 2), (256, 4, 49152, 2)):
        config, reached = LMConfig(dim=dim, n_layers=n_layers, vocab_size=vocab_size, qk_norm=True), None
        for more in ({}, {"grad_checkpoint": True}, {"lora_rank": 8}, {"optimizer": "muon"},
                     *({"processes": 2, "shard": shard} for shard in ("none", "zero2", "zero3"))):
            run = {"batch_size": batch_size, "max_seq_len": 256, "accumulation_steps": 2, "dtype": "float32", **more}
            peak = measured(config, run, returned="65536")[0]
            _, _, found, ring = measured(config, run, n_steps=5)
            memory, terms = total(plan(config, config, **run)), step(config, config, **run)
            work = sum(n_bytes(formula) for formula in terms.values() if formula.endswith("operations"))
            reached = reached or work / found
            planned = sum(seconds(terms, {"operations": reached, "within": ring})[0].values())
            rows.append([str(config), f"{vocab_size:,}", label(**run), run.get("optimizer", "adamw"),
                         str(run.get("processes", 1)), f"{memory / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{memory / peak:.2f}",
                         f"{planned:.2f}", f"{found:.2f}", f"{planned / found:.2f}"])
            print(*rows[-1], f"{reached / 1e9:.0f} G operations/s, {ring / 1e9:.2f} GB/s", flush=True)
    print(markdown(rows, "lrllr"))


if __name__ == "__main__":
    main()
