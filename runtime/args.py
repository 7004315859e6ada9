"""
命令行参数：各训练脚本共有的标志，以及 --config 的 YAML 文件。
Arguments: the flags that all training scripts share, and the YAML files of --config.
"""

import argparse
import difflib
import math
import os
import re
import shlex
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from runtime.errors import in_one_line, report_errors

WORKFLOW = "MINIDISTILL_WORKFLOW"   # environment variable: the command this process is a step of
CHAT = "MINIDISTILL_CHAT"           # environment variable: --chat
COLUMNS = "MINIDISTILL_COLUMNS"     # environment variable: --columns, a line each

# Where the values of a flag lie, if not in [0, inf). A flag is found by its name, or else by the
# last word of it: write_temperature. Infinity only says that there is no bound.
RANGES = {name: interval for interval, names in {
    "[-1, inf)": "local_rank",
    "[1, inf)": "accumulation_steps batch_size depth dim epochs max_new_tokens "
                "max_seq_len max_tries n_heads n_layers n_samples num_samples "
                "relation_heads repeats rounds rows sample_every teacher_top_k threads "
                "tokens_per_batch vocab_size",
    "[1, 1000]": "parallel processes",
    "[0, 10000]": "lora_rank measure num_workers",
    "(0, inf)": "gpu_gb lora_alpha max_mb temperature",
    "[0, 1]": "alpha alpha_ce beta floor label_noise on_policy_fraction reward_weight",
    "[0, 1)": "dropout replay_share teacher_ema val_fraction warmup_ratio",
    "(0, 1)": "skew teacher_share test_share",
    "(0, 1]": "top_p"}.items() for name in names.split()}

# Keys of other frameworks' YAML files -> our flags, and the words of some of them -> our values
ALIASES = {
    "student_path": "weights", "teacher_path": "teacher", "torch_dtype": "dtype",
    "per_device_train_batch_size": "batch_size", "num_train_epochs": "epochs",
    "gradient_accumulation_steps": "accumulation_steps", "kl_direction": "divergence",
    "skd.alpha": "kd_weight",                   # there, alpha is the weight of KL
    "peft.enabled": "lora_rank"}
WORDS = {"kl_direction": {"forward": "forward_kl", "reverse": "reverse_kl"},
         "peft.enabled": {"true": "16", "false": "0"}}


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
        sys.exit(in_one_line(error) or f"{error}")


def did_you_mean(name: str, known) -> str:
    return repr(difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0])


def check_ranges(parser, args, *ranges: tuple[str, bool, str]):
    """ranges: (flag, whether its value is valid, what it must be). Exits with a message at the
    first that is not."""
    for flag, valid, needed in ranges:
        if not valid:
            parser.error(f"--{flag} {vars(args)[flag]} must {needed}")


class Parser(argparse.ArgumentParser):
    """Its errors are one line, without the list of all flags."""

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (--\w+)", message):
            hint = did_you_mean(unknown[1], self._option_string_actions)
            message = f"{message}; did you mean {hint}?"
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(doc: str) -> argparse.ArgumentParser:
    report_errors()
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_training_args(parser: argparse.ArgumentParser):
    """The flags that all training scripts share; each script adds those of its own lesson."""
    add = parser.add_argument_group("optimization").add_argument
    add("--max_steps", type=int, default=0, help="optimizer steps; 0: as many as --epochs make")
    add("--accumulation_steps", type=int, default=1, help="micro-batches per step and process")
    add("--optimizer", default="muon", choices=["muon", "adamw"],
        help="muon (runtime/optim.py) for the matrices of the layers, adamw for the rest; adamw: "
             "for all, as for adapters always; better on a published model's weights")
    add("--weight_decay", type=float, default=0.1, help="weight decay, on matrices only")
    add("--grad_clip", type=float, default=1.0, help="maximum L2 norm of the gradient; 0: no limit")
    add("--warmup_iters", "--warmup_ratio", type=float, default=0,
        help="linear warm-up before the cosine, in steps; below 1: a fraction of all steps")
    add("--seed", type=int, default=1337, help="of initial weights, shuffling and dropout")
    add("--qat", default=None, choices=["int8", "int4", "int3", "int2"],
        help="quantisation-aware training (model/qat.py): each forward pass rounds the weights")

    add = parser.add_argument_group("LoRA (model/lora.py)").add_argument
    add("--lora_rank", type=int, default=0, help="rank of the adapters; 0: the weights train")
    add("--lora_alpha", type=float, help="adapters are scaled by this / rank; default: the rank")
    add("--lora_dropout", type=float, default=0.0, help="on the adapters' inputs, in [0, 1)")
    add("--lora_targets", nargs="+", help="adapted matrices; default: wq wk wv wo w1 w2 w3")

    add = parser.add_argument_group("data").add_argument
    add("--tokenizer", default=None,
        help="of a randomly initialised model: its file, or a model that has one; default: "
             "model/tokenizer.json, in distillation the teacher's")
    add("--max_seq_len", type=int, default=None,
        help="tokens of a sample; longer ones are cut; default: the model's context length")
    add("--val_path", default=None,
        help="validation data, or none; default: val.jsonl beside the data, else --val_fraction")
    add("--val_fraction", type=float, default=0.05,
        help="fraction of the data held out without a validation file; at most 1,000 samples")
    add("--skip_bad_lines", action="store_true", help="skip and count lines that cannot be used")
    add("--num_workers", type=int, default=1,
        help="threads that prepare batches; 0: the training thread itself")

    add = add_process_args(parser)
    add("--grad_checkpoint", action="store_true",
        help="recompute each layer in the backward pass: much less memory, a third more work")
    add("--compile", action="store_true", help="torch.compile each layer; on a GPU in bfloat16")
    add("--shard", default="none", choices=["none", "zero2", "zero3"],
        help="what --ddp shards over the processes. zero2: gradients and optimizer state; zero3: "
             "weights too, also a frozen teacher's")

    add = parser.add_argument_group("output").add_argument
    add("--out_dir", "--output_dir", default="out", help="folder of weights, log and resume files")
    add("--log_interval", type=int, default=100, help="steps between two rows of the log")
    add("--save_interval", type=int, default=100, help="steps between two saves")
    add("--eval_interval", type=int, default=200,
        help="steps between two validations; 0: only at the end")
    add("--resume", action="store_true", help="resume from the resume file, if there is one")
    add("--use_wandb", action="store_true",
        help="log to Weights & Biases (WANDB_MODE=offline logs locally)")
    add("--wandb_project", default="MiniDistill", help="project in Weights & Biases")


def add_process_args(parser: argparse.ArgumentParser, dtype: bool = True):
    """The flags of a script that runs a model in several processes; returns the add_argument of
    their group."""
    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    if dtype:
        add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
            help="of the matrix products (autocast); trainable weights, optimizer state and losses "
                 "are fp32. auto: bfloat16 on a GPU, float32 elsewhere")
    add("--ddp", action="store_true", help="several processes, started by torchrun")
    add("--local_rank", type=int, default=-1, help="GPU of this process; -1: set by torchrun")
    return add


def parse_teacher(spec: str) -> tuple[str, str, float]:
    """(name, path, weight) of 'NAME=PATH', 'PATH=WEIGHT', or 'PATH', which may hold a "=" too."""
    path, _, weight = spec.rpartition("=")
    if not path or Path(spec).exists():
        return "", spec, 1.0
    with suppress(ValueError):
        return "", path, float(weight)
    name, _, path = spec.partition("=")
    return name, path, 1.0


def by_name(specs: list[str]) -> dict[str, str]:
    """{NAME: PATH} of [NAME=]PATH; without a name the file's. A path may have a "=", too. Raises
    ValueError for equal names."""
    found = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals or Path(spec).exists():
            name, path = Path(spec).name if Path(spec).is_dir() else Path(spec).stem, spec
        if name in found:
            raise ValueError(f"two models have the name {name}, {found[name]} and {path}; write "
                             "NAME=PATH")
        found[name] = path
    return found


def model_options(args) -> dict:
    """The arguments of `prepare` (interop/checkpoint.py) that are flags."""
    lora = {"rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": args.lora_dropout,
            "targets": args.lora_targets}
    return {"lora": lora if args.lora_rank else None, "qat": args.qat,
            "grad_checkpoint": args.grad_checkpoint, "compiled": args.compile}


def check_training_args(parser, args):
    """What the flags of add_training_args require of each other. Exits with a message."""
    for flag, unset in (("lora_alpha", None), ("lora_dropout", 0.0), ("lora_targets", None)):
        if not args.lora_rank and vars(args)[flag] != unset:
            parser.error(f"--{flag} has no effect without --lora_rank: set a rank, or leave it out")
    if args.qat and args.lora_rank:
        parser.error("--qat trains the weights, --lora_rank freezes them: leave one of them out")
    if args.shard != "none" and not args.ddp:       # a config for several GPUs, on one
        print(f"one process: without --shard {args.shard}")
        args.shard = "none"
    if args.shard != "none" and args.dtype == "float16":
        parser.error(f"--shard {args.shard} works in bfloat16 or float32, not in float16, whose "
                     "gradients need scaling: --dtype bfloat16")
    if args.compile and args.shard != "none":
        parser.error(f"--compile compiles whole layers, and --shard {args.shard} gathers weights "
                     "inside them; leave one of them out")


def parse_args(parser: argparse.ArgumentParser, argv=None, **ranges: str) -> argparse.Namespace:
    """Defaults, then the YAML files of --config, each over those before it, then the command line.
    ranges: a script's own, over RANGES.

    Adds the flags --config, --chat and --columns. Exits with a message on a file that is not YAML,
    a value that its flag does not take, and an unknown key, naming the file and the nearest key.
    """
    parser.add_argument("--chat", default=None, choices=["chatml", "llama3", "plain"],
        help="format of conversations for a model whose chat template is missing or cannot be "
             "followed exactly (plain: Alpaca's); other models keep their own")
    parser.add_argument("--columns", nargs="+", default=None, metavar="NAME=COLUMN",
        help="columns of the data files, and the names of dataset/dataset.md that they have here: "
             "question=customer_message answer=agent_reply; other columns are not read")
    only_config = Parser(prog=parser.prog, add_help=False)
    only_config.add_argument("--config", nargs="+", default=[])
    values = {}
    for path in only_config.parse_known_args(argv)[0].config:
        values |= read_config(parser, path)
    parser.set_defaults(**values)
    for flag in parser._actions:
        flag.required &= flag.dest not in values
    for group in parser._mutually_exclusive_groups:
        group.required &= not any(flag.dest in values for flag in group._group_actions)
    parser.add_argument("--config", nargs="+", default=[], metavar="YAML",
        help="YAML files with values for any flag; a later file overrides earlier ones, the "
             "command line overrides all")
    args = parser.parse_args(argv)
    if args.chat:
        os.environ[CHAT] = args.chat        # where tokenizers are read, here and in child processes
    if args.columns:
        if bad := [pair for pair in args.columns if not re.fullmatch("[^=]+=.+", pair)]:
            parser.error(f"--columns {bad[0]}: write NAME=COLUMN")
        os.environ[COLUMNS] = "\n".join(args.columns)      # where rows are read, as above
    check_values(parser, args, RANGES | ranges)
    if "lora_alpha" in args:
        check_training_args(parser, args)
    return args


def check_values(parser, args, ranges: dict[str, str]):
    """Every number is in its range. Exits with a message."""
    for name, given in vars(args).items():
        for value in given if isinstance(given, list) else [given]:
            if needed := out_of_range(name, value, ranges):
                parser.error(f"--{name} {value} must {needed}")


def out_of_range(name: str, value, ranges: dict[str, str] = RANGES) -> str | None:
    """What a number must do, such as "lie in [0, 1]"; None for one that does, and for no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    interval = ranges.get(name) or ranges.get(name.rpartition("_")[2], "[0, inf)")
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if above and below:
        return None
    return (f"lie in {interval}" if high < math.inf else
            f"be {low:g} or more" if interval[0] == "[" else f"be above {low:g}")


def read_config(parser, path: str) -> dict:
    """{dest of a flag: value} of one YAML file, whose sections only group its keys."""
    if not os.path.isfile(path):
        parser.error(f"no config file at {path}")
    try:        # each value as the text that it is, which its flag converts as on the command line
        document = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        parser.error(f"{path} is not YAML in UTF-8: {' '.join(str(error).split())}")
    if not isinstance(document, (yaml.MappingNode, type(None))):
        parser.error(f"{path} must hold lines like `learning_rate: 5e-6`")
    flags, values = parser._option_string_actions, {}
    for section, content in document.value if document else []:
        is_group = isinstance(content, yaml.MappingNode)
        for key, node in content.value if is_group else [(section, content)]:
            full = f"{section.value}.{key.value}"
            name = full if full in ALIASES else str(key.value)
            where = f"{path}, line {key.start_mark.line + 1}: {key.value!r}"
            if (name, node.value) == ("enable_thinking", "false"):  # so the chat template has it
                continue
            flag = flags.get(f"--{ALIASES.get(name, name)}")
            if flag is None:
                near = did_you_mean(name, [known.lstrip("-") for known in flags])
                parser.error(f"{where} is no flag; did you mean {near}?")
            if flag.dest in values:
                parser.error(f"{where} is given twice")
            values[flag.dest] = read_value(parser, flag, node, WORDS.get(name), where)
    return values


def read_value(parser, flag, node, words: dict | None, where: str):
    """A value of a YAML file, converted and checked as on the command line."""
    several = flag.nargs in ("+", "*")
    nodes = node.value if several and isinstance(node, yaml.SequenceNode) else [node]
    texts = [each.value for each in nodes]
    if not all(isinstance(each, str) and each for each in texts):
        parser.error(f"{where} takes {'plain values' if several else 'one value'}")
    if flag.nargs == 0:
        words = {"true": flag.const, "false": flag.default}
    if words:
        if texts[0].lower() not in words:
            parser.error(f"{where} takes {' or '.join(words)}, not {texts[0]!r}")
        texts = [words[texts[0].lower()]]
    try:
        return texts[0] if flag.nargs == 0 else parser._get_values(flag, texts)
    except argparse.ArgumentError as error:
        parser.error(f"{where}: {error}")
