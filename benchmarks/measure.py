"""
怎样测量：每次各用一个全新的进程，各种写法轮流来，结果不同的不计时；比值、表、JSON、图。
How things are measured: each time in a new process, the forms taking turns, and what gives another result has no speed.
Ratios to the first form, as a table, as JSON and as a picture.

    figures = compare(measure, case, ["plain", "ours"], repeats=3)      # {form: {"seconds": ..., "peak": ..., "deviation": ...}}

`measure(case, form, saved)` is a function at the top of a module: a new process imports it. It returns {figure: number}, and
leaves in the file `saved`, unless that is None, the tensors in which the forms have to agree.
"""

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

import torch
from runtime.files import write_atomic


TOLERANCE = 1e-4            # relative, of each tensor; fp32 sums in another order differ by 1e-6
PAGE = 4096                 # bytes; no measurement of memory is finer


# --------------------------------------------------------------------------------------------------- in the new process


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


def compare(measure, case, forms, repeats: int, tolerance: float = TOLERANCE) -> dict[str, dict[str, float]]:
    """{form: {figure: median over `repeats` processes}}, and each form's "deviation" from the first one.

    Raises ValueError where they disagree, MemoryError where a process was killed.
    """
    forms, measured = list(forms), {form: [] for form in forms}
    with tempfile.TemporaryDirectory() as folder:
        saved = {form: Path(folder) / f"{number}.pt" for number, form in enumerate(forms)}
        for repeat in range(repeats):
            for form in forms:
                measured[form].append(in_a_new_process(measure, case, form, saved[form] if repeat == 0 else None))
        deviations = {form: deviation(form, saved[form], forms[0], saved[forms[0]], tolerance) for form in forms}
    return {form: {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
            | {"deviation": deviations[form]} for form, runs in measured.items()}


def in_a_new_process(measure, case, form, saved) -> dict[str, float]:
    """`measure`, where nothing of an earlier measurement is left."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as new:
            return new.submit(measure, case, form, saved).result()
    except BrokenProcessPool:
        raise MemoryError(f"the process of the form {form!r} was killed, most likely for its memory: {case}. Take a smaller "
                          "case") from None


def deviation(form, saved: Path, truth_form, truth: Path, tolerance: float = TOLERANCE) -> float:
    """The largest of |a - b| / |b| over all that was saved. Raises ValueError where it is over the tolerance."""
    ours, theirs = (torch.load(path, map_location="cpu") for path in (saved, truth))
    relative = {name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs}
    for name, value in relative.items():
        if not value <= tolerance:          # so that NaN is refused too
            raise ValueError(f"{form}, {name}: {value:.1e} away from {truth_form}, more than {tolerance:g}; how fast a wrong "
                             "result is does not matter")
    return max(relative.values())


# --------------------------------------------------------------------------------------------------------------- results


def add_result_args(parser):
    add = parser.add_argument_group("how, and where to").add_argument
    add("--repeats", type=int, default=3, help="processes for each form; the median counts")
    add("--threads", type=int, default=1, help="threads of the CPU")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--json", default=None, help="file for all figures")
    add("--picture", default=None, help="PNG file for the ratios as bars")


def check_result_args(parser, args):
    """Better now than after ten minutes."""
    if min(args.repeats, args.threads) < 1:
        parser.error("--repeats and --threads are counts: 1 or more")
    for path in filter(None, (args.json, args.picture)):
        if not Path(path).parent.is_dir():
            parser.error(f"no folder for {path}; make it: mkdir -p {Path(path).parent}")


def write_results(args, rows: list[dict], title: str, ratios: dict[str, str]):
    """The JSON and the picture that were asked for.

    rows        {"group": where its bars stand, "form", figures}
    ratios      {figure of a row: what its bars are}; the first form of a group has 1 and no bar
    """
    if args.json:
        text = json.dumps({"setting": vars(args), "torch": torch.__version__, "rows": rows}, indent=2)
        write_atomic(Path(args.json), lambda file: file.write(text.encode()))
    if args.picture:
        draw(rows, title, ratios, Path(args.picture))


def draw(rows, title, ratios, path: Path):
    from matplotlib.figure import Figure

    groups, forms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("group", "form"))
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, len(ratios), squeeze=False)[0]
    width = 0.8 / max(1, len(forms) - 1)
    for axis, (key, name) in zip(axes, ratios.items()):
        for i, form in enumerate(forms[1:]):
            of_form = {row["group"]: row[key] for row in rows if row["form"] == form and key in row}
            places = [x + width * (i - len(forms) / 2 + 1) for x, group in enumerate(groups) if group in of_form]
            bars = axis.bar(places, of_form.values(), 0.95 * width, label=form)
            axis.bar_label(bars, fmt="%.1f x", padding=2)
        axis.axhline(1, color="black", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(groups)), groups)
        axis.set_title(name)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(forms) - 1, frameon=False)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))
