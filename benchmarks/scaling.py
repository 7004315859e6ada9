"""
一步蒸馏的时间与内存怎样增长：词元、模型、词表、样本长度、专家数，每次只变一个。
How time and memory of a distillation step grow: with tokens, models, vocabulary, sample length, experts, one at a time.

all five            python -m benchmarks.scaling                                            # five minutes on one core
some of them        python -m benchmarks.scaling --axes tokens length=64,512,4096 --tokens 4096
a picture           python -m benchmarks.scaling --picture scaling.png --json scaling.json

A step is one of train_distillation.train_epoch itself, with its default loss: the teacher reads, the student learns, AdamW.
Weights and words are random. All samples are of one length, and the second half of each is to be predicted. The teacher is
twice as wide and twice as deep as the student; with experts it stays dense.

What should come out: linear in the tokens and nearly in the parameters of both. The vocabulary only adds to the rest, so
that it begins flat; so does attention, the one part that knows how long a sample is. Experts add weights and no work:
each token visits two of them. Where a ratio is above linear, something is wrong, or a cache is too small.
"""

import argparse
import signal
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.measure import (PAGE, add_result_args, check_result_args, in_a_new_process, peak, reset_peak, timed,
                                write_results)
from dataset.lm_dataset import MicroBatches, packed_batch
from model.config import LMConfig
from distill.teachers import Teacher
from model.transformer import Transformer
from train_distillation import train_epoch
from runtime.args import add_training_args
from runtime.files import write_atomic
from runtime.precision import pick_dtype, seed_everything
from runtime.processes import World
from runtime.run import Run

AXES = {        # name: (what grows, its values where none are given)
    "tokens": ("tokens of a step", "512,1024,2048,4096,8192"),
    "model": ("parameters of both", "128x2,192x3,256x4,384x6"),
    "vocab": ("words of the vocabulary", "3200,6400,12800,25600,51200"),
    "length": ("tokens of a sample, as many in all", "64,128,256,512,1024"),
    "experts": ("experts of the student, two a token", "2,4,8,16"),
}
LOSS = {"divergence": "forward_kl", "beta": 0.5, "skew": 0.1, "jsd_normalised": False, "feature_weight": 0.0,
        "attention_weight": 0.0, "contrastive_weight": 0.0, "final_temperature": None, "plain_loss": False, "pad_vocab": False,
        "grad_norm_interval": 0}                # as train_distillation.py has it; no look at the gradient's norms

ENDLESS = 10 ** 9                               # steps: nothing that is done now and then, or at the end, is ever due


# ------------------------------------------------------------------------------------------------------- a training run


class RandomSamples:
    """What MicroBatches asks of a dataset: n samples of `length` tokens to read, the second half to be predicted."""

    key = "random"

    def __init__(self, n: int, length: int, vocabulary: int):
        self.ids = np.random.default_rng(0).integers(vocabulary, size=(n, length + 1))      # + 1: predicted, never read
        self.is_target = np.arange(length + 1) > length // 2                                # (length + 1,)
        self.lengths, self.n_targets = np.full(n, length + 1), np.full(n, self.is_target.sum())

    def __len__(self):
        return len(self.ids)

    def batch(self, samples, step_targets, step_samples):
        return packed_batch(self.ids[samples].ravel(), np.tile(self.is_target, len(samples)), self.lengths[samples],
                          step_targets, step_samples)


def run_args(**changed) -> argparse.Namespace:
    """The flags of a training script as nobody gave any, but for these."""
    parser = argparse.ArgumentParser()
    add_training_args(parser)
    never = {"max_steps": ENDLESS, "log_interval": 0, "save_interval": 0, "eval_interval": 0, "num_workers": 0}
    return argparse.Namespace(**vars(parser.parse_args([])) | never | {"learning_rate": 1e-4} | changed)


def silent_run(kind: type[Run], args, world: World, model, data) -> Run:
    """A run of which no one is told: the first process would draw a bar and write files, hence counted from 1."""
    run = kind("benchmark", args, world._replace(rank=world.rank + 1), {"model": model}, data)
    for number in (signal.SIGINT, signal.SIGTERM):          # Run finishes a step and saves; here there is nothing to save
        signal.signal(number, signal.SIG_DFL)
    return run


# ---------------------------------------------------------------------------------------------------------- one measurement


class Case(NamedTuple):
    tokens: int
    model: tuple[int, int]      # width and layers of the student
    vocab: int
    length: int
    experts: int                # 0: dense
    steps: int
    device: str
    dtype: str
    threads: int


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Median seconds of a step, bytes at the peak with models and optimizer, parameters of both models."""
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    # The first step of all loads the code of every kernel, which counts as memory too: let it be a small one.
    steps_of(case._replace(tokens=2, model=(16, 1), vocab=8, length=1))[0](0)
    reset_peak(device)
    before = peak(device)
    step, parameters = steps_of(case)
    step(0)                     # makes AdamW's moments; the allocator holds what it keeps
    seconds = statistics.median(timed(lambda: step(epoch), device)[1] for epoch in range(1, 1 + case.steps))
    return {"seconds": seconds, "peak": max(PAGE, peak(device) - before), "parameters": parameters}


def steps_of(case: Case):
    """(a function that trains one epoch, which is a step, by its number; parameters of both models)."""
    args = run_args(device=case.device, dtype=case.dtype, **LOSS)
    world = World(0, 1, torch.device(case.device))
    seed_everything(0)
    student, teacher = (Transformer(config) for config in configs(case))
    teacher = teacher.to(world.device, pick_dtype(case.dtype, world.device)).eval().requires_grad_(False)
    samples = RandomSamples(case.tokens // case.length, case.length, case.vocab)
    run = silent_run(Run, args, world, student.train(), MicroBatches(samples, batch_size=len(samples)))

    def step(epoch: int):
        train_epoch(epoch, None, 0.0, 1.0, run, [Teacher(teacher, 1.0, None)], student, None, None)

    return step, student.n_parameters() + teacher.n_parameters()


def configs(case: Case) -> tuple[LMConfig, LMConfig]:
    """Student and teacher. Raises ValueError when the sizes do not fit together."""
    dim, n_layers = case.model
    shared = {"vocab_size": case.vocab, "max_seq_len": case.length}
    moe = {"use_moe": True, "n_routed_experts": case.experts} if case.experts else {}
    return LMConfig(dim, n_layers, **shared, **moe), LMConfig(2 * dim, 2 * n_layers, **shared)


# --------------------------------------------------------------------------------------------------------------- results


def rows_of(base: Case, axis: str, values: list, repeats: int) -> list[dict]:
    """A row for each value of one axis."""
    cases = [base._replace(**{axis: value}) for value in values]
    measured = [[in_a_new_process(measure, case, f"{axis} {value}", None) for case, value in zip(cases, values)]
                for _ in range(repeats)]
    rows = []
    for case, value, *runs in zip(cases, values, *measured):
        median = {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
        x = median["parameters"] if axis == "model" else value
        rows.append({"group": axis, "form": "x".join(map(str, value)) if axis == "model" else f"{value:,}", "value": x,
                     "seconds": median["seconds"], "tokens_per_s": case.tokens / median["seconds"],
                     "peak_mb": median["peak"] / 2 ** 20})
    first = rows[0]
    return [row | {"ratio": row["seconds"] / first["seconds"], "linear": row["value"] / first["value"],
                   "peak_ratio": row["peak_mb"] / first["peak_mb"]} for row in rows]


def table(axis, rows) -> str:
    lines = [f"| {AXES[axis][0]} | seconds | tokens/s | time / first | linear growth | peak MB | peak / first |",
             "|---:|---:|---:|---:|---:|---:|---:|"]
    names = [f"{row['form']}: {row['value'] / 1e6:.2f} M" if axis == "model" else row["form"] for row in rows]
    return "\n".join(lines + [
        f"| {name} | {row['seconds']:.3g} | {row['tokens_per_s']:,.0f} | {row['ratio']:.2f} | {row['linear']:.2f} "
        f"| {row['peak_mb']:,.0f} | {row['peak_ratio']:.2f} |" for name, row in zip(names, rows)])


def draw(rows, title, path: Path):
    """A panel an axis, both of its scales logarithmic: what grows linearly runs along the dashed line."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure = Figure(figsize=(2.9 * len(groups) + 0.4, 3.6), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False, sharey=True)[0], groups):
        own = [row for row in rows if row["group"] == group]
        x = [row["value"] for row in own]
        axes.loglog(x, [row["linear"] for row in own], "--", color="gray", label="linear growth")
        axes.loglog(x, [row["ratio"] for row in own], ".-", color="C0", label="time")
        axes.loglog(x, [row["peak_ratio"] for row in own], ".-", color="C1", label="peak memory")
        axes.set_xticks(x, [row["form"] for row in own], rotation=45, ha="right", fontsize=8)
        axes.minorticks_off()
        axes.set_yticks([0.5, 1, 2, 4, 8, 16], ["1/2", "1", "2", "4", "8", "16"])
        axes.set_title(AXES[group][0], fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("times the first value's", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def width_and_layers(text: str) -> tuple[int, int]:
    """'256x4' -> (256, 4). Raises ValueError, of which argparse makes a message."""
    dim, n_layers = map(int, text.split("x"))
    return dim, n_layers


def axis_and_values(text: str) -> tuple[str, list]:
    """'length=64,512', or 'length' with the values of AXES."""
    name, _, values = text.partition("=")
    if name not in AXES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(AXES)}")
    read = width_and_layers if name == "model" else int
    return name, [read(value) for value in (values or AXES[name][1]).split(",")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--axes", nargs="+", type=axis_and_values, default=[axis_and_values(name) for name in AXES],
        metavar="NAME[=VALUE,VALUE,...]", help=f"what is to grow, of {', '.join(AXES)}; the others stay as below")
    add("--tokens", type=int, default=2048, help="of a step, a multiple of --length")
    add("--model", type=width_and_layers, default=(256, 4), metavar="WIDTHxLAYERS", help="student; the teacher has twice of both")
    add("--vocab", type=int, default=6400, help="vocabulary size, words")
    add("--length", type=int, default=256, help="tokens of a sample")
    add("--steps", type=int, default=2, help="steps timed in each process, after one that is not; the median counts")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the matrix products")
    add_result_args(parser)
    parser.set_defaults(repeats=1)
    args = parser.parse_args(argv)
    check_result_args(parser, args)
    base = Case(args.tokens, args.model, args.vocab, args.length, 0, args.steps, args.device, args.dtype, args.threads)
    for axis, values in args.axes:
        for case in [base._replace(**{axis: value}) for value in values]:
            if min(case.tokens, *case.model, case.vocab, case.length, case.steps) < 1 or axis == "experts" and case.experts < 1:
                parser.error(f"--axes {axis}, --tokens, --model, --vocab, --length and --steps are counts: 1 or more")
            if case.tokens % case.length:
                parser.error(f"--tokens {case.tokens} are not whole samples of --length {case.length}")
            try:
                configs(case)
            except ValueError as error:
                parser.error(str(error))

    setting = (f"student {args.model[0]} x {args.model[1]} <- teacher {2 * args.model[0]} x {2 * args.model[1]}, {args.tokens:,} "
               f"tokens in samples of {args.length}, {args.vocab:,} words, {args.dtype}, {args.device}"
               + (f", threads: {args.threads}" if args.device == "cpu" else ""))
    print(f"{setting}; but for what grows\n")
    rows = []
    try:
        for axis, values in args.axes:
            rows += (own := rows_of(base, axis, values, args.repeats))
            print(table(axis, own), end="\n\n", flush=True)
    except MemoryError as error:
        sys.exit(str(error))
    print(f"seconds: {'CPU time' if args.device == 'cpu' else 'of the GPU'} of a step, median of {args.steps} in each of "
          f"{args.repeats} new processes; peak: with both models and the optimizer")
    picture, args.picture = args.picture, None              # bars would not show how a thing grows
    write_results(args, rows, setting, {})
    if picture:
        draw(rows, setting, Path(picture))


if __name__ == "__main__":
    main()
