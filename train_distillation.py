"""
白盒蒸馏：学生模仿教师的整个下一词分布，而不只是答案。
White-box distillation: the student imitates the teacher's whole next-token distribution, not just the answer.

    loss = alpha * CE(student, label) + (1 - alpha) * T^2 * KL(teacher_T || student_T)

Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, Sec. 2. alpha is the weight of the labels: 1 is plain
fine-tuning, 0 (the default) listens to the teacher alone, which is right when labels are noisy and the teacher is good.

one process    python train_distillation.py
two processes  torchrun --nproc_per_node 2 train_distillation.py --ddp
"""

import argparse
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import runtime
from dataset.lm_dataset import MicroBatches, SFTDataset, in_order
from distill.features import FeatureProjections, feature_distillation_loss
from distill.losses import distillation_loss_fn
from distill.schedules import get_temperature
from model.checkpoint import load_model, new_model, read_about, save_model
from model.config import LMConfig
from runtime import Logger

# Teacher, student, and the numbers that suit them. Edit them in class. Weights: out/full_sft_{dim}{_moe}.pth.
SIZES = {
    "base": {"lm_config_student": LMConfig(dim=512, n_layers=8, max_seq_len=512),
             "lm_config_teacher": LMConfig(dim=768, n_layers=16, max_seq_len=512),
             "epochs": 6, "batch_size": 32, "learning_rate": 5e-6},
    "tiny": {"lm_config_student": LMConfig(dim=64, n_layers=2, n_heads=4, max_seq_len=128),
             "lm_config_teacher": LMConfig(dim=128, n_layers=4, n_heads=8, max_seq_len=128),
             "epochs": 16, "batch_size": 12, "learning_rate": 5e-3},
}


def train_epoch(epoch, wandb, alpha, temperature, run, teacher, student, tokenizer, val_data):
    args = run.args
    for step in run.steps_of(epoch):
        temperature_now = get_temperature(step, run.total_steps, temperature, args.final_temperature or temperature)
        for batch, last in run.micro_batches(step):
            with torch.no_grad(), runtime.autocast(run.dtype, run.world.device):
                taught = teacher(batch.tokens, batch.lengths, at=batch.at, return_hidden=args.feature_weight > 0)
            with run.forward(last):
                out = run.parallel["model"](batch.tokens, batch.lengths, at=batch.at,
                                            return_hidden=args.feature_weight > 0)

            # Both models speak only where the assistant does: (S, V). Sums over tokens, divided once by the tokens of
            # the whole step: every token weighs the same, however the step is split.
            ce = F.cross_entropy(out.logits.float(), batch.targets, reduction="sum")
            kd = distillation_loss_fn(out.logits, taught.logits, temperature_now, reduction="sum")
            loss = (alpha * ce + (1 - alpha) * kd) / batch.step_targets
            parts = {"ce": ce / batch.step_targets, "kd": kd / batch.step_targets}
            if args.feature_weight > 0:
                with run.forward(last):
                    features = run.parallel["projections"](out.hidden, taught.hidden)
                parts["feature"] = feature_distillation_loss(*features) / batch.step_targets
                loss = loss + args.feature_weight * parts["feature"]
            if student.config.use_moe:
                # Outside the alpha mix: keeping the experts in use is no matter of whom to believe.
                parts["balance"] = out.balance_loss / batch.step_samples
                loss = loss + student.config.aux_loss_alpha * parts["balance"]
            run.backward(loss)
            run.log.add(len(batch.tokens), loss=loss, **parts)
        rates = run.update(step)

        # A save also ends a row, so that a run resumed from it writes the rows that the unbroken one wrote.
        if run.is_due(args.log_interval) or run.is_due(args.save_interval):
            run.log.row(run.steps_done, wandb, temperature=temperature_now, **rates)
        if val_data is not None and run.is_due(args.eval_interval):
            val_loader = in_order(val_data, rank=run.world.rank, world_size=run.world.size)
            scores = evaluate(student, val_loader, run.world.device, teacher, run.dtype)
            run.log.row(run.steps_done, wandb, **scores)
            if run.is_best(scores["val_kl"]) and run.is_main:
                save_model(student, tokenizer, f"{args.out_dir}/{run.name}_best.pth")
        stopping = run.must_stop()
        if stopping or run.is_due(args.save_interval):
            if run.is_main:
                save_model(student, tokenizer, f"{args.out_dir}/{run.name}.pth")
            run.save()
        if stopping:
            return


@torch.no_grad()
def evaluate(model, val_loader, device, teacher, dtype):
    """Per supervised token: cross-entropy, KL(teacher || student) in nats, and how often both rank one word first."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in val_loader:
        batch = batch.to(device)
        with runtime.autocast(dtype, device):
            logits = model(batch.tokens, batch.lengths, at=batch.at).logits
            teacher_logits = teacher(batch.tokens, batch.lengths, at=batch.at).logits
        sums[0] += F.cross_entropy(logits.float(), batch.targets, reduction="sum")
        sums[1] += distillation_loss_fn(logits, teacher_logits, reduction="sum")
        sums[2] += (logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
        sums[3] += len(batch.targets)
    model.train()
    ce, kl, agree, n = runtime.sum_over_processes(sums).tolist()
    return {"val_loss": ce / n, "val_kl": kl / n, "val_agreement": agree / n}


def init_student_model(lm_config, weights, tokenizer_path):
    """The student and its tokenizer: from a weight file, or with 'none' a new one of lm_config's sizes."""
    model, tokenizer = new_model(lm_config, tokenizer_path) if weights == "none" else load_model(weights)
    Logger(f"student {model.config}: {model.n_parameters() / 1e6:.2f} M parameters, from {weights}")
    return model.train(), tokenizer


def init_teacher_model(weights):
    """The teacher, never trained: in eval mode, without gradients, and outside DDP."""
    model, tokenizer = load_model(weights)
    Logger(f"teacher {model.config}: {model.n_parameters() / 1e6:.2f} M parameters, from {weights}")
    return model.requires_grad_(False), tokenizer


def distill(teacher, student, tokenizer, args, world):
    """One teacher, one student: sections 4 to 6 of the run."""
    with runtime.checking_input():
        # 4. Data
        train_data, val_data = runtime.open_data(SFTDataset, args, tokenizer, student.config, world)
        data = MicroBatches(train_data, args.batch_size, args.accumulation_steps, world.rank, world.size, args.seed)

        # 5. Optimizer, precision, and where an interrupted run stood
        name = f"full_dist_{student.config.dim}{student.config.moe_path}"
        projections = FeatureProjections(student.config, teacher.config) if args.feature_weight > 0 else None
        run = runtime.Run(name, args, world, {"model": student, "projections": projections}, data)
        teacher = teacher.to(world.device, run.dtype if run.dtype == torch.bfloat16 else torch.float32)

    # 6. Train
    Logger(f"{teacher.config} teaches {student.config}")
    Logger(f"loss = {args.alpha:.2f} CE + {1 - args.alpha:.2f} * {args.temperature:g}^2 * KL(teacher || student) "
           f"at T={args.temperature:g}"
           + (f" moving to {args.final_temperature:g}" if args.final_temperature else "")
           + (f" + {args.feature_weight:g} * feature MSE" if args.feature_weight > 0 else "")
           + (f" + {student.config.aux_loss_alpha:g} * balance" if student.config.use_moe else "")
           + f"; {run.total_steps} steps of {data.step_samples} samples")
    for epoch in run.epochs:
        train_epoch(epoch, run.wandb, args.alpha, args.temperature, run, teacher, student, tokenizer, val_data)
    run.close()


def progressive_distillation(teacher, students, distill):
    """teacher -> medium -> small: each student, once taught, teaches the next. Mirzadeh et al. 2019,
    https://arxiv.org/abs/1902.03393. `distill(teacher, student)` teaches one; returns the last."""
    for student in students:
        distill(teacher, student)
        teacher = student.eval().requires_grad_(False)
    return teacher


def fill_in(args) -> list[tuple[str, LMConfig]]:
    """Complete the arguments from a row of SIZES. Returns the students from large to small: (weights, sizes if new)."""

    def sft_weights(config):
        """Where they lie: in OUT_DIR or, for a run that writes elsewhere, in out/."""
        name = f"full_sft_{config.dim}{config.moe_path}.pth"
        return next((path for path in (Path(args.out_dir, name), Path("out", name)) if path.exists()), Path("out", name))

    complete = [name for name, size in SIZES.items()
                if sft_weights(size["lm_config_student"]).exists() and sft_weights(size["lm_config_teacher"]).exists()]
    name = args.size if args.size != "auto" else (complete or ["base"])[0]
    size = SIZES[name]
    for key in ("epochs", "batch_size", "learning_rate"):
        if getattr(args, key) is None:
            setattr(args, key, size[key])
    Logger(f"size {name}: {args.epochs} epochs, batch size {args.batch_size}, learning rate {args.learning_rate:g}")

    given = size["lm_config_student"]
    last = LMConfig(dim=args.dim or given.dim, n_layers=args.n_layers or given.n_layers,
                    n_heads=args.n_heads or given.n_heads, use_moe=args.use_moe,
                    max_seq_len=args.max_seq_len or given.max_seq_len)
    args.teacher = args.teacher or str(sft_weights(size["lm_config_teacher"]))
    students = []
    for link in args.chain:
        if re.fullmatch(r"\d+x\d+", link):
            dim, n_layers = map(int, link.split("x"))
            n_heads = next((n for n in (8, 4, 2) if dim % (2 * n) == 0), 1)
            config = LMConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, max_seq_len=last.max_seq_len)
            start = sft_weights(config)
            fits = start.exists() and read_about(start)[0].n_layers == n_layers
            students.append((str(start) if fits else "none", config))
        else:
            students.append((link, last))
    students.append((args.student or str(sft_weights(last)), last))
    for path in (args.teacher, *(weights for weights, _ in students)):
        if path != "none" and not Path(path).exists():
            sys.exit(f"no weights at {path}. Make the tiny pair: bash quickstart.sh; "
                     "your own: python train_sft.py --help; or name others with --teacher and --student")
    return students


def check_vocabulary(teacher, teacher_tokenizer, student, tokenizer):
    """Column v of both distributions must be the same word."""
    if teacher.config.vocab_size != student.config.vocab_size:
        sys.exit(f"the teacher's vocabulary has {teacher.config.vocab_size} words, the student's "
                 f"{student.config.vocab_size}; train both with one tokenizer")
    if teacher_tokenizer.sha256 != tokenizer.sha256:
        sys.exit(f"teacher and student have different vocabularies of one size, {teacher_tokenizer.path} and "
                 f"{tokenizer.path}; train both with one tokenizer")


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("lesson").add_argument
    add("--data_path", nargs="+", default=["./dataset/sft_data.jsonl"],
        help="files of conversations, in the formats of dataset/dataset.md")
    add("--teacher", default=None, help="its weights; default: full_sft_DIM.pth of --size's teacher, in OUT_DIR or out/")
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
    add("--alpha", type=float, default=0.0, help="weight of CE in [0, 1]; KL has 1 - alpha")
    add("--temperature", type=float, default=1.0, help="softens both distributions; 1 leaves them")
    add("--final_temperature", type=float, default=None, help="the temperature moves to this in a straight line")
    add("--feature_weight", type=float, default=0.0, help="weight of the hidden-state loss; 0: off, and costs nothing")
    add("--epochs", type=int, default=None, help="passes over the data; default: --size's")
    add("--batch_size", type=int, default=None, help="samples per micro-batch and process; default: --size's")
    add("--learning_rate", type=float, default=None,
        help="of the cosine, which runs from 1.1 to 0.1 times this; default: --size's")
    runtime.add_training_args(parser)
    args = runtime.parse_args(parser)
    if not 0.0 <= args.alpha <= 1.0:
        parser.error(f"--alpha {args.alpha} is the weight of CE and must lie in [0, 1]")
    for name in ("temperature", "final_temperature"):
        if vars(args)[name] is not None and vars(args)[name] <= 0:
            parser.error(f"--{name} {vars(args)[name]} must be above 0")

    # 2. Processes and seeds
    world = runtime.init_distributed_mode(args)
    runtime.seed_everything(args.seed)

    with runtime.checking_input():
        # 3. Models
        students = fill_in(args)
        teacher, teacher_tokenizer = init_teacher_model(args.teacher)
        models = []
        for weights, lm_config in students:
            student, tokenizer = init_student_model(lm_config, weights, args.tokenizer)
            check_vocabulary(teacher, teacher_tokenizer, student, tokenizer)
            models.append(student)
        names = [f"{model.config.dim}{model.config.moe_path}" for model in models]
        if len(set(names)) < len(names):
            raise ValueError(f"students {', '.join(names)}: two of a chain would be saved as one full_dist_DIM.pth; "
                             "give them different widths")

    # 4. to 6. Teach them, one after the other
    progressive_distillation(teacher, models, lambda t, s: distill(t, s, tokenizer, args, world))


if __name__ == "__main__":
    main()
