"""
一整步蒸馏有多快、多省内存：教科书写法与本仓库的写法并排，损失和梯度相同才计时。
Speed and memory of a whole distillation step: the textbook's beside ours, with the same loss and
gradients.

two tables          python -m benchmarks.step
one, more exactly   python -m benchmarks.step --shapes B --steps 5 --repeats 3

plain       benchmarks/plain.py: padded rows, logits of both models at every position
ours        the step of train_distillation.py: packed real tokens, the fused loss at the targets
bf16        matrix products and the frozen teacher's weights in bf16, where the hardware has bf16
asked once  the teacher's final states are kept, as from the second epoch on or in a cache

Weights and ids are random.
"""

import dataclasses
import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import plain
from benchmarks.measure import (TOLERANCE, add_result_args, compare, parse, save, setting, table,
                                timed)
from dataset.lm_dataset import Batch, packed_batch
from distill.fused import fused_distillation_loss
from distill.teachers import Teacher, teacher_outputs
from model.config import LMConfig
from model.transformer import Transformer
from runtime.args import checking_input, make_parser
from runtime.log import peak_above
from runtime.optim import parameter_groups
from runtime.precision import autocast, pick_dtype
from runtime.processes import World, parallelize

ALPHA, TEMPERATURE, LEARNING_RATE = 0.5, 2.0, 5e-6
LOGIT_STD = 3.0             # standard deviation of the teacher's logits
MEAN, SHORTEST, LONGEST, ANSWERS = 146, 16, 340, 0.61   # tokens of a chat; share of targets
LIMIT = 512                 # to which rows are padded


class Shape(NamedTuple):
    student: LMConfig
    teacher: LMConfig
    batch: int                      # samples


def small(dim, n_layers) -> LMConfig:
    return LMConfig(dim=dim, n_layers=n_layers, max_seq_len=LONGEST)


SHAPES = {"A": Shape(small(512, 8), small(768, 8), 8),
          "B": Shape(small(256, 4), small(512, 8), 16),
          "document": Shape(small(512, 8), small(768, 16), 32),
          "test": Shape(small(32, 2), small(48, 2), 3)}


class Case(NamedTuple):
    shape: Shape
    vocab_size: int
    steps: int                      # timed
    device: str
    threads: int


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


def packed(samples) -> Batch:
    """The samples packed, as dataset/lm_dataset.py does."""
    ids, is_target = (np.concatenate(each) for each in zip(*samples))
    sizes = np.array([len(its_ids) for its_ids, _ in samples])
    return packed_batch(ids, is_target, sizes, int(is_target.sum()), len(samples))


class Form(NamedTuple):
    """What a form does in a step, but for the update, which all have in common."""

    student: Transformer
    optimizer: torch.optim.Optimizer
    batches: list                   # one per step
    loss: object                    # (number of the batch) -> ()


def plain_form(case: Case, limit: int | None) -> Form:
    student, teacher = model_of(case, "student"), model_of(case, "teacher")
    batches = [plain.pad(chats(case, number), limit, case.device)
               for number in range(case.steps + 1)]

    def loss(number):
        return plain.distillation_loss(student, teacher, batches[number], ALPHA, TEMPERATURE)

    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    return Form(student, optimizer, batches, loss)


def our_form(case: Case, dtype=torch.float32, asked_once: bool = False) -> Form:
    world = World(0, 1, torch.device(case.device), dtype)
    student, teacher = model_of(case, "student"), model_of(case, "teacher").to(dtype)
    batches = [packed(chats(case, number)).to(world.device) for number in range(case.steps + 1)]
    return distillation_form(student, teacher, batches, world, ALPHA, TEMPERATURE, asked_once)


def distillation_form(student, teacher, batches, world, alpha=0.0, temperature=1.0,
                      asked_once: bool = False) -> Form:
    """The step of train_epoch in train_distillation.py."""
    model = parallelize(student, world)
    optimizer = torch.optim.AdamW(parameter_groups({"model": model}, weight_decay=0.1),
                                  lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def ask(batch):
        with torch.no_grad(), autocast(world.device, world.dtype):
            return teacher_outputs([Teacher(teacher)], batch).predictions

    known = [ask(batch) for batch in batches] if asked_once else []

    def loss(number):
        batch = batches[number]
        predictions = known[number] if asked_once else ask(batch)
        with autocast(world.device, world.dtype):
            out = model(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
            fused = fused_distillation_loss(out.final, student.head, batch.targets, predictions,
                                            alpha, temperature)
        balance = out.balance_loss / batch.step_samples
        loss = fused.loss / batch.step_targets + student.config.aux_loss_alpha * balance
        return loss * world.size            # DDP averages; the step needs the sum

    return Form(student, optimizer, batches, loss)


BF16 = "ours, bf16"
FORMS = {"plain, padded to the limit": partial(plain_form, limit=LIMIT),
         "plain, padded to the longest": partial(plain_form, limit=None),
         "ours": our_form,
         BF16: partial(our_form, dtype=torch.bfloat16),
         "ours, teacher asked once": partial(our_form, asked_once=True)}
TOLERANCES = dict.fromkeys(FORMS, TOLERANCE) | {BF16: 0.05}     # bf16 has 8 significant bits


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Per optimizer step: seconds, real tokens per second, bytes at the peak above weights,
    gradients and AdamW's moments. The first step's loss and gradients are `saved`."""
    device = torch.device(case.device)
    # The first call loads the code of every kernel, which counts as memory: let it be a small one.
    run(FORMS[form](case._replace(shape=SHAPES["test"], vocab_size=64, steps=0)), 0)

    ready = FORMS[form](case)
    settle(ready.optimizer)
    with peak_above(device) as above:
        ready.optimizer.zero_grad()
        run(ready, 0, saved)                                # the allocator keeps what it got
        timed_steps = range(1, case.steps + 1)
        seconds = [timed(partial(run, ready, number), device)[1] for number in timed_steps]
    real = [sum(len(ids) - 1 for ids, _ in chats(case, number)) for number in timed_steps]
    return {"seconds": statistics.median(seconds), "peak": above(),
            "tokens_per_second": statistics.median(n / each for n, each in zip(real, seconds)),
            "positions": sum(batch.tokens.numel() for batch in ready.batches[1:]) / sum(real)}


def run(form: Form, number: int, saved: Path | None = None):
    """One optimizer step."""
    loss = form.loss(number)
    loss.backward()
    if saved:       # before clipping, which would hide a wrong factor
        torch.save({"loss": loss.detach()} | {name: weight.grad for name, weight
                                              in form.student.named_parameters()}, saved)
    torch.nn.utils.clip_grad_norm_(form.student.parameters(), 1.0)
    form.optimizer.step()
    form.optimizer.zero_grad()


def settle(optimizer):
    """Make the gradients and AdamW's moments by a step of learning rate 0: no weight changes."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE


COLUMNS = {"form": "{form}", "positions / token": "{positions:.2f}", "seconds": "{seconds:.2f}",
           "tokens/s": "{tokens_per_second:,.0f}", "speed": "{speed:.2f} x",
           "peak MB": "{peak_mb:,.0f}", "peak / first": "1/{peak_ratio:.1f}",
           "deviation": "{deviation:.1g}"}


def main(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["A", "B"], choices=SHAPES,
        help="pairs of student and teacher, SHAPES in benchmarks/step.py; document is the default "
             "of train_distillation.py")
    add("--vocab", type=int, default=6400, help="vocabulary size")
    add("--steps", type=int, default=3, help="timed steps per process; their median counts")
    add_result_args(parser, repeats=1)
    args = parse(parser, argv, "vocab", "steps")

    forms, rows = dict(TOLERANCES), []
    if pick_dtype("bfloat16", torch.device(args.device)) != torch.bfloat16:
        del forms[BF16]
        print(f"the form {BF16!r} is left out\n")
    for name in args.shapes:
        shape = SHAPES[name]
        case = Case(shape, args.vocab, args.steps, args.device, args.threads)
        with checking_input():
            own = compare(measure, case, forms, args.repeats)
        print(f"{name}: student {shape.student}, teacher {shape.teacher}, batch {shape.batch}; "
              f"vocabulary {args.vocab:,}, limit {LIMIT}\n\n{table(own, COLUMNS)}\n")
        rows += [row | {"shape": name} for row in own]
    print(f"samples: {MEAN} tokens on average, at most {LONGEST}, {ANSWERS:.0%} targets;\n"
          f"one step, median of {args.steps}, {setting(args)};\n"
          "peak: above weights, gradients and optimizer state; deviation: of loss and gradients")
    save(args, rows)


if __name__ == "__main__":
    main()
