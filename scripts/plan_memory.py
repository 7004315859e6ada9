"""
显存规划：每一项都写出算式，告诉你多大的模型在几块 GPU 上放得下。
What fits where: the memory of a training run, each term with its arithmetic.

    python scripts/plan_memory.py                                   a table: sizes of models, numbers of GPUs
    python scripts/plan_memory.py --student 8B --processes 8 --shard zero3 --grad_checkpoint
    python scripts/plan_memory.py --student out/full_sft_64.pth --teacher out/full_sft_128.pth --processes 1 --dtype float32
    python scripts/plan_memory.py --measure                         planned beside measured, on this machine

Of each weight that trains a process keeps 16 bytes: itself and its gradient in fp32, and AdamW's two moments (Rajbhandari
et al. 2020, ZeRO, https://arxiv.org/abs/1910.02054, Sec. 3.1). zero2 and zero3 divide these 16 by the processes, gradients
being shared out with every micro-batch. Beside its part a process then holds weights gathered from the others: under zero2
all of them, under zero3 those of two layers, and under both the words, in fp32 (fully_shard). The teacher costs 2 a weight
in bf16, and so do the layers' matrices that adapters stand beside. What autograd keeps for the backward pass grows with the tokens, and is counted from model/transformer.py line by
line.

GB are 10^9 bytes; of a GPU's memory a tenth is left to CUDA, NCCL and the gaps between tensors. While it loads, each process
takes 4 bytes a weight of the host's memory, under zero3 those of the teacher too.
"""

import argparse
import dataclasses
import itertools
import os
import re
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

# Run as `python scripts/plan_memory.py`, Python looks for modules in scripts/ only; the shelves lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from distill.fused import CHUNK_BYTES, MOST_ROWS, Dense, fused_distillation_loss
from distill.losses import reverse_kl
from interop.checkpoint import build, empty_model, load_config
from model.config import LMConfig
from model.lora import add_lora, store_frozen
from runtime.args import checking_input, command_line, parse_args
from runtime.precision import autocast
from runtime.processes import fully_shard
from runtime.run import make_optimizer


def qwen3(dim, n_layers, n_heads, hidden_dim, tied=False) -> LMConfig:
    return LMConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=8, head_dim=128, hidden_dim=hidden_dim,
                    vocab_size=151936, max_seq_len=40960, rope_theta=1e6, norm_eps=1e-6, tie_embeddings=tied, qk_norm=True)


# Qwen3: Yang et al. 2025, https://arxiv.org/abs/2505.09388, Table 1; widths from each model's config.json.
# Llama 3.1 70B: Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783, Table 3.
SIZES = {
    "0.6B": qwen3(1024, 28, 16, 3072, tied=True),
    "1.7B": qwen3(2048, 28, 16, 6144, tied=True),
    "4B": qwen3(2560, 36, 32, 9728, tied=True),
    "8B": qwen3(4096, 36, 32, 12288),
    "14B": qwen3(5120, 40, 40, 17408),
    "32B": qwen3(5120, 64, 64, 25600),
    "70B": LMConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672, vocab_size=128256,
                    max_seq_len=131072, rope_theta=5e5, tie_embeddings=False),
}
USABLE = 0.9                    # of a GPU's memory
FP32, MOMENTS = 4, 8            # bytes of a number; of AdamW's two for one weight


# ------------------------------------------------------------------------------------------------------- what is counted


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a run is set up, in the words of the training scripts' flags."""

    batch_size: int = 2         # samples per micro-batch and process
    max_seq_len: int = 2048     # tokens of each, at most
    processes: int = 1
    shard: str = "none"
    lora_rank: int = 0
    grad_checkpoint: bool = False
    dtype: str = "bfloat16"
    max_new_tokens: int = 0     # written by the student while it trains; 0: it writes nothing
    rows: int = 16              # answers under way at once

    @property
    def tokens(self) -> int:
        return self.batch_size * self.max_seq_len

    @property
    def width(self) -> int:
        """Bytes of a number in the matrix products."""
        return 4 if self.dtype == "float32" else 2

    @property
    def parts(self) -> int:
        """Into how many parts what trains is divided."""
        return 1 if self.shard == "none" else self.processes

    def __str__(self):
        return f"{f'LoRA {self.lora_rank}' if self.lora_rank else 'full'}, {self.shard}"


class Term(NamedTuple):
    name: str
    bytes: int
    formula: str


class Count(NamedTuple):
    """Numbers of weights."""

    all: int                    # without adapters
    layer: int                  # one layer's
    matrices: int               # of these, in matrices
    words: int                  # the rest: embeddings, last norm, head
    trained: int                # those with a gradient


def count(config: LMConfig, lora_rank: int = 0) -> Count:
    """Counted on a model of one layer that takes no memory; all layers are alike."""
    model = empty_model(dataclasses.replace(config, n_layers=1), "meta", torch.float32)
    L, layer = config.n_layers, sum(weight.numel() for weight in model.layers[0].parameters())
    matrices = sum(weight.numel() for weight in model.layers[0].parameters() if weight.dim() >= 2)
    words = model.n_parameters() - layer
    trained = L * add_lora(model, lora_rank).n_trained if lora_rank else words + L * layer
    return Count(words + L * layer, layer, matrices, words, trained)


def config_of(name: str) -> LMConfig:
    """Raises FileNotFoundError or ValueError for what is neither a size nor a model."""
    if name in SIZES:
        return SIZES[name]
    if not Path(name).exists():
        raise FileNotFoundError(f"{name} is no path, and none of the sizes {', '.join(SIZES)}")
    return load_config(name)


def kept_of_a_layer(config: LMConfig, width: int) -> dict[str, int]:
    """Bytes a token that autograd keeps of one Block until its backward pass; `width` of a number in the products.

    The residual stream and the norms are fp32 whatever the products are. Under autocast every product casts its input for
    itself: wq, wk and wv keep a copy each, w1 and w3 too.
    """
    D, H, G, K, F = config.dim, config.n_heads, config.n_kv_heads, config.head_dim, config.hidden_dim
    q_and_k = (H + G) * K
    n_ffn = config.num_experts_per_tok + config.n_shared_experts if config.use_moe else 1
    copies = (1 + 1) * FP32 * D if width == FP32 else (3 + 2) * width * D
    return {"two norms: their inputs, and those over their length": 2 * (2 * FP32 * D + FP32),
            "what wq, wk, wv and w1, w3 multiply": copies,
            "the norms of q and k": (2 * FP32 * q_and_k + FP32 * (H + G)) if config.qk_norm else 0,
            "q and k, turned, and v": width * (q_and_k + G * K),
            "attention: its output twice, and its normaliser": 2 * width * H * K + FP32 * H,
            "SwiGLU: both factors, silu, their product": 4 * width * F * n_ffn}


def kept_beside_layers(config: LMConfig) -> int:
    """Bytes a token: its id, its turn (K/2 complex numbers), and the last norm."""
    return 8 + FP32 * config.head_dim + 2 * FP32 * config.dim + FP32


# ------------------------------------------------------------------------------------------------------------ the terms


def terms(student: LMConfig, teacher: LMConfig | None, recipe: Recipe, distilled: bool = True) -> list[Term]:
    """What one process keeps at its peak. Raises ValueError for an architecture that is not reckoned here.

    teacher     with weights of its own; None: there is none in memory
    distilled   by the fused loss; else fine-tuned by train_sft.py, whose logits are whole
    """
    if student.architecture != "llama":
        raise ValueError(f"architecture {student.architecture!r}: only the layers of model/transformer.py are counted here")
    n, width, parts = count(student, recipe.lora_rank), recipe.width, recipe.parts
    over = f" / {parts} processes" if parts > 1 else ""
    found = [Term("weights", FP32 * n.all // parts, f"4 B x {n.all:,}{over}"),
             Term("gradients", FP32 * n.trained // parts, f"4 B x {n.trained:,}{over}"),
             Term("AdamW", MOMENTS * n.trained // parts, f"8 B x {n.trained:,}{over}")]
    if recipe.lora_rank:
        frozen = student.n_layers * n.matrices                  # model/lora.py, store_frozen
        found[0] = Term("weights", (width * frozen + FP32 * (n.all - frozen)) // parts,
                        f"({width} B x {frozen:,} in the layers' matrices + 4 B x {n.all - frozen:,}){over}")
        found.insert(1, Term("adapters", FP32 * n.trained // parts, f"4 B x {n.trained:,}{over}"))
    if teacher:
        found += taught_by(count(teacher), recipe)
    found += copies(student, n, recipe)
    learning = [activations(student, recipe), (loss if distilled else loss_of_sft)(student, recipe)]
    sharing = [Term("words' gradients, to share out", 2 * FP32 * n.words, f"2 x 4 B x {n.words:,}")]
    # First the student writes, then it learns, last its words' gradients, which come at the end, are shared out.
    phases = [learning] + [sharing] * (recipe.shard != "none" and not recipe.lora_rank)
    phases += [[kv_cache(student, recipe)]] * (recipe.max_new_tokens > 0)
    return found + max(phases, key=total)


def total(found: list[Term]) -> int:
    return sum(term.bytes for term in found)


def taught_by(n: Count, recipe: Recipe) -> list[Term]:
    """The teacher: whole, or under zero3 a part of it, and gathered what is at work."""
    width = recipe.width
    if recipe.shard != "zero3":
        return [Term("teacher", width * n.all, f"{width} B x {n.all:,}")]
    return [Term("teacher", width * n.all // recipe.parts, f"{width} B x {n.all:,} / {recipe.parts} processes"),
            Term("gathered of it", width * (n.words + 2 * n.layer), f"{width} B x ({n.words:,} + 2 layers x {n.layer:,})")]


def copies(config: LMConfig, n: Count, recipe: Recipe) -> list[Term]:
    """The student's weights once more, in the type of the products or gathered from all processes."""
    width, L = recipe.width, config.n_layers
    if recipe.shard == "none":
        if width == FP32:
            return []
        # Autocast keeps the copies of what trains until the forward pass ends; what is frozen is stored as such a copy.
        if recipe.lora_rank:
            return [Term("copies for autocast", width * n.trained, f"{width} B x {n.trained:,}")]
        return [Term("copies for autocast", width * L * n.layer, f"{width} B x {L} layers x {n.layer:,}")]
    layers = L if recipe.shard == "zero2" else min(2, L)
    gathered = Term("gathered weights", FP32 * n.words + width * layers * n.layer,
                    f"4 B x {n.words:,} + {width} B x {layers} layers x {n.layer:,}")
    if recipe.lora_rank:
        return [gathered]
    one_layer = Term("gradients, to share out", (width + FP32) * n.layer, f"({width} + 4) B x one layer's {n.layer:,}")
    return [gathered, one_layer]


def activations(config: LMConfig, recipe: Recipe) -> Term:
    layer, beside = sum(kept_of_a_layer(config, recipe.width).values()), kept_beside_layers(config)
    L, tokens = config.n_layers, recipe.tokens
    if recipe.grad_checkpoint:
        return Term("activations", tokens * (L * FP32 * config.dim + layer + beside),
                    f"{tokens:,} tokens x ({L} layers x 4 B x {config.dim:,} + one layer's {layer:,} + {beside:,})")
    return Term("activations", tokens * (L * layer + beside), f"{tokens:,} tokens x ({L} layers x {layer:,} + {beside:,})")


def loss(config: LMConfig, recipe: Recipe) -> Term:
    """distill/fused.py: its buffers, the gradient of the head in fp32 and, but in fp32, two copies of the head and the
    product that is added to its gradient. A frozen head has no gradient."""
    width, V, D = recipe.width, config.vocab_size, config.dim
    buffer = FP32 * V * max(1, min(MOST_ROWS, CHUNK_BYTES // (FP32 * V)))
    is_copied, has_gradient = width < FP32, not recipe.lora_rank
    head = 2 * width * is_copied + FP32 * has_gradient + width * (is_copied and has_gradient)
    return Term("loss", N_BUFFERS * buffer + head * V * D + 2 * FP32 * recipe.tokens * D,
                f"{N_BUFFERS} buffers x {buffer:,} + {head} B x head of {V:,} x {D:,} "
                f"+ 8 B x {recipe.tokens:,} tokens x {D:,}")


def loss_of_sft(config: LMConfig, recipe: Recipe) -> Term:
    """Logits in the type of the products, and in fp32 their log-softmax and two gradients; the head as in `loss`. All tokens
    are taken for the assistant's."""
    width, V, D = recipe.width, config.vocab_size, config.dim
    head = width * (width < FP32) + (FP32 + width * (width < FP32)) * (not recipe.lora_rank)
    return Term("loss", (width + 3 * FP32) * recipe.tokens * V + head * V * D,
                f"{width + 3 * FP32} B x {recipe.tokens:,} tokens x {V:,} + {head} B x head of {V:,} x {D:,}")


N_BUFFERS = 10                  # (rows, V) in fp32 of a divergence by autograd; forward KL needs three


def kv_cache(config: LMConfig, recipe: Recipe) -> Term:
    L, G, K, width, length = config.n_layers, config.n_kv_heads, config.head_dim, recipe.width, recipe.max_seq_len
    return Term("KV cache", 2 * width * L * G * K * recipe.rows * length,
                f"2 x {width} B x {L} layers x {G} x {K} x {recipe.rows} answers x {length:,} tokens")


# -------------------------------------------------------------------------------------------------------------- a table

CHOICES = [("none", 0), ("zero2", 0), ("zero3", 0), ("none", 16), ("zero3", 16)]     # what is simplest comes first


def smallest_that_fits(config: LMConfig, processes: int, gpu_gb: float) -> tuple[Recipe, int] | None:
    """The first of CHOICES that fits, and its bytes; None if none does. The teacher is as large as the student."""
    for shard, rank in CHOICES:
        recipe = Recipe(processes=processes, shard=shard, lora_rank=rank, grad_checkpoint=True)
        needed = total(terms(config, config, recipe))
        if needed <= USABLE * gpu_gb * 1e9 and (processes > 1 or shard == "none"):
            return recipe, needed
    return None


# What makes a plan smaller, dearest first: adapters learn less, gathering takes time, and so does a second forward pass.
REMEDIES = {"--lora_rank 16": ("lora_rank", 16), "--shard zero3": ("shard", "zero3"),
            "--grad_checkpoint": ("grad_checkpoint", True)}


def remedy(student: LMConfig, teacher: LMConfig | None, recipe: Recipe, room: float,
           distilled: bool = True) -> tuple[str, int] | None:
    """The cheapest flags with which the run fits into `room` bytes, and its bytes; None if none help."""
    for chosen in itertools.product((False, True), repeat=len(REMEDIES)):         # counts up: the last flag comes first
        flags = list(itertools.compress(REMEDIES, chosen))
        changed = dataclasses.replace(recipe, **dict(REMEDIES[flag] for flag in flags))
        needed = total(terms(student, teacher, changed, distilled))
        if needed <= room and (changed.processes > 1 or changed.shard == "none"):
            return " ".join(flags), needed
    return None


def table(gpu_gb: float) -> str:
    numbers = (1, 2, 4, 8)
    lines = ["| model | weights | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in numbers) + " |",
             "|---|---:|" + "---|" * len(numbers)]
    for name, config in SIZES.items():
        found = [smallest_that_fits(config, n, gpu_gb) for n in numbers]
        cells = [f"{each[0]}: {each[1] / 1e9:.0f} GB" if each else "-" for each in found]
        lines.append(f"| {name} | {count(config).all / 1e9:.2f} G | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ planned and measured

# What one core trains in two minutes: sizes of the student and of a teacher as large, and three recipes for each.
MEASURED = [(LMConfig(dim=dim, n_layers=n_layers, vocab_size=vocab_size, qk_norm=True),
             Recipe(batch_size, max_seq_len=256, dtype="float32", **more))
            for dim, n_layers, vocab_size, batch_size in ((256, 8, 6400, 4), (512, 8, 6400, 2), (256, 4, 49152, 2))
            for more in ({}, {"grad_checkpoint": True}, {"lora_rank": 8})]


def measure(config: LMConfig, recipe: Recipe, device: str) -> int:
    """Bytes at the peak of two steps of two micro-batches each, above what Python and torch take. Runs in a new process."""
    torch.set_num_threads(1)
    # The first step of all loads the code of every kernel, which counts as memory too: let it be a small one.
    small = LMConfig(dim=16, n_layers=2, n_heads=2, vocab_size=64, qk_norm=config.qk_norm)
    train(small, Recipe(1, 8, dtype=recipe.dtype), device)
    before = reset_peak(device)
    train(config, recipe, device)
    return peak(device) - before


def train(config: LMConfig, recipe: Recipe, device: str):
    dtype, device = getattr(torch, recipe.dtype), torch.device(device)
    with device:
        student, teacher = build(config), build(config).to(dtype).eval().requires_grad_(False)
    if recipe.lora_rank:
        add_lora(student, recipe.lora_rank)
        store_frozen(student, dtype)
    student.grad_checkpoint = recipe.grad_checkpoint
    optimizer = make_optimizer([student], weight_decay=0.1)
    lengths = [recipe.max_seq_len] * recipe.batch_size
    for micro_batch in range(4):
        tokens = torch.randint(config.vocab_size, (recipe.tokens,), device=device)
        with autocast(device, dtype):
            with torch.no_grad():
                said = [Dense(teacher(tokens, lengths, with_logits=False).final, teacher.head)]
            out = student(tokens, lengths, with_logits=False)
            fused = fused_distillation_loss(out.final, student.head, tokens, said, 0.5, 4.0, reverse_kl)
        (fused.loss / recipe.tokens).backward()
        if micro_batch % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def reset_peak(device: str) -> int:
    """From now on the peak is a new one. Returns what is in use at the moment."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux. Elsewhere the old peak stays; nothing large was freed so far, so that it too is what is in use.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def planned_and_measured(n: int, device: str):
    """Print a row for each of the first n of MEASURED, as it comes."""
    # glibc keeps blocks of up to 32 MB when they are freed, and was seen to hold 1.4 times what was in use; it is asked to
    # give them back, so that tensors are measured and not its gaps. A process on a CPU needs room for these too.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    print("| student and teacher | words | tokens | recipe | planned MB | measured MB | planned / measured |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for config, recipe in MEASURED[:n]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as new:      # where nothing earlier is left
            measured = new.submit(measure, config, recipe, device).result()
        planned = total(terms(config, config, recipe))
        how = f"{recipe}{', grad_checkpoint' * recipe.grad_checkpoint}"
        print(f"| {config} | {config.vocab_size:,} | {recipe.tokens:,} | {how} | {planned / 1e6:,.0f} "
              f"| {measured / 1e6:,.0f} | {planned / measured:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # whose memory
    add = parser.add_argument_group("models").add_argument
    add("--student", default=None, help=f"a size, {' '.join(SIZES)}, or a model's path; default: a table of all sizes")
    add("--teacher", default="copy", help="a size or a path; copy: as large as the student; self: the student without its "
                                          "adapters, which costs nothing; none: train_sft.py")
    # how it is trained: flags of the training scripts
    add = parser.add_argument_group("recipe").add_argument
    add("--batch_size", type=int, default=2, help="samples per micro-batch and process")
    add("--max_seq_len", type=int, default=2048, help="tokens of each sample, at most")
    add("--processes", type=int, default=1, help="of all machines together, one a GPU")
    add("--shard", default="none", choices=["none", "zero2", "zero3"], help="what the processes share out among them")
    add("--lora_rank", type=int, default=0, help="of the adapters; 0: all weights train")
    add("--grad_checkpoint", action="store_true", help="keep only what each layer reads")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the matrix products")
    add("--max_new_tokens", type=int, default=0, help="that the student writes while it trains (train_onpolicy.py), within "
                                                      "--max_seq_len; 0: none")
    add("--rows", type=int, default=Recipe.rows, help="answers that it writes at once: of all micro-batches of a step")
    # where
    add = parser.add_argument_group("machine").add_argument
    add("--gpu_gb", type=float, default=80.0, help="memory of a GPU, 10^9 bytes")
    add("--measure", type=int, nargs="?", default=0, const=len(MEASURED), metavar="N", help="train small pairs on --device, and "
        f"print planned and measured memory: the first N rows, or all {len(MEASURED)}")
    add("--device", default="cpu", help="of --measure: cpu, cuda, cuda:1, ...")
    defaults = vars(parser.parse_args([]))          # before a --config changes them
    args = parse_args(parser)
    check_all_is_read(parser, args, defaults)
    for name in ("batch_size", "max_seq_len", "processes", "rows", "gpu_gb"):
        if vars(args)[name] <= 0:
            parser.error(f"--{name} {vars(args)[name]} must be above 0")
    if args.teacher == "self" and not args.lora_rank:
        parser.error("--teacher self is the student without its adapters: give a --lora_rank, or --teacher copy")
    if args.shard != "none" and args.processes == 1:
        parser.error(f"--shard {args.shard} shares the model out among processes, and there is one. Type:\n"
                     f"    python {command_line()} --processes 2")

    if args.measure:
        planned_and_measured(args.measure, args.device)
        return
    if args.student is None:
        print(table(args.gpu_gb))
        return
    with checking_input():
        student = config_of(args.student)
        teachers = {"copy": student, "self": None, "none": None}
        teacher = teachers[args.teacher] if args.teacher in teachers else config_of(args.teacher)
        recipe = Recipe(args.batch_size, args.max_seq_len, args.processes, args.shard, args.lora_rank, args.grad_checkpoint,
                        args.dtype, args.max_new_tokens, args.rows)
        distilled = args.teacher != "none"
        found = terms(student, teacher, recipe, distilled)
    for term in found:
        print(f"{term.name:<32}{term.bytes / 1e9:>8.2f} GB   {term.formula}")
    needed, room = total(found) / 1e9, USABLE * args.gpu_gb
    print(f"{'in all, on each process':<32}{needed:>8.2f} GB   "
          f"{'fits' if needed <= room else 'does not fit'}: {args.gpu_gb:g} GB leave {room:g}")
    if needed > room:
        found = remedy(student, teacher, recipe, room * 1e9, distilled)
        print(f"it fits with {found[0]}: {found[1] / 1e9:.2f} GB" if found else
              "nothing here makes it fit: more processes, or a smaller model")


def check_all_is_read(parser, args, defaults: dict):
    """Exits with a message that names the flags which are given and would be ignored."""
    if args.measure:
        read, way_out = {"measure", "device"}, "--measure trains small pairs of its own; leave them out"
    elif args.student is None:
        read = {"gpu_gb"}
        way_out = f"the table of all sizes reads --gpu_gb alone; for a plan give a --student, {', '.join(SIZES)} or a path"
    else:
        read, way_out = defaults.keys() - {"device"}, "it is for --measure; leave it out"
    unread = [f"--{name}" for name, default in defaults.items() if vars(args)[name] != default and name not in read]
    if unread:
        parser.error(f"no effect of {', '.join(unread)}: {way_out}")


if __name__ == "__main__":
    main()
