"""
一整步蒸馏有多快、多省内存：教科书写法与本仓库的写法并排，损失和梯度相同才计时。
Speed and memory of a whole distillation step: the textbook's beside ours, with the same loss and
gradients.

two tables          python -m benchmarks.step
one, more exactly   python -m benchmarks.step --shapes B --steps 5 --repeats 3
another padding     python -m benchmarks.step --pad 340

plain       benchmarks/plain.py: padded rows, logits of both models at every position
ours        the step of train_distillation.py: packed real tokens, the fused loss at the targets
bf16        matrix products and the frozen teacher's weights in bf16, where the hardware has bf16
on disk     the teacher's outputs come from a cache, written once (distill/cache.py)

"Of the matrix rate" divides the operations that the loss needs by those that this machine does in
the same time in one large matrix product (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311,
App. B: model FLOPs utilisation, with the data sheet's rate). Weights and ids are random.
"""

import dataclasses
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import plain
from benchmarks.measure import (TOLERANCE, add_result_args, compare, in_a_new_process, parse,
                                setting, table, timed, with_ratios, write_json)
from dataset.lm_dataset import Batch, packed_batch, sample_key
from distill.cache import IDENTITY, VERSION, CacheWriter, TeacherCache, lay_out, pack, row_type
from distill.fused import fused_distillation_loss
from distill.teachers import Teacher, teacher_outputs
from model.config import LMConfig
from model.sizes import SIZES, operations
from model.transformer import Transformer
from runtime.args import checking_input, make_parser
from runtime.log import peak_above
from runtime.optim import parameter_groups
from runtime.precision import autocast, pick_dtype

ALPHA, TEMPERATURE, WEIGHT_DECAY = 0.5, 2.0, 0.1
LOGIT_STD = 3.0             # standard deviation of the teacher's logits
MEAN, SHORTEST, LONGEST, ANSWERS = 146, 16, 340, 0.61   # tokens of a chat; share of targets


class Shape(NamedTuple):
    student: LMConfig
    teacher: LMConfig
    batch: int                      # samples


def small(dim, n_layers) -> LMConfig:
    return LMConfig(dim=dim, n_layers=n_layers, max_seq_len=LONGEST)


SHAPES = {"A": Shape(small(512, 8), small(768, 8), 8),
          "B": Shape(small(256, 4), small(512, 8), 16),
          "document": Shape(small(512, 8), small(768, 16), 32),
          "qwen3": Shape(SIZES["0.6B"], SIZES["8B"], 4),
          "test": Shape(small(32, 2), small(48, 2), 3)}


class Case(NamedTuple):
    shape: Shape
    vocab_size: int
    pad: int                        # length of rows that are padded to a limit
    steps: int                      # timed
    device: str
    threads: int
    cache: str = ""                 # folder of the cached teacher outputs


def model_of(case: Case, role: str) -> Transformer:
    """Student or teacher, the same in every process."""
    torch.manual_seed(("student", "teacher").index(role))
    config = dataclasses.replace(getattr(case.shape, role), vocab_size=case.vocab_size,
                                 tie_embeddings=role == "student")
    with torch.device(case.device):
        model = Transformer(config)
    if role == "student":
        return model.train()
    # A random head gives nearly uniform probabilities: an error would hardly show in the gradients.
    torch.nn.init.normal_(model.output.weight, std=LOGIT_STD / config.dim ** 0.5)
    return model.eval().requires_grad_(False)


def chats(case: Case, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The samples (ids, is_target) of one step, from short to long: a question, then an answer to
    learn. Their lengths have the mean and the maximum of real chats; their spread (gamma, shape 4)
    is a guess."""
    rng = np.random.default_rng([number, 0])
    lengths = rng.gamma(4, MEAN / 4, case.shape.batch).round().clip(SHORTEST, LONGEST).astype(int)
    return [(rng.integers(case.vocab_size, size=n + 1), np.arange(n + 1) > n - round(ANSWERS * n))
            for n in np.sort(lengths)]


def counts(samples) -> tuple[list[int], int]:  # tokens to read of each sample, targets of all
    return [len(ids) - 1 for ids, _ in samples], int(sum(mark.sum() for _, mark in samples))


def packed(samples) -> Batch:
    """The samples packed, as dataset/lm_dataset.py does."""
    ids, is_target = (np.concatenate(each) for each in zip(*samples))
    sizes = np.array([len(its_ids) for its_ids, _ in samples])
    batch = packed_batch(ids, is_target, sizes, counts(samples)[1], len(samples))
    return batch._replace(keys=tuple(sample_key(its_ids) for its_ids, _ in samples))


@torch.no_grad()
def write_cache(case: Case, form=None, saved=None) -> dict[str, float]:
    """Cache the teacher's outputs for all steps, as scripts/cache_teacher.py does; the seconds."""
    teacher, device = model_of(case, "teacher"), torch.device(case.device)
    samples = [sample for number in range(case.steps + 1) for sample in chats(case, number)]
    about = {**dict.fromkeys((*IDENTITY, "teacher", "tokenizer", "skip_bad_lines")), "files": {},
             "version": VERSION, "top_k": 0, "temperature": 1.0, "vocab_size": case.vocab_size,
             "dim": teacher.config.dim}

    def write():
        keys = np.array([sample_key(ids) for ids, _ in samples], np.uint64)
        sizes = [np.array(each) for each in zip(*((len(ids), mark.sum()) for ids, mark in samples))]
        layout = lay_out(keys, *sizes, row_type(about).itemsize)
        writer = CacheWriter(case.cache, about, layout, teacher.head.detach().clone())
        missing = writer.prepare()
        writer.begin()
        for part in missing:
            batch = packed([samples[i] for i in layout.samples[layout.part(part)]]).to(device)
            states = teacher(batch.tokens, batch.lengths, at=batch.at, with_logits=False).final
            writer.write(part, pack(about, states, writer.head))

    return {"write_seconds": timed(write, device)[1]}


class Form(NamedTuple):
    """What a form does in a step; between the two is loss.backward()."""

    student: Transformer
    optimizer: torch.optim.Optimizer
    batches: list                   # one per step
    loss: object                    # batch -> ()
    update: object                  # () -> None


def plain_form(case: Case, limit: bool) -> Form:
    student, teacher = model_of(case, "student"), model_of(case, "teacher")
    optimizer = plain.make_optimizer(student)
    batches = [plain.pad(chats(case, number), case.pad if limit else None, case.device)
               for number in range(case.steps + 1)]
    loss = partial(plain.distillation_loss, student, teacher, alpha=ALPHA, temperature=TEMPERATURE)
    return Form(student, optimizer, batches, loss, partial(plain.update, student, optimizer))


def our_form(case: Case, dtype=torch.float32, on_disk: bool = False) -> Form:
    student, device = model_of(case, "student"), torch.device(case.device)
    source = TeacherCache(case.cache).to(device) if on_disk else model_of(case, "teacher").to(dtype)
    batches = [packed(chats(case, number)).to(device) for number in range(case.steps + 1)]
    return distillation_form(student, source, batches, dtype, ALPHA, TEMPERATURE)


def distillation_form(student, source, batches, dtype, alpha=0.0, temperature=1.0) -> Form:
    """The step of train_epoch in train_distillation.py. source: a model, or a TeacherCache."""
    device, teachers = batches[0].tokens.device, [Teacher(source)]
    optimizer = torch.optim.AdamW(parameter_groups({"model": student}, WEIGHT_DECAY),
                                  lr=plain.LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def loss(batch):
        with torch.no_grad(), autocast(device, dtype):
            teacher = teacher_outputs(teachers, batch)
        with autocast(device, dtype):
            out = student(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
            fused = fused_distillation_loss(
                out.final, student.head, batch.targets, teacher.predictions, alpha, temperature,
                kd_weight=teacher.matched)
        balance = out.balance_loss / batch.step_samples
        return fused.loss / batch.step_targets + student.config.aux_loss_alpha * balance

    def update():
        torch.nn.utils.clip_grad_norm_(list(student.parameters()), plain.GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Form(student, optimizer, batches, loss, update)


BF16, ON_DISK = "ours, bf16", "ours, teacher on disk"
FORMS = {"plain, padded to the limit": partial(plain_form, limit=True),
         "plain, padded to the longest": partial(plain_form, limit=False),
         "ours": our_form,
         BF16: partial(our_form, dtype=torch.bfloat16),
         ON_DISK: partial(our_form, on_disk=True)}
# bf16 has 8 significant bits. On disk only the teacher's final states are rounded to it.
TOLERANCES = dict.fromkeys(FORMS, TOLERANCE) | {BF16: 0.05, ON_DISK: 0.005}


def operations_of_step(case: Case, number: int, on_disk: bool) -> int:
    """Teacher forward; student forward, and twice that backward. On disk: the teacher's head."""
    lengths, n_targets = counts(chats(case, number))
    student, teacher = (dataclasses.replace(each, vocab_size=case.vocab_size)
                        for each in (case.shape.student, case.shape.teacher))
    of_teacher = (2 * teacher.dim * teacher.vocab_size * n_targets if on_disk
                  else operations(teacher, lengths, n_targets))
    return of_teacher + 3 * operations(student, lengths, n_targets)


def matrix_rate(dtype, device) -> float:
    """Operations per second in a product of two large matrices; the best of four."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.ones(2, n, n, dtype=dtype, device=device).unbind()
    return 2 * n ** 3 / min(timed(partial(torch.mm, a, b), device)[1] for _ in range(4))


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Per optimizer step: seconds, real tokens per second, necessary operations relative to the
    matrix rate, bytes at the peak above weights, gradients and AdamW's moments. The first step's
    loss and gradients are `saved`."""
    device, on_disk = torch.device(case.device), form == ON_DISK
    rate = matrix_rate(torch.bfloat16 if form == BF16 else torch.float32, device)

    # The first call loads the code of every kernel, which counts as memory: let it be a small one.
    small = case._replace(shape=SHAPES["test"], vocab_size=64, pad=LONGEST, steps=0)
    run(FORMS["ours" if on_disk else form](small), 0)       # no small teacher is on disk

    ready = FORMS[form](case)
    settle(ready.optimizer)
    with peak_above(device) as above:
        ready.optimizer.zero_grad(set_to_none=True)
        run(ready, 0, saved)                                # the allocator keeps what it got
        timed_steps = range(1, case.steps + 1)
        seconds = [timed(partial(run, ready, number), device)[1] for number in timed_steps]
    real = [sum(counts(chats(case, number))[0]) for number in timed_steps]
    needed = [operations_of_step(case, number, on_disk) for number in timed_steps]
    return {"seconds": statistics.median(seconds), "peak": above(), "matrix_rate": rate,
            "useful": statistics.median(n / each / rate for n, each in zip(needed, seconds)),
            "tokens_per_second": statistics.median(n / each for n, each in zip(real, seconds)),
            "positions": sum(batch.tokens.numel() for batch in ready.batches[1:]) / sum(real)}


def run(form: Form, number: int, saved: Path | None = None):
    """One optimizer step."""
    loss = form.loss(form.batches[number])
    loss.backward()
    if saved:       # before clipping, which would hide a wrong factor
        torch.save({"loss": loss.detach()} | {name: weight.grad for name, weight
                                              in form.student.named_parameters()}, saved)
    form.update()


def settle(optimizer):
    """Make the gradients and AdamW's moments by a step of learning rate 0: no weight changes."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = plain.LEARNING_RATE


COLUMNS = {"form": "{form}", "positions / token": "{positions:.2f}", "seconds": "{seconds:.2f}",
           "tokens/s": "{tokens_per_second:,.0f}", "of the matrix rate, %": "{percent:.0f}",
           "speed": "{speed:.2f} x", "peak MB": "{peak_mb:,.0f}",
           "peak / first": "1/{peak_ratio:.1f}", "deviation": "{deviation:.1g}"}


def main(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["A", "B"], choices=SHAPES,
        help="pairs of student and teacher, SHAPES in benchmarks/step.py; document is the default "
             "of train_distillation.py, qwen3 (0.6B and 8B) needs a GPU of 80 GB")
    add("--vocab", type=int, default=None, help="vocabulary size; default: 6,400, of qwen3 151,936")
    add("--pad", type=int, default=512, help=f"limit that rows are padded to, {LONGEST} or more")
    add("--steps", type=int, default=3, help="timed steps per process; their median counts")
    add_result_args(parser, repeats=1)
    args = parse(parser, argv, "steps")
    if args.pad < LONGEST:
        parser.error(f"--pad {args.pad} would cut samples, which have up to {LONGEST} tokens")

    forms, rows = list(FORMS), []
    if pick_dtype("bfloat16", torch.device(args.device)) != torch.bfloat16:
        forms.remove(BF16)
        print(f"the form {BF16!r} is left out\n")
    for name in args.shapes:
        shape, vocab_size = SHAPES[name], args.vocab or SHAPES[name].student.vocab_size
        with checking_input(), tempfile.TemporaryDirectory() as folder:
            case = Case(shape, vocab_size, args.pad, args.steps, args.device, args.threads, folder)
            written = in_a_new_process(write_cache, case, "cache")
            figures = compare(measure, case, forms, args.repeats, TOLERANCES)
        figures[ON_DISK] |= written
        own = [row | {"percent": 100 * row["useful"]} for row in with_ratios(figures, shape=name)]
        rate = own[0]["matrix_rate"] / 1e9
        print(f"{name}: student {shape.student}, teacher {shape.teacher}, batch {shape.batch}; "
              f"vocabulary {vocab_size:,}, limit {args.pad}\n\n"
              f"{table(own, COLUMNS)}\n\nnot in these seconds: the cache on disk was written in "
              f"{written['write_seconds']:.2f} s, for {args.steps + 1} steps\n"
              f"matrix rate: {rate:,.0f} G operations/s in fp32\n")
        rows += own
    print(f"samples: {MEAN} tokens on average, at most {LONGEST}, {ANSWERS:.0%} targets;\n"
          f"one step, median of {args.steps}, {setting(args)};\n"
          "peak: above weights, gradients and optimizer state; deviation: of loss and gradients")
    write_json(args, rows)


if __name__ == "__main__":
    main()
