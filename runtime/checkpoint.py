"""
断点：中断后续跑的结果与不中断时逐位相同。
Resume files: a run that is interrupted at any step and resumed ends with the same bits.
"""

import glob
import math
import os
import shutil
import sys
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.args import parse_teacher, resume_command
from runtime.errors import FileError
from runtime.files import delete, keep_previous, lock, write_atomic
from runtime.log import Logger
from runtime.optim import trained_weights
from runtime.processes import (World, any_process, is_main_process, local_rows, sharded_like,
                               unwrapped)

# Flags that a resumed run may change; what they change in the mathematics is checked by itself.
FREE_TO_CHANGE = {
    "out_dir", "data_path", "columns", "config", "resume", "max_steps", "epochs", "batch_size",
    "device", "ddp", "accumulation_steps", "shard", "grad_checkpoint", "compile", "local_rank",
    "num_workers", "log_interval", "save_interval", "eval_interval", "val_path", "use_wandb",
    "wandb_project", "tokenizer", "start_stage", "end_stage", "set",
    "teacher_states_gb", "teacher_url", "teacher_key_env"}


@dataclass
class Progress:
    """How far a run has come; saved in its resume file."""

    settings: dict                  # must not change, or a resumed run ends unlike an unbroken one
    total_steps: int
    steps_done: int = 0
    best: float = math.inf          # lowest validation loss so far
    wandb_id: str | None = None
    memory: dict = field(default_factory=dict)      # what else a script needs: numbers, strings

    def epochs(self, steps_per_epoch: int) -> range:
        """The epochs that have steps still to be done."""
        return range(self.steps_done // steps_per_epoch,
                     math.ceil(self.total_steps / steps_per_epoch))

    def steps_of(self, epoch: int, steps_per_epoch: int) -> range:
        """The optimizer steps of an epoch that are still to be done."""
        return range(max(epoch * steps_per_epoch, self.steps_done),
                     min((epoch + 1) * steps_per_epoch, self.total_steps))

    def is_due(self, interval: int, n_steps: int = 1) -> bool:
        """Whether what happens every `interval` steps, and after the last, fell due in the last
        n_steps. 0: only after the last."""
        is_last = self.steps_done == self.total_steps
        return is_last or interval > 0 and self.steps_done % interval < n_steps

    def is_best(self, loss: float) -> bool:
        """Whether this is the lowest validation loss so far; it is remembered."""
        better = loss < self.best           # of NaN: False
        self.best = loss if better else self.best
        return better


def start_progress(args, name, data, epochs: int, adapted: dict | None = None) -> Progress:
    """At step 0; the files NAME.* are now this run's alone. data: MicroBatches; adapted: of a model
    with adapters, whose resume file lacks the frozen weights. Raises ValueError if another run is
    writing NAME.*."""
    if is_main_process():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        lock(name)
        if not args.resume:
            set_aside(name)
    total_steps = args.max_steps or epochs * data.steps_per_epoch
    flags = {flag: value for flag, value in vars(args).items() if flag not in FREE_TO_CHANGE}
    settings = {"data": data.dataset.key, "samples per step": data.step_samples,
                "total steps": total_steps, **flags}
    if adapted:
        settings["sha256 of the adapted weights"] = adapted["base_sha256"]
    for flag in ("teacher", "teacher_cache"):
        specs = vars(args).get(flag) or []
        for spec in [specs] if isinstance(specs, str) else specs:
            _, path, _ = parse_teacher(spec)
            settings[f"content of {path}"] = fingerprint(Path(path))
    return Progress(settings, total_steps)


def set_aside(name):
    """Keep what an earlier run wrote, NAME.* and, of the curriculum, NAME_epoch-* and the like, as
    NAME.previous.* too, until the next run. Hard links take no space, and NAME.* stay for a run
    that ends before its first save."""
    path = Path(name)
    ends = (".pth*", ".json*", ".png*", ".resume*", "_best.*", "_final.*", "_epoch-*")
    files = [file for end in ends for file in path.parent.glob(glob.escape(path.name) + end)
             if file.is_file() and file.suffix != ".tmp"]
    if not any(file.suffix == ".pth" for file in files):
        return
    for old in path.parent.glob(f"{glob.escape(path.name)}.previous*"):
        delete(old)
    for file in files:
        kept = path.with_name(f"{path.name}.previous{file.name.removeprefix(path.name)}")
        try:
            os.link(file, kept)
        except OSError:             # some file systems have no links
            shutil.copy2(file, kept)
    Logger(f"*** this run replaces {name}.*; the files of the earlier run are kept as "
           f"{name}.previous.*, until the next run without --resume ***")


def fingerprint(path: Path) -> str:
    """Distinguishes other weights, or another cache, at the same path without reading them all: a
    checksum of each file's size and last 64 KB, where a .pth has the CRC-32 of all its records."""
    files, crc = [path] if path.is_file() else sorted(path.iterdir()), 0
    for file in files:
        if file.suffix in (".pth", ".gguf", ".safetensors", ".bin", ".json"):
            with open(file, "rb") as opened:
                size = opened.seek(0, os.SEEK_END)
                opened.seek(max(0, size - (1 << 16)))
                crc = zlib.crc32(opened.read() + b"%d" % size, crc)
    return f"{crc:08x}"


def save_resume(path, modules: dict, optimizer, scaler, progress: Progress):
    """Everything that an interrupted run needs. The file before it is kept as PATH.previous. All
    processes call this, and the main one writes. Raises ValueError, before anything is replaced,
    for a tensor with NaN or infinity."""
    path, state = Path(path), run_state(modules, optimizer)
    wrong = not_finite(state)
    if any_process(wrong is not None, optimizer.param_groups[0]["params"][0].device):
        raise FileError(f"{wrong or 'a tensor of another process'} holds NaN or infinity after "
                        f"step {progress.steps_done}; {path} stays as it was saved before")
    state = gather(state) | {"scaler": scaler.state_dict(), "progress": asdict(progress)}
    if is_main_process():
        keep_previous(path)
        write_atomic(path, lambda file: torch.save(state, file))


def gather(value):
    """A nested dict whose sharded tensors are whole, in the memory of the main process alone. They
    are gathered one at a time. All processes call this."""
    if isinstance(value, dict):
        return {key: gather(each) for key, each in value.items()}
    if not hasattr(value, "full_tensor"):
        return value
    whole = value.full_tensor()
    return whole.cpu() if is_main_process() else None


def load_resume(path, modules: dict, optimizer, scaler, progress: Progress) -> Progress:
    """Restore a run in place from the newest file that can be read, on any number of processes,
    sharded or not; without one it starts at step 0. Raises ValueError if the file belongs to a run
    with other settings."""
    path = Path(path)
    state = read_resume(path, optimizer.param_groups[0]["params"][0].device)
    if state is None:
        Logger(f"no {path} to resume: starting from the first step")
        if is_main_process():
            set_aside(path.with_suffix(""))
        return progress
    saved = Progress(**state["progress"])
    changed = [f"{key} was {saved.settings.get(key)}, is {value}"
               for key, value in progress.settings.items() if saved.settings.get(key) != value]
    if changed:
        raise ValueError(f"{path} belongs to another run: {'; '.join(changed)}. "
                         "Start anew without --resume, or in another --out_dir.")
    for name, module in modules.items():
        own = unwrapped(module).state_dict()
        own |= {key: sharded_like(own[key], whole) for key, whole in state[name].items()}
        unwrapped(module).load_state_dict(own)
    weights = trained_weights(optimizer)
    for i, moments in state["optimizer"]["state"].items():
        moments |= {key: sharded_like(weights[i], whole) for key, whole in moments.items()
                    if whole.dim()}                 # not the number of steps
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    Logger(f"resumed {path} after step {saved.steps_done}")
    return saved


def run_state(modules: dict, optimizer) -> dict:
    """The tensors of a run, not copied: weights that train, and the optimizer's state. Frozen
    weights come from their own file."""
    state = {}
    for name, module in modules.items():
        module = unwrapped(module)
        frozen = {key for key, weight in module.named_parameters(remove_duplicate=False)
                  if not weight.requires_grad}
        state[name] = {key: tensor for key, tensor in module.state_dict().items()
                       if key not in frozen}
    return state | {"optimizer": optimizer.state_dict()}


def load_verified(path, mmap: bool = True):
    """The tensors and plain values that torch.save wrote; no code runs. Compares the file's records
    with their CRC-32 at 2.8 GB/s, which torch.load does not. Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as records:
            if damaged := records.testzip():
                raise ValueError(f"{damaged} differs from its checksum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:          # a damaged file makes zipfile and torch.load raise any
        raise ValueError(f"{path} is cut short, or no weight file at all, or damaged "
                         f"({type(error).__name__}: {str(error)[:100]})") from error


def is_finite(tensor) -> bool:
    """Without NaN and infinity. aminmax passes both on at 5 GB/s, ten times as fast as isfinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def not_finite(state: dict) -> str | None:
    """The name of a tensor in a nested dict that holds NaN or infinity; None if there is none."""
    return next((name for name, tensor in tensors_of(state).items()
                 if not is_finite(local_rows(tensor))), None)


def read_resume(path: Path, device=torch.device("cpu")) -> dict | None:
    """The newest state that all processes can read; None if there is no file. A file that cannot be
    read is named, and the one before it takes its place. Raises ValueError if none can."""
    found = [file for file in (path, path.with_name(path.name + ".previous")) if file.exists()]
    for file in found:
        state, problem = None, "by another process"
        try:
            state = load_verified(file, mmap=dist.is_initialized())     # in memory once for all
            if wrong := not_finite(state):
                raise ValueError(f"{wrong} holds NaN or infinity")
        except ValueError as error:
            state, problem = None, error
        if not any_process(state is None, device):
            if file != path and is_main_process():      # so that the next save keeps this one
                os.replace(file, path)
            return state
        Logger(f"{file} cannot be read ({problem}); trying the one before it")
    if found:
        raise ValueError(f"no readable resume file at {path}; start anew without --resume")
    return None


def tensors_of(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors in a nested dict, by the path of their keys: "optimizer.state.0.exp_avg"."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= tensors_of(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
    return found


def end_run(log, wandb, progress: Progress, world: World):
    """Close the log; exit with status 130 and the command to resume if steps are left."""
    log.close()
    if wandb is not None:
        wandb.finish()
    if dist.is_initialized():
        dist.barrier()
    if progress.steps_done < progress.total_steps:
        Logger(f"stopped after step {progress.steps_done} of {progress.total_steps}; everything is "
               f"saved. Resume with: {resume_command(world.size, ' --resume')}")
        sys.exit(130)
