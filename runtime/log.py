"""
日志：终端上的一行行数字、JSONL 文件、曲线图与 wandb；只由主进程写。
Logs: rows of numbers on the terminal, in a JSONL file, as curves, and on wandb. Written by the main
process.
"""

import json
import math
import re
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from runtime.files import read_rows, write_jsonl
from runtime.precision import sum_dtype
from runtime.processes import World, full_tensor, is_main_process, sum_over_processes

LOG_FILES = []          # into which Logger writes too
SECONDS_WITHOUT_ROW = 30        # until Log shows a line
MAX_BAD_STEPS = 3       # in a row, without a finite gradient
PAGE = 4096             # bytes; no measurement of memory is finer


def Logger(content):
    """Print on the main process only."""
    if is_main_process():
        print(content, flush=True)
        for path in LOG_FILES:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{content}\n")


def peak(device) -> int:  # -> bytes
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))[1])
    import resource                         # macOS

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def peak_above(device):
    """with peak_above(device) as above: ...; above() is the peak in bytes above what was in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):             # not Linux: the old peak stays, nothing large was freed yet
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = peak(device)
    yield lambda: max(PAGE, peak(device) - before)


class Log:
    """Rows of numbers: plain lines, a JSONL file, and wandb if requested.

    Values are added per step as sums over this process's tokens. `means` are those over the steps
    since its last call, without the steps that were skipped; see `is_finite`.
    """

    def __init__(self, name, progress, world: World):
        self.path, self.total_steps, self.world = Path(f"{name}.jsonl"), progress.total_steps, world
        self.progress, self.first_step = progress, progress.steps_done
        self.start, self.printed = time.time(), 0.0
        self.values, self.sums = {}, {}             # of this step; of the steps since the last row
        self.steps = self.skipped = self.tokens = self.tokens_before = 0
        self.skipped_in_a_row = 0
        self.cpu_before, self.cpu = 0.0, time.process_time()    # of the rows; at the last one
        if world.rank == 0:
            old = read_rows(self.path, "step") if self.first_step else []
            old = [row for row in old if row["step"] <= self.first_step]
            write_jsonl(self.path, old)
            self.cpu_before = max((row.get("total_cpu_seconds", 0.0) for row in old), default=0.0)

    def add(self, tokens: int, **values: torch.Tensor):
        """One micro-batch: tokens that the model read, and values that add up to the step's over
        processes."""
        self.tokens += tokens
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value.detach()

    def is_finite(self, grad_norm, scaler) -> bool:
        """Whether the gradient of this step is finite, on all processes. If not, its update must be
        skipped; after three in a row the script ends, and its files stay as they are.

        In float16 a gradient may overflow because of the loss scale, which the scaler then lowers:
        such a step does not count.
        """
        if full_tensor(grad_norm).isfinite():
            self.skipped_in_a_row = 0
            return True
        values = torch.stack([torch.as_tensor(value) for value in self.values.values()])
        bad = sum_over_processes((~values.isfinite()).float().to(self.world.device)).tolist()
        terms = [name for name, n_processes in zip(self.values, bad) if n_processes]
        self.values, self.skipped = {}, self.skipped + 1
        self.skipped_in_a_row += scaler.get_scale() <= 1.0      # 1.0: nothing is scaled
        what = f"the {', '.join(terms)} of" if terms else "the gradient, but not the loss, of"
        Logger(f"{what} step {self.progress.steps_done + 1} is not finite: its update is skipped")
        if self.skipped_in_a_row < MAX_BAD_STEPS:
            return False
        cause = "the teacher's outputs" if "kd" in terms and "ce" not in terms else (
            "a learning rate that is too high: lower --learning_rate, or raise --warmup_iters")
        self.close()
        sys.exit(f"{MAX_BAD_STEPS} steps in a row are not finite. Likely cause: {cause}. The files "
                 "stay as they were last saved.")

    def step(self):
        """One optimizer step is done. Without a row for 30 s, and after the first step, a line on
        the terminal shows this process's loss."""
        for name, value in self.values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.values, self.steps = {}, self.steps + 1
        if self.world.rank == 0 and time.time() - self.printed > SECONDS_WITHOUT_ROW:
            n_finite = max(1, self.steps - self.skipped)
            means = {name: float(value) / n_finite for name, value in self.sums.items()}
            tokens = self.tokens_before + self.world.size * self.tokens
            self.show(self.progress.steps_done, means, tokens)

    def means(self) -> dict[str, float]:
        """The means since the last call, over all processes, which all call this."""
        used, self.cpu = time.process_time() - self.cpu, time.process_time()
        device, dtype = self.world.device, sum_dtype(self.world.device)
        sums = torch.stack([torch.as_tensor(value, device=device, dtype=dtype)
                            for value in (*self.sums.values(), self.tokens, used)])
        *sums, tokens, used = sum_over_processes(sums).tolist()
        means = {name: value / (self.steps - self.skipped) for name, value in zip(self.sums, sums)}
        if self.skipped:
            means["skipped_steps"] = self.skipped
        self.cpu_before, self.tokens_before = self.cpu_before + used, self.tokens_before + tokens
        self.sums, self.steps, self.skipped, self.tokens = {}, 0, 0, 0
        return means

    def row(self, step: int, wandb=None, sample: str | None = None, **values):
        """Report values, and a sample of the student's text. What is not finite is shown, but not
        written."""
        values = {name: float(value) for name, value in values.items()}
        if self.world.rank != 0:
            return
        pace = self.show(step, values, self.tokens_before)
        row = {name: value for name, value in values.items() if math.isfinite(value)}
        row |= {"tokens_per_s": pace} if pace else {}
        row["total_cpu_seconds"] = self.cpu_before
        if wandb is not None:
            wandb.log(row, step=step)
        if sample is not None:
            Logger(f"    {sample}")
            row["sample"] = sample
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")

    def show(self, step: int, values: dict, tokens: float) -> float:
        """Print a line; return the tokens per second since the start."""
        self.printed = time.time()
        seconds, done = self.printed - self.start, step - self.first_step
        left = seconds / done * (self.total_steps - step) if done else 0
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        pace = f"  {tokens / seconds:,.0f} tokens/s" if tokens else ""
        Logger(f"step {step}/{self.total_steps}  {text}{pace}  {left / 60:.1f} min left")
        return tokens / seconds

    def close(self):
        """Draw NAME.png from NAME.jsonl, whose rows include those before a resume."""
        if self.world.rank == 0:
            draw_curves(read_rows(self.path, "step"), self.path.with_suffix(".png"))


# Panels of a run's picture: title -> its quantities, as far as the run has them.
PANELS = {"KL to the teacher": ("kd", "val_kl"),
          "agreement with the teacher": ("val_agreement",),
          "cross-entropy of the labels": ("ce", "val_ce", "val_teacher_ce"),
          "loss": ("loss", "val_loss"),
          "accuracy": ("reward", "val_accuracy")}


def draw_curves(rows: list[dict], path: Path):
    """PANELS over the steps, that of the loss only where nothing tells its terms; without any, no
    file. scripts/plot.py draws all other quantities."""
    from runtime.pictures import new_figure, save_picture       # needed once, at the end of a run

    logged = {name for row in rows for name in row}
    logged -= {"loss", "val_loss"} if "ce" in logged else set()
    panels = {title: [name for name in names if name in logged] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    figure = new_figure(3.6 * len(panels), 3.4)
    figure.suptitle(path.stem)
    figure.supxlabel("step")
    for axis, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                    panels.items()):
        for name in names:
            style = "k--" if "teacher" in name else "C1.-" if name.startswith("val_") else "C0-"
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), style, label=name)
        axis.set_title(title)
        axis.legend()
    save_picture(figure, path)


def init_wandb(args, name: str, progress):
    """The wandb run, resumed if there is one; None without --use_wandb or off the main process."""
    if not args.use_wandb or not is_main_process():
        return None
    import wandb

    run = wandb.init(project=args.wandb_project, name=Path(name).name, id=progress.wandb_id,
                     resume="allow", config=vars(args))
    progress.wandb_id = run.id
    return run
