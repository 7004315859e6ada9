"""
断点：中断后续跑的结果与不中断时逐位相同。
Resume files: a run that is interrupted at any step and resumed ends with the same bits.
"""

import math
import os
import pickle
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.args import resume_command
from runtime.files import keep_previous, write_atomic
from runtime.log import Logger
from runtime.processes import World, is_main_process, is_sharded, unwrapped

# Flags that a resumed run may change; what they change in the mathematics is checked by itself.
FREE_TO_CHANGE = {
    "out_dir", "data_path", "config", "resume", "max_steps", "epochs", "batch_size", "device",
    "ddp", "accumulation_steps", "shard", "grad_checkpoint", "compile", "local_rank", "num_workers",
    "log_interval", "save_interval", "eval_interval", "val_path", "use_wandb", "wandb_project",
    "tokenizer", "start_stage", "end_stage", "set", "max_bad_steps"}

# What torch.load raises for a file that is empty, cut short, or of another kind.
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError)

PROGRESS = "progress.pt"        # in a sharded run's resume folder: what is not a tensor


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

    def is_due(self, interval: int) -> bool:
        """Whether what happens every `interval` steps, and after the last, is due. 0: only after
        the last."""
        is_last = self.steps_done == self.total_steps
        return is_last or interval > 0 and self.steps_done % interval == 0

    def is_best(self, loss: float) -> bool:
        """Whether this is the lowest validation loss so far; it is remembered."""
        better = loss < self.best           # of NaN: False
        self.best = loss if better else self.best
        return better


def start_progress(args, data, epochs: int, adapted: dict | None = None) -> Progress:
    """At step 0. data: MicroBatches; adapted: of a model with adapters, whose resume file lacks the
    frozen weights."""
    total_steps = args.max_steps or epochs * data.steps_per_epoch
    flags = {flag: value for flag, value in vars(args).items() if flag not in FREE_TO_CHANGE}
    settings = {"data": data.dataset.key, "samples per step": data.step_samples,
                "total steps": total_steps, **flags}
    if adapted:
        settings["sha256 of the adapted weights"] = adapted["base_sha256"]
    return Progress(settings, total_steps)


def save_resume(path, modules: dict, optimizer, scaler, progress: Progress):
    """Everything that an interrupted run needs. The file before it is kept as PATH.previous. All
    processes call this.

    A sharded run writes a folder, with one file per process.
    """
    path, sharded = Path(path), any(map(is_sharded, modules.values()))
    state = run_state(modules, optimizer)
    rest = {"scaler": scaler.state_dict(), "progress": asdict(progress)}
    if sharded:
        save_shards(path, state, rest)
    elif is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_previous(path)
        write_atomic(path, lambda file: torch.save(state | rest, file))


def load_resume(path, modules: dict, optimizer, scaler, progress: Progress) -> Progress:
    """Restore a run in place from the newest file that can be read; without one it starts at step
    0.

    Raises ValueError if the file belongs to a run with other settings.
    """
    path, sharded = Path(path), any(map(is_sharded, modules.values()))
    state = read_resume(path)
    if state is None:
        Logger(f"no {path} to resume: starting from the first step")
        return progress
    saved = Progress(**state["progress"])
    changed = [f"{key} was {saved.settings.get(key)}, is {value}"
               for key, value in progress.settings.items() if saved.settings.get(key) != value]
    if changed:
        raise ValueError(f"{path} belongs to another run: {'; '.join(changed)}. "
                         "Start anew without --resume, or in another --out_dir.")
    if sharded != ("shards" in state):
        raise ValueError(f"{path} belongs to a run {'without' if sharded else 'with'} --shard; "
                         "resume it as it began (with --shard, on any number of processes), or "
                         "start anew without --resume")
    if sharded:
        # AdamW creates its moments in its first step. One with zero gradients and learning rate 0
        # changes no weight.
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        load_shards(state["shards"], run_state(modules, optimizer))
    else:
        for name, module in modules.items():
            module = unwrapped(module)
            module.load_state_dict(module.state_dict() | state[name])
        optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    Logger(f"resumed {path} after step {saved.steps_done}")
    return saved


def run_state(modules: dict, optimizer) -> dict:
    """The tensors of a run, not copied: weights that train, and the optimizer's state."""
    weights = {name: trained_state(unwrapped(module)) for name, module in modules.items()}
    return weights | {"optimizer": optimizer.state_dict()}


def trained_state(module) -> dict:
    """A module's state without frozen weights, which come from their own file."""
    frozen = {name for name, weight in module.named_parameters(remove_duplicate=False)
              if not weight.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def read_resume(path: Path) -> dict | None:
    """The newest state that can be read; None if there is no file. Of a sharded run's folder: its
    progress and, as `shards`, its path. A file that cannot be read is named, and the one before it
    is used. Raises ValueError if none can be read."""
    found = [file for file in (path, path.with_name(path.name + ".previous")) if file.exists()]
    for file in found:
        try:
            if file.is_dir():
                return torch.load(file / PROGRESS, weights_only=True) | {"shards": file}
            return torch.load(file, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            Logger(f"{file} cannot be read ({type(error).__name__}); trying the one before it")
    if found:
        raise ValueError(f"no readable resume file at {path}; start anew without --resume")
    return None


def save_shards(path: Path, state: dict, rest: dict):
    """A folder into which each process writes its part of the tensors. All processes call this."""
    import torch.distributed.checkpoint as dcp

    temporary = path.with_name(path.name + ".tmp")
    if is_main_process():
        shutil.rmtree(temporary, ignore_errors=True)        # left by a run killed while saving
        temporary.mkdir(parents=True)
        write_atomic(temporary / PROGRESS, lambda file: torch.save(rest, file))
    dist.barrier()
    dcp.save(tensors_of(state), checkpoint_id=temporary)    # returns when all have written
    if is_main_process():
        keep_previous(path)
        os.replace(temporary, path)


def load_shards(path: Path, state: dict):
    """Read what save_shards wrote, on any number of processes, into the tensors of `state`. All
    processes call this."""
    import torch.distributed.checkpoint as dcp

    try:
        dcp.load(tensors_of(state), checkpoint_id=path)
    except dcp.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))     # of the first process that failed
        raise ValueError(f"{path} cannot be read ({type(reason).__name__}). Remove it, and "
                         f"--resume uses the one before it, {path.name}.previous, if there is "
                         "one") from error


def tensors_of(state: dict) -> dict:
    """A nested dict without everything that is not a tensor."""
    return {key: tensors_of(value) if isinstance(value, dict) else value
            for key, value in state.items() if isinstance(value, (dict, torch.Tensor))}


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
