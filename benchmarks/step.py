"""
一整步蒸馏有多快、多省内存：教科书写法与本仓库的写法并排，损失和梯度相同才计时。
How fast one whole step of distillation is, and in how little memory: the textbook's beside ours, which have one loss and
the same gradients.

    forward of teacher and student, loss, backward, clipping, AdamW

    plain       benchmarks/plain.py: rows padded to a length, logits of both models at every position
    ours        the step of train_distillation.py: one flat stream of real tokens, the fused loss where there is something
                to learn, no logits, fused AdamW
    bf16        matrix products in bf16, and the frozen teacher's weights too (where the hardware has bf16)
    on disk     the teacher's states are read from a file, written once (distill/teacher_logits.py)

two tables          python -m benchmarks.step
one, more surely    python -m benchmarks.step --shapes B --steps 5 --repeats 3
another padding     python -m benchmarks.step --pad 340
a picture           python -m benchmarks.step --picture step.png --json step.json

How much is gained is first a matter of how much padding there is: the table says it, as positions per real token. How
much could still be gained is told by the column "of the matrix rate": the operations that the loss needs (`operations`)
over those that this machine does in that time in one large product of matrices, measured in the same process. At 100 %
nothing would take time but products that nobody can do without. (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311,
App. B, call it model FLOPs utilisation, and divide by what the data sheet says.)

Both models are dense. They are untrained and ids random, for a product of matrices takes as long with any numbers.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import plain
from benchmarks.measure import (PAGE, TOLERANCE, add_result_args, check_result_args, compare, in_a_new_process, peak,
                                reset_peak, timed, write_results)
from dataset.lm_dataset import Batch, packed_batch, sample_key
from distill.fused import fused_distillation_loss
from distill.cache import VERSION, CacheWriter, TeacherCache, lay_out, pack, row_type
from model.config import LMConfig
from distill.teachers import Teacher, ask
from model.transformer import Transformer
from scripts.plan_memory import SIZES
from runtime.precision import autocast, pick_dtype
from runtime.run import make_optimizer

ALPHA, TEMPERATURE, WEIGHT_DECAY = 0.5, 2.0, 0.1
OPINION = 3.0               # standard deviation of the teacher's logits
MEAN, SHORTEST, LONGEST, ANSWERS = 146, 16, 340, 0.61       # tokens of a chat, and the assistant's share of them


class Shape(NamedTuple):
    student: LMConfig
    teacher: LMConfig
    batch: int                      # samples

    def __str__(self):
        return f"student {self.student}, teacher {self.teacher}, batch {self.batch}"


def small(dim, n_layers) -> LMConfig:
    return LMConfig(dim=dim, n_layers=n_layers, max_seq_len=LONGEST)


SHAPES = {"A": Shape(small(512, 8), small(768, 8), 8),
          "B": Shape(small(256, 4), small(512, 8), 16),
          "document": Shape(small(512, 8), small(768, 16), 32),
          "qwen3": Shape(SIZES["0.6B"], SIZES["8B"], 4),
          "test": Shape(small(32, 2), small(48, 2), 3)}


class Case(NamedTuple):
    shape: Shape
    vocabulary: int
    pad: int                        # length of the rows that are padded to a limit
    steps: int                      # that are timed
    device: str
    threads: int
    cache: str                      # folder of what the teacher said


# ---------------------------------------------------------------------------------------------------- models and chats


def model_of(case: Case, role: str) -> Transformer:
    """Student or teacher, the same in every process."""
    torch.manual_seed(("student", "teacher").index(role))
    config = case.shape.student if role == "student" else case.shape.teacher
    with torch.device(case.device):
        model = Transformer(dataclasses.replace(config, vocab_size=case.vocabulary, tie_embeddings=role == "student"))
    if role == "student":
        return model.train()
    # Untrained it would be sure of nothing, or with tied matrices of the word it has just read: one that is wrong would
    # then hardly be seen in the gradients.
    torch.nn.init.normal_(model.output.weight, std=OPINION / config.dim ** 0.5)
    return model.eval().requires_grad_(False)


def chats(case: Case, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The samples (ids, is_target) of one step, from short to long: a question, and an answer that is to be learned.

    Their lengths have the mean and the maximum of a real set of chats. That they are spread like a gamma distribution of
    shape 4, half a mean to either side, is a guess.
    """
    draw = np.random.default_rng([number, 0])
    lengths = np.sort(draw.gamma(4, MEAN / 4, case.shape.batch).round().clip(SHORTEST, LONGEST).astype(int))
    return [(draw.integers(case.vocabulary, size=n + 1), np.arange(n + 1) > n - round(ANSWERS * n)) for n in lengths]


def stream(samples) -> Batch:
    """They as one flat stream, which is what dataset/lm_dataset.py deals out."""
    ids, is_target = (np.concatenate(each) for each in zip(*samples))
    n_targets = sum(its_targets.sum() for _, its_targets in samples)
    batch = packed_batch(ids, is_target, np.array([len(its_ids) for its_ids, _ in samples]), int(n_targets), len(samples))
    return batch._replace(keys=tuple(sample_key(its_ids) for its_ids, _ in samples))


def write_cache(case: Case, folder: str, _) -> dict[str, float]:
    """What the teacher says of all steps, on disk, as scripts/cache_teacher.py writes it; and how long it took."""
    torch.set_num_threads(case.threads)
    teacher, device = model_of(case, "teacher"), torch.device(case.device)
    samples = [sample for number in range(case.steps + 1) for sample in chats(case, number)]
    about = {"version": VERSION, "top_k": 0, "temperature": 1.0, "vocab_size": case.vocabulary, "dim": teacher.config.dim}

    @torch.no_grad()
    def write():
        keys = np.array([sample_key(ids) for ids, _ in samples], np.uint64)
        lengths, n_targets = (np.array(each) for each in zip(*((len(ids), mark.sum()) for ids, mark in samples)))
        layout = lay_out(keys, lengths, n_targets, row_type(about).itemsize)
        writer = CacheWriter(folder, about, layout, teacher.head.detach().clone())
        missing = writer.prepare()
        writer.begin()
        for part in missing:
            batch = stream([samples[i] for i in layout.samples[layout.part(part)]]).to(device)
            states = teacher(batch.tokens, batch.lengths, at=batch.at, with_logits=False).final
            writer.write(part, pack(about, states, writer.head))
        writer.finish()

    return {"write_seconds": timed(write, device)[1]}


# ----------------------------------------------------------------------------------------------------------- the forms


class Form(NamedTuple):
    """What a form does in a step, its models being there. Between the two is loss.backward()."""

    student: Transformer
    optimizer: torch.optim.Optimizer
    batches: list                   # one for each step
    loss: object                    # batch -> ()
    update: object                  # () -> nothing


def plain_form(case: Case, limit: bool) -> Form:
    student, teacher = model_of(case, "student"), model_of(case, "teacher")
    optimizer = plain.make_optimizer(student)
    batches = [plain.pad(chats(case, number), case.pad if limit else None, case.device) for number in range(case.steps + 1)]
    return Form(student, optimizer, batches,
                lambda batch: plain.distillation_loss(student, teacher, batch, ALPHA, TEMPERATURE),
                partial(plain.update, student, optimizer))


def our_form(case: Case, dtype=torch.float32, on_disk: bool = False) -> Form:
    """As train_epoch of train_distillation.py goes about it."""
    student, device = model_of(case, "student"), torch.device(case.device)
    if on_disk:
        source = TeacherCache(case.cache).to(device)
    else:
        source = model_of(case, "teacher").to(dtype)
    teachers, args = [Teacher(source, 1.0, None)], Namespace(pad_vocab=False)
    optimizer = make_optimizer([student], WEIGHT_DECAY)
    batches = [stream(chats(case, number)).to(device) for number in range(case.steps + 1)]

    def loss(batch):
        with torch.no_grad(), autocast(device, dtype):
            taught = ask(teachers, batch, None, args)
        with autocast(device, dtype):
            out = student(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
            fused = fused_distillation_loss(out.final, student.head, batch.targets, taught.said, ALPHA, TEMPERATURE,
                                            kd_weight=taught.matched)
        return fused.loss / batch.step_targets

    def update():
        torch.nn.utils.clip_grad_norm_(list(student.parameters()), plain.LONGEST_GRADIENT, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Form(student, optimizer, batches, loss, update)


BF16, ON_DISK = "ours, bf16", "ours, teacher on disk"
FORMS = {"plain, padded to the limit": partial(plain_form, limit=True),
         "plain, padded to the longest": partial(plain_form, limit=False),
         "ours": our_form,
         BF16: partial(our_form, dtype=torch.bfloat16),
         ON_DISK: partial(our_form, on_disk=True)}
# bf16 keeps 8 bits of a number. On disk it is only the teacher's last states that are rounded to it.
TOLERANCES = dict.fromkeys(FORMS, TOLERANCE) | {BF16: 0.05, ON_DISK: 0.005}


# --------------------------------------------------------------------------------------------- what would be enough


def operations(config: LMConfig, lengths: list[int], n_targets: int) -> int:
    """Multiplications and additions of a forward pass, those of its matrix products alone: no padding, and of the last
    layer's output projection, its FFN and the head only what is asked for.

        2 for each weight and each token that meets it
        4 K H for each layer and each pair of a token and one that it sees: K in q . k, K in the sum of v
    """
    D, L, F, V = config.dim, config.n_layers, config.hidden_dim, config.vocab_size
    H, G, K, N = config.n_heads, config.n_kv_heads, config.head_dim, sum(lengths)
    into_attention, behind_it = D * (H + 2 * G) * K, H * K * D + 3 * D * F      # weights of wq, wk, wv; wo, w1, w2, w3
    meetings = N * (L * into_attention + (L - 1) * behind_it) + n_targets * (behind_it + D * V)
    pairs = sum(T * (T + 1) // 2 for T in lengths)
    return 2 * meetings + 4 * K * H * L * pairs


def operations_of_step(case: Case, number: int, on_disk: bool) -> int:
    """Of the teacher forward; of the student forward, and twice that backward: the gradients of what is multiplied, and of
    the weights. Of a teacher on disk there is only the head."""
    samples = chats(case, number)
    lengths, n_targets = [len(ids) - 1 for ids, _ in samples], int(sum(mark.sum() for _, mark in samples))
    student, teacher = (dataclasses.replace(each, vocab_size=case.vocabulary)
                        for each in (case.shape.student, case.shape.teacher))
    taught = 2 * teacher.dim * teacher.vocab_size * n_targets if on_disk else operations(teacher, lengths, n_targets)
    return taught + 3 * operations(student, lengths, n_targets)


def matrix_rate(dtype, device) -> float:
    """Multiplications and additions a second of a product of two large square matrices; the best of four."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.ones(2, n, n, dtype=dtype, device=device).unbind()
    return 2 * n ** 3 / min(timed(partial(torch.mm, a, b), device)[1] for _ in range(4))


# ----------------------------------------------------------------------------------------------------- one measurement


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Seconds and real tokens a second of an optimizer step, its useful operations over those of the matrix rate, and bytes
    at the peak above weights, gradients and AdamW's moments. The first step's loss and gradients are `saved`."""
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    rate = matrix_rate(torch.bfloat16 if form == BF16 else torch.float32, device)

    # The first call of all loads the code of every kernel, which counts as memory too: let it be a small one.
    small = case._replace(shape=SHAPES["test"], vocabulary=64, pad=LONGEST, steps=0)
    run(FORMS["ours" if form == ON_DISK else form](small), 0)       # no small teacher lies on disk

    ready = FORMS[form](case)
    settle(ready.optimizer)
    reset_peak(device)
    before = peak(device)
    ready.optimizer.zero_grad(set_to_none=True)
    run(ready, 0, saved)                                    # now the allocator holds what it keeps
    real = [sum(len(ids) - 1 for ids, _ in chats(case, number)) for number in range(case.steps + 1)]
    seconds = [timed(partial(run, ready, number), device)[1] for number in range(1, case.steps + 1)]
    return {"seconds": statistics.median(seconds),
            "matrix_rate": rate,
            "useful": statistics.median(operations_of_step(case, number, form == ON_DISK) / each / rate
                                        for number, each in enumerate(seconds, start=1)),
            "tokens_per_second": statistics.median(n / each for n, each in zip(real[1:], seconds)),
            "positions": sum(batch.tokens.numel() for batch in ready.batches[1:]) / sum(real[1:]),
            "peak": max(PAGE, peak(device) - before)}


def run(form: Form, number: int, saved: Path | None = None):
    """One optimizer step."""
    loss = form.loss(form.batches[number])
    loss.backward()
    if saved:       # before they are clipped: that would hide a wrong factor
        torch.save({"loss": loss.detach()} | {name: weight.grad for name, weight in form.student.named_parameters()}, saved)
    form.update()


def settle(optimizer):
    """Make what stays from step to step: gradients, and AdamW's moments, by a step of rate 0 that changes no weight."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate or plain.LEARNING_RATE           # runtime's waits for its schedule


# --------------------------------------------------------------------------------------------------------------- results


def rows_of(name: str, case: Case, forms: list[str], repeats: int) -> list[dict]:
    """A row for each form. Raises ValueError for one that is another loss."""
    with tempfile.TemporaryDirectory() as folder:
        case = case._replace(cache=folder)
        written = in_a_new_process(write_cache, case, folder, None)
        figures = compare(measure, case, forms, repeats, max(TOLERANCES.values()))
    for form, each in figures.items():
        if each["deviation"] > TOLERANCES[form]:
            raise ValueError(f"{form}: {each['deviation']:.1e} away from {forms[0]}, more than {TOLERANCES[form]:g}; how fast "
                             "a wrong result is does not matter")
    figures[ON_DISK] |= written
    first = figures[forms[0]]
    return [{"group": f"{name}: {case.shape}".replace(", ", "\n", 1), "shape": name, "form": form, **each,
             "speed": first["seconds"] / each["seconds"], "peak_mb": each["peak"] / 2 ** 20,
             "peak_ratio": first["peak"] / each["peak"]} for form, each in figures.items()]


def table(rows) -> str:
    lines = ["| form | positions / token | seconds | tokens/s | of the matrix rate, % | speed | peak MB | peak / first "
             "| deviation |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    return "\n".join(lines + [
        f"| {row['form']} | {row['positions']:.2f} | {row['seconds']:.2f} | {row['tokens_per_second']:,.0f} "
        f"| {100 * row['useful']:.0f} | {row['speed']:.2f} x | {row['peak_mb']:,.0f} | 1/{row['peak_ratio']:.1f} "
        f"| {row['deviation']:.1g} |"
        for row in rows])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["A", "B"], choices=SHAPES,
        help="; ".join(f"{name}: {shape}" for name, shape in SHAPES.items()) + ". document is what train_distillation.py "
             "takes by default, minutes a step on one core; qwen3, sizes of 0.6B and 8B, is for a GPU of 80 GB")
    add("--vocab", type=int, default=None, help="words of the vocabulary; default: 6,400, and of qwen3 its own 151,936")
    add("--pad", type=int, default=512, help=f"length of rows that are padded to a limit, {LONGEST} or more: the model's "
                                             "max_seq_len")
    add("--steps", type=int, default=3, help="that are timed in each process, behind one that is not; the median counts")
    add_result_args(parser)
    parser.set_defaults(repeats=1)
    args = parser.parse_args(argv)
    if args.steps < 1 or args.vocab is not None and args.vocab < 1:
        parser.error("--vocab and --steps are counts: 1 or more")
    if args.pad < LONGEST:
        parser.error(f"--pad {args.pad} would cut samples, which have up to {LONGEST} tokens, and change the loss")
    check_result_args(parser, args)

    forms = list(FORMS)
    if pick_dtype("bfloat16", torch.device(args.device)) != torch.bfloat16:
        forms.remove(BF16)
        print(f"the form {BF16!r} is left out\n")

    words, rows = {name: args.vocab or SHAPES[name].student.vocab_size for name in args.shapes}, []
    try:
        for name in args.shapes:
            case = Case(SHAPES[name], words[name], args.pad, args.steps, args.device, args.threads, cache="")
            rows += rows_of(name, case, forms, args.repeats)
    except (ValueError, MemoryError) as error:
        sys.exit(str(error))

    setting = (f"limit {args.pad}, {args.device}"
               + (f", threads: {args.threads}" if args.device == "cpu" else ""))
    for name in args.shapes:
        own = [row for row in rows if row["shape"] == name]
        rates = {"bf16" if row["form"] == BF16 else "fp32": f"{row['matrix_rate'] / 1e9:,.0f}" for row in own}
        print(f"{name}: {SHAPES[name]}; {words[name]:,} words, {setting}\n\n{table(own)}\n\n"
              f"not in these seconds: what is on disk was written in {own[-1]['write_seconds']:.2f} s, for {args.steps + 1} steps\n"
              "matrix rate: " + ", ".join(f"{rate} G operations/s in {dtype}" for dtype, rate in rates.items()) + "\n")
    print(f"samples: {MEAN} tokens in the mean, at most {LONGEST}, {ANSWERS:.0%} of them to be learned; tokens: real ones;\n"
          f"seconds: {'CPU time' if args.device == 'cpu' else 'of the GPU'} of an optimizer step, median of {args.steps} in "
          f"each of {args.repeats} new processes;\npeak: above weights, gradients and optimizer state; deviation: relative, the "
          f"largest of the loss and all gradients,\nfrom the first form's, at most {TOLERANCE:g}, "
          + ", ".join(f"{form} {TOLERANCES[form]:g}" for form in (BF16, ON_DISK)))
    write_results(args, rows, setting, {"speed": "times as fast as the plain form",
                                        "peak_ratio": "times less memory than the plain form"})


if __name__ == "__main__":
    main()
