"""
白盒蒸馏：学生模仿教师的整个下一词分布，而不只是答案。
White-box distillation: the student imitates the teacher's whole next-token distribution, not just the answer.

    loss = alpha * CE(student, label) + (1 - alpha) * T^2 * KL(teacher_T || student_T)

Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, Sec. 2. alpha is the weight of the labels: 1 is plain
fine-tuning, 0 (the default) listens to the teacher alone, which is right when labels are noisy and the teacher is good.
--divergence puts another distance in the place of KL (distill/losses.py); start with KL (NOTES.md has all their figures).

When: labels are few, wrong or uncertain, and the teacher is good. With 30 % wrong labels 69.2 ± 2.9 % exact match, where the
labels alone give 31.0 ± 1.6 (README).

one process    python train_distillation.py
two processes  torchrun --nproc_per_node 2 train_distillation.py --ddp
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from dataset.lm_dataset import MicroBatches, dataset_of, in_order
from distill.features import bridges_below, losses_below
from distill.fused import COMPARED, COMPARED_ACROSS, compare, fused_distillation_loss
from distill.losses import DIVERGENCES, distillation_loss_fn, pick_divergence
from distill.schedules import get_temperature
from distill.cache import TeacherCache
from interop.checkpoint import adapt, load_config, load_model, new_model, save_model
from model.config import LMConfig
from distill.teachers import Base, Teacher, ask, check_cache, check_teachers, check_vocabulary, only_words
from model.transformer import Transformer
from runtime.args import add_training_args, checking_input, parse_args
from runtime.log import Logger
from runtime.precision import autocast, pick_dtype, seed_everything
from runtime.processes import init_distributed_mode, sum_over_processes
from runtime.run import Run, open_data, place_frozen

# Teacher, student, and the numbers that suit them. Edit them in class. Weights: out/full_sft_{dim}{_moe}.pth.
SIZES = {
    "base": {"lm_config_student": LMConfig(dim=512, n_layers=8, max_seq_len=512),
             "lm_config_teacher": LMConfig(dim=768, n_layers=16, max_seq_len=512),
             "epochs": 6, "batch_size": 32, "learning_rate": 5e-6},
    "tiny": {"lm_config_student": LMConfig(dim=64, n_layers=2, n_heads=4, max_seq_len=128),
             "lm_config_teacher": LMConfig(dim=128, n_layers=4, n_heads=8, max_seq_len=128),
             "epochs": 16, "batch_size": 12, "learning_rate": 5e-3},
}


def train_epoch(epoch, wandb, alpha, temperature, run, teachers, student, tokenizer, val_data):
    args = run.args
    divergence, _ = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    weights = {"feature": args.feature_weight, "attention": args.attention_weight,
               "contrastive": args.contrastive_weight,
               # Outside the alpha mix: keeping the experts in use is no matter of whom to believe.
               "balance": student.config.aux_loss_alpha}
    for step in run.steps_of(epoch):
        temperature_now = get_temperature(step, max(1, run.total_steps - 1), temperature,
                                          args.final_temperature or temperature)
        looking = run.is_due(args.log_interval, ahead=1)
        probing = args.grad_norm_interval > 0 and run.is_due(args.grad_norm_interval, ahead=1)
        seen, gradients = {}, {}
        for batch, last in run.micro_batches(step):
            with torch.no_grad(), autocast(run.world.device, run.dtype):
                taught = ask(teachers, batch, tokenizer, args, return_hidden=args.feature_weight > 0)
            with run.forward(last):
                out = run.parallel["model"](batch.tokens, batch.lengths, at=batch.at, with_logits=False,
                                            return_hidden=args.feature_weight > 0)
                head = only_words(student.head, tokenizer, args)

                # The student speaks only where the assistant does: (S, D) states, (S, V) logits. Sums over tokens,
                # divided once by the tokens of the whole step: every token weighs the same, however the step is split.
                if args.plain_loss:
                    logits, teacher_logits = F.linear(out.final, head), F.linear(*taught.said[0][:2])
                    ce = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
                    kd = distillation_loss_fn(logits, teacher_logits, temperature_now, "sum", divergence)
                    loss = alpha * ce + (1 - alpha) * kd
                else:
                    # The same without (S, V) logits: in chunks, gradients at once. See distill/fused.py.
                    fused = partial(fused_distillation_loss, out.final, head, batch.targets, taught.said,
                                    temperature=temperature_now, divergence=divergence, kd_weight=taught.matched)
                    loss, ce, kd = fused(alpha)
                    if probing:         # each alone: their joint gradient cannot be taken to pieces
                        ce, kd = fused(1.0).loss, fused(0.0).loss
                more = losses_below(args, run.parallel, batch, out, taught.out)
                if student.config.use_moe:
                    more["balance"] = out.balance_loss / batch.step_samples
            parts = {"ce": ce / batch.step_targets, "kd": kd / batch.step_targets, **more}
            terms = {name: weights[name] * term for name, term in more.items()}
            loss = loss / batch.step_targets + sum(terms.values())

            if probing:
                terms |= {"ce": alpha * ce / batch.step_targets} if alpha > 0 else {}
                terms |= {"kd": (1 - alpha) * kd / batch.step_targets} if alpha < 1 else {}
                run.add_gradients(gradients, terms)
            if looking:
                with autocast(run.world.device, run.dtype):
                    now = compare(out.final, head, batch.targets, taught.said, taught.matched, temperature_now,
                                  across=args.divergence == "uld")
                seen = {name: seen.get(name, 0.0) + value / batch.step_targets for name, value in now.items()}
            run.backward(loss)
            run.log.add(len(batch.tokens), loss=loss, **parts)
        rates = run.gradient_norms(gradients)
        rates |= run.update(step)

        # A save also ends a row, so that a run resumed from it writes the rows that the unbroken one wrote. The
        # comparison with the teacher is that of the row's last step; all other losses are means since the row before.
        if run.is_due(args.log_interval) or run.is_due(args.save_interval):
            seen = {name: sum_over_processes(value) for name, value in seen.items() if name != "ce"}
            run.log.row(run.steps_done, wandb, **seen, temperature=temperature_now, **rates)
        if val_data is not None and run.is_due(args.eval_interval):
            scores = evaluate(student, run.share(in_order(val_data)), run.world.device, teachers, tokenizer, run.dtype, args)
            run.log.row(run.steps_done, wandb, **scores)
            if run.is_best(scores["val_uld" if args.divergence == "uld" else "val_kl"]):
                save_model(student, tokenizer, f"{args.out_dir}/{run.name}_best.pth")
        stopping = run.must_stop()
        if stopping or run.is_due(args.save_interval):
            save_model(student, tokenizer, f"{args.out_dir}/{run.name}.pth")
            run.save()
        if stopping:
            return


@torch.no_grad()
def evaluate(model, val_loader, device, teachers, tokenizer, dtype, args):
    """Means over the supervised tokens, of what distill.fused.compare describes."""
    model.eval()
    names = COMPARED_ACROSS if args.divergence == "uld" else COMPARED
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
    for batch in val_loader:
        batch = batch.to(device)
        with autocast(device, dtype):
            taught = ask(teachers, batch, tokenizer, args)
            out = model(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
            head = only_words(model.head, tokenizer, args)
            scores = compare(out.final, head, batch.targets, taught.said, taught.matched, args.temperature,
                             across=args.divergence == "uld")
        sums += torch.stack([*scores.values(), torch.tensor(len(batch.targets), device=device)])
    model.train()
    *sums, n = sum_over_processes(sums).tolist()
    return {f"val_{name}": value / n for name, value in zip(names, sums)}


def init_student_model(lm_config, weights, vocabulary):
    """The student and its tokenizer: from weights of any kind, or with 'none' a new one of lm_config's sizes."""
    model, tokenizer = new_model(lm_config, vocabulary) if weights == "none" else load_model(weights)
    Logger(f"student {model.config}: {model.n_parameters() / 1e6:.2f} M parameters, from {weights}")
    return model.train(), tokenizer


def init_teacher_model(weights, args, world):
    """The teacher, never trained: in eval mode, without gradients, outside DDP, and in bf16 where the hardware has it."""
    dtype = torch.bfloat16 if pick_dtype(args.dtype, world.device) == torch.bfloat16 else torch.float32
    # What will be shared out need not fit on one device.
    model, tokenizer = load_model(weights, "cpu" if args.shard == "zero3" else world.device, dtype)
    Logger(f"teacher {model.config}: {model.n_parameters() / 1e6:.2f} M parameters, from {weights}")
    return place_frozen(model.requires_grad_(False), args, world), tokenizer


def distill(teachers, student, tokenizer, args, world):
    """One student and its teachers: sections 4 to 6 of the run."""
    with checking_input():
        # 4. Data. A teacher that cuts text into other tokens reads the same samples in its own; one that is told more than
        # the student (an experience, a document, a hint) reads other prompts to the same answers.
        models = [teacher for teacher in teachers if not isinstance(teacher.source, TeacherCache)]
        other_words = [model for model in models if model.tokenizer.sha256 != tokenizer.sha256]
        kind = dataset_of(args.data_path)
        own_side = models if args.teacher_data_path else other_words
        train_data, val_data = open_data(kind, args, tokenizer, student.config, world, *own_side,
                                                 other_paths=args.teacher_data_path)
        data = MicroBatches(train_data, args.batch_size, args.accumulation_steps, world.rank, world.size, args.seed)
        shortest = min((model.source.config.max_seq_len for model in models), default=train_data.max_seq_len)
        if train_data.max_seq_len > shortest and not own_side:
            raise ValueError(f"the student reads {train_data.max_seq_len} tokens, the teacher was made for {shortest}: "
                             f"--max_seq_len {shortest}")
        for teacher in teachers:
            if isinstance(teacher.source, TeacherCache):
                for part in filter(None, (train_data, val_data)):
                    check_cache(teacher.source, part, args)

        # 5. Optimizer, precision, and where an interrupted run stood
        name = f"full_dist_{student.config.dim}{student.config.moe_path}{'_lora' if args.lora_rank else ''}"
        bridges = bridges_below(args, student.config, models[0].source.config) if models else {}
        run = Run(name, args, world, {"model": student, **bridges}, data)
        if run.dtype == torch.bfloat16 and not run.sharded:     # a student of the chain that teaches now comes in fp32
            for teacher in models:
                if isinstance(teacher.source, Transformer):
                    teacher.source.to(torch.bfloat16)

    # 6. Train
    names = [f"{teacher.source.config if teacher in models else teacher.source.described()}" for teacher in teachers]
    if len(teachers) > 1:
        names = [f"{teacher.weight:.2g} x ({name})" for teacher, name in zip(teachers, names)]
    Logger(f"{' + '.join(names)} teaches {student.config}")
    Logger(f"loss = {loss_in_words(student.config, args)}; {run.total_steps} steps of {data.step_samples} samples, "
           + ("plain: with all logits" if args.plain_loss else "fused: in chunks, without (tokens, vocabulary) logits"))
    for epoch in run.epochs:
        train_epoch(epoch, run.wandb, args.alpha, args.temperature, run, teachers, student, tokenizer, val_data)
    run.close()


def loss_in_words(lm_config, args) -> str:
    _, divergence = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    return (f"{args.alpha:.2f} CE + {1 - args.alpha:.2f} * {args.temperature:g}^2 * {divergence} at T={args.temperature:g}"
            + (f" moving to {args.final_temperature:g}" if args.final_temperature else "")
            + (f" + {args.feature_weight:g} * feature {args.feature_loss.upper()}" if args.feature_weight > 0 else "")
            + (f" + {args.attention_weight:g} * attention relations" if args.attention_weight > 0 else "")
            + (f" + {args.contrastive_weight:g} * InfoNCE" if args.contrastive_weight > 0 else "")
            + (f" + {lm_config.aux_loss_alpha:g} * balance" if lm_config.use_moe else ""))


def progressive_distillation(teachers, students, distill):
    """teacher -> medium -> small: each student, once taught, teaches the next. Mirzadeh et al. 2019,
    https://arxiv.org/abs/1902.03393. `distill(teachers, student, tokenizer)` teaches one."""
    for student, tokenizer in students:
        distill(teachers, student, tokenizer)
        teachers = [Teacher(student.eval().requires_grad_(False), 1.0, tokenizer)]


def fill_in(args) -> list[tuple[str, LMConfig]]:
    """Complete the arguments from a row of SIZES. Returns the students from large to small: (weights, sizes if new)."""

    def sft_weights(config):
        """Where they lie: in OUT_DIR or, for a run that writes elsewhere, in out/."""
        name = f"full_sft_{config.dim}{config.moe_path}.pth"
        return next((path for path in (Path(args.out_dir, name), Path("out", name)) if path.exists()), Path("out", name))

    complete = [name for name, size in SIZES.items() if sft_weights(size["lm_config_student"]).exists()
                and (args.teacher_cache or sft_weights(size["lm_config_teacher"]).exists())]
    name = args.size if args.size != "auto" else (complete or ["base"])[0]
    size = SIZES[name]
    for key in ("epochs", "batch_size", "learning_rate"):
        if getattr(args, key) is None:
            setattr(args, key, size[key])
    Logger(f"{args.epochs} epochs, batch size {args.batch_size}, learning rate {args.learning_rate:g}; "
           f"what was not given is as for size {name}")

    given = size["lm_config_student"]
    last = LMConfig(dim=args.dim or given.dim, n_layers=args.n_layers or given.n_layers,
                    n_heads=args.n_heads or given.n_heads, use_moe=args.use_moe,
                    max_seq_len=args.max_seq_len or given.max_seq_len)
    if not args.teacher and not args.teacher_cache:
        args.teacher = [str(sft_weights(size["lm_config_teacher"]))]
    students = []
    for link in args.chain:
        if re.fullmatch(r"\d+x\d+", link):
            dim, n_layers = map(int, link.split("x"))
            n_heads = next((n for n in (8, 4, 2) if dim % (2 * n) == 0), 1)
            config = LMConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, max_seq_len=last.max_seq_len)
            start = sft_weights(config)
            fits = start.exists() and load_config(start).n_layers == n_layers
            students.append((str(start) if fits else "none", config))
        else:
            students.append((link, last))
    students.append((args.student or str(sft_weights(last)), last))
    for path in (*(path_and_weight(spec)[0] for spec in args.teacher or []), *(weights for weights, _ in students)):
        if Path(path).is_dir() and not Path(path, "config.json").exists():
            sys.exit(f"{path} is a folder, but no model; what a teacher said there is given with --teacher_cache")
        if path != "none" and not Path(path).exists():
            sys.exit(f"no weights at {path}. Name others with --teacher and --student; the tiny pair is made by "
                     "bash quickstart.sh, your own by train_sft.py; README.md tells how to download real ones")
    return students


def path_and_weight(spec: str) -> tuple[str, float]:
    """'PATH=WEIGHT' or 'PATH', whose weight is 1."""
    path, _, weight = spec.rpartition("=")
    try:
        return (spec, 1.0) if not path or Path(spec).exists() else (path, float(weight))
    except ValueError:
        raise ValueError(f"{spec}: {weight!r} is no number; write PATH=WEIGHT, or PATH alone") from None


def init_teachers(args, world) -> list[Teacher]:
    """All of --teacher and --teacher_cache, their weights made to sum to 1."""
    teachers = []
    for spec in args.teacher or []:
        path, weight = path_and_weight(spec)
        model, tokenizer = init_teacher_model(path, args, world)
        teachers.append(Teacher(model, weight, tokenizer))
    for spec in args.teacher_cache or []:
        path, weight = path_and_weight(spec)
        teachers.append(Teacher(TeacherCache(path).to(world.device), weight, None))
    if min(teacher.weight for teacher in teachers) <= 0:
        raise ValueError("the weight of a teacher must be above 0; leave out one that is not to teach")
    total = sum(teacher.weight for teacher in teachers)
    return [teacher._replace(weight=teacher.weight / total) for teacher in teachers]


def name_idle_flags(parser, args):
    """Say it where a flag was given that this loss does not use."""
    for in_use, flags in ((args.divergence == "jsd", ("beta", "jsd_normalised")), ("skew" in args.divergence, ("skew",)),
                          (args.feature_weight > 0, ("feature_loss", "layer_map")),
                          (args.attention_weight > 0, ("relation_heads",)),
                          (args.contrastive_weight > 0, ("contrastive_temperature",))):
        for flag in flags:
            if not in_use and vars(args)[flag] != parser.get_default(flag):
                Logger(f"--{flag} {vars(args)[flag]} has no effect on this loss")
    if args.shard != "none" and args.grad_norm_interval > 0:
        Logger(f"--shard {args.shard}: no process has the whole gradient, so that its norm per loss term is not looked at "
               "(--grad_norm_interval 0)")
        args.grad_norm_interval = 0


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("lesson").add_argument
    add("--data_path", nargs="+", default=["./dataset/sft_data.jsonl"],
        help="files of conversations, or of texts to go on with, in the formats of dataset/dataset.md")
    add("--teacher", nargs="+", action="extend", metavar="PATH[=WEIGHT]", help="its weights: a checkpoint, a Hugging Face "
        "folder, a GGUF file; default: full_sft_DIM.pth of --size's teacher, in OUT_DIR or out/. Several teach as one, "
        "the mean of their distributions by WEIGHT")
    add("--teacher_data_path", nargs="+", default=None, help="what the teacher reads in place of --data_path: the same answers, "
        "row by row, to prompts that tell more, so that the student learns to do without")
    add("--teacher_cache", nargs="+", action="extend", metavar="DIR[=WEIGHT]", help="what a teacher said, written by "
        "scripts/cache_teacher.py: it teaches without being in memory")
    add("--student", "--weights", default=None, help="weights to start from; default: full_sft_DIM.pth of --size's "
                                                     "student, in OUT_DIR or out/; none: from nothing")
    add("--size", default="auto", choices=["auto", *SIZES],
        help="row of SIZES that fills in what is not given; auto: the first whose two weight files are there")
    add("--dim", type=int, default=None, help="width of the student, instead of --size's")
    add("--n_layers", type=int, default=None, help="its depth, likewise")
    add("--n_heads", type=int, default=None, help="its query heads, likewise")
    add("--use_moe", action="store_true", help="its FFNs are mixtures of experts")
    add("--chain", nargs="*", default=[], metavar="WEIGHTS", help="students in between, from large to small: weight "
        "files, or sizes like 96x3 that start from full_sft_96.pth if that has these sizes, else from nothing")
    add("--alpha", type=float, default=0.0, help="weight of CE in [0, 1]; the divergence has 1 - alpha")
    add("--divergence", default="forward_kl", choices=DIVERGENCES, help="between teacher and student, see distill/losses.py; "
        "uld: of any two tokenizers, compared wherever both have seen the same text")
    add("--beta", type=float, default=0.5, help="of jsd, in [0, 1]: 0 is forward KL, 1 reverse KL")
    add("--jsd_normalised", action="store_true", help="divide jsd by beta (1 - beta), so that it tends to them at its ends")
    add("--skew", type=float, default=0.1, help="of the skew KLs, in (0, 1): share of the other one that is mixed in")
    add("--temperature", type=float, default=1.0, help="softens both distributions; 1 leaves them")
    add("--final_temperature", type=float, default=None, help="the temperature moves to this in a straight line")
    add("--feature_weight", type=float, default=0.0, help="weight of the hidden-state loss; 0: off, and costs nothing")
    add("--feature_loss", default="mse", choices=["mse", "cosine"], help="how hidden states are compared")
    add("--layer_map", default="uniform", help="which layers: uniform, last, or by hand, STUDENT:TEACHER like 1:2,2:4")
    add("--attention_weight", type=float, default=0.0, help="weight of MiniLM's attention relations; 0: off")
    add("--relation_heads", type=int, default=4, help="heads of the relations; must divide all widths of q, k and v")
    add("--contrastive_weight", type=float, default=0.0, help="weight of InfoNCE on pooled hidden states; 0: off")
    add("--contrastive_temperature", type=float, default=0.1, help="of its similarities")
    add("--pad_vocab", action="store_true", help="leave out the columns beyond the tokenizer's words, with which a model "
                                                 "family rounds its vocabulary up")
    add("--plain_loss", action="store_true", help="the loss as papers write it, with all logits; default: the same, fused")
    add("--grad_norm_interval", type=int, default=100, help="steps between two looks at the gradient's norm per loss "
                                                           "term, each one more backward pass a term; 0: none")
    add("--epochs", type=int, default=None, help="passes over the data; default: --size's")
    add("--batch_size", type=int, default=None, help="samples per micro-batch and process; default: --size's")
    add("--learning_rate", type=float, default=None,
        help="of the cosine, which runs from 1.1 to 0.1 times this; default: --size's")
    add_training_args(parser)
    args = parse_args(parser)
    if not 0.0 <= args.alpha <= 1.0:
        parser.error(f"--alpha {args.alpha} is the weight of CE and must lie in [0, 1]")
    if args.divergence == "uld" and args.alpha == 0.0:
        parser.error("--divergence uld compares how sure the two are, not of what: give the labels a weight, --alpha 0.5")
    if not 0.0 <= args.beta <= 1.0:
        parser.error(f"--beta {args.beta} must lie in [0, 1]")
    if not 0.0 < args.skew < 1.0:
        parser.error(f"--skew {args.skew} must lie between 0 and 1; at 0 it is the plain KL")
    for name in ("temperature", "final_temperature", "contrastive_temperature"):
        if vars(args)[name] is not None and vars(args)[name] <= 0:
            parser.error(f"--{name} {vars(args)[name]} must be above 0")

    # 2. Processes and seeds
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    seed_everything(args.seed)

    with checking_input():
        # 3. Models
        students = fill_in(args)
        name_idle_flags(parser, args)
        # A student with adapters is taught by what it was without them: no second copy in memory.
        by_itself = len(students) == 1 and args.teacher == [students[0][0]]
        if by_itself and not args.teacher_data_path and args.alpha == 0:
            Logger(f"{args.teacher[0]} is teacher and student and reads the same prompts: it can teach itself nothing. "
                   "--teacher_data_path names what it is told besides, as the teacher")
        as_it_was = by_itself and args.lora_rank > 0
        teachers, pairs = [] if as_it_was else init_teachers(args, world), []
        vocabulary = args.tokenizer or next((teacher.tokenizer for teacher in teachers if teacher.tokenizer), None)
        for weights, lm_config in students:
            student, tokenizer = init_student_model(lm_config, weights, vocabulary)
            check_vocabulary(teachers, student, tokenizer, args)
            if args.lora_rank:
                Logger(adapt(student, weights, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets))
            pairs.append((student, tokenizer))
        if as_it_was:
            Logger(f"teacher: {weights} too, without the adapters")
            teachers = [Teacher(Base(student), 1.0, tokenizer)]
        check_teachers(teachers, args)
        names = [f"{student.config.dim}{student.config.moe_path}" for student, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"students {', '.join(names)}: two of a chain would be saved as one full_dist_DIM.pth; "
                             "give them different widths")

    # 4. to 6. Teach them, one after the other
    progressive_distillation(teachers, pairs, partial(distill, args=args, world=world))


if __name__ == "__main__":
    main()
