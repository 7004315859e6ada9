"""
融合损失有多快、多省内存：与教科书写法并排，每次测量各用一个全新的进程。
How fast the fused loss is and how little memory it takes, beside the textbook form.

    loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher_T || student_T)      alpha = 0.5, T = 2

one table           python -m benchmarks.loss
quick               python -m benchmarks.loss --tokens 512 --vocab 6400 --repeats 3
other divergences   python -m benchmarks.loss --vocab 50257 --divergence reverse_kl jsd

Forward and backward, from final hidden states to the gradients of the student's states and of its
head. The plain form needs 10 GB at 2048 tokens and a vocabulary of 151,936.
"""

from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.measure import (TOLERANCE, add_result_args, compare, parse, save, setting, table,
                                timed)
from distill.fused import CHUNK_BYTES, Dense, fused_distillation_loss
from distill.losses import DIVERGENCES, distillation_loss_fn, forward_kl, pick_divergence
from runtime.args import checking_input, make_parser
from runtime.log import peak_above

ALPHA, TEMPERATURE = 0.5, 2.0
Case = namedtuple("Case", "divergence vocab_size tokens dim device threads")


def plain_loss(hidden, head, targets, teacher, divergence):  # (S, D), (V, D), (S,) -> ()
    """The loss as textbooks write it. Logits, tempered logits, softmaxes and the gradient of each
    are (S, V), and eight of them are alive at once."""
    student_logits = hidden @ head.T                                                # (S, V)
    teacher_logits = teacher.states @ teacher.head.T                                # (S, V)
    ce = F.cross_entropy(student_logits, targets, reduction="sum")
    if divergence is forward_kl:
        log_q = F.log_softmax(student_logits / TEMPERATURE, dim=-1)
        p = F.softmax(teacher_logits / TEMPERATURE, dim=-1)
        kd = TEMPERATURE ** 2 * F.kl_div(log_q, p, reduction="sum")
    else:
        kd = distillation_loss_fn(student_logits, teacher_logits, TEMPERATURE, "sum", divergence)
    return ALPHA * ce + (1 - ALPHA) * kd


def fused_loss(hidden, head, targets, teacher, divergence, rows=None):
    chunk_bytes = rows * 4 * len(head) if rows else CHUNK_BYTES
    return fused_distillation_loss(hidden, head, targets, [teacher], ALPHA, TEMPERATURE, divergence,
                                   chunk_bytes=chunk_bytes).loss


FORMS = {"plain": plain_loss, "fused": fused_loss, "fused, 32 rows": partial(fused_loss, rows=32)}


def inputs(case: Case):
    """The same for every form. Filled in place: a temporary tensor would raise the peak."""
    device, S, V = case.device, case.tokens, case.vocab_size
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows, std):
        return torch.empty(rows, case.dim, device=device).normal_(std=std, generator=generator)

    hidden, head = normal(S, 1.0).requires_grad_(), normal(V, 0.05).requires_grad_()
    targets = torch.randint(V, (S,), device=device, generator=generator)
    return hidden, head, targets, Dense(normal(S, 1.0), normal(V, 0.05))


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Seconds of one call, and bytes at the peak above the inputs, with the gradients. The loss and
    its gradients are `saved`."""
    device, (divergence, _) = torch.device(case.device), pick_divergence(case.divergence)

    def call(hidden, head, targets, teacher):
        hidden.grad = head.grad = None
        loss = FORMS[form](hidden, head, targets, teacher, divergence) / len(hidden)
        loss.backward()
        return loss.detach()

    # The first call loads the code of every kernel, which counts as memory: let it be a small one.
    call(*inputs(case._replace(vocab_size=min(64, case.vocab_size), tokens=2)))
    given = inputs(case)
    with peak_above(device) as above:
        call(*given)                                        # the allocator keeps what it got
        loss, seconds = timed(lambda: call(*given), device)
    peak = above()
    if saved:
        torch.save({"loss": loss, "hidden": given[0].grad, "head": given[1].grad}, saved)
    return {"seconds": seconds, "peak": peak}


COLUMNS = {"vocabulary": "{vocab_size:,}", "form": "{form}", "seconds": "{seconds:.2f}",
           "speed": "{speed:.2f} x", "peak MB": "{peak_mb:,.0f}",
           "peak / plain": "1/{peak_ratio:.1f}", "deviation": "{deviation:.1g}"}


def main(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--vocab", nargs="+", type=int, default=[6400, 50257, 151936], help="vocabulary sizes")
    add("--divergence", nargs="+", default=["forward_kl"], choices=DIVERGENCES,
        help="divergences to compare")
    add("--tokens", type=int, default=2048, help="rows of the hidden states")
    add("--dim", type=int, default=512, help="their width, in student and teacher")
    add_result_args(parser)
    args = parse(parser, argv, "vocab", "tokens", "dim")

    rows = []
    for name in args.divergence:
        own = []
        for vocab_size in args.vocab:
            case = Case(name, vocab_size, args.tokens, args.dim, args.device, args.threads)
            with checking_input():
                own += [row | {"divergence": name, "vocab_size": vocab_size} for row in
                        compare(measure, case, dict.fromkeys(FORMS, TOLERANCE), args.repeats)]
        print(f"{ALPHA:g} CE + {1 - ALPHA:g} * {TEMPERATURE:g}^2 * {pick_divergence(name)[1]}, "
              f"fp32; {args.tokens} tokens, dim {args.dim}\n\n{table(own, COLUMNS)}\n")
        rows += own
    print(f"{setting(args)}; peak: above the inputs, with the gradients")
    save(args, rows)


if __name__ == "__main__":
    main()
