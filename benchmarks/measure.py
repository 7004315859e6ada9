"""
怎样测量：每次用一个全新的进程，各种写法轮流，结果不同的不计时；表与 JSON。
How things are measured: each time in a new process, the forms in turn. A form with another result
than the first one's stops the benchmark.

`measure(case, form, saved)` is a function at the top of a module, as a new process imports it. It
returns {figure: number}, among them "seconds" and "peak", and writes the tensors in which the forms
must agree to the file `saved`, unless that is None. A case is a tuple with a field `threads`.
"""

import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from evaluation.tables import markdown
from runtime.args import RANGES, check_values
from runtime.files import write_json

TOLERANCE = 1e-4            # relative, per tensor; fp32 sums in another order differ by 1e-6


def timed(call, device):  # -> (its result, seconds)
    """On the CPU its own time, of all threads: wall-clock time would measure other programs too."""
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


def compare(measure, case, forms: dict[str, float], repeats: int) -> list[dict]:
    """A row for each form: the median of each figure over `repeats` processes, the "deviation" from
    the first form, and the ratios to it. forms: {form: tolerance of its deviation}. Raises
    ValueError where a form deviates more, or where a process was killed."""
    measured, deviations = {form: [] for form in forms}, {}
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder, "0.pt")
        for repeat in range(repeats):
            for number, (form, tolerance) in enumerate(forms.items()):
                saved = Path(folder, f"{number}.pt") if repeat == 0 else None
                measured[form] += in_new_processes([(measure, case, form, saved)])
                if saved:
                    deviations[form] = deviation(form, saved, next(iter(forms)), truth, tolerance)
    rows = []
    for form, runs in measured.items():
        row = {"form": form, "deviation": deviations[form], **medians(runs)}
        first = rows[0] if rows else row
        rows.append(row | {"speed": first["seconds"] / row["seconds"],
                           "peak_mb": row["peak"] / 2 ** 20,
                           "peak_ratio": first["peak"] / row["peak"]})
    return rows


def medians(runs: list[dict]) -> dict[str, float]:
    return {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}


def in_new_processes(calls: list[tuple]) -> list[dict]:
    """The results of calls (measure, case, ...), each in a process where nothing of an earlier
    measurement is left, all at the same time."""
    case = calls[0][1]
    try:
        with ProcessPoolExecutor(len(calls), get_context("spawn"), torch.set_num_threads,
                                 [case.threads]) as new:
            return [result.result() for result in [new.submit(*call) for call in calls]]
    except BrokenProcessPool:
        raise ValueError(f"a process was killed, most likely for lack of memory: {calls[0][1:]}. "
                         "Take a smaller case") from None


def deviation(form, saved: Path, truth_form, truth: Path, tolerance: float = TOLERANCE) -> float:
    """The largest |a - b| / |b| of all that was saved. Raises ValueError above the tolerance."""
    ours, theirs = (torch.load(path, map_location="cpu", weights_only=True)
                    for path in (saved, truth))
    relative = {name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item()
                for name in theirs}
    for name, value in relative.items():
        if not value <= tolerance:          # also refuses NaN
            raise ValueError(f"{form}, {name}: {value:.1e} away from {truth_form}, more than "
                             f"{tolerance:g}; the speed of a wrong result does not matter")
    return max(relative.values())


def add_result_args(parser, repeats: int = 3):
    add = parser.add_argument_group("measurement and output").add_argument
    add("--repeats", type=int, default=repeats, help="processes per form; their median counts")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--json", default=None, help="file for all figures")


def parse(parser, argv, *counts: str):
    """args; counts are flags that must be 1 or more. Exits with a message."""
    args = parser.parse_args(argv)
    check_values(parser, args, RANGES | dict.fromkeys(counts, "[1, inf)"))
    return args


def setting(args) -> str:
    """'cpu, threads: 1, CPU time, median of 3 new processes'"""
    clock = f"threads: {args.threads}, CPU time" if args.device == "cpu" else "GPU time"
    return f"{args.device}, {clock}, median of {args.repeats} new processes"


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Markdown. columns: {title: its cell as a format of a row, such as "{seconds:.2f}"}"""
    return markdown([list(columns), *([cell.format_map(row) for cell in columns.values()]
                                      for row in rows)])


def save(args, rows: list[dict]):
    if args.json:
        write_json(args.json, {"setting": vars(args), "torch": torch.__version__, "rows": rows})
