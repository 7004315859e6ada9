"""
融合损失有多快、多省内存：与教科书写法并排，每次测量各用一个全新的进程。
How fast the fused loss is and how little memory it takes: beside the textbook form, each measurement in a new process.

    loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher_T || student_T)      alpha = 0.5, T = 2

forward and backward: from final hidden states to the gradients of the student's states and of its head.

one table           python -m benchmarks.loss
quick               python -m benchmarks.loss --tokens 512 --vocab 6400 --repeats 3
other divergences   python -m benchmarks.loss --vocab 50257 --divergence reverse_kl jsd
a picture           python -m benchmarks.loss --picture loss.png --json loss.json

The plain form holds some eight tensors of (tokens, vocabulary) at once: 10 GB at 2048 tokens and 151,936 words.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import (PAGE, add_result_args, check_result_args, compare, peak, reset_peak, timed, write_results)
from distill.fused import CHUNK_BYTES, Dense, fused_distillation_loss
from distill.losses import DIVERGENCES, distillation_loss_fn, forward_kl, pick_divergence

ALPHA, TEMPERATURE = 0.5, 2.0


# --------------------------------------------------------------------------------------------------------- the forms


def plain_loss(hidden, head, targets, teacher, divergence):  # (S, D), (V, D), (S,) -> ()
    """The loss as textbooks write it: all logits of both models, and autograd finds the way back.

    It is right, and short. But logits, tempered logits, softmaxes and the gradient of each are all (S, V), and eight of
    them are alive at once: at V = 50,257 each one is a hundred times the size of hidden states of 512.
    """
    student_logits = hidden @ head.T                                                # (S, V)
    teacher_logits = teacher.states @ teacher.head.T                                # (S, V)
    ce = F.cross_entropy(student_logits, targets, reduction="sum")
    if divergence is forward_kl:
        kd = TEMPERATURE ** 2 * F.kl_div(F.log_softmax(student_logits / TEMPERATURE, dim=-1),
                                         F.softmax(teacher_logits / TEMPERATURE, dim=-1), reduction="sum")
    else:
        kd = distillation_loss_fn(student_logits, teacher_logits, TEMPERATURE, "sum", divergence)
    return ALPHA * ce + (1 - ALPHA) * kd


def fused_loss(hidden, head, targets, teacher, divergence, chunk_bytes=CHUNK_BYTES):
    return fused_distillation_loss(hidden, head, targets, [teacher], ALPHA, TEMPERATURE, divergence,
                                   chunk_bytes=chunk_bytes).loss


def fused_loss_of_32_rows(hidden, head, targets, teacher, divergence):
    """Where memory is what is short: chunks of 32 tokens."""
    return fused_loss(hidden, head, targets, teacher, divergence, chunk_bytes=32 * 4 * len(head))


FORMS = {"plain": plain_loss, "fused": fused_loss, "fused, 32 rows": fused_loss_of_32_rows}


# --------------------------------------------------------------------------------------------------- one measurement


class Case(NamedTuple):
    divergence: str
    vocabulary: int
    tokens: int
    dim: int
    device: str
    threads: int


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Seconds of one call, and bytes at the peak above the inputs, with the gradients and without. The loss and its gradients are
    `saved`."""
    torch.set_num_threads(case.threads)
    device, (divergence, _) = torch.device(case.device), pick_divergence(case.divergence)

    def call(hidden, head, targets, teacher):
        hidden.grad = head.grad = None
        loss = FORMS[form](hidden, head, targets, teacher, divergence) / len(hidden)
        loss.backward()
        return loss.detach()

    # The first call of all loads the code of every kernel, which counts as memory too: let it be a small one.
    call(*inputs(case._replace(vocabulary=min(64, case.vocabulary), tokens=2)))
    given = inputs(case)
    reset_peak(device)
    before = peak(device)
    call(*given)                                            # now the allocator holds what it keeps
    loss, seconds = timed(lambda: call(*given), device)
    above = max(PAGE, peak(device) - before)
    if saved:
        hidden, head, *_ = given
        torch.save({"loss": loss, "hidden": hidden.grad, "head": head.grad}, saved)
    gradients = sum(given[i].nbytes for i in range(2))      # which every form has to leave behind
    return {"seconds": seconds, "peak": above, "beside": max(PAGE, above - gradients)}


def inputs(case: Case):
    """The same for every form. Filled in place: a temporary would leave a high-water mark behind it."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(rows, size):
        return torch.empty(rows, case.dim, device=case.device).normal_(std=size, generator=generator)

    hidden, head = normal(case.tokens, 1.0).requires_grad_(), normal(case.vocabulary, 0.05).requires_grad_()
    targets = torch.randint(case.vocabulary, (case.tokens,), device=case.device, generator=generator)
    return hidden, head, targets, Dense(normal(case.tokens, 1.0), normal(case.vocabulary, 0.05))


# --------------------------------------------------------------------------------------------------------------- results


def rows_of(case: Case, repeats: int) -> list[dict]:
    """A row for each form."""
    figures = compare(measure, case, FORMS, repeats)
    plain = figures["plain"]
    return [{"group": f"{case.divergence}\n{case.vocabulary:,} words", "divergence": case.divergence,
             "vocabulary": case.vocabulary, "form": form, "seconds": each["seconds"],
             "time_ratio": each["seconds"] / plain["seconds"], "speed": plain["seconds"] / each["seconds"],
             "peak_mb": each["peak"] / 2 ** 20, "peak_ratio": plain["peak"] / each["peak"],
             "beside_mb": each["beside"] / 2 ** 20, "beside_ratio": plain["beside"] / each["beside"],
             "deviation": each["deviation"]} for form, each in figures.items()]


def table(rows) -> str:
    lines = ["| vocabulary | form | seconds | time / plain | speed | peak MB | peak / plain | without gradients | deviation |",
             "|---:|---|---:|---:|---:|---:|---:|---:|---:|"]
    return "\n".join(lines + [
        f"| {row['vocabulary']:,} | {row['form']} | {row['seconds']:.2f} | {row['time_ratio']:.2f} | {row['speed']:.2f} x "
        f"| {row['peak_mb']:,.0f} | 1/{row['peak_ratio']:.1f} | 1/{row['beside_ratio']:.1f} | {row['deviation']:.1g} |" for row in rows])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vocab", nargs="+", type=int, default=[6400, 50257, 151936], help="vocabulary sizes, words")
    add("--divergence", nargs="+", default=["forward_kl"], choices=DIVERGENCES, help="D of the loss; a table for each")
    add("--tokens", type=int, default=2048, help="rows of the hidden states")
    add("--dim", type=int, default=512, help="their width, of student and teacher")
    add_result_args(parser)
    args = parser.parse_args(argv)
    if min(*args.vocab, args.tokens, args.dim) < 1:
        parser.error("--vocab, --tokens and --dim are counts: 1 or more")
    check_result_args(parser, args)

    rows = []
    try:
        for name in args.divergence:
            for vocabulary in args.vocab:
                case = Case(name, vocabulary, args.tokens, args.dim, args.device, args.threads)
                rows += rows_of(case, args.repeats)
    except (ValueError, MemoryError) as error:
        sys.exit(str(error))

    setting = (f"{args.tokens} tokens, dim {args.dim}, fp32, forward and backward, {args.device}"
               + (f", threads: {args.threads}" if args.device == "cpu" else ""))
    for name in args.divergence:
        print(f"{ALPHA:g} CE + {1 - ALPHA:g} * {TEMPERATURE:g}^2 * {pick_divergence(name)[1]}; {setting}\n")
        print(table([row for row in rows if row["divergence"] == name]), end="\n\n")
    print(f"seconds: {'CPU time' if args.device == 'cpu' else 'of the GPU'}, median of {args.repeats} new processes; "
          "peak: above the inputs, gradients included; then without their size;\n"
          "deviation: relative, the largest of the loss and both gradients, from the plain form's")
    write_results(args, rows, setting, {"speed": "times as fast as the plain form",
                                        "peak_ratio": "times less memory than the plain form"})


if __name__ == "__main__":
    main()
