"""
一步蒸馏的时间与内存怎样增长：词元、模型、词表、样本长度、专家数、进程数，每次只变一个。
How time and memory of a step grow: with tokens, models, vocabulary, sample length, experts and
processes.

all six             python -m benchmarks.scaling            # six minutes on one core
some of them        python -m benchmarks.scaling --axes tokens length --tokens 4096
more to send        python -m benchmarks.scaling --axes processes --tokens 256

A step is that of train_distillation.py with its default loss (benchmarks/step.py), on random ids.
The teacher is twice as wide and twice as deep as the student, and always dense. Several processes
train one model (DDP: Li et al. 2020, https://arxiv.org/abs/2006.15704), each with as many tokens.
"""

import os
import socket
import statistics
from collections import namedtuple
from functools import partial

import numpy as np

from benchmarks.measure import (add_result_args, in_new_processes, medians, parse, save, setting,
                                table, timed)
from benchmarks.step import distillation_form, run
from dataset.lm_dataset import packed_batch
from model.config import LMConfig
from model.transformer import Transformer
from runtime.args import checking_input, make_parser
from runtime.log import peak_above
from runtime.precision import seed_everything
from runtime.processes import init_distributed_mode

AXES = {        # name: (what grows, its values)
    "tokens": ("tokens of a step", [512, 1024, 2048, 4096, 8192]),
    "model": ("parameters of both", [(128, 2), (192, 3), (256, 4), (384, 6)]),
    "vocab": ("vocabulary size", [3200, 6400, 12800, 25600, 51200]),
    "length": ("tokens of a sample, as many in all", [64, 128, 256, 512, 1024]),
    "experts": ("experts of the student, two per token", [2, 4, 8, 16]),
    "processes": ("processes, each with as many tokens", [1, 2]),
}
# As the flags; model: width and layers of the student; experts: 0 is dense.
Case = namedtuple("Case", "tokens model vocab length experts processes steps device dtype threads")


def random_batch(n: int, length: int, vocab_size: int, seed: int = 0, n_batches: int = 1):
    """n samples of `length` tokens to read, of which the second half predicts. n_batches: of the
    step, in all processes."""
    # A sample has one token more than are read.
    ids = np.random.default_rng(seed).integers(vocab_size, size=n * (length + 1))
    is_target = np.tile(np.arange(length + 1) > length // 2, n)
    step_targets = int(is_target.sum()) * n_batches
    return packed_batch(ids, is_target, np.full(n, length + 1), step_targets, n * n_batches)


def measure(case: Case, rank: int, port: int) -> dict[str, float]:
    """Median seconds of a step, peak bytes with models and optimizer, parameters of both models, of
    one of the case's processes."""
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{case.processes}",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    world = init_distributed_mode(case.processes > 1, case.device, dtype=case.dtype)
    # The first step loads the code of every kernel, which counts as memory: let it be a small one.
    run(form_of(case._replace(tokens=2, model=(16, 1), vocab=8, length=1), world)[0], 0)
    with peak_above(world.device) as above:
        ready, parameters = form_of(case, world)
        run(ready, 0)           # makes AdamW's moments; the allocator keeps what it got
        seconds = [timed(partial(run, ready, 0), world.device)[1] for _ in range(case.steps)]
    return {"seconds": statistics.median(seconds), "peak": above(), "parameters": parameters}


def form_of(case: Case, world):
    """(the step, parameters of both models)"""
    seed_everything(0)
    dim, n_layers = case.model
    shared = {"vocab_size": case.vocab, "max_seq_len": case.length}
    moe = {"use_moe": True, "n_routed_experts": case.experts} if case.experts else {}
    student = Transformer(LMConfig(dim, n_layers, **shared, **moe))
    teacher = Transformer(LMConfig(2 * dim, 2 * n_layers, **shared))
    parameters = student.n_parameters() + teacher.n_parameters()
    teacher = teacher.to(world.device, world.dtype).eval().requires_grad_(False)
    batch = random_batch(case.tokens // case.length, case.length, case.vocab, world.rank,
                         world.size).to(world.device)
    return distillation_form(student.to(world.device), teacher, [batch], world), parameters


def rows_of(base: Case, axis: str, repeats: int) -> list[dict]:
    """A row for each value of one axis."""
    rows = []
    for value in AXES[axis][1]:
        case = base._replace(**{axis: value})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        calls = [(measure, case, rank, port) for rank in range(case.processes)]
        found = medians([each for _ in range(repeats) for each in in_new_processes(calls)])
        if axis == "model":
            size = found["parameters"]
            name = f"{value[0]} x {value[1]}: {size / 1e6:.2f} M"
        else:
            name, size = f"{value:,}", value
        rows.append({"group": axis, "name": name, "value": size, "seconds": found["seconds"],
                     "tokens_per_s": case.tokens * case.processes / found["seconds"],
                     "peak_mb": found["peak"] / 2 ** 20})
    ratios = {"ratio": "seconds", "linear": "value", "peak_ratio": "peak_mb"}
    return [row | {name: row[of] / rows[0][of] for name, of in ratios.items()} for row in rows]


COLUMNS = {"seconds": "{seconds:.3g}", "tokens/s": "{tokens_per_s:,.0f}",
           "time / first": "{ratio:.2f}", "linear growth": "{linear:.2f}",
           "peak MB": "{peak_mb:,.0f}", "peak / first": "{peak_ratio:.2f}"}


def main(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--axes", nargs="+", default=list(AXES), choices=AXES, help="what grows")
    add("--dim", type=int, default=256, help="width of the student; its teacher's is twice that")
    add("--n_layers", type=int, default=4, help="number of its layers; its teacher has twice that")
    add("--vocab", type=int, default=6400, help="vocabulary size")
    add("--tokens", type=int, default=2048, help="tokens of a step, a multiple of --length")
    add("--length", type=int, default=256, help="tokens of a sample")
    add("--steps", type=int, default=2, help="timed steps per process; their median counts")
    add("--dtype", default="float32", choices=["float32", "bfloat16"],
        help="dtype of the matrix products; gradients are communicated in fp32")
    add_result_args(parser, repeats=1)
    args = parse(parser, argv, "tokens", "vocab", "length", "steps", "n_layers")
    if args.tokens % args.length:
        parser.error(f"--tokens {args.tokens} is not a multiple of --length {args.length}")
    base = Case(args.tokens, (args.dim, args.n_layers), args.vocab, args.length, experts=0,
                processes=1, steps=args.steps, device=args.device, dtype=args.dtype,
                threads=args.threads)

    print(f"student {args.dim} x {args.n_layers}, teacher twice as wide and deep, "
          f"{args.tokens:,} tokens in samples of {args.length}, vocabulary {args.vocab:,}, "
          f"{args.dtype}, except for what grows\n")
    rows = []
    for axis in args.axes:
        with checking_input():
            rows += (own := rows_of(base, axis, args.repeats))
        print(table(own, {AXES[axis][0]: "{name}"} | COLUMNS), end="\n\n", flush=True)
    print(f"seconds of a step, median of {args.steps}, {setting(args)}; peak: with both models and "
          "the optimizer")
    save(args, rows)


if __name__ == "__main__":
    main()
