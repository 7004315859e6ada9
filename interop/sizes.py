"""
SIZES 的一行意味着哪些权重：教师、学生，以及它们之间的助教。
Which weights a row of SIZES stands for: teacher, student, and the teacher assistants between them.
"""

import re
from pathlib import Path

from interop.checkpoint import load_config, load_model, load_teacher, new_model
from model.config import LMConfig
from runtime.log import Logger
from runtime.precision import pick_device
from runtime.processes import World


def sft_weights(config: LMConfig, out_dir="out") -> str:
    """Path of the SFT weights of these sizes: in OUT_DIR, or else in out/."""
    file = f"full_sft_{config.dim}{config.moe_path}.pth"
    found = (path for path in (Path(out_dir, file), Path("out", file)) if path.exists())
    return str(next(found, Path("out", file)))


def init_student_model(lm_config, *, weights=None, vocabulary=None):
    """The student and its tokenizer, from a file of any format; None: its SFT weights; 'none':
    random weights."""
    weights = weights or sft_weights(lm_config)
    return new_model(lm_config, vocabulary) if weights == "none" else load_model(weights)


def init_teacher_model(lm_config, *, weights=None, world=None, shard="none", compiled=False):
    """The teacher: in eval mode, without gradients, outside DDP, in bf16 where the hardware has
    it."""
    world = world or World(0, 1, pick_device())
    return load_teacher(weights or sft_weights(lm_config), world, shard, compiled)[0]


def fill_in(args, sizes: dict) -> list[tuple[str, LMConfig]]:
    """Complete the arguments from a row of SIZES; auto: the first whose weights exist, else the
    first. Returns, for each student from large to small, its weights and sizes of a new one."""
    elsewhere = args.teacher_cache or args.teacher_url
    roles = ["student"] if elsewhere else ["student", "teacher"]
    found = [name for name, size in sizes.items()
             if all(Path(sft_weights(size[f"lm_config_{role}"], args.out_dir)).exists()
                    for role in roles)]
    row = [*found, *sizes][0] if args.size == "auto" else args.size
    size = sizes[row]
    for key in ("epochs", "batch_size", "learning_rate"):
        setattr(args, key, size[key] if vars(args)[key] is None else vars(args)[key])
    Logger(f"size {row}: {args.epochs} epochs, batch size {args.batch_size}, learning rate "
           f"{args.learning_rate:g}")
    if not args.teacher and not elsewhere:
        args.teacher = [sft_weights(size["lm_config_teacher"], args.out_dir)]
    given = size["lm_config_student"]
    last = LMConfig(dim=args.dim or given.dim, n_layers=args.n_layers or given.n_layers,
                    n_heads=args.n_heads or given.n_heads, use_moe=args.use_moe,
                    max_seq_len=args.max_seq_len or given.max_seq_len)
    same = args.teacher == [args.student] and not args.teacher_data_path
    if same and args.alpha == 0 and not args.qat:       # with it, KL is what rounding costs
        Logger("teacher and student are the same model with the same prompts, so the KD loss is "
               "zero. --teacher_data_path gives the teacher prompts with privileged context")
    chain = [chain_link(link, last, args.out_dir) for link in args.chain]
    chain.append((args.student or sft_weights(last, args.out_dir), last))
    files = [str((config if weights == "none" else load_config(weights)).dim)
             for weights, config in chain]
    if len(set(files)) < len(files):
        raise ValueError(f"students of widths {', '.join(files)}: two of a chain would be saved as "
                         "the same full_dist_DIM.pth; give them different widths")
    return chain


def chain_link(link: str, last: LMConfig, out_dir="out") -> tuple[str, LMConfig]:
    """(weights, sizes of a new model) of a teacher assistant. link: a weight file, or sizes like
    96x3, which start from full_sft_96.pth if that has 3 layers, else from random weights."""
    if not re.fullmatch(r"\d+x\d+", link):
        return link, last
    dim, n_layers = map(int, link.split("x"))
    n_heads = next((n for n in (8, 4, 2) if dim % (2 * n) == 0), 1)
    config = LMConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, max_seq_len=last.max_seq_len)
    weights = sft_weights(config, out_dir)
    fits = Path(weights).exists() and load_config(weights).n_layers == n_layers
    return weights if fits else "none", config
