"""
命令行参数：各训练脚本共有的标志，以及 --config 的 YAML 文件。
Arguments: the flags that all training scripts share, and the YAML files of --config.
"""

import argparse
import difflib
import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

import yaml

WORKFLOW = "MINIDISTILL_WORKFLOW"   # environment variable: the command this process is a step of


def command_line() -> str:
    """The command behind `python` or torchrun: "train_sft.py --ddp", "-m ability_tree.validate
    --out kept.jsonl"."""
    module = sys.modules["__main__"].__spec__
    return shlex.join([*(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])


def resume_command(n_processes: int, flag: str = "") -> str:
    """What to type to resume this run: its own command with `flag`, or the workflow's, of which it
    is a step."""
    if WORKFLOW in os.environ:
        return os.environ[WORKFLOW]
    launcher = f"torchrun --nproc_per_node {n_processes}" if n_processes > 1 else "python"
    return f"{launcher} {command_line().replace(flag, '')}{flag}"


@contextmanager
def checking_input():
    """Errors in the user's files end the script with their message, without a traceback."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}")


def did_you_mean(name: str, known) -> str:
    return repr(difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0])


def check_ranges(parser, args, *ranges: tuple[str, bool, str]):
    """ranges: (flag, whether its value is valid, what it must be). Exits with a message at the
    first that is not."""
    for flag, valid, needed in ranges:
        if not valid:
            parser.error(f"--{flag} {vars(args)[flag]} must {needed}")


def make_parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_training_args(parser: argparse.ArgumentParser):
    """The flags that all training scripts share; each script adds those of its own lesson."""
    add = parser.add_argument_group("optimization").add_argument
    add("--max_steps", type=int, default=0,
        help="total number of optimizer steps; 0: as many as --epochs make")
    add("--accumulation_steps", type=int, default=1,
        help="micro-batches per optimizer step and process")
    add("--weight_decay", type=float, default=0.1, help="weight decay of AdamW, on matrices only")
    add("--grad_clip", type=float, default=1.0,
        help="maximum L2 norm of the gradient; 0 disables clipping")
    add("--max_bad_steps", type=int, default=3,
        help="steps in a row without a finite gradient, which are skipped, until the run ends")
    add("--warmup_iters", "--warmup_ratio", type=float, default=0,
        help="linear warm-up before the cosine, in steps; below 1: a fraction of all steps")
    add("--seed", type=int, default=1337,
        help="random seed of initial weights, shuffling and dropout")

    add = parser.add_argument_group("LoRA (model/lora.py)").add_argument
    add("--lora_rank", type=int, default=0,
        help="rank of the adapters; 0 trains the weights themselves")
    add("--lora_alpha", type=float, default=None,
        help="adapters are scaled by this / rank; default: the rank")
    add("--lora_dropout", type=float, default=0.0,
        help="dropout on the adapters' inputs, in [0, 1)")
    add("--lora_targets", nargs="+", default=None,
        help="adapted matrices; default: all of wq wk wv wo w1 w2 w3")

    add = parser.add_argument_group("data").add_argument
    add("--tokenizer", default=None,
        help="tokenizer of a randomly initialised model: its file, or a model that has one; "
             "default: model/tokenizer.json, in distillation the teacher's")
    add("--max_seq_len", type=int, default=None,
        help="maximum length of a sample, in tokens; longer ones are cut; default: the model's "
             "context length")
    add("--val_path", default=None,
        help="validation data, or none; default: val.jsonl beside the data if it exists, else "
             "--val_fraction of the data")
    add("--val_fraction", type=float, default=0.05,
        help="fraction of the data held out when there is no validation file, in [0, 1); at most "
             "1,000 samples")
    add("--skip_bad_lines", action="store_true", help="skip and count lines that cannot be used")
    add("--num_workers", type=int, default=1,
        help="threads that prepare batches; 0: the training thread itself")

    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
        help="autocast dtype; trainable weights, optimizer state and losses stay in fp32. bfloat16 "
             "falls back to float32 where the hardware has none")
    add("--grad_checkpoint", action="store_true",
        help="activation checkpointing: recompute each layer in the backward pass; much less "
             "memory, a third more work")
    add("--compile", action="store_true",
        help="torch.compile each layer; on a GPU in bfloat16 only")
    add("--ddp", action="store_true", help="several processes, started by torchrun")
    add("--shard", default="none", choices=["none", "zero2", "zero3"],
        help="what --ddp shards over the processes. zero2: gradients and optimizer state; zero3: "
             "weights too, also a frozen teacher's")
    add("--local_rank", type=int, default=-1, help="GPU of this process; -1: set by torchrun")

    add = parser.add_argument_group("output").add_argument
    add("--out_dir", "--output_dir", default="out",
        help="folder of the weights, metrics and resume files")
    add("--log_interval", type=int, default=100, help="steps between two rows of the log")
    add("--save_interval", type=int, default=100,
        help="steps between two saves of weights and resume file")
    add("--eval_interval", type=int, default=200,
        help="steps between two validations; 0: only at the end")
    add("--resume", action="store_true",
        help="resume from the newest resume file in --out_dir, if there is one")
    add("--use_wandb", action="store_true",
        help="log to Weights & Biases (WANDB_MODE=offline logs locally)")
    add("--wandb_project", default="MiniDistill", help="project in Weights & Biases")


def add_process_args(parser: argparse.ArgumentParser, dtype: bool = True):
    """The flags of a script that runs a model in several processes without training it."""
    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    if dtype:
        add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
            help="dtype of the matrix products; bfloat16 falls back to float32 where the hardware "
                 "has none")
    add("--ddp", action="store_true", help="several processes, started by torchrun")
    add("--local_rank", type=int, default=-1, help="GPU of this process; -1: set by torchrun")


def lora_options(args) -> dict | None:
    """The arguments of add_lora; None without --lora_rank."""
    if not args.lora_rank:
        return None
    return {"rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": args.lora_dropout,
            "targets": args.lora_targets}


def check_training_args(parser, args):
    """What the flags of add_training_args require of each other. Exits with a message."""
    for flag, unset in (("lora_alpha", None), ("lora_dropout", 0.0), ("lora_targets", None)):
        if not args.lora_rank and vars(args)[flag] != unset:
            parser.error(f"--{flag} has no effect without --lora_rank: set a rank, or leave it out")
    if args.shard != "none" and not args.ddp:
        parser.error(f"--shard {args.shard} shards the model over the processes of --ddp. Type:\n"
                     f"    torchrun --nproc_per_node 2 {command_line()} --ddp")
    if args.shard != "none" and args.dtype == "float16":
        parser.error(f"--shard {args.shard} works in bfloat16 or float32, not in float16, whose "
                     "gradients need scaling: --dtype bfloat16")
    if args.compile and args.shard != "none":
        parser.error(f"--compile compiles whole layers, and --shard {args.shard} gathers weights "
                     "inside them; leave one of them out")


def parse_args(parser: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """Defaults, then the YAML files of --config, each over those before it, then the command line.
    Sections of a YAML file only group its keys.

    Adds the flag --config. Exits with a message on a file that is not YAML, a value that its flag
    does not take, and an unknown key, naming the file and the nearest known key.
    """
    parser.add_argument("--config", nargs="+", default=[], metavar="YAML",
        help="YAML files with values for any flag; a later file overrides earlier ones, the "
             "command line overrides all")
    only_config = argparse.ArgumentParser(add_help=False)
    only_config.add_argument("--config", nargs="+", default=[])
    files, _ = only_config.parse_known_args(argv)
    flags = {action.dest: action for action in parser._actions}
    values = {}
    for path in files.config:
        values |= read_config(parser, flags, path)
    for key in values:
        flags[key].required = False
    for group in parser._mutually_exclusive_groups:
        group.required &= not any(flag.dest in values for flag in group._group_actions)
    # A repeatable flag would extend its default, where the command line must override the files.
    several = {key: values.pop(key) for key in list(values)
               if flags[key].nargs == "+" and flags[key].default is None}
    parser.set_defaults(**values)
    args = parser.parse_args(argv)
    vars(args).update({key: value for key, value in several.items() if getattr(args, key) is None})
    if "lora_alpha" in args:
        check_training_args(parser, args)
    return args


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
            parser.error(f"{path}: unknown key {key!r}; did you mean {did_you_mean(key, flags)}?")
        try:
            values[key] = read_value(parser, flags[key], value)
        except argparse.ArgumentError as error:
            parser.error(f"{path}: {error}")
    return values


def read_value(parser, flag, value):
    """A YAML value converted and checked as on the command line (YAML reads 5e-6 as text)."""
    if value is None or flag.nargs == 0:                    # unset, or true and false for a switch
        return value
    values = value if isinstance(value, list) else [value]
    values = [parser._get_value(flag, str(each)) for each in values]
    for each in values:
        parser._check_value(flag, each)
    return values if flag.nargs in ("+", "*") else values[0]
