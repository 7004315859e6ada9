"""
日志：终端上的一行行数字、JSONL 文件、曲线图与 wandb；只由主进程写。
Logs: rows of numbers on the terminal, in a JSONL file, as curves, and on wandb. Written by the main
process.
"""

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.files import read_lines, write_atomic
from runtime.processes import World, is_main_process, sum_over_processes

LOG_FILES = []          # into which Logger writes too
SECONDS = 10            # between two lines of ProgressBar


def Logger(content):
    """Print on the main process only, without breaking a progress bar."""
    if is_main_process():
        tqdm.write(str(content), file=sys.stdout)
        sys.stdout.flush()
        for path in LOG_FILES:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{content}\n")


def progress_bar(world: World, **more) -> tqdm:
    """On the terminal of the main process; elsewhere it is disabled."""
    return tqdm(dynamic_ncols=True, disable=world.rank != 0 or not sys.stderr.isatty(), **more)


class ProgressBar:
    """This process's share of some work: a bar on a terminal, else a line every ten seconds. Only
    the main process prints; it assumes that the others are as fast."""

    def __init__(self, total: int, unit: str, world: World):
        self.total, self.unit, self.world, self.done, self.tokens = total, unit, world, 0, 0
        self.start = self.printed = time.perf_counter()
        self.bar = progress_bar(world, total=total, unit=f" {unit}", unit_scale=True)

    def add(self, done: int, tokens: int = 0):
        """So many more units are done. tokens: of a unit that is not tokens, for the pace."""
        self.done += done
        self.tokens += tokens
        now, seconds = time.perf_counter(), self.seconds()
        pace = f"{self.world.size * self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        self.bar.set_postfix_str(pace, refresh=False)
        self.bar.update(done)
        late = now - self.printed > SECONDS or self.done == self.total
        if self.bar.disable and self.done and late:
            self.printed = now
            share = " of this process" if self.world.size > 1 else ""
            rate = self.world.size * self.done / seconds
            left = (self.total - self.done) * seconds / self.done / 60
            texts = [f"{self.done:,}/{self.total:,} {self.unit}{share}",
                     f"{rate:,.1f} {self.unit}/s", pace, f"{left:.1f} min left"]
            Logger("  ".join(filter(None, texts)))

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def close(self):
        self.bar.close()


class Clock:
    """The seconds that each phase of a step takes, on this process: `with clock("teacher"): ...`"""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    @contextmanager
    def __call__(self, phase: str):
        start = self.now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - start

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)     # kernels run asynchronously
        return time.perf_counter()

    def shares(self) -> dict[str, float]:
        """{"share_teacher": 0.2, ...} of the time measured since the last call."""
        total = sum(self.seconds.values())
        shares = {f"share_{phase}": seconds / total for phase, seconds in self.seconds.items()}
        self.seconds = {}
        return shares


class Log:
    """Rows of numbers: a progress bar or plain lines, a JSONL file, and wandb if requested.

    Values are added per step as sums over this process's tokens and reported as means over the
    steps since the last row; nothing is copied from the device in between.
    """

    def __init__(self, name, progress, world: World):
        self.path, self.total_steps, self.world = Path(f"{name}.jsonl"), progress.total_steps, world
        self.first_step, self.start = progress.steps_done, time.time()
        self.sums, self.steps, self.tokens, self.tokens_before = {}, 0, 0, 0
        self.bar = progress_bar(world, total=self.total_steps, initial=self.first_step, unit="step")
        if world.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            old = read_lines(self.path) if self.first_step else []
            keep = [line for line in old if json.loads(line)["step"] <= self.first_step]
            write_atomic(self.path, lambda file: file.write("".join(keep).encode()))

    def add(self, tokens: int, **values: torch.Tensor):
        """One micro-batch: tokens that the model read, and values that add up to the step's over
        processes."""
        self.tokens += tokens
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def step(self):
        self.steps += 1
        self.bar.update()

    def row(self, step: int, wandb=None, **more):
        """Report the means since the last row together with `more`."""
        if self.steps:
            sums = torch.stack([torch.as_tensor(value, dtype=torch.float64)
                                for value in (*self.sums.values(), self.tokens)])
            sums = sums.to(self.world.device)
            *means, tokens = (sum_over_processes(sums) / self.steps).tolist()
            more = dict(zip(self.sums, means)) | more
            self.tokens_before += tokens * self.steps
            self.sums, self.steps, self.tokens = {}, 0, 0
        more = {name: float(value) for name, value in more.items()}
        if self.world.rank != 0:
            return
        seconds, done = time.time() - self.start, step - self.first_step
        speed = {"tokens_per_s": self.tokens_before / seconds} if self.tokens_before else {}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **more, **speed}) + "\n")
        if wandb is not None:
            wandb.log({**more, **speed}, step=step)
        left = seconds / done * (self.total_steps - step) if done else 0
        text = "  ".join(f"{name} {value:.4g}" for name, value in more.items())
        pace = f"  {speed['tokens_per_s']:,.0f} tokens/s" if speed else ""
        Logger(f"step {step}/{self.total_steps}  {text}{pace}  {left / 60:.1f} min left")

    def close(self):
        """End the progress bar and draw NAME.png from NAME.jsonl, whose rows include those before a
        resume."""
        self.bar.close()
        if self.world.rank == 0:
            rows = [json.loads(line) for line in read_lines(self.path)]
            draw_curves(rows, self.path.with_suffix(".png"))


def draw_curves(rows: list[dict], path: Path):
    """One panel per quantity over the steps, with its validation values (val_*) in the same panel.
    Constants and tokens_per_s, a property of the machine, are left out; without a panel, no file.
    """
    from matplotlib.figure import Figure        # needed once, at the end of a run

    from runtime.pictures import save_picture

    panels = {}                     # {"loss": {"loss": {step: value}, "val_loss": {step: value}}}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "tokens_per_s"):
                lines = panels.setdefault(name.removeprefix("val_"), {})
                lines.setdefault(name, {})[row["step"]] = value
    panels = {title: lines for title, lines in panels.items()
              if any(len(line) == 1 or len(set(line.values())) > 1 for line in lines.values())}
    if not panels:
        return

    n_columns, axis = min(4, len(panels)), None
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(3.2 * n_columns, 2.4 * n_rows + 0.6), layout="constrained")
    figure.suptitle(path.stem)
    figure.supxlabel("step")
    for place, (title, lines) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(n_rows, n_columns, place, title=title, sharex=axis)
        axis.spines[["top", "right"]].set_visible(False)
        for name, line in lines.items():
            label, color = ("validation", "C1") if name.startswith("val_") else ("training", "C0")
            axis.plot(list(line), list(line.values()), ".-", color=color, label=label)
        if any(name.startswith("val_") for name in lines):
            axis.legend(frameon=False)
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
