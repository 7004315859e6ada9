"""
一步蒸馏的时间与内存怎样增长：词元、模型、词表、样本长度、专家数，每次只变一个。
How time and memory of a step grow: with tokens, models, vocabulary, sample length, experts.

all five            python -m benchmarks.scaling            # five minutes on one core
some of them        python -m benchmarks.scaling --axes tokens length=64,512 --tokens 4096
a picture           python -m benchmarks.scaling --picture scaling.png --json scaling.json

A step is that of train_distillation.py with its default loss (benchmarks/step.py), on random ids.
The teacher is twice as wide and twice as deep as the student, and always dense.
"""

import argparse
import statistics
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import (add_result_args, in_a_new_process, parse, setting, table, timed,
                                write_json)
from benchmarks.step import distillation_form, run
from dataset.lm_dataset import packed_batch
from model.config import LMConfig
from model.transformer import Transformer
from runtime.args import checking_input, make_parser
from runtime.log import peak_above
from runtime.pictures import new_figure, save_picture
from runtime.precision import pick_dtype, seed_everything

AXES = {        # name: (what grows, default values)
    "tokens": ("tokens of a step", "512,1024,2048,4096,8192"),
    "model": ("parameters of both", "128x2,192x3,256x4,384x6"),
    "vocab": ("vocabulary size", "3200,6400,12800,25600,51200"),
    "length": ("tokens of a sample, as many in all", "64,128,256,512,1024"),
    "experts": ("experts of the student, two per token", "2,4,8,16"),
}
# As the flags; model: width and layers of the student; experts: 0 is dense.
Case = namedtuple("Case", "tokens model vocab length experts steps device dtype threads")


def random_batch(n: int, length: int, vocab_size: int, seed: int = 0, batches_per_step: int = 1):
    """n samples of `length` tokens to read, of which the second half predicts."""
    # A sample has one token more than are read.
    ids = np.random.default_rng(seed).integers(vocab_size, size=n * (length + 1))
    is_target = np.tile(np.arange(length + 1) > length // 2, n)
    step_targets = int(is_target.sum()) * batches_per_step
    return packed_batch(ids, is_target, np.full(n, length + 1), step_targets, n * batches_per_step)


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Median seconds of a step, peak bytes with models and optimizer, parameters of both models."""
    device = torch.device(case.device)
    # The first step loads the code of every kernel, which counts as memory: let it be a small one.
    run(form_of(case._replace(tokens=2, model=(16, 1), vocab=8, length=1))[0], 0)
    with peak_above(device) as above:
        ready, parameters = form_of(case)
        run(ready, 0)           # makes AdamW's moments; the allocator keeps what it got
        seconds = [timed(partial(run, ready, 0), device)[1] for _ in range(case.steps)]
    return {"seconds": statistics.median(seconds), "peak": above(), "parameters": parameters}


def form_of(case: Case):
    """(the step, parameters of both models)"""
    seed_everything(0)
    device = torch.device(case.device)
    dtype = pick_dtype(case.dtype, device)
    student, teacher = (Transformer(config) for config in configs(case))
    parameters = student.n_parameters() + teacher.n_parameters()
    student, teacher = student.to(device), teacher.to(device, dtype).eval().requires_grad_(False)
    batch = random_batch(case.tokens // case.length, case.length, case.vocab).to(device)
    return distillation_form(student, teacher, [batch], dtype), parameters


def configs(case: Case) -> tuple[LMConfig, LMConfig]:
    """Student and teacher. Raises ValueError when the sizes do not fit together."""
    dim, n_layers = case.model
    shared = {"vocab_size": case.vocab, "max_seq_len": case.length}
    moe = {"use_moe": True, "n_routed_experts": case.experts} if case.experts else {}
    return LMConfig(dim, n_layers, **shared, **moe), LMConfig(2 * dim, 2 * n_layers, **shared)


def rows_of(base: Case, axis: str, values: list, repeats: int) -> list[dict]:
    """A row for each value of one axis."""
    cases, rows = [base._replace(**{axis: value}) for value in values], []
    measured = [[in_a_new_process(measure, case, axis) for case in cases] for _ in range(repeats)]
    for case, value, *runs in zip(cases, values, *measured):
        each = {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
        form = "x".join(map(str, value)) if axis == "model" else f"{value:,}"
        rows.append({
            "group": axis, "form": form, "value": each["parameters"] if axis == "model" else value,
            "name": f"{form}: {each['parameters'] / 1e6:.2f} M" if axis == "model" else form,
            "seconds": each["seconds"], "tokens_per_s": case.tokens / each["seconds"],
            "peak_mb": each["peak"] / 2 ** 20})
    ratios = {"ratio": "seconds", "linear": "value", "peak_ratio": "peak_mb"}
    return [row | {name: row[of] / rows[0][of] for name, of in ratios.items()} for row in rows]


COLUMNS = {"seconds": "{seconds:.3g}", "tokens/s": "{tokens_per_s:,.0f}",
           "time / first": "{ratio:.2f}", "linear growth": "{linear:.2f}",
           "peak MB": "{peak_mb:,.0f}", "peak / first": "{peak_ratio:.2f}"}


def draw(rows, path: Path):
    """A panel per axis, both scales logarithmic: linear growth follows the dashed line."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure = new_figure(2.9 * len(groups) + 0.4, 3.6)
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False, sharey=True)[0], groups):
        own = [row for row in rows if row["group"] == group]
        x = [row["value"] for row in own]
        for key, style, label in (("linear", "k--", "linear growth"), ("ratio", "C0.-", "time"),
                                  ("peak_ratio", "C1.-", "peak memory")):
            axes.loglog(x, [row[key] for row in own], style, label=label)
        axes.set_xticks(x, [row["form"] for row in own], rotation=45, ha="right")
        axes.minorticks_off()
        axes.set_title(AXES[group][0], fontsize=9)
    figure.supylabel("relative to the first value")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_picture(figure, path)


def width_and_layers(text: str) -> tuple[int, int]:
    """'256x4' -> (256, 4); argparse makes a message of its ValueError."""
    dim, n_layers = map(int, text.split("x"))
    return dim, n_layers


def axis_and_values(text: str) -> tuple[str, list]:
    """'length=64,512', or 'length' with the values of AXES."""
    name, _, values = text.partition("=")
    if name not in AXES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(AXES)}")
    read = width_and_layers if name == "model" else int
    return name, [read(value) for value in (values or AXES[name][1]).split(",")]


def add_step_args(parser, **defaults):
    """The flags of a step of random samples."""
    add = parser.add_argument
    add("--model", type=width_and_layers, metavar="WIDTHxLAYERS",
        help="width and number of layers; a teacher has twice of both")
    add("--vocab", type=int, default=6400, help="vocabulary size")
    add("--tokens", type=int, help="tokens of a micro-batch, a multiple of --length")
    add("--length", type=int, default=256, help="tokens of a sample")
    add("--steps", type=int, help="timed steps per process; their median counts")
    add("--dtype", default="float32", choices=["float32", "bfloat16"],
        help="dtype of the matrix products; gradients are communicated in fp32")
    parser.set_defaults(**defaults)


def main(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--axes", nargs="+", type=axis_and_values, default=[axis_and_values(name) for name in AXES],
        metavar="NAME[=VALUE,VALUE,...]", help=f"what grows, of {', '.join(AXES)}")
    add_step_args(parser, model=(256, 4), tokens=2048, steps=2)
    add("--picture", help="PNG file of the curves")
    add_result_args(parser, repeats=1)
    args = parse(parser, argv, "tokens", "model", "vocab", "length", "steps")
    base = Case(*(vars(args).get(field, 0) for field in Case._fields))
    for axis, values in args.axes:
        for case in (base._replace(**{axis: value}) for value in values):
            if min(*case.model, case.tokens, case.vocab, case.length) < 1:
                parser.error(f"--axes {axis}: values must be 1 or more")
            if case.tokens % case.length:
                parser.error(f"--tokens {case.tokens} is not a multiple of --length {case.length}")
            with checking_input():
                configs(case)

    print("student {} x {}, teacher twice as wide and deep, ".format(*args.model)
          + f"{args.tokens:,} tokens in samples of {args.length}, vocabulary {args.vocab:,}, "
            f"{args.dtype}, except for what grows\n")
    rows = []
    for axis, values in args.axes:
        with checking_input():
            rows += (own := rows_of(base, axis, values, args.repeats))
        print(table(own, {AXES[axis][0]: "{name}"} | COLUMNS), end="\n\n", flush=True)
    print(f"seconds of a step, median of {args.steps}, {setting(args)}; peak: with both models and "
          "the optimizer")
    write_json(args, rows)
    if args.picture:
        draw(rows, Path(args.picture))


if __name__ == "__main__":
    main()
