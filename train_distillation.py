"""
白盒蒸馏：学生模仿教师的整个下一词元分布，而不只是答案。
White-box knowledge distillation: the student imitates the teacher's whole next-token distribution
(soft labels, "dark knowledge"), not just the answer.

    loss = alpha * CE(student, label) + (1 - alpha) * T^2 * KL(teacher_T || student_T)

Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, Sec. 2. alpha is the weight of the
labels: 1 is plain fine-tuning, 0 (the default) uses the soft labels alone, which is best when
labels are noisy and the teacher is good. --divergence replaces the KL (distill/losses.py).

When: labels are few, noisy or uncertain, and the teacher is good (figures: docs/results.md).

one process    python train_distillation.py
two processes  torchrun --nproc_per_node 2 train_distillation.py --ddp
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from dataset.lm_dataset import MicroBatches, dataset_of, in_order, make_loader, open_data
from distill.features import feature_distillation_loss      # noqa: F401  readers look for it here
from distill.flags import (add_divergence_args, add_intermediate_args, check_chain, check_teachers,
                           describe_loss, make_intermediate)
from distill.fused import fused_distillation_loss
from distill.losses import DIVERGENCES, distillation_loss_fn, pick_divergence
from distill.served import add_served_args, make_served, read_ahead
from distill.teachers import (Teacher, check_caches, make_teachers, progressive_distillation,
                              read_once, share_vocabulary, teacher_outputs, teacher_side)
from evaluation.validation import evaluate
from interop.checkpoint import freeze, load_teacher, prepare, run_name, save_model
from interop.sizes import fill_in, init_student_model, init_teacher_model   # noqa: F401
from model.config import LMConfig
from model.lora import WithoutAdapters
from runtime.args import add_training_args, checking_input, make_parser, model_options, parse_args
from runtime.checkpoint import end_run, load_resume, save_resume, start_progress
from runtime.log import Log, Logger, init_wandb
from runtime.optim import OPTIMIZERS, parameter_groups, trained_weights
from runtime.precision import autocast, seed_everything
from runtime.processes import (StopSignal, full_tensor, init_distributed_mode, main_process_first,
                               parallelize, release_gathered, sync_gradients)
from runtime.schedules import get_lr, get_temperature

# Teacher, student and their hyperparameters. Edit them in class. Weights: out/full_sft_{dim}.pth.
SIZES = {
    "base": {"lm_config_student": LMConfig(dim=512, n_layers=8, max_seq_len=512),
             "lm_config_teacher": LMConfig(dim=768, n_layers=16, max_seq_len=512),
             "epochs": 6, "batch_size": 32, "learning_rate": 5e-6},
    "tiny": {"lm_config_student": LMConfig(dim=64, n_layers=2, n_heads=4, max_seq_len=128),
             "lm_config_teacher": LMConfig(dim=128, n_layers=4, n_heads=8, max_seq_len=128),
             "epochs": 16, "batch_size": 12, "learning_rate": 5e-3},
}


def plain_distillation_loss(hidden, head, targets, teacher, alpha, temperature, divergence,
                            kd_weight=None):
    """(loss, CE, KD), summed over S positions; the default: the same, fused (distill/fused.py)."""
    logits = F.linear(hidden, head)                                     # student (S, V)
    teacher_logits = F.linear(teacher[0].states, teacher[0].head)       # teacher (S, V)
    ce = F.cross_entropy(logits.float(), targets, reduction="sum")
    kd = distillation_loss_fn(logits, teacher_logits, temperature, "none", divergence)  # T^2 * KL
    kd = (kd if kd_weight is None else kd * kd_weight).sum()
    return alpha * ce + (1 - alpha) * kd, ce, kd


def train_epoch(epoch, wandb, alpha=0.0, temperature=1.0, *, teachers,
                args, world, name, student, tokenizer, modules, optimizer, scaler, data, val_data,
                loader, progress, log, stop):
    total_steps, weights = progress.total_steps, trained_weights(optimizer)
    divergence, _ = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    loss_fn = plain_distillation_loss if args.plain_loss else fused_distillation_loss
    features = args.feature_weight > 0
    for step in progress.steps_of(epoch, data.steps_per_epoch):
        # 1. Learning rate: linear warm-up, then cosine
        lr = get_lr(step, total_steps, args.learning_rate, args.warmup_iters)
        for group in optimizer.param_groups:
            group["lr"] = lr
        T = get_temperature(step, max(1, total_steps - 1), temperature,
                            args.final_temperature or temperature)

        # 2. Gradients: losses are summed over tokens and divided once by the tokens of the whole
        #    optimizer step, so any split into micro-batches and processes gives the same step.
        seed_everything(args.seed, step, world.rank)    # resuming repeats this step's dropout
        for micro in range(args.accumulation_steps):
            batch, is_last = next(loader).to(world.device), micro == args.accumulation_steps - 1
            with torch.no_grad(), autocast(world.device, world.dtype):
                teacher = teacher_outputs(teachers, batch, return_hidden=features)
            with autocast(world.device, world.dtype), sync_gradients(modules, is_last):
                out = modules["model"](batch.tokens, batch.lengths, at=batch.at,
                                       with_logits=False, return_hidden=features)
                loss, ce, kd = loss_fn(out.final, student.head, batch.targets,
                                       teacher.predictions, alpha, T, divergence,
                                       kd_weight=teacher.matched)
                loss, ce, kd = (value / batch.step_targets for value in (loss, ce, kd))
                intermediate, terms = modules["intermediate"](batch, out, teacher.out)
                balance = out.balance_loss / batch.step_samples
                total = loss + intermediate + student.config.aux_loss_alpha * balance
            scaler.scale(total * world.size).backward()     # DDP averages, the step needs the sum
            log.add(len(batch.tokens), loss=total, ce=ce, kd=kd, **terms,
                    **({"balance": balance} if student.config.use_moe else {}))

        # 3. Update
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.grad_clip or math.inf)
        if log.is_finite(grad_norm, scaler):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        release_gathered(modules)
        progress.steps_done = step + 1

        # 4. Log, validate, save. A save ends a row: a resumed run writes the same rows.
        log.step()
        if progress.is_due(args.log_interval) or progress.is_due(args.save_interval):
            log.row(step + 1, wandb, **log.means(), lr=lr, grad_norm=full_tensor(grad_norm),
                    temperature=T)
        if val_data is not None and progress.is_due(args.eval_interval):
            val_loader = in_order(val_data, world.rank, world.size)
            scores = evaluate(student, val_loader, world.device, dtype=world.dtype,
                              teachers=teachers, temperature=temperature)
            log.row(step + 1, wandb, **scores)
            if progress.is_best(scores["val_kl"]):
                save_model(student, tokenizer, f"{name}_best.pth")
        stopping = stop.agreed(step + 1, world)
        if stopping or progress.is_due(args.save_interval):
            save_model(student, tokenizer, f"{name}.pth")
            save_resume(f"{name}.resume", modules, optimizer, scaler, progress)
        if stopping:
            return


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("lesson").add_argument
    add("--data_path", nargs="+", default=["./dataset/sft_data.jsonl"],
        help="files of conversations, or of plain texts, in the formats of dataset/dataset.md")
    add("--teacher", nargs="+", metavar="PATH[=WEIGHT]|NAME=PATH",
        help="weights; several are mixed, or each teaches the rows of its NAME; default: --size's")
    add("--teacher_data_path", nargs="+", default=None,
        help="context distillation: the same rows with privileged context, for the teacher")
    add("--teacher_cache", nargs="+", metavar="DIR[=WEIGHT]",
        help="offline distillation: teacher outputs cached by scripts/cache_teacher.py")
    add_served_args(add)
    add("--teacher_states_gb", type=float, default=4.0,
        help="memory per process, in 10^9 bytes, for teacher's states that epochs share; 0: none")
    add("--student", "--weights", help="initial weights; default: --size's student; none: random")
    add("--size", default="auto", choices=["auto", *SIZES],
        help="row of SIZES for all that you do not give; auto: the first whose weights exist")
    add("--dim", type=int, default=None, help="width of the student; default: --size's")
    add("--n_layers", type=int, default=None, help="layers of the student; default: --size's")
    add("--n_heads", type=int, default=None, help="query heads of the student; default: --size's")
    add("--use_moe", action="store_true", help="mixtures of experts as the student's FFNs")
    add("--chain", nargs="*", default=[], metavar="WEIGHTS",
        help="teacher assistants from large to small: weight files, or sizes like 96x3")
    add("--alpha", type=float, default=0.0, help="weight of CE in [0, 1]; KD: 1 - alpha")
    add("--divergence", default="forward_kl", choices=DIVERGENCES,
        help="divergence from the teacher (distill/losses.py); gold takes another tokenizer")
    add("--temperature", type=float, default=1.0, help="softmax temperature of both models")
    add("--final_temperature", type=float, help="at the last step, linear; default: constant")
    add("--plain_loss", action="store_true", help="all logits at once; default: in chunks (fused)")
    add("--epochs", type=int, default=None, help="passes over the data; default: --size's")
    add("--batch_size", type=int, help="samples per micro-batch and process; default: --size's")
    add("--learning_rate", type=float, default=None,
        help="learning rate; cosine decay from 1.1x to 0.1x of it; default: --size's")
    add_divergence_args(parser)
    add_intermediate_args(parser)
    add_training_args(parser)
    args = parse_args(parser)
    if args.teacher_url and (args.teacher or args.teacher_cache):
        parser.error("--teacher_url, --teacher or --teacher_cache: give one of them")

    # 2. Processes and seeds
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    seed_everything(args.seed)

    with checking_input():
        # 3. Models. A student with adapters can be its own teacher: the model without them.
        chain = fill_in(args, SIZES)
        own_teacher = args.lora_rank > 0 and args.teacher == [weights for weights, _ in chain]
        load = partial(load_teacher, world=world, shard=args.shard, compiled=args.compile)
        teachers = [] if own_teacher else make_teachers(args.teacher, args.teacher_cache,
                                                        world.device, load, make_served(args))
        vocabulary = args.tokenizer or next((t.tokenizer for t in teachers if t.tokenizer), None)
        students = []
        for weights, config in chain:
            student, tokenizer = init_student_model(config, weights=weights, vocabulary=vocabulary)
            prepare(student, weights, world, **model_options(args))
            students.append((student, tokenizer))
        if share_vocabulary(teachers, students, args.divergence):
            args.teacher_data_path = args.teacher_data_path or args.data_path
        teachers = teachers or [Teacher(WithoutAdapters(student), 1.0, tokenizer)]
        check_teachers(teachers, args)
        check_chain(students, args)

    # 4. to 6. Distil one after the other: large -> medium -> small
    progressive_distillation(teachers, students[:-1], students[-1], args.data_path, args.epochs,
                             distill=partial(distill, args=args, world=world))


def distill(teacher, student, train_loader, epochs, *, args, world):
    """teacher: [Teacher, ...], or the student before. student: (model, tokenizer)."""
    student, tokenizer = student
    if isinstance(teacher, tuple):
        teacher = [Teacher(freeze(teacher[0], world), 1.0, teacher[1])]

    with checking_input():
        # 4. Data
        max_seq_len = student.context_length(args.max_seq_len)
        side = teacher_side(teacher, tokenizer, train_loader, args.teacher_data_path, max_seq_len)
        train_data, val_data = open_data(
            dataset_of(train_loader), train_loader, tokenizer, max_seq_len, args.val_path,
            args.val_fraction, args.skip_bad_lines, main_process_first(world), Logger, side,
            [one.name for one in teacher])
        check_caches(teacher, (train_data, val_data))
        data = MicroBatches(train_data, args.batch_size, args.accumulation_steps, world.rank,
                            world.size, args.seed)

        # 5. Optimizer, and the step at which an interrupted run stopped
        name = run_name(args.out_dir, "full_dist", student)
        intermediate = make_intermediate(args, student.config, teacher)
        modules = {"model": parallelize(student, world, args.shard, student.shard_units()),
                   "intermediate": parallelize(intermediate, world, args.shard)}
        optimizer = OPTIMIZERS[args.optimizer](parameter_groups(modules, args.weight_decay),
                                               lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
        scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        progress = start_progress(args, name, data, epochs, student.adapted)
        if args.resume:
            progress = load_resume(f"{name}.resume", modules, optimizer, scaler, progress)
        if progress.total_steps > data.steps_per_epoch and not intermediate.weights:
            teacher = read_once(teacher, (train_data, val_data), args.teacher_states_gb, world)

    # 6. Train
    stop, wandb, log = StopSignal(), init_wandb(args, name, progress), Log(name, progress, world)
    Logger(f"{' + '.join(map(str, teacher))} -> student {student.config}")
    Logger(f"loss = {describe_loss(args, student.config)}; "
           f"{progress.total_steps} steps of {data.step_samples} samples")
    loader = make_loader(data, progress.steps_done, progress.total_steps, args.num_workers,
                         world.device)
    loader = read_ahead(loader, teacher, stop, args.accumulation_steps)
    if val_data is not None and args.eval_interval and progress.steps_done == 0:
        scores = evaluate(student, in_order(val_data, world.rank, world.size), world.device,
                          dtype=world.dtype, teachers=teacher, temperature=args.temperature)
        log.row(0, wandb, **scores)         # where the student starts
    for epoch in progress.epochs(data.steps_per_epoch):
        train_epoch(epoch, wandb, args.alpha, args.temperature, teachers=teacher,
                    args=args, world=world, name=name, student=student, tokenizer=tokenizer,
                    modules=modules, optimizer=optimizer, scaler=scaler, data=data,
                    val_data=val_data, loader=loader, progress=progress, log=log, stop=stop)
        if stop.stopped:
            break
    end_run(log, wandb, progress, world)


if __name__ == "__main__":
    main()
