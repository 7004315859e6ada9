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
import json
import re
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from distill.fused import CHUNK_BYTES, Dense, fused_distillation_loss
from distill.losses import DIVERGENCES, distillation_loss_fn, forward_kl, pick_divergence
from runtime import write_whole

ALPHA, TEMPERATURE = 0.5, 2.0
TOLERANCE = 1e-4            # relative, of the loss and of both gradients; fp32 sums in another order differ by 1e-6
PAGE = 4096                 # bytes; no measurement of memory is finer


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


def measure(case: Case, form: str, gradients: Path | None) -> tuple[float, int]:
    """Seconds of one call, and bytes at the peak above the inputs. Runs in a new process.

    gradients  where to leave the loss and its gradients for `deviation`
    """
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
    if gradients:
        hidden, head, *_ = given
        torch.save({"loss": loss, "hidden": hidden.grad, "head": head.grad}, gradients)
    return seconds, above


def inputs(case: Case):
    """The same for every form. Filled in place: a temporary would leave a high-water mark behind it."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(rows, size):
        return torch.empty(rows, case.dim, device=case.device).normal_(std=size, generator=generator)

    hidden, head = normal(case.tokens, 1.0).requires_grad_(), normal(case.vocabulary, 0.05).requires_grad_()
    targets = torch.randint(case.vocabulary, (case.tokens,), device=case.device, generator=generator)
    return hidden, head, targets, Dense(normal(case.tokens, 1.0), normal(case.vocabulary, 0.05))


def timed(call, device):  # -> (what it returns, seconds)
    """Of the CPU its own time, all threads together: on a shared machine the clock on the wall measures others too."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end) / 1000
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def reset_peak(device):
    """From now on the peak is a new one; at first what is in use at the moment."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux. Elsewhere the old peak stays; nothing large was freed so far, so that it too is what is in use.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device) -> int:  # -> bytes
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------ many, and a comparison


def compare_forms(case: Case, repeats: int) -> list[dict]:
    """A row for each form: medians over `repeats` processes, the forms taking turns.

    Raises ValueError where they disagree, MemoryError where one was killed.
    """
    measured = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        saved = {form: Path(folder) / f"{number}.pt" for number, form in enumerate(FORMS)}
        for repeat in range(repeats):
            for form in FORMS:
                measured[form].append(in_a_new_process(case, form, saved[form] if repeat == 0 else None))
        deviations = {form: deviation(saved[form], saved["plain"]) for form in FORMS}
    seconds = {form: statistics.median(seconds for seconds, _ in runs) for form, runs in measured.items()}
    peaks = {form: statistics.median(above for _, above in runs) for form, runs in measured.items()}
    return [{"divergence": case.divergence, "vocabulary": case.vocabulary, "form": form, "seconds": seconds[form],
             "time_ratio": seconds[form] / seconds["plain"], "speed": seconds["plain"] / seconds[form],
             "peak_mb": peaks[form] / 2 ** 20, "peak_ratio": peaks["plain"] / peaks[form],
             "deviation": deviations[form]} for form in FORMS]


def in_a_new_process(case: Case, form: str, gradients) -> tuple[float, int]:
    """`measure`, where nothing of an earlier measurement is left."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as new:
            return new.submit(measure, case, form, gradients).result()
    except BrokenProcessPool:
        needed = 8 * 4 * case.tokens * case.vocabulary / 1e9        # eight tensors in fp32
        raise MemoryError(f"the process of the {form} form was killed at V={case.vocabulary}. The plain one needs about "
                          f"{needed:.1f} GB: take a smaller --tokens or --vocab") from None


def deviation(saved: Path, truth: Path) -> float:
    """The largest of |a - b| / |b| over the loss and both gradients. Raises ValueError where it is over TOLERANCE."""
    ours, theirs = torch.load(saved, map_location="cpu"), torch.load(truth, map_location="cpu")
    relative = {name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs}
    for name, value in relative.items():
        if not value <= TOLERANCE:          # so that NaN is refused too
            raise ValueError(f"{name}: {value:.1e} away from the plain form's, more than {TOLERANCE:g}; "
                             "how fast a wrong result is does not matter")
    return max(relative.values())


# --------------------------------------------------------------------------------------------------------------- results


def table(rows) -> str:
    lines = ["| vocabulary | form | seconds | time / plain | speed | peak MB | peak / plain | deviation |",
             "|---:|---|---:|---:|---:|---:|---:|---:|"]
    return "\n".join(lines + [
        f"| {row['vocabulary']:,} | {row['form']} | {row['seconds']:.2f} | {row['time_ratio']:.2f} | {row['speed']:.2f} x "
        f"| {row['peak_mb']:,.0f} | 1/{row['peak_ratio']:.1f} | {row['deviation']:.1g} |" for row in rows])


def draw(rows, title, path: Path):
    """For every vocabulary how many times faster and how many times smaller than the plain form, as bars."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["divergence"], row["vocabulary"]) for row in rows))
    forms = [form for form in FORMS if form != "plain"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, name in zip(axes, ("speed", "peak_ratio"), ("times as fast as the plain form",
                                                               "times less memory than the plain form")):
        for i, form in enumerate(forms):
            bars = axis.bar([x + 0.4 * i for x in range(len(groups))],
                            [row[key] for row in rows if row["form"] == form], 0.38, label=form)
            axis.bar_label(bars, fmt="%.1f x", padding=2)
        axis.axhline(1, color="black", linewidth=1, linestyle="--")
        axis.set_xticks([x + 0.2 for x in range(len(groups))],
                        [f"{divergence}\n{words:,} words" for divergence, words in groups])
        axis.set_title(name)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(forms), frameon=False)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what
    add("--vocab", nargs="+", type=int, default=[6400, 50257, 151936], help="vocabulary sizes, words")
    add("--divergence", nargs="+", default=["forward_kl"], choices=DIVERGENCES, help="D of the loss; a table for each")
    add("--tokens", type=int, default=2048, help="rows of the hidden states")
    add("--dim", type=int, default=512, help="their width, of student and teacher")
    # how
    add("--repeats", type=int, default=3, help="processes for each form; the median counts")
    add("--threads", type=int, default=1, help="threads of the CPU; their times are added up")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    # where to
    add("--json", default=None, help="file for all figures")
    add("--picture", default=None, help="PNG file for the ratios as bars")
    args = parser.parse_args(argv)
    if min(*args.vocab, args.tokens, args.dim, args.repeats, args.threads) < 1:
        parser.error("--vocab, --tokens, --dim, --repeats and --threads are counts: 1 or more")
    for path in filter(None, (args.json, args.picture)):        # better now than after ten minutes
        if not Path(path).parent.is_dir():
            parser.error(f"no folder for {path}; make it: mkdir -p {Path(path).parent}")

    rows = []
    try:
        for name in args.divergence:
            for vocabulary in args.vocab:
                case = Case(name, vocabulary, args.tokens, args.dim, args.device, args.threads)
                rows += compare_forms(case, args.repeats)
    except (ValueError, MemoryError) as error:
        sys.exit(str(error))

    setting = (f"{args.tokens} tokens, dim {args.dim}, fp32, forward and backward, {args.device}"
               + (f", threads: {args.threads}" if args.device == "cpu" else ""))
    for name in args.divergence:
        print(f"{ALPHA:g} CE + {1 - ALPHA:g} * {TEMPERATURE:g}^2 * {pick_divergence(name)[1]}; {setting}\n")
        print(table([row for row in rows if row["divergence"] == name]), end="\n\n")
    print(f"seconds: {'CPU time' if args.device == 'cpu' else 'of the GPU'}, median of {args.repeats} new processes; "
          "peak: above the inputs, gradients included;\n"
          "deviation: relative, the largest of the loss and both gradients, from the plain form's")
    if args.json:
        text = json.dumps({"setting": vars(args), "torch": torch.__version__, "rows": rows}, indent=2)
        write_whole(Path(args.json), lambda file: file.write(text.encode()))
    if args.picture:
        draw(rows, setting, Path(args.picture))


if __name__ == "__main__":
    main()
