"""
运行时的管道：进程、设备、精度、学习率、断点、日志。与课程内容无关，故不在课程脚本里。
The plumbing of a run: arguments, processes, devices, precision, learning rate, checkpoints, logs. Plain functions that
the lessons call; nothing here knows what is being learned.
"""

import argparse
import atexit
import difflib
import functools
import json
import math
import os
import pickle
import random
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm


def Logger(content):
    """Print on the main process only, and without tearing a progress bar."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(str(content), file=sys.stdout)
        sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------- arguments


def add_training_args(parser: argparse.ArgumentParser):
    """The flags that all training scripts share; each script adds its own lesson's."""
    add = parser.add_argument_group("run").add_argument
    add("--out_dir", default="out", help="folder of the weights, metrics and resume files")
    add("--tokenizer", default=None, help="vocabulary of a model that starts from nothing: its file, or a model that has "
                                          "it; default: model/tokenizer.json, and in distillation the teacher's")
    add("--max_seq_len", type=int, default=None, help="tokens, longer samples are cut; default: what the model was "
                                                      "made for, 512 for a new one (in distillation, "
                                                      "that of --size)")
    add("--max_steps", type=int, default=0, help="optimizer steps in all; 0: as many as --epochs make")
    add("--accumulation_steps", type=int, default=1, help="micro-batches per optimizer step and process")
    add("--weight_decay", type=float, default=0.1, help="AdamW's, on matrices only")
    add("--grad_clip", type=float, default=1.0, help="longest gradient, as a Euclidean norm; 0: no clipping")
    add("--warmup_iters", type=int, default=0, help="steps of a linear warm-up before the cosine")
    add("--lora_rank", type=int, default=0, help="train adapters of this rank beside the weights, which stay as they are "
                                                 "(model/lora.py); 0: train the weights")
    add("--lora_alpha", type=float, default=None, help="their change is scaled by alpha / rank; default: the rank")
    add("--lora_dropout", type=float, default=0.0, help="in [0, 1), on what they read")
    add("--lora_targets", nargs="+", default=None, help="beside which matrices of each layer; default: all seven, "
                                                        "wq wk wv wo w1 w2 w3")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
        help="of the matrix products; weights, optimizer and losses stay fp32. "
             "bfloat16 falls back to float32 where the hardware has none")
    add("--ddp", action="store_true", help="several processes, under torchrun")
    add("--local_rank", type=int, default=-1, help="GPU of this process; -1: as torchrun says")
    add("--num_workers", type=int, default=1, help="processes that prepare batches; 0: the training process itself")
    add("--seed", type=int, default=1337, help="of the initial weights, the shuffling and dropout")
    add("--log_interval", type=int, default=100, help="steps between two rows of the log")
    add("--save_interval", type=int, default=100, help="steps between two saves of weights and resume file")
    add("--eval_interval", type=int, default=200, help="steps between two validations; 0: only at the end")
    add("--val_path", default=None, help="validation data; default: val.jsonl beside the data if it lies there, else "
                                         "--val_fraction of the data are held out; 'none': no validation")
    add("--val_fraction", type=float, default=0.05, help="share in [0, 1) that is held out when no validation file is "
                                                         "there; at most 1,000 samples")
    add("--skip_bad_lines", action="store_true", help="leave out lines that cannot be used, and count them")
    add("--resume", action="store_true", help="go on from the newest resume file of --out_dir, if there is one")
    add("--use_wandb", action="store_true", help="log to Weights & Biases (WANDB_MODE=offline keeps it here)")
    add("--wandb_project", default="MiniDistill", help="its project")


def parse_args(parser: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """Defaults, then the YAML of --config, then the command line. Sections of the YAML are grouping only.

    Adds the flag --config. Exits with a message on a file that is not YAML, a value that its flag does not take, and a key that is no flag,
    naming the nearest one that is.
    """
    parser.add_argument("--config", default=None, help="YAML file with values for any of these flags; the command line "
                                                       "overrides it")
    first, _ = config_only().parse_known_args(argv)
    if first.config:
        if not Path(first.config).exists():
            parser.error(f"no config file at {first.config}")
        try:
            document = yaml.safe_load(Path(first.config).read_text()) or {}
        except yaml.YAMLError as error:
            parser.error(f"{first.config} is not YAML: {error}")
        if not isinstance(document, dict):
            parser.error(f"{first.config} must hold lines like `learning_rate: 5e-6`")
        flags = {action.dest: action for action in parser._actions}
        values = {}
        for key, value in document.items():
            values.update(value if isinstance(value, dict) else {key: value})
        for key, value in values.items():
            if key not in flags:
                nearest = difflib.get_close_matches(key, flags, n=1, cutoff=0.0)[0]
                parser.error(f"{first.config}: unknown key {key!r}; did you mean {nearest!r}?")
            flags[key].required = False
            try:
                values[key] = read_as_flag(parser, flags[key], value)
            except argparse.ArgumentError as error:
                parser.error(f"{first.config}: {error}")
        for group in parser._mutually_exclusive_groups:
            group.required &= not any(flag.dest in values for flag in group._group_actions)
        # A flag that may be repeated would go on from its default, where the command line is to override the file.
        several = {key: values.pop(key) for key in list(values) if flags[key].nargs == "+" and flags[key].default is None}
        parser.set_defaults(**values)
        args = parser.parse_args(argv)
        vars(args).update({key: value for key, value in several.items() if getattr(args, key) is None})
        return args
    return parser.parse_args(argv)


def read_as_flag(parser, flag, value):
    """A YAML value as the command line would have it: its type and choices rule (YAML reads 5e-6 as text)."""
    if value is None or flag.nargs == 0:                    # unset, or true and false for a switch
        return value
    values = value if isinstance(value, list) else [value]
    values = [parser._get_value(flag, str(each)) for each in values]
    for each in values:
        parser._check_value(flag, each)
    return values if flag.nargs in ("+", "*") else values[0]


def config_only() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", default=None)
    return parser


# ----------------------------------------------------------------------------- processes, devices, precision, seeds


class World(NamedTuple):
    """This process among the others."""

    rank: int
    size: int
    device: torch.device


def init_distributed_mode(args) -> World:
    """One process, or as many as torchrun started: NCCL between GPUs, gloo between CPUs."""
    if not args.ddp:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            sys.exit(f"torchrun started {os.environ['WORLD_SIZE']} processes that would each train alone; add --ddp")
        return World(0, 1, pick_device(args.device))
    if "RANK" not in os.environ:
        sys.exit(f"--ddp needs torchrun to start its processes. Type:\n"
                 f"    torchrun --nproc_per_node 2 {' '.join(sys.argv)}")
    local_rank = args.local_rank if args.local_rank >= 0 else int(os.environ["LOCAL_RANK"])
    on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", local_rank) if on_gpu else pick_device(args.device)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def checking_input():
    """Around what reads the user's files: their errors end the script with the message alone, without a traceback."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}")


def pick_device(name: str = "auto") -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def main_process_first(world: World):
    """The main process goes through alone, then the others: it tokenises, they find the file made. If it fails, they
    follow, and end with the same error instead of waiting for it."""
    if world.rank != 0:
        dist.barrier()
    try:
        yield
    finally:
        if world.rank == 0 and world.size > 1:
            dist.barrier()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@functools.cache
def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products. bf16 on hardware without it would be emulated, and many times slower, so that it
    becomes fp32 there, which is said once."""
    dtype = getattr(torch, name)
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities()
        has_bf16 = has.get("avx512_bf16", False) or has.get("amx_bf16", False) or has.get("bf16", False)
    if dtype == torch.bfloat16 and not has_bf16:
        Logger(f"{device} has no bfloat16 arithmetic: the matrix products run in float32")
        return torch.float32
    if dtype == torch.float16 and device.type == "cpu":
        sys.exit("--dtype float16 needs a GPU (on a CPU it is slower than float32, and gains nothing); "
                 "use --dtype float32")
    return dtype


def autocast(dtype: torch.dtype, device: torch.device):
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def seed_everything(*seed: int):
    """Python, NumPy and PyTorch from one or several whole numbers."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


# ------------------------------------------------------------------------------------------------ learning rate, data


def get_lr(current_step: int, total_steps: int, lr: float) -> float:
    """lr/10 + lr/2 * (1 + cos(pi * step / total)): a cosine from 1.1 * lr down to 0.1 * lr."""
    return lr / 10 + 0.5 * lr * (1 + math.cos(math.pi * current_step / total_steps))


def lr_at(step: int, total_steps: int, lr: float, warmup_iters: int) -> float:
    """A straight line up to where the cosine begins, then the cosine over the steps that are left."""
    if step < warmup_iters:
        return get_lr(0, 1, lr) * (step + 1) / warmup_iters
    return get_lr(step - warmup_iters, max(1, total_steps - warmup_iters), lr)


def open_data(kind, args, tokenizer, lm_config, world: World, other=None, other_paths=None):
    """Training and validation data of a script: (kind, kind or None). `kind` is PretrainDataset or SFTDataset; `other`
    (.tokenizer, .source.config) is a teacher that reads the same samples in its own way: in other tokens, or from files
    of its own, which have other prompts to the same answers."""
    max_seq_len = args.max_seq_len or lm_config.max_seq_len
    if max_seq_len > lm_config.max_seq_len:
        raise ValueError(f"--max_seq_len {max_seq_len} is more than the model was made for, {lm_config.max_seq_len}")
    if other_paths and args.val_path not in (None, "none"):
        raise ValueError(f"--val_path {args.val_path} has no prompts for the teacher; leave it out, and --val_fraction of the "
                         "pairs are held out")
    if not 0.0 <= args.val_fraction < 1.0:
        raise ValueError(f"--val_fraction {args.val_fraction} must lie in [0, 1)")
    val_path = args.val_path
    if not val_path and kind.validated_on and not other_paths:
        beside = Path(args.data_path[0]).with_name(kind.validated_on)
        val_path = beside if beside.exists() else None

    def read(paths):
        data = kind(paths, tokenizer, max_seq_len, args.skip_bad_lines, Logger)
        if other is None:
            return data
        return data.paired_with(kind(other_paths or paths, other.tokenizer, other.source.config.max_seq_len,
                                     args.skip_bad_lines, Logger))

    with main_process_first(world):
        data, val = read(args.data_path), None
        if val_path and val_path != "none":
            val = read([val_path])
    if not val_path:
        # More than 1,000 samples would make each validation longer, and its figure hardly surer.
        data, val = data.split(min(args.val_fraction, 1000 / len(data)), seed=0)
    val = val if val is not None and len(val) else None
    Logger(f"data: {len(data):,} samples of {data}; validation: {f'{len(val):,} of {val}' if val else 'none'}")
    return data, val


# ------------------------------------------------------------------------------------------------- optimizer and steps


def make_optimizer(modules, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices alone: a norm's gain or a bias has no reason to shrink."""
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    groups = [{"params": [w for w in weights if w.dim() >= 2], "weight_decay": weight_decay},
              {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


# Flags that a resumed run may have otherwise than before; what they change in the mathematics is checked by itself.
FREE_TO_CHANGE = {"out_dir", "data_path", "config", "resume", "max_steps", "epochs", "batch_size", "accumulation_steps",
                  "device", "ddp", "local_rank", "num_workers", "log_interval", "save_interval", "eval_interval",
                  "val_path", "grad_norm_interval", "use_wandb", "wandb_project", "tokenizer"}


class Run:
    """What a training run remembers from step to step, and the plumbing around its steps.

    name       of the files in --out_dir: NAME.pth, NAME.resume, NAME.jsonl and, at the end, its curves in NAME.png
    modules    what is trained, by name: {"model": student, "projections": ...}; `parallel` holds them as to be called
    data       dataset.lm_dataset.MicroBatches

    With --resume it stands where the run was interrupted. Raises ValueError if that was a run of another kind.
    """

    def __init__(self, name: str, args, world: World, modules: dict, data):
        self.name, self.args, self.world, self.data = name, args, world, data
        self.dtype = pick_dtype(args.dtype, world.device)
        self.modules = {key: module.to(world.device) for key, module in modules.items() if module is not None}
        self.optimizer = make_optimizer(self.modules.values(), args.weight_decay)
        self.weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        # fp16 gradients underflow unless they are scaled up; with the other types the scaler passes them through.
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        self.total_steps = args.max_steps or args.epochs * data.steps_per_epoch
        self.steps_done, self.best, wandb_id = 0, math.inf, None
        # What must be the same for a resumed run to end where the unbroken one would have.
        self.kind = {"data": data.dataset.key, "samples per step": data.step_samples,
                     "total steps": self.total_steps,
                     **{flag: value for flag, value in vars(args).items() if flag not in FREE_TO_CHANGE}}

        state = load_resume(self.resume_path) if args.resume else None
        if args.resume and state is None:
            Logger(f"no {self.resume_path} to resume: from the first step")
        if state:
            changed = [f"{key} was {state['kind'].get(key)}, is {value}"
                       for key, value in self.kind.items() if state["kind"].get(key) != value]
            if changed:
                raise ValueError(f"{self.resume_path} belongs to another run: {'; '.join(changed)}. "
                                 "Start anew without --resume, or in another --out_dir.")
            for key, module in self.modules.items():
                module.load_state_dict(state[key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.steps_done, self.best, wandb_id = state["steps_done"], state["best"], state["wandb_id"]
            Logger(f"resumed {self.resume_path} after step {self.steps_done}")

        self.parallel = {key: self.wrap(module) for key, module in self.modules.items()}
        self.wandb = init_wandb(args, name, world, wandb_id)
        self.log = Log(Path(args.out_dir) / f"{name}.jsonl", self.total_steps, self.steps_done, world)
        self.stop, self.stopped = StopSignal(), False
        wanted = range(self.steps_done * args.accumulation_steps, self.total_steps * args.accumulation_steps)
        self.loader = iter(DataLoader(data, batch_size=None, sampler=wanted, num_workers=args.num_workers,
                                      pin_memory=world.device.type == "cuda"))

    def wrap(self, module):
        """The module as to be called: under DDP its gradients come out as the mean over processes."""
        if self.world.size == 1:
            return module
        ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    @property
    def is_main(self) -> bool:
        return self.world.rank == 0

    @property
    def resume_path(self) -> Path:
        return Path(self.args.out_dir) / f"{self.name}.resume"

    @property
    def epochs(self):
        """The epochs still to be done; none after a stop."""
        for epoch in range(self.steps_done // self.data.steps_per_epoch,
                           -(-self.total_steps // self.data.steps_per_epoch)):
            if not self.stopped:
                yield epoch

    def steps_of(self, epoch: int) -> range:
        """The optimizer steps of an epoch that are still to be done."""
        size = self.data.steps_per_epoch
        return range(max(epoch * size, self.steps_done), min((epoch + 1) * size, self.total_steps))

    def micro_batches(self, step: int):
        """This process's micro-batches of one step, each with whether it is the last."""
        # Seeding each step anew makes dropout a function of the step: a resumed run draws what the unbroken one would.
        seed_everything(self.args.seed, step, self.world.rank)
        for micro in range(self.args.accumulation_steps):
            yield next(self.loader).to(self.world.device), micro == self.args.accumulation_steps - 1

    @contextmanager
    def forward(self, last: bool):
        """Mixed precision; and under DDP, gradients travel once per step, with its last micro-batch."""
        with ExitStack() as stack:
            stack.enter_context(autocast(self.dtype, self.world.device))
            for module in self.parallel.values():
                if self.world.size > 1 and not last:
                    stack.enter_context(module.no_sync())
            yield

    def backward(self, loss):
        """`loss` is this process's part of the step's sum; DDP takes the mean over processes, so it is scaled up."""
        self.scaler.scale(loss * self.world.size).backward()

    def add_gradients(self, sums: dict, terms: dict):
        """Add the gradient of each term of a micro-batch's loss to `sums`, by name. The loss can still be used."""
        for name, term in terms.items():
            grads = torch.autograd.grad(self.scaler.scale(term), self.weights, retain_graph=True, materialize_grads=True)
            sums[name] = sums.get(name, 0.0) + torch.cat([grad.flatten() for grad in grads])

    def gradient_norms(self, sums: dict) -> dict:
        """{grad_NAME: Euclidean norm} of such sums, over all processes."""
        return {f"grad_{name}": sum_over_processes(grad).norm() / self.scaler.get_scale() for name, grad in sums.items()}

    def update(self, step: int) -> dict:
        """Set the learning rate, clip, step, clear. Returns {lr, grad_norm}, the norm as it was before clipping."""
        lr = lr_at(step, self.total_steps, self.args.learning_rate, self.args.warmup_iters)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.weights, self.args.grad_clip or math.inf, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done = step + 1
        self.log.step()
        return {"lr": lr, "grad_norm": grad_norm}

    def is_due(self, interval: int, ahead: int = 0) -> bool:
        """Whether something that is done every so many steps, and after the last, is due now or so many steps ahead."""
        steps = self.steps_done + ahead
        return steps == self.total_steps or interval > 0 and steps % interval == 0

    def is_best(self, loss: float) -> bool:
        """Whether this validation loss is the lowest so far; it is remembered."""
        better = loss < self.best
        self.best = min(loss, self.best)
        return better

    def save(self):
        """The resume file, by the main process. The one before is kept as NAME.resume.previous."""
        if self.is_main:
            save_resume(self.resume_path, **{key: module.state_dict() for key, module in self.modules.items()},
                        optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), kind=self.kind,
                        steps_done=self.steps_done, best=self.best, wandb_id=self.wandb.id if self.wandb else None)

    def must_stop(self) -> bool:
        self.stopped = self.stop.agreed(self.steps_done, self.world)
        return self.stopped

    def close(self):
        """End the run: cleanly when all steps are done, with exit status 130 and a word on how to go on when not."""
        self.log.close()
        self.log.draw()
        if self.wandb is not None:
            self.wandb.finish()
        if dist.is_initialized():
            dist.barrier()
        if self.steps_done < self.total_steps:
            launcher = f"torchrun --nproc_per_node {self.world.size}" if self.world.size > 1 else "python"
            flags = " ".join(word for word in sys.argv if word != "--resume")
            Logger(f"stopped after step {self.steps_done} of {self.total_steps}; everything is saved. "
                   f"Go on with: {launcher} {flags} --resume")
            sys.exit(130)


# ------------------------------------------------------------------------------------------------- saving and resuming


def replace_whole(path: Path, write):
    """Whole or not at all: `write` is given a path beside the place, then flushed, renamed. Several processes may do it
    at once."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)      # there only if something went wrong


def write_whole(path: Path, write):
    """The same for a `write` that is given an open file."""
    def to_file(beside):
        with open(beside, "wb") as file:
            write(file)

    replace_whole(path, to_file)


# What torch.load raises for a file that is empty, cut short, or something else altogether.
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError)


def save_resume(path, **state):
    """Everything an interrupted run needs to end as if it had not been. The one before is kept as PATH.previous."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.replace(path, path.with_name(path.name + ".previous"))
    write_whole(path, lambda file: torch.save(state, file))


def load_resume(path) -> dict | None:
    """The newest state that can be read whole; None if there is no file.

    A file that cannot be read is named and passed over for the one before it. Raises ValueError if none is left.
    """
    path = Path(path)
    found = [file for file in (path, path.with_name(path.name + ".previous")) if file.exists()]
    for file in found:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            Logger(f"{file} cannot be read whole ({type(error).__name__}); trying the one before it")
    if found:
        raise ValueError(f"no readable resume file at {path}; start anew without --resume")
    return None


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop; the loop finishes its step, saves and leaves. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.asked = True

    def agreed(self, step: int, world: World) -> bool:
        """Whether to stop after this step. Processes hear of a signal at different steps and must leave at the same
        one, so they ask each other, every eighth step: often enough for a person, rarely enough to cost nothing."""
        if world.size == 1:
            return self.asked
        return step % 8 == 0 and bool(sum_over_processes(torch.tensor(float(self.asked), device=world.device)) > 0)


# -------------------------------------------------------------------------------------------------------------- logs


class Log:
    """Rows of numbers: a bar on a terminal or plain lines, a JSONL file, and wandb if asked. Main process only.

    Values are added per step as sums over this process's tokens and reported as means over the steps since the row
    before; nothing is copied from the device in between.
    """

    def __init__(self, path, total_steps: int, first_step: int, world: World):
        self.path, self.total_steps, self.world = Path(path), total_steps, world
        self.first_step, self.start = first_step, time.time()
        self.sums, self.steps, self.tokens, self.tokens_before = {}, 0, 0, 0
        self.bar = None
        if world.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep = [line for line in read_lines(self.path) if json.loads(line)["step"] <= first_step] if first_step else []
            write_whole(self.path, lambda file: file.write("".join(keep).encode()))
            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty(),
                            dynamic_ncols=True)

    def add(self, tokens: int, **values: torch.Tensor):
        """One micro-batch: how many tokens the model read, and what adds up to the step's values over processes."""
        self.tokens += tokens
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def step(self):
        self.steps += 1
        if self.bar is not None:
            self.bar.update()

    def row(self, step: int, wandb=None, **more):
        """Report the means since the last row, with `more` beside them, and begin anew."""
        if self.steps:
            sums = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in self.sums.values()]
                               + [torch.tensor(self.tokens, dtype=torch.float64)]).to(self.world.device)
            *means, tokens = (sum_over_processes(sums) / self.steps).tolist()
            more = dict(zip(self.sums, means)) | more
            self.tokens_before += tokens * self.steps
            self.sums, self.steps, self.tokens = {}, 0, 0
        more = {name: float(value) for name, value in more.items()}
        seconds = time.time() - self.start
        done = step - self.first_step
        speed = {"tokens_per_s": self.tokens_before / seconds} if self.tokens_before else {}
        if self.world.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **more, **speed}) + "\n")
            if wandb is not None:
                wandb.log({**more, **speed}, step=step)
            left = seconds / done * (self.total_steps - step) if done else 0
            text = "  ".join(f"{name} {value:.4g}" for name, value in more.items())
            pace = f"  {speed['tokens_per_s']:,.0f} tokens/s" if speed else ""
            Logger(f"step {step}/{self.total_steps}  {text}{pace}  {left / 60:.1f} min left")

    def close(self):
        if self.bar is not None:
            self.bar.close()

    def draw(self):
        """All rows so far, those before a resumption among them, as NAME.png beside NAME.jsonl."""
        if self.world.rank == 0:
            draw_curves([json.loads(line) for line in read_lines(self.path)], self.path.with_suffix(".png"))


def draw_curves(rows: list[dict], path: Path):
    """A panel per quantity over the steps; its validation, whose name begins with val_, is drawn into the same panel.

    Left out: what never changes, and tokens_per_s, which tells of the machine. Nothing is left, no picture is drawn.
    """
    from matplotlib.figure import Figure        # needed once, at the end of a run

    panels = {}                                 # {"loss": {"loss": {step: value}, "val_loss": {step: value}}}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "tokens_per_s"):
                panels.setdefault(name.removeprefix("val_"), {}).setdefault(name, {})[row["step"]] = value
    panels = {title: lines for title, lines in panels.items()
              if any(len(line) == 1 or len(set(line.values())) > 1 for line in lines.values())}
    if not panels:
        return

    n_columns = min(4, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(3.2 * n_columns, 2.4 * n_rows + 0.6), layout="constrained")
    figure.suptitle(path.stem)
    figure.supxlabel("step")
    axis = None
    for place, (title, lines) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(n_rows, n_columns, place, title=title, sharex=axis)
        axis.spines[["top", "right"]].set_visible(False)
        for name, line in lines.items():
            role, color = ("validation", "C1") if name.startswith("val_") else ("training", "C0")
            axis.plot(list(line), list(line.values()), ".-", color=color, label=role)
        if any(name.startswith("val_") for name in lines):
            axis.legend(frameon=False)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def read_lines(path: Path) -> list[str]:
    """The whole lines of a log; one that a kill cut short is dropped."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def init_wandb(args, name: str, world: World, run_id: str | None = None):
    """The run, or None without --use_wandb and on all but the main process."""
    if not args.use_wandb or world.rank != 0:
        return None
    import wandb

    return wandb.init(project=args.wandb_project, name=name, id=run_id, resume="allow", config=vars(args))
