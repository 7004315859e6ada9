"""
真实的一步：量出一个新进程的峰值内存，与 scripts/plan_memory.py 的计划对照。
The peak memory of real steps beside what scripts/plan_memory.py plans.

    python tests/planned_and_measured.py        # Linux
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from distill.fused import Dense, fused_distillation_loss
from distill.losses import reverse_kl
from evaluation.tables import markdown
from interop.checkpoint import build
from model.config import LMConfig
from model.lora import add_lora, store_frozen
from runtime.log import peak_above
from runtime.optim import OPTIMIZERS, parameter_groups
from scripts.plan_memory import plan, total

CPU = torch.device("cpu")


def real_steps(config, run) -> int:
    """Bytes at the peak above those of Python and torch."""
    torch.set_num_threads(1)
    # The first steps load the code of every kernel, which counts as memory too: of a small model.
    small = LMConfig(dim=16, n_layers=2, n_heads=2, vocab_size=64, qk_norm=config.qk_norm)
    train(small, run | {"max_seq_len": 8, "lora_rank": 0})
    with peak_above(CPU) as above:
        train(config, run)
    return above()


def train(config, run):
    """Two steps of two micro-batches, in fp32."""
    student, teacher = build(config).train(), build(config).eval().requires_grad_(False)
    if run.get("lora_rank"):
        add_lora(student, run["lora_rank"])
        store_frozen(student, torch.float32)
    student.grad_checkpoint = run.get("grad_checkpoint", False)
    groups = parameter_groups({"model": student}, 0.1)
    optimizer = OPTIMIZERS[run.get("optimizer", "adamw")](groups, fused=True)
    lengths = [run["max_seq_len"]] * run["batch_size"]
    for micro_batch in range(4):
        tokens = torch.randint(config.vocab_size, (sum(lengths),))
        with torch.no_grad():
            states = teacher(tokens, lengths, with_logits=False).final
        out = student(tokens, lengths, with_logits=False)
        fused = fused_distillation_loss(out.final, student.head, tokens,
                                        [Dense(states, teacher.head)], 0.5, 4.0, reverse_kl)
        (fused.loss / len(tokens)).backward()
        if micro_batch % 2:
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def measured(config, run) -> int:
    """real_steps, in a new process. glibc returns blocks of 64 KB when they are freed, so that a
    process has its tensors alone."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as new:
        found = new.submit(real_steps, config, run).result()
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return found


def main():
    rows = [["student and teacher", "vocabulary", "recipe", "planned MB", "measured MB", "ratio"]]
    for dim, n_layers, vocab_size, batch_size in ((256, 8, 6400, 4), (512, 8, 6400, 2),
                                                  (256, 4, 49152, 2)):
        config = LMConfig(dim=dim, n_layers=n_layers, vocab_size=vocab_size, qk_norm=True)
        for more in ({}, {"grad_checkpoint": True}, {"lora_rank": 8}, {"optimizer": "muon"}):
            run = {"batch_size": batch_size, "max_seq_len": 256, "dtype": "float32", **more}
            planned, found = total(plan(config, config, **run)), measured(config, run)
            rows.append([f"{config}", f"{vocab_size:,}", f"{more or 'all weights'}",
                         f"{planned / 1e6:.0f}", f"{found / 1e6:.0f}", f"{planned / found:.2f}"])
    print(markdown(rows, "lrlrrr"))


if __name__ == "__main__":
    main()
