"""
显存规划：每一项都写出算式，告诉你多大的模型在几块 GPU 上放得下。
What fits where: the memory of a training run, each term with its formula.

    python scripts/plan_memory.py                        a table: model sizes by numbers of GPUs
    python scripts/plan_memory.py --student 8B --processes 8 --shard zero3 --grad_checkpoint
    python scripts/plan_memory.py --measure              planned and measured, on this machine

Each trainable weight takes 16 bytes: itself and its gradient in fp32, and AdamW's two moments
(Rajbhandari et al. 2020, ZeRO, https://arxiv.org/abs/1910.02054, Sec. 3.1); zero2 and zero3 divide
them by the number of processes. GB are 10^9 bytes; a tenth of a GPU's memory is left to CUDA, NCCL
and fragmentation. While it loads, a process takes 4 bytes a weight of the host's memory.
"""

import os
import re
import sys
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import torch

from distill.fused import CHUNK_BYTES, MAX_ROWS, Dense, fused_distillation_loss
from distill.losses import reverse_kl
from evaluation.tables import markdown
from interop.checkpoint import build, empty_model, load_config
from model.config import LMConfig
from model.lora import add_lora, store_frozen
from model.sizes import SIZES
from runtime.args import checking_input, command_line, make_parser, parse_args
from runtime.log import peak_above
from runtime.optim import parameter_groups
from runtime.precision import autocast

USABLE, BUFFERS = 0.9, 10       # of a GPU's memory; (rows, V) in fp32, of a divergence by autograd
# Flags of a run, the simplest first; and those that make it smaller, the least costly first.
SIMPLEST = [{"shard": shard, "lora_rank": rank} for shard, rank in (
    ("none", 0), ("zero2", 0), ("zero3", 0), ("none", 16), ("zero3", 16))]
REMEDIES = [lora | shard | checkpoint for lora in ({}, {"lora_rank": 16})
            for shard in ({}, {"shard": "zero3"}) for checkpoint in ({}, {"grad_checkpoint": True})]
# What one core trains in two minutes: a student, a teacher of its size, and three runs of each.
MEASURED = [(LMConfig(dim=dim, n_layers=n_layers, vocab_size=vocab_size, qk_norm=True),
             {"batch_size": batch_size, "max_seq_len": 256, "dtype": "float32", **more})
            for dim, n_layers, vocab_size, batch_size in (
                (256, 8, 6400, 4), (512, 8, 6400, 2), (256, 4, 49152, 2))
            for more in ({}, {"grad_checkpoint": True}, {"lora_rank": 8})]

Count = namedtuple("Count", "all layer matrices rest trained")     # weights; rest: not in layers


def n_bytes(formula: str) -> int:
    """"4 B x 1,000 / 8 processes" -> 500: the numbers in words; / rounds down."""
    return eval(re.sub(r"[^\d+*/()]", "", formula.replace(" x ", "*").replace("/", "//")))


def total(terms: dict[str, str]) -> int:
    return sum(map(n_bytes, terms.values()))


def count(config: LMConfig, lora_rank: int = 0) -> Count:
    """Counted on a model of one layer on the meta device; all layers are alike."""
    model = empty_model(replace(config, n_layers=1), "meta", torch.float32)
    weights = list(model.layers[0].parameters())
    layer = sum(weight.numel() for weight in weights)
    rest = model.n_parameters() - layer
    n = rest + config.n_layers * layer
    return Count(n, layer, sum(weight.numel() for weight in weights if weight.dim() >= 2), rest,
                 config.n_layers * add_lora(model, lora_rank).n_trained if lora_rank else n)


def kept_of_a_layer(config: LMConfig, width: int) -> int:
    """Bytes per token that autograd keeps of one layer. width: bytes of a number in the matrix
    products; under autocast wq, wk, wv, w1 and w3 each cast their input."""
    D, H, G, K = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
    n_ffn = config.num_experts_per_tok + config.n_shared_experts if config.use_moe else 1
    return (2 * (2 * 4 * D + 4)                                     # norms: input and scaled input
            + (2 * 4 * D if width == 4 else 5 * width * D)          # inputs of wq, wk, wv; w1, w3
            + config.qk_norm * (2 * 4 * (H + G) * K + 4 * (H + G))  # norms of q and k
            + width * (H + 2 * G) * K                               # rotated q and k, and v
            + 2 * width * H * K + 4 * H                             # attention twice; normaliser
            + 4 * width * config.hidden_dim * n_ffn)                # factors, silu, product


def loss(V: int, D: int, tokens: int, width: int, lora: bool, distilled: bool) -> str:
    """distill/fused.py: buffers, copies of the head, its gradient, that of the hidden states.
    train_sft.py: logits, and in fp32 their log-softmax and two gradients."""
    cast = width if width < 4 else 0
    head = (2 if distilled else 1) * cast + (0 if lora else 4 + cast)
    head = f"{head} B x head of {V:,} x {D:,}"
    if not distilled:
        return f"{width + 12} B x {tokens:,} tokens x {V:,} + {head}"
    rows = max(1, min(MAX_ROWS, CHUNK_BYTES // (4 * V)))
    return f"{BUFFERS} buffers x {4 * V * rows:,} + {head} + 8 B x {tokens:,} tokens x {D:,}"


def plan(student: LMConfig, teacher: LMConfig | None, *, batch_size=2, max_seq_len=2048,
         processes=1, shard="none", lora_rank=0, grad_checkpoint=False, dtype="bfloat16",
         max_new_tokens=0, rows=16, distilled=True) -> dict[str, str]:
    """{term: its formula}, what one process holds at its peak. teacher: None if none is in memory.
    distilled: with the fused loss, else train_sft.py. The rest are the training scripts' flags."""
    if student.architecture != "llama":
        raise ValueError(f"architecture {student.architecture!r}: only the layers of "
                         "model/transformer.py are counted")
    n, L, D, V = count(student, lora_rank), student.n_layers, student.dim, student.vocab_size
    width = 4 if dtype == "float32" else 2              # bytes of a number in the matrix products
    tokens = batch_size * max_seq_len
    over = f" / {processes} processes" if shard != "none" and processes > 1 else ""
    terms = {"weights": f"4 B x {n.all:,}{over}"}
    if lora_rank:                                       # matrices beside adapters are stored so
        matrices = L * n.matrices
        terms = {"weights": f"({width} B x {matrices:,} in the layers' matrices + 4 B x "
                            f"{n.all - matrices:,}){over}",
                 "adapters": f"4 B x {n.trained:,}{over}"}
    terms |= {"gradients": f"4 B x {n.trained:,}{over}", "AdamW": f"8 B x {n.trained:,}{over}"}
    if teacher:
        t = count(teacher)
        terms["teacher"] = f"{width} B x {t.all:,}{over if shard == 'zero3' else ''}"
        if shard == "zero3":
            terms["gathered of it"] = f"{width} B x ({t.rest:,} + 2 layers x {t.layer:,})"

    # The student's weights once more: gathered from all processes, or copied by autocast.
    if shard != "none":
        layers = L if shard == "zero2" else min(2, L)
        terms["gathered weights"] = f"4 B x {n.rest:,} + {width} B x {layers} layers x {n.layer:,}"
        if not lora_rank:
            terms["gradients, to shard"] = f"({width} + 4) B x one layer's {n.layer:,}"
    elif width < 4:
        copied = f"{n.trained:,}" if lora_rank else f"{L} layers x {n.layer:,}"
        terms["copies for autocast"] = f"{width} B x {copied}"

    # The largest of: forward and backward; gradients of embedding and head; generation. Beside
    # layers a token keeps its id, its rotation (K/2 complex numbers) and the last norm.
    layer, beside = kept_of_a_layer(student, width), 8 + 4 * student.head_dim + 2 * 4 * D + 4
    kept = f"4 B x {D:,} + one layer's {layer:,}" if grad_checkpoint else f"{layer:,}"
    phases = [{"activations": f"{tokens:,} tokens x ({L} layers x {kept} + {beside:,})",
               "loss": loss(V, D, tokens, width, lora_rank > 0, distilled)}]
    if shard != "none" and not lora_rank:
        phases.append({"gradients of the rest, to shard": f"2 x 4 B x {n.rest:,}"})
    if max_new_tokens:
        phases.append({"KV cache": f"2 x {width} B x {L} layers x {student.n_kv_heads} x "
                       f"{student.head_dim} x {rows} answers x {max_seq_len:,} tokens"})
    return terms | max(phases, key=total)


def first_that_fits(student, teacher, run: dict, changes, room: float) -> tuple[dict, int] | None:
    """The first of the changes of a run's flags with which it fits into `room` bytes, and those it
    takes; None if none does. One process shards nothing."""
    for change in changes:
        changed = run | change
        if changed["shard"] == "none" or changed["processes"] > 1:
            needed = total(plan(student, teacher, **changed))
            if needed <= room:
                return change, needed
    return None


def label(lora_rank=0, shard="none", grad_checkpoint=False, **_) -> str:
    return (f"{f'LoRA {lora_rank}' if lora_rank else 'full'}, {shard}"
            f"{', grad_checkpoint' if grad_checkpoint else ''}")


def table(run: dict, room: float, n_gpus=(1, 2, 4, 8)) -> str:
    """The simplest flags that fit, for each size, with a teacher of that size."""
    rows = [["model", "weights", *(f"{n} GPU{'s' * (n > 1)}" for n in n_gpus)]]
    for name, config in SIZES.items():
        found = [first_that_fits(config, config, run | {"processes": n}, SIMPLEST, room)
                 for n in n_gpus]
        rows.append([name, f"{count(config).all / 1e9:.2f} G", *(
            f"{label(**each[0])}: {each[1] / 1e9:.0f} GB" if each else "-" for each in found)])
    return markdown(rows, "lr" + "l" * len(n_gpus))


def measure(config: LMConfig, run: dict, device: str) -> int:
    """Peak bytes of two optimizer steps of two micro-batches, above those of Python and torch.
    Needs a new process; on a CPU also Linux, where a new peak can begin."""
    torch.set_num_threads(1)
    device, dtype = torch.device(device), getattr(torch, run["dtype"])
    # The first steps load the code of every kernel, which counts as memory too: of a small model.
    small = LMConfig(dim=16, n_layers=2, n_heads=2, vocab_size=64, qk_norm=config.qk_norm)
    for config, lengths, rank in ((small, [8], 0), (
            config, [run["max_seq_len"]] * run["batch_size"], run.get("lora_rank"))):
        with peak_above(device) as above, device:
            student, teacher = build(config), build(config).to(dtype).eval().requires_grad_(False)
            if rank:
                add_lora(student, rank)
                store_frozen(student, dtype)
            student.grad_checkpoint = run.get("grad_checkpoint", False)
            optimizer = torch.optim.AdamW(parameter_groups({"model": student}, 0.1), fused=True)
            for micro_batch in range(4):
                tokens = torch.randint(config.vocab_size, (sum(lengths),))
                with autocast(device, dtype):
                    with torch.no_grad():
                        states = teacher(tokens, lengths, with_logits=False).final
                    out = student(tokens, lengths, with_logits=False)
                    fused = fused_distillation_loss(
                        out.final, student.head, tokens, [Dense(states, teacher.head)], 0.5, 4.0,
                        reverse_kl)
                (fused.loss / len(tokens)).backward()
                if micro_batch % 2:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
    return above()


def planned_and_measured(n: int, device: str) -> str:
    """A table of the first n of MEASURED."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"      # glibc returns freed blocks: tensors alone
    rows = [["student and teacher", "vocabulary", "tokens", "recipe", "planned MB", "measured MB",
             "planned / measured"]]
    for config, run in MEASURED[:n]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            measured = process.submit(measure, config, run, device).result()
        planned = total(plan(config, config, **run))
        tokens = run["batch_size"] * run["max_seq_len"]
        rows.append([str(config), f"{config.vocab_size:,}", f"{tokens:,}", label(**run),
                     f"{planned / 1e6:,.0f}", f"{measured / 1e6:,.0f}",
                     f"{planned / measured:.2f}"])
    return markdown(rows, "lrrlrrr")


def config_of(name: str) -> LMConfig:
    if name not in SIZES and not Path(name).exists():
        raise FileNotFoundError(f"{name} is no path, and none of the sizes {', '.join(SIZES)}")
    return SIZES[name] if name in SIZES else load_config(name)


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("--student", default=None,
        help=f"a size, {' '.join(SIZES)}, or the path of a model; default: a table of all sizes, "
             "with --grad_checkpoint and the simplest --shard and --lora_rank that fit")
    add("--teacher", default="copy",
        help="a size or a path; copy: of the student's size; self: the student without its "
             "adapters, which takes no memory; none: train_sft.py")
    recipe = parser.add_argument_group("recipe: flags of the training scripts")
    add = recipe.add_argument
    add("--batch_size", type=int, default=2, help="samples per micro-batch and process")
    add("--max_seq_len", type=int, default=2048, help="length of a sample, in tokens")
    add("--processes", type=int, default=1, help="number of processes on all machines, one per GPU")
    add("--shard", default="none", choices=["none", "zero2", "zero3"],
        help="what is sharded over the processes")
    add("--lora_rank", type=int, default=0, help="rank of the adapters; 0 trains all weights")
    add("--grad_checkpoint", action="store_true", help="activation checkpointing")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"],
        help="dtype of the matrix products")
    add("--max_new_tokens", type=int, default=0,
        help="maximum length of the student's answers in train_onpolicy.py, in tokens; 0: none")
    add("--rows", type=int, default=16,
        help="sequences generated at once: all micro-batches of a step")
    add = parser.add_argument_group("machine").add_argument
    add("--gpu_gb", type=float, default=80.0, help="memory of a GPU, in 10^9 bytes")
    add("--measure", type=int, nargs="?", default=0, const=len(MEASURED), metavar="N",
        help=f"number of small pairs, of {len(MEASURED)}, that are trained to print planned and "
             "measured memory; default: all; on a CPU, Linux only")
    add("--device", default="cpu", help="device of --measure: cpu, cuda, cuda:1, ...")
    args = parse_args(parser, max_new_tokens="[0, inf)")
    if args.teacher == "self" and not args.lora_rank:
        parser.error("--teacher self is the student without its adapters: give a --lora_rank, or "
                     "--teacher copy")
    if args.shard != "none" and args.processes == 1:
        parser.error(f"--shard {args.shard} shards the model over processes, and there is one. "
                     f"Type:\n    python {command_line()} --processes 2")
    run = {flag.dest: vars(args)[flag.dest] for flag in recipe._group_actions}
    room = USABLE * args.gpu_gb * 1e9
    if args.measure:
        return print(planned_and_measured(args.measure, args.device))
    if args.student is None:
        return print(table(run | {"grad_checkpoint": True}, room))

    run["distilled"] = args.teacher != "none"
    with checking_input():
        student = config_of(args.student)
        others = {"copy": student, "self": None, "none": None}
        teacher = others[args.teacher] if args.teacher in others else config_of(args.teacher)
        terms = plan(student, teacher, **run)
    for name, formula in terms.items():
        print(f"{name:<32}{n_bytes(formula) / 1e9:>8.2f} GB   {formula}")
    needed = total(terms)
    fits = "fits" if needed <= room else "does not fit"
    print(f"{'in all, on each process':<32}{needed / 1e9:>8.2f} GB   {fits}: {args.gpu_gb:g} GB "
          f"leave {room / 1e9:g}")
    if needed > room:
        found = first_that_fits(student, teacher, run, REMEDIES, room)
        flags = found and " ".join(f"--{name}" if value is True else f"--{name} {value}"
                                   for name, value in found[0].items())
        print(f"it fits with {flags}: {found[1] / 1e9:.2f} GB" if found else
              "none of these flags makes it fit: more processes, or a smaller model")


if __name__ == "__main__":
    main()
