"""
运行时的管道：进程、设备、精度、学习率、断点、日志。与课程内容无关，故不在课程脚本里。
The plumbing of a run: arguments, processes, devices, precision, learning rate, checkpoints, logs. Plain functions that
the lessons call; nothing here knows what is being learned.
"""

import argparse
import atexit
import datetime
import difflib
import functools
import json
import math
import os
import pickle
import random
import shlex
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn     # noqa: F401  before there are processes: imported after, by DDP, it would hold on to their group
import yaml
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from model.lora import store_frozen
from model.moe import has_grouped_products
from model.transformer import Block, has_varlen


def how_called() -> str:
    """The command line behind `python` or torchrun: "train_sft.py --ddp", "-m ability_tree.validate --out kept.jsonl"."""
    module = sys.modules["__main__"].__spec__
    return shlex.join([*(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])


WORKFLOW = "MINIDISTILL_WORKFLOW"       # environment variable: the command that this process is a step of


def to_go_on(n_processes: int, more: str = "") -> str:
    """What to type so that a run which was stopped goes on: its own command and `more`; in a step of a workflow, that one's."""
    if WORKFLOW in os.environ:
        return os.environ[WORKFLOW]
    launcher = f"torchrun --nproc_per_node {n_processes}" if n_processes > 1 else "python"
    return f"{launcher} {how_called().replace(more, '')}{more}"


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


LOG_FILES = []          # into which Logger writes too


def Logger(content):
    """Print on the main process only, and without tearing a progress bar."""
    if is_main_process():
        tqdm.write(str(content), file=sys.stdout)
        sys.stdout.flush()
        for path in LOG_FILES:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{content}\n")


# ----------------------------------------------------------------------------------------------------- arguments


def add_training_args(parser: argparse.ArgumentParser):
    """The flags that all training scripts share; each script adds its own lesson's."""
    add = parser.add_argument_group("run").add_argument
    add("--out_dir", "--output_dir", default="out", help="folder of the weights, metrics and resume files")
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
        help="of the matrix products, and of weights beside adapters; what trains, optimizer and losses are fp32. "
             "bfloat16 falls back to float32 where the hardware has none")
    add("--grad_checkpoint", action="store_true", help="keep only what each layer reads, and work the rest out again for the "
                                                       "gradient: much less memory, a third more work")
    add("--compile", action="store_true", help="torch.compile of each layer: some minutes at first, then fewer and larger kernels; "
                                               "on a GPU in bfloat16 alone")
    add("--ddp", action="store_true", help="several processes, under torchrun")
    add("--shard", default="none", choices=["none", "zero2", "zero3"],
        help="what the processes of --ddp share out among them, where with none each has all of it. zero2: gradients and "
             "optimizer state; zero3: the weights too, also a frozen teacher's")
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
    """Defaults, then the YAML files of --config, each over those before it, then the command line. Sections of a YAML are
    grouping only.

    Adds the flag --config. Exits with a message on a file that is not YAML, a value that its flag does not take, and a key
    that is no flag, naming the file and the nearest key that is one.
    """
    parser.add_argument("--config", nargs="+", default=[], metavar="YAML", help="files with values for any of these flags; a "
                        "later one overrides those before it, the command line all of them")
    files, _ = config_only().parse_known_args(argv)
    flags = {action.dest: action for action in parser._actions}
    values = {}
    for path in files.config:
        values |= read_config(parser, flags, path)
    for key in values:
        flags[key].required = False
    for group in parser._mutually_exclusive_groups:
        group.required &= not any(flag.dest in values for flag in group._group_actions)
    # A flag that may be repeated would go on from its default, where the command line is to override the files.
    several = {key: values.pop(key) for key in list(values) if flags[key].nargs == "+" and flags[key].default is None}
    parser.set_defaults(**values)
    args = parser.parse_args(argv)
    vars(args).update({key: value for key, value in several.items() if getattr(args, key) is None})
    if "lora_alpha" in args:
        check_training_args(parser, args)
    return args


def check_training_args(parser, args):
    """What the flags of add_training_args ask of each other. Exits with a message."""
    for flag, unset in (("lora_alpha", None), ("lora_dropout", 0.0), ("lora_targets", None)):
        if not args.lora_rank and vars(args)[flag] != unset:
            parser.error(f"--{flag} has no effect without --lora_rank: give a rank, or leave it out")
    if args.shard != "none" and not args.ddp:
        parser.error(f"--shard {args.shard} shares the model out among the processes of --ddp. Type:\n"
                     f"    torchrun --nproc_per_node 2 {how_called()} --ddp")
    if args.shard != "none" and args.dtype == "float16":
        parser.error(f"--shard {args.shard} works in bfloat16 or float32, not in float16, whose gradients need scaling: "
                     "--dtype bfloat16")
    if args.compile and args.shard != "none":
        parser.error(f"--compile takes a layer whole, and --shard {args.shard} gathers its weights in between; leave one of them out")
    device = pick_device(args.device)
    # Here of a head that any kernel takes; compile_layers looks at the model's.
    if args.compile and (args.dtype != "bfloat16" or not has_varlen(device, pick_dtype(args.dtype, device), head_dim=64)):
        parser.error(f"--compile works on a GPU in bfloat16, from NVIDIA's Ampere on, and this is {device} in {args.dtype}: attention "
                     "goes from length to length there, and each batch would be compiled anew. Leave it out")


def read_config(parser, flags: dict, path: str) -> dict:
    """{flag: value} of one YAML file."""
    if not Path(path).exists():
        parser.error(f"no config file at {path}")
    try:
        document = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        parser.error(f"{path} is not YAML: {error}")
    if not isinstance(document, dict):
        parser.error(f"{path} must hold lines like `learning_rate: 5e-6`")
    values = {}
    for key, value in document.items():
        values.update(value if isinstance(value, dict) else {key: value})
    for key, value in values.items():
        if key not in flags:
            nearest = difflib.get_close_matches(key, flags, n=1, cutoff=0.0)[0]
            parser.error(f"{path}: unknown key {key!r}; did you mean {nearest!r}?")
        try:
            values[key] = read_as_flag(parser, flags[key], value)
        except argparse.ArgumentError as error:
            parser.error(f"{path}: {error}")
    return values


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
    parser.add_argument("--config", nargs="+", default=[])
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
                 f"    torchrun --nproc_per_node 2 {how_called()}")
    local_rank = args.local_rank if args.local_rank >= 0 else int(os.environ["LOCAL_RANK"])
    on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", local_rank) if on_gpu else pick_device(args.device)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    atexit.register(dist.destroy_process_group)
    dist.barrier()          # one that finds a mistake at once and leaves would otherwise tear the others' connections
    return World(dist.get_rank(), dist.get_world_size(), device)


def patient_group(world: World):
    """The processes, to wait for each other in however long it takes, where NCCL gives up after ten minutes; None if there is
    only one. Called by all at the same place."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30)) if world.size > 1 else None


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
    Logger(f"data: {len(data):,} samples of {data}; "
           + (f"the teacher reads {data.teacher}; " if other_paths else "")
           + f"validation: {f'{len(val):,} of {val}' if val else 'none'}")
    return data, val


# ------------------------------------------------------------------------------------------------------------ sharding


def shard(module, world: World, dtype: torch.dtype, stays_gathered: bool = False):
    """Leave to each process only its part of a module's tensors, some rows of each, by PyTorch's fully_shard. In place.

    Before a part of the module is called, the processes gather its weights; behind it they let them go again:

        attention, FFN of each layer    gathered in `dtype`, each when it is called, and for the gradient once more; with
                                        stays_gathered they stay in between
        words, norms, head              gathered in fp32 when the module is called, and they stay until the gradients have
                                        gone: a loss may use the head outside of the module

    The gradients' mean over processes is taken in fp32, each process its own rows, and AdamW keeps moments for those alone.
    Rajbhandari et al. 2020 (ZeRO), https://arxiv.org/abs/1910.02054, Sec. 5; Zhao et al. 2023 (FSDP),
    https://arxiv.org/abs/2304.11277, Sec. 3. Call a module of bf16 under autocast, as Run.forward does.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = mesh_of(world)
    # Inputs are not cast: what runs past the layers, from one to the next, stays fp32, as without sharding.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [part for part in module.modules() if isinstance(part, Block)]:
        for part in (block.attention, block.ffn):
            fully_shard(part, mesh=mesh, reshard_after_forward=not stays_gathered, mp_policy=precision)
    return fully_shard(module, mesh=mesh, reshard_after_forward=False)


@functools.cache
def mesh_of(world: World):
    return dist.init_device_mesh(world.device.type, (world.size,))


def reshard(module):
    """Let go of gathered weights, which a forward without a backward leaves behind: a step of the optimizer makes them old."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def place_frozen(model, args, world: World):
    """A model that is asked and never trained: whole on each device; under zero3 each process has its part of it."""
    model = shard(model, world, dtype=None) if args.shard == "zero3" else model.to(world.device)
    compile_layers(model, args, world)
    return model


def compile_layers(model, args, world: World):
    """With --compile, each layer in place: the same graphs serve any number of tokens, samples and layers. (Sampling with a
    cache goes past them, see Transformer.forward.)

    Raises ValueError for a model whose layers ask for numbers on their way, so that each batch would have graphs of its own.
    """
    if not args.compile:
        return
    config, dtype = model.config, pick_dtype(args.dtype, world.device)
    if config.dropout and model.training or not has_varlen(world.device, dtype, config.head_dim):
        raise ValueError(f"--compile needs dropout 0 and a head_dim that 8 divides, of at most 256; the model has {config.dropout:g} "
                         f"and {config.head_dim}. Leave it out")
    if config.use_moe and not has_grouped_products(world.device, dtype, model.layers[0].ffn.w1):
        raise ValueError(f"--compile needs experts of sizes that 8 divides, not quantised; the model has {config.dim} and "
                         f"{config.hidden_dim}. Leave it out")
    # DDP need not cut a layer's graph for its gradients to travel early: they do, layer by layer. And the norm of each loss
    # term's gradient (Run.add_gradients) is taken on graphs that must be there for the next.
    torch._dynamo.config.optimize_ddp = torch._functorch.config.donated_buffer = False
    for layer in model.layers:
        layer.compile(dynamic=True, recompile_limit=64)     # training or not, the last layer or not, student or teacher, ...


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered from all processes, which must all call this; any other as it is."""
    if not dist.is_initialized():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------- optimizer and steps


def make_optimizer(modules, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices alone: a norm's gain or a bias has no reason to shrink."""
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    groups = [{"params": [w for w in weights if w.dim() >= 2], "weight_decay": weight_decay},
              {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


# Flags that a resumed run may have otherwise than before; what they change in the mathematics is checked by itself.
FREE_TO_CHANGE = {"out_dir", "data_path", "config", "resume", "max_steps", "epochs", "batch_size", "accumulation_steps",
                  "device", "ddp", "shard", "grad_checkpoint", "compile", "local_rank", "num_workers", "log_interval",
                  "save_interval", "eval_interval", "val_path", "grad_norm_interval", "use_wandb", "wandb_project",
                  "tokenizer", "start_stage", "end_stage", "set"}


class Run:
    """What a training run remembers from step to step, and the plumbing around its steps.

    name       of the files in --out_dir: NAME.pth, NAME.resume, NAME.jsonl and, at the end, its curves in NAME.png
    modules    what is trained, by name: {"model": student, "projections": ...}; `parallel` holds them as to be called
    data       dataset.lm_dataset.MicroBatches
    memory     what the script itself wants back after a resumption: numbers and words, in dicts and lists

    With --resume it stands where the run was interrupted. Raises ValueError if that was a run of another kind.
    """

    def __init__(self, name: str, args, world: World, modules: dict, data):
        self.name, self.args, self.world, self.data = name, args, world, data
        self.dtype = pick_dtype(args.dtype, world.device)
        store_frozen(modules["model"], self.dtype)
        self.modules = {key: self.place(module) for key, module in modules.items() if module is not None}
        self.modules["model"].grad_checkpoint = args.grad_checkpoint
        compile_layers(self.modules["model"], args, world)
        self.optimizer = make_optimizer(self.modules.values(), args.weight_decay)
        self.weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        # fp16 gradients underflow unless they are scaled up; with the other types the scaler passes them through.
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        self.total_steps = args.max_steps or args.epochs * data.steps_per_epoch
        self.steps_done, self.best, self.memory, wandb_id = 0, math.inf, {}, None
        # What must be the same for a resumed run to end where the unbroken one would have.
        self.kind = {"data": data.dataset.key, "samples per step": data.step_samples,
                     "total steps": self.total_steps,
                     **{flag: value for flag, value in vars(args).items() if flag not in FREE_TO_CHANGE}}

        if self.modules["model"].adapted:               # a resume file holds the adapters, not what they stand beside
            self.kind["sha256 of the weights adapted"] = self.modules["model"].adapted["base_sha256"]

        state = load_resume(self.resume_path) if args.resume else None
        if args.resume and state is None:
            Logger(f"no {self.resume_path} to resume: from the first step")
        if state:
            changed = [f"{key} was {state['kind'].get(key)}, is {value}"
                       for key, value in self.kind.items() if state["kind"].get(key) != value]
            if changed:
                raise ValueError(f"{self.resume_path} belongs to another run: {'; '.join(changed)}. "
                                 "Start anew without --resume, or in another --out_dir.")
            self.take_up(state)
            self.scaler.load_state_dict(state["scaler"])
            self.steps_done, self.best, self.memory = state["steps_done"], state["best"], state.get("memory", {})
            wandb_id = state["wandb_id"]
            Logger(f"resumed {self.resume_path} after step {self.steps_done}")

        self.parallel = self.modules if self.sharded else {key: self.wrap(module) for key, module in self.modules.items()}
        self.wandb = init_wandb(args, name, world, wandb_id)
        self.log = Log(Path(args.out_dir) / f"{name}.jsonl", self.total_steps, self.steps_done, world)
        self.stop, self.stopped = StopSignal(), False
        self.load_data()

    def load_data(self):
        """The micro-batches from here on, as the data are now."""
        wanted = range(self.steps_done * self.data.per_step, self.total_steps * self.data.per_step)
        self.loader = iter(DataLoader(self.data, batch_size=None, sampler=wanted, num_workers=self.args.num_workers,
                                      pin_memory=self.world.device.type == "cuda"))

    @property
    def sharded(self) -> bool:
        return self.args.shard != "none"

    def place(self, module):
        """On the device; of a sharded module, this process's part."""
        if self.sharded:
            return shard(module, self.world, self.dtype, stays_gathered=self.args.shard == "zero2")
        return module.to(self.world.device)

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
        for micro in range(self.data.per_step):
            yield next(self.loader).to(self.world.device), micro == self.data.per_step - 1

    @contextmanager
    def forward(self, last: bool):
        """Mixed precision; and of several processes, gradients travel once per step, with its last micro-batch."""
        with ExitStack() as stack:
            stack.enter_context(autocast(self.dtype, self.world.device))
            for module in self.parallel.values():
                if self.sharded:        # gradients are shared out each time: whole, they would undo the sharding
                    module.set_reshard_after_backward(last or self.args.shard == "zero3")
                elif self.world.size > 1 and not last:
                    stack.enter_context(module.no_sync())
            yield

    def backward(self, loss):
        """`loss` is this process's part of the step's sum; gradients become the mean over processes, so it is scaled up."""
        self.scaler.scale(loss * self.world.size).backward()

    def add_gradients(self, sums: dict, terms: dict):
        """Add the gradient of each term of a micro-batch's loss to `sums`, by name. The loss can still be used."""
        for name, term in terms.items():
            grads = torch.autograd.grad(self.scaler.scale(term), self.weights, retain_graph=True, materialize_grads=True)
            sums[name] = sums.get(name, 0.0) + torch.cat([grad.flatten() for grad in grads])

    def gradient_norms(self, sums: dict) -> dict:
        """{grad_NAME: Euclidean norm} of such sums, over all processes."""
        return {f"grad_{name}": sum_over_processes(grad).norm() / self.scaler.get_scale() for name, grad in sums.items()}

    def take_gradient(self) -> torch.Tensor:  # -> (weights that train,), fp32
        """What backward has gathered so far, as the mean over processes, which is cleared. (Gather it with
        forward(last=False): DDP would travel too.)"""
        flat = torch.cat([torch.zeros_like(weight).flatten() if weight.grad is None else weight.grad.flatten()
                          for weight in self.weights])
        self.optimizer.zero_grad(set_to_none=True)
        return sum_over_processes(flat) / self.world.size

    def give_gradient(self, flat: torch.Tensor):
        """What the next update takes for the gradient."""
        for weight, grad in zip(self.weights, flat.split([weight.numel() for weight in self.weights])):
            weight.grad = grad.view_as(weight)

    def update(self, step: int) -> dict:
        """Set the learning rate, clip, step, clear. Returns {lr, grad_norm}, the norm as it was before clipping."""
        lr = lr_at(step, self.total_steps, self.args.learning_rate, self.args.warmup_iters)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.weights, self.args.grad_clip or math.inf, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.sharded:
            grad_norm = grad_norm.full_tensor()
            for module in self.modules.values():
                reshard(module)
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

    def share(self, batches):
        """This process's batches of those to be evaluated, as many on each: a sharded model's forward needs all processes.
        Where there is none left, it is one that asks for nothing."""
        batches = iter(batches)
        while group := list(islice(batches, self.world.size)):
            if self.world.rank < len(group):
                yield group[self.world.rank]
            else:
                yield group[0]._replace(at=group[0].at[:0], targets=group[0].targets[:0])

    def any_busy(self, busy: bool) -> bool:
        """Whether this process has something to do; or, where a sharded model's forward needs all of them, whether any has."""
        if not self.sharded:
            return busy
        return bool(sum_over_processes(torch.tensor(float(busy), device=self.world.device)) > 0)

    def save(self):
        """The resume file; sharded, a folder with a file a process. The one before is kept as NAME.resume.previous. All
        processes call this."""
        state = self.state_dict()
        progress = {"scaler": self.scaler.state_dict(), "kind": self.kind, "steps_done": self.steps_done, "best": self.best,
                    "memory": self.memory, "wandb_id": self.wandb.id if self.wandb else None}
        if self.sharded:
            save_shards(self.resume_path, state, progress)
        elif self.is_main:
            save_resume(self.resume_path, **state, **progress)

    def state_dict(self) -> dict:
        """Of the weights that train and of the optimizer; not copied."""
        weights = {key: trained_state(module) for key, module in self.modules.items()}
        return weights | {"optimizer": self.optimizer.state_dict()}

    def take_up(self, state: dict):
        """What load_resume gave becomes the state of the weights and the optimizer."""
        if self.sharded != ("shards" in state):
            raise ValueError(f"{self.resume_path} is of a run {'without' if self.sharded else 'with'} --shard; go on as it "
                             "began (with --shard, any number of processes will do), or start anew without --resume")
        if self.sharded:
            # AdamW makes its moments in its first step. One without gradient, at a rate of 0, changes no weight.
            for weight in self.weights:
                weight.grad = torch.zeros_like(weight)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            load_shards(state["shards"], self.state_dict())
            return
        for key, module in self.modules.items():
            module.load_state_dict(module.state_dict() | state[key])
        self.optimizer.load_state_dict(state["optimizer"])

    def must_stop(self, every: int = 8) -> bool:
        """Whether Ctrl-C or SIGTERM asked for an end. Several processes ask each other every so many steps."""
        self.stopped = self.stop.agreed(self.steps_done, self.world, every)
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
            Logger(f"stopped after step {self.steps_done} of {self.total_steps}; everything is saved. "
                   f"Go on with: {to_go_on(self.world.size, ' --resume')}")
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

PROGRESS = "progress.pt"        # in the resume folder of a sharded run: all that is no tensor


def trained_state(module) -> dict:
    """The state of a module less what is frozen, which comes from where it came from."""
    frozen = {name for name, weight in module.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def save_resume(path, **state):
    """Everything an interrupted run needs to end as if it had not been. The one before is kept as PATH.previous."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    keep_previous(path)
    write_whole(path, lambda file: torch.save(state, file))


class Parts:
    """A file that is made in parts, by any number of processes, in a folder beside it until all are there:

    OUT.parts/about.json        what the parts are made from
    OUT.parts/part-00000.*      what one part came to

    Which work is in which part is a matter of the work alone, and so are its random numbers: any number of processes writes
    the same, and the same command goes on.
    """

    suffix, others = ".json", "another file"

    def __init__(self, out, about: dict, n_parts: int):
        self.out, self.folder, self.about, self.n_parts = Path(out), Path(f"{out}.parts"), about, n_parts

    def prepare(self) -> list[int]:
        """Returns the parts that are missing. Raises ValueError if the file is there already, or parts of another."""
        if self.out.exists():
            raise ValueError(f"{self.out} is there already. Give another --out, or remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "about.json"
        if about.exists():
            was = json.loads(about.read_text())
            changed = [f"{name} was {was.get(name)}, is {value}" for name, value in self.about.items()
                       if was.get(name) != value]
            if changed:
                raise ValueError(f"{self.folder} holds parts of {self.others}: {'; '.join(changed)}. Go on as it was, give "
                                 "another --out, or remove that folder")
        elif any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is there already, and is not from here. Give another --out, or remove it")
        else:
            write_whole(about, lambda file: file.write(json.dumps(self.about, indent=2).encode()))
        return self.missing()

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}{self.suffix}"

    def missing(self) -> list[int]:
        return [part for part in range(self.n_parts) if not self.path(part).exists()]

    def remove(self):
        """The folder, when the file is written."""
        shutil.rmtree(self.folder)


def keep_previous(path: Path):
    """Rename what is at PATH, a file or a folder, to PATH.previous."""
    previous = path.with_name(path.name + ".previous")
    if path.exists():
        if previous.is_dir():
            shutil.rmtree(previous)
        elif path.is_dir():
            previous.unlink(missing_ok=True)
        os.replace(path, previous)


def save_shards(path: Path, state: dict, progress: dict):
    """The same as a folder, into which each process writes its part of the tensors; all of them call this."""
    import torch.distributed.checkpoint as dcp

    beside = path.with_name(path.name + ".tmp")
    if is_main_process():
        shutil.rmtree(beside, ignore_errors=True)           # there only if a run was killed while it saved
        beside.mkdir(parents=True)
        write_whole(beside / PROGRESS, lambda file: torch.save(progress, file))
    dist.barrier()
    dcp.save(tensors_of(state), checkpoint_id=beside)       # comes back when all have written
    if is_main_process():
        keep_previous(path)
        os.replace(beside, path)


def load_shards(path: Path, state: dict):
    """Read what save_shards wrote, on any number of processes, into the tensors of `state`. All of them call this."""
    import torch.distributed.checkpoint as dcp

    try:
        dcp.load(tensors_of(state), checkpoint_id=path)
    except dcp.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))         # of the first process that failed
        raise ValueError(f"{path} cannot be read whole ({type(reason).__name__}). Remove it, and --resume takes the one before "
                         f"it, {path.name}.previous, if there is one") from error


def tensors_of(state: dict) -> dict:
    """A nested dict less all that is no tensor."""
    return {key: tensors_of(value) if isinstance(value, dict) else value for key, value in state.items()
            if isinstance(value, (dict, torch.Tensor))}


def load_resume(path) -> dict | None:
    """The newest state that can be read whole; None if there is no file. Of a folder of save_shards, its progress and, as
    `shards`, its path, for load_shards.

    A file that cannot be read is named and passed over for the one before it. Raises ValueError if none is left.
    """
    path = Path(path)
    found = [file for file in (path, path.with_name(path.name + ".previous")) if file.exists()]
    for file in found:
        try:
            if file.is_dir():
                return torch.load(file / PROGRESS, weights_only=True) | {"shards": file}
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

    def agreed(self, step: int, world: World, every: int) -> bool:
        """Whether to stop after this step. Processes hear of a signal at different steps and must leave at the same
        one, so they ask each other, every eighth step: often enough for a person, rarely enough to cost nothing."""
        if world.size == 1:
            return self.asked
        return step % every == 0 and bool(sum_over_processes(torch.tensor(float(self.asked), device=world.device)) > 0)


# -------------------------------------------------------------------------------------------------------------- logs


class Clock:
    """The seconds that each phase of a step takes, on this process.

        with clock("teacher"):
            ...
        clock.shares()      {"share_teacher": 0.2, ...} of all that was timed since it was last asked
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    @contextmanager
    def __call__(self, phase: str):
        start = self.now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - start

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)     # a GPU is told what to do long before it is done
        return time.perf_counter()

    def shares(self) -> dict[str, float]:
        total = sum(self.seconds.values())
        shares = {f"share_{phase}": seconds / total for phase, seconds in self.seconds.items()}
        self.seconds = {}
        return shares


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
