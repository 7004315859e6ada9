"""
内存规划：多大的模型在几块 GPU 上放得下，每一项都写出算式。
What fits where: the memory of a training run, each term with its formula.

    python scripts/plan_memory.py                        a table: model sizes by numbers of GPUs
    python scripts/plan_memory.py --student 8B --processes 8 --shard zero3 --grad_checkpoint

Each trainable weight takes 16 bytes: itself and its gradient in fp32, and AdamW's two moments
(Rajbhandari et al. 2020, ZeRO, https://arxiv.org/abs/1910.02054, Sec. 3.1), where Muon has one;
zero2 and zero3 divide them by the number of processes. GB are 10^9 bytes; a tenth of a GPU's memory
is left to CUDA, NCCL and fragmentation. While it loads, a process takes 4 bytes a weight of the
host's memory.
"""

import re
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import torch

from distill.fused import CHUNK_BYTES, MAX_ROWS
from evaluation.tables import markdown
from interop.checkpoint import empty_model, load_config
from model.config import LMConfig
from model.lora import add_lora, lora_state
from model.sizes import SIZES
from runtime.args import add_training_args, checking_input, make_parser, parse_args

USABLE, BUFFERS = 0.9, 10       # of a GPU's memory; (rows, V) in fp32, of a divergence by autograd
# Flags that make a run smaller, the least costly first.
REMEDIES = [lora | shard | checkpoint for lora in ({}, {"lora_rank": 16})
            for shard in ({}, {"shard": "zero2"}, {"shard": "zero3"})
            for checkpoint in ({}, {"grad_checkpoint": True})]
Count = namedtuple("Count", "all layer matrices rest trained")      # weights; rest: not in layers


def n_bytes(formula: str) -> int:
    """"4 B x 1,000 / 8 processes" -> 500: the numbers in words; / rounds down."""
    return eval(re.sub(r"[^\d+*/()]", "", formula.replace(" x ", "*").replace("/", "//")))


def total(terms: dict[str, str]) -> int:
    return sum(map(n_bytes, terms.values()))


def count(config: LMConfig, lora_rank: int = 0) -> Count:
    """Counted on a model of one layer on the meta device; all layers are alike."""
    model = empty_model(replace(config, n_layers=1), "meta", torch.float32)
    sizes = [(weight.numel(), weight.dim()) for weight in model.layers[0].parameters()]
    layer = sum(n for n, _ in sizes)
    rest = model.n_parameters() - layer
    n = rest + config.n_layers * layer
    trained = n
    if lora_rank:
        add_lora(model, lora_rank)
        trained = config.n_layers * sum(weight.numel() for weight in lora_state(model).values())
    return Count(n, layer, sum(n for n, n_dims in sizes if n_dims >= 2), rest, trained)


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
         optimizer="adamw", max_new_tokens=0, rows=16, distilled=True) -> dict[str, str]:
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
    muon = L * n.matrices if optimizer == "muon" and not lora_rank else 0
    moments = f"8 B x {n.trained:,}"
    if muon:
        moments = f"(4 B x {muon:,} in the layers' matrices + 8 B x {n.trained - muon:,})"
    terms |= {"gradients": f"4 B x {n.trained:,}{over}", "moments": f"{moments}{over}"}
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


def first_that_fits(student, teacher, run: dict, room: float) -> tuple[dict, int] | None:
    """The first of REMEDIES with which a run fits into `room` bytes, and those it takes; None if
    none does. One process shards nothing."""
    for change in REMEDIES:
        changed = run | change
        if changed["shard"] == "none" or changed["processes"] > 1:
            needed = total(plan(student, teacher, **changed))
            if needed <= room:
                return change, needed
    return None


def label(lora_rank=0, shard="none", **_) -> str:
    return f"LoRA {lora_rank}, {shard}" if lora_rank else f"full, {shard}"


def table(run: dict, room: float, n_gpus=(1, 2, 4, 8)) -> str:
    """What fits for each size, with a teacher of that size."""
    rows = [["model", "weights", *(f"{n} GPU{'s' * (n > 1)}" for n in n_gpus)]]
    for name, config in SIZES.items():
        found = [first_that_fits(config, config, run | {"processes": n}, room) for n in n_gpus]
        rows.append([name, f"{count(config).all / 1e9:.2f} G", *(
            f"{label(**run | each[0])}: {each[1] / 1e9:.0f} GB" if each else "-"
            for each in found)])
    return markdown(rows, "lr" + "l" * len(n_gpus))


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
             "adapters; served: behind a server or in a cache; neither takes memory here; none: "
             "train_sft.py")
    recipe = parser.add_argument_group("recipe: flags of the training scripts")
    add = recipe.add_argument
    add("--batch_size", type=int, default=2, help="samples per micro-batch and process")
    add("--max_seq_len", type=int, default=2048, help="length of a sample, in tokens")
    add("--processes", type=int, default=1, help="number of processes on all machines, one per GPU")
    add_training_args(training := make_parser(""))
    for name in "optimizer shard lora_rank grad_checkpoint dtype".split():
        recipe._add_action(training._option_string_actions[f"--{name}"])
    add("--max_new_tokens", type=int, default=0,
        help="maximum length of the student's answers in train_onpolicy.py, in tokens; 0: none")
    add("--rows", type=int, default=16,
        help="sequences generated at once: all micro-batches of a step")
    parser.add_argument("--gpu_gb", type=float, default=80.0,
        help="memory of a GPU, in 10^9 bytes")
    args = parse_args(parser, max_new_tokens="[0, inf)")
    if args.shard != "none" and args.processes == 1:
        parser.error(f"--shard {args.shard} shards over processes, and there is one: --processes 2")
    run = {flag.dest: vars(args)[flag.dest] for flag in recipe._group_actions}
    room = USABLE * args.gpu_gb * 1e9
    if args.student is None:
        return print(table(run | {"grad_checkpoint": True}, room))

    run["distilled"] = args.teacher != "none"
    with checking_input():
        student = config_of(args.student)
        others = {"copy": student, "self": None, "served": None, "none": None}
        teacher = others[args.teacher] if args.teacher in others else config_of(args.teacher)
        terms = plan(student, teacher, **run)
    for name, formula in terms.items():
        print(f"{name:<32}{n_bytes(formula) / 1e9:>8.2f} GB   {formula}")
    needed = total(terms)
    fits = "fits" if needed <= room else "does not fit"
    print(f"{'in all, on each process':<32}{needed / 1e9:>8.2f} GB   {fits}: {args.gpu_gb:g} GB "
          f"leave {room / 1e9:g}")
    if needed > room:
        found = first_that_fits(student, teacher, run, room)
        flags = found and " ".join(f"--{name}" if value is True else f"--{name} {value}"
                                   for name, value in found[0].items())
        print(f"it fits with {flags}: {found[1] / 1e9:.2f} GB" if found else
              "none of these flags makes it fit: more processes, or a smaller model")


if __name__ == "__main__":
    main()
