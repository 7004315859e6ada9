"""
白盒蒸馏：学生模仿教师的整个下一词元分布，而不只是答案。
White-box distillation: the student imitates the teacher's whole next-token distribution, not just the answer.

    loss = alpha * CE(student, label) + (1 - alpha) * T^2 * KL(teacher_T || student_T)

Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, Sec. 2. alpha is the weight of the labels: 1 is plain
fine-tuning, 0 (the default) uses the teacher's soft labels alone, which is best when labels are noisy and the teacher
is good. --divergence replaces the KL (distill/losses.py); start with KL (NOTES.md has the figures of the others).

When: labels are few, noisy or uncertain, and the teacher is good. With 30 % noisy labels distillation reaches
69.2 ± 2.9 % exact match, SFT on the labels 31.0 ± 1.6.

one process    python train_distillation.py
two processes  torchrun --nproc_per_node 2 train_distillation.py --ddp
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from dataset.lm_dataset import MicroBatches, dataset_of, in_order, make_loader, open_data
from distill.cache import TeacherCache
from distill.features import feature_distillation_loss       # noqa: F401  readers look for it here
from distill.flags import (INTERMEDIATE, add_divergence_args, add_intermediate_args, check_loss_args, describe_loss,
                           make_intermediate)
from distill.fused import fused_distillation_loss
from distill.losses import DIVERGENCES, distillation_loss_fn, pick_divergence
from distill.teachers import (Teacher, as_mixture, check_cache, check_teachers, check_vocabulary, path_and_weight,
                              teacher_outputs, trim_padded_vocab)
from evaluation.validation import evaluate, gradient_norms
from interop.checkpoint import (chain_link, load_model, load_teacher, load_tokenizer, new_model, prepare, save_model,
                                sft_weights)
from model.config import LMConfig
from model.lora import WithoutAdapters
from runtime.args import add_training_args, checking_input, lora_options, parse_args
from runtime.checkpoint import end_run, load_resume, save_resume, start_progress
from runtime.log import Log, Logger, init_wandb
from runtime.optim import decay_groups, trained_weights
from runtime.precision import autocast, pick_device, seed_everything
from runtime.processes import (StopSignal, World, full_tensor, init_distributed_mode, main_process_first, parallelize,
                               release_gathered, sync_gradients)
from runtime.schedules import epochs_left, get_lr, get_temperature, is_due, steps_of_epoch

# Teacher, student and their hyperparameters. Edit them in class. Weights: out/full_sft_{dim}{_moe}.pth.
SIZES = {
    "base": {"lm_config_student": LMConfig(dim=512, n_layers=8, max_seq_len=512),
             "lm_config_teacher": LMConfig(dim=768, n_layers=16, max_seq_len=512),
             "epochs": 6, "batch_size": 32, "learning_rate": 5e-6},
    "tiny": {"lm_config_student": LMConfig(dim=64, n_layers=2, n_heads=4, max_seq_len=128),
             "lm_config_teacher": LMConfig(dim=128, n_layers=4, n_heads=8, max_seq_len=128),
             "epochs": 16, "batch_size": 12, "learning_rate": 5e-3},
}


def plain_distillation_loss(hidden, head, targets, teacher, alpha, temperature, divergence, kd_weight=None):
    """(loss, CE, KD), each summed over the S supervised positions. fused_distillation_loss (the default) computes the
    same in chunks, without the (S, V) logits."""
    logits, teacher_logits = F.linear(hidden, head), F.linear(teacher[0].states, teacher[0].head)           # (S, V)
    ce = F.cross_entropy(logits.float(), targets, reduction="sum")
    kd = distillation_loss_fn(logits, teacher_logits, temperature, "sum", divergence)       # T^2 * KL(p_T || q_T)
    return alpha * ce + (1 - alpha) * kd, ce, kd


def train_epoch(epoch, wandb, alpha=0.0, temperature=1.0, *, args, world, name, student, tokenizer, modules, optimizer,
                scaler, data, val_data, loader, progress, log, stop, teachers):
    total_steps, weights = progress.total_steps, trained_weights(optimizer)
    divergence, _ = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    loss_fn = plain_distillation_loss if args.plain_loss else fused_distillation_loss
    vocab_size = tokenizer.vocab_size if args.pad_vocab else None
    for step in steps_of_epoch(epoch, data.steps_per_epoch, progress.steps_done, total_steps):
        # 1. Learning rate: linear warm-up, then cosine
        lr = get_lr(step, total_steps, args.learning_rate, args.warmup_iters)
        for group in optimizer.param_groups:
            group["lr"] = lr
        T = get_temperature(step, max(1, total_steps - 1), temperature, args.final_temperature or temperature)

        # 2. Gradients: losses are summed over tokens and divided once by the tokens of the whole optimizer step, so
        #    that any split into micro-batches and processes gives the same step.
        seed_everything(args.seed, step, world.rank)        # dropout depends on the step alone: a resumed run repeats it
        for micro in range(args.accumulation_steps):
            batch, is_last = next(loader).to(world.device), micro == args.accumulation_steps - 1
            with torch.no_grad(), autocast(world.device, world.dtype):
                teacher = teacher_outputs(teachers, batch, vocab_size, return_hidden=args.feature_weight > 0)
            with autocast(world.device, world.dtype), sync_gradients(modules, is_last):
                out = modules["model"](batch.tokens, batch.lengths, at=batch.at, with_logits=False,
                                       return_hidden=args.feature_weight > 0)
                head = trim_padded_vocab(student.head, vocab_size)
                loss, ce, kd = loss_fn(out.final, head, batch.targets, teacher.predictions, alpha, T, divergence,
                                       kd_weight=teacher.matched)
                intermediate, terms = modules["intermediate"](batch, out, teacher.out)
                balance = out.balance_loss / batch.step_samples
                loss = loss / batch.step_targets + intermediate + student.config.aux_loss_alpha * balance
            scaler.scale(loss * world.size).backward()      # DDP averages over processes; the step needs their sum
            log.add(len(batch.tokens), loss=loss, ce=ce / batch.step_targets, kd=kd / batch.step_targets, **terms,
                    **({"balance": balance} if student.config.use_moe else {}))

        # 3. Update
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        release_gathered(modules)

        # 4. Log, validate, save
        progress.steps_done = step + 1
        due = partial(is_due, steps_done=step + 1, total_steps=total_steps)
        log.step()
        if due(args.log_interval) or due(args.save_interval):   # a resumed run then writes the same rows
            log.row(step + 1, wandb, lr=lr, grad_norm=full_tensor(grad_norm), temperature=T)
        if val_data is not None and due(args.eval_interval):
            scores = evaluate(student, in_order(val_data, world.rank, world.size), world.device, dtype=world.dtype,
                              teachers=teachers, vocab_size=vocab_size, temperature=args.temperature,
                              across=args.divergence == "uld")
            norms = gradient_norms(student, modules, weights, next(in_order(val_data, world.rank, world.size)), world,
                                   teachers, alpha, T, divergence, vocab_size)
            log.row(step + 1, wandb, **scores, **norms)
            if progress.is_best(scores["val_uld" if args.divergence == "uld" else "val_kl"]):
                save_model(student, tokenizer, f"{name}_best.pth")
        stopping = stop.agreed(step + 1, world)
        if stopping or due(args.save_interval):
            save_model(student, tokenizer, f"{name}.pth")
            save_resume(f"{name}.resume", modules, optimizer, scaler, progress)
        if stopping:
            return


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("lesson").add_argument
    add("--data_path", nargs="+", default=["./dataset/sft_data.jsonl"],
        help="files of conversations or of plain texts, in the formats of dataset/dataset.md")
    add("--teacher", nargs="+", action="extend", metavar="PATH[=WEIGHT]", help="teacher weights: a checkpoint, a Hugging "
        "Face folder or a GGUF file; several act as the weighted mean of their distributions; default: --size's teacher")
    add("--teacher_data_path", nargs="+", default=None, help="context distillation: files with the same answers, row by "
        "row, to prompts with privileged context, which the teacher reads instead of --data_path")
    add("--teacher_cache", nargs="+", action="extend", metavar="DIR[=WEIGHT]",
        help="offline distillation: teacher outputs cached by scripts/cache_teacher.py")
    add("--student", "--weights", default=None, help="initial weights; default: --size's student; none: random")
    add("--size", default="auto", choices=["auto", *SIZES],
        help="row of SIZES for whatever is not given; auto: the first whose weights exist")
    add("--dim", type=int, default=None, help="width of the student; default: --size's")
    add("--n_layers", type=int, default=None, help="number of layers of the student; default: --size's")
    add("--n_heads", type=int, default=None, help="number of its query heads; default: --size's")
    add("--use_moe", action="store_true", help="its FFNs are mixtures of experts")
    add("--chain", nargs="*", default=[], metavar="WEIGHTS", help="teacher assistants from large to small: weight files, "
        "or sizes like 96x3, from full_sft_96.pth if that has 3 layers, else randomly initialised")
    add("--alpha", type=float, default=0.0, help="weight of CE in [0, 1]; the divergence has weight 1 - alpha")
    add("--divergence", default="forward_kl", choices=DIVERGENCES,
        help="divergence between teacher and student (distill/losses.py); uld compares different tokenizers")
    add("--temperature", type=float, default=1.0, help="softmax temperature of both models; above 1 softens")
    add("--final_temperature", type=float, default=None, help="linear schedule from --temperature to this; default: constant")
    add("--plain_loss", action="store_true", help="the loss with all logits, as papers write it; default: fused, equal")
    add("--epochs", type=int, default=None, help="passes over the data; default: --size's")
    add("--batch_size", type=int, default=None, help="samples per micro-batch and process; default: --size's")
    add("--learning_rate", type=float, default=None,
        help="learning rate; cosine decay from 1.1x to 0.1x of it; default: --size's")
    add_divergence_args(parser)
    add_intermediate_args(parser)
    add_training_args(parser)
    args = parse_args(parser)
    check_loss_args(parser, args)

    # 2. Processes and seeds
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    seed_everything(args.seed)

    with checking_input():
        # 3. Models
        lm_config_teacher, chain = fill_in(args)
        Logger(f"{args.epochs} epochs, batch size {args.batch_size}, learning rate {args.learning_rate:g}")
        # A student with adapters can be its own teacher: the model without them, no second copy in memory.
        self_distillation = len(chain) == 1 and args.teacher == [chain[0][0]]
        if self_distillation and not args.teacher_data_path and args.alpha == 0:
            Logger("teacher and student are the same model with the same prompts, so the KD loss is zero. "
                   "--teacher_data_path gives the teacher prompts with privileged context")
        teachers = [] if self_distillation and args.lora_rank else init_teachers(args, world, lm_config_teacher)
        vocabulary = args.tokenizer or next((teacher.tokenizer for teacher in teachers if teacher.tokenizer), None)
        students = []
        for weights, lm_config_student in chain:
            student, tokenizer = init_student_model(lm_config_student, weights=weights, vocabulary=vocabulary)
            check_vocabulary(teachers, student.config, tokenizer, args.divergence, args.pad_vocab)
            prepare(student, weights, world, lora_options(args), args.grad_checkpoint, args.compile)
            students.append((student, tokenizer))
        teachers = teachers or [Teacher(WithoutAdapters(student), 1.0, tokenizer)]
        check_teachers(teachers, args.divergence, [name for name in INTERMEDIATE if vars(args)[f"{name}_weight"] > 0],
                       args.plain_loss, bool(args.teacher_data_path), (args.temperature, args.final_temperature))
        names = [f"{student.config.dim}{student.config.moe_path}" for student, _ in students]
        if len(set(names)) < len(names):
            raise ValueError(f"students {', '.join(names)}: two of a chain would be saved as the same full_dist_DIM.pth; "
                             "give them different widths")

    # 4. to 6. Distil them, one after the other
    progressive_distillation(teachers, students[:-1], students[-1], args.data_path, args.epochs,
                             distill=partial(distill, args=args, world=world))


def distill(teacher, student, train_loader, epochs, *, args, world):
    """Sections 4 to 6 of the run, for one student. teacher: [Teacher, ...], or a student that is one now; student:
    (model, tokenizer); train_loader: the data files."""
    student, tokenizer = student
    with checking_input():
        teachers = teacher
        if not isinstance(teacher, list):
            teachers = [Teacher(teacher[0].eval().requires_grad_(False).to(world.dtype), 1.0, teacher[1])]

        # 4. Data. A teacher with another tokenizer, or with privileged context in its prompts, reads its own tokens.
        models = [teacher for teacher in teachers if not teacher.is_cached]
        own_side = None
        if models and (args.teacher_data_path or models[0].tokenizer.sha256 != tokenizer.sha256):
            own_side = (args.teacher_data_path or train_loader, models[0].tokenizer, models[0].source.config.max_seq_len)
        max_seq_len = student.context_length(args.max_seq_len)
        shortest = min((model.source.config.max_seq_len for model in models), default=max_seq_len)
        if max_seq_len > shortest and not own_side:
            raise ValueError(f"--max_seq_len {max_seq_len} exceeds the teacher's context length of {shortest}: "
                             f"--max_seq_len {shortest}")
        train_data, val_data = open_data(
            dataset_of(train_loader), train_loader, tokenizer, max_seq_len, args.val_path, args.val_fraction,
            args.skip_bad_lines, main_process_first(world), Logger, own_side)
        for cache in [teacher.source for teacher in teachers if teacher.is_cached]:
            for part in filter(None, (train_data, val_data)):
                check_cache(cache, part, args.pad_vocab)
        data = MicroBatches(train_data, args.batch_size, args.accumulation_steps, world.rank, world.size, args.seed)

        # 5. Optimizer, and the step at which an interrupted run stopped
        name = f"{args.out_dir}/full_dist_{student.config.dim}{student.config.moe_path}{'_lora' if args.lora_rank else ''}"
        intermediate = make_intermediate(args, student.config, models[0].source.config if models else None)
        modules = {"model": parallelize(student, world, args.shard, student.shard_units()),
                   "intermediate": parallelize(intermediate, world, args.shard)}
        optimizer = torch.optim.AdamW(decay_groups(modules, args.weight_decay), lr=args.learning_rate,
                                      betas=(0.9, 0.95), fused=True)
        scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        progress = start_progress(args, data, args.max_steps or epochs * data.steps_per_epoch, student.adapted)
        if args.resume:
            progress = load_resume(f"{name}.resume", modules, optimizer, scaler, progress)

    # 6. Train
    Logger(f"{' + '.join(map(str, teachers))} -> student {student.config}")
    Logger(f"loss = {describe_loss(args, student.config)}; {progress.total_steps} steps of {data.step_samples} samples")
    wandb, log, stop = init_wandb(args, name, progress), Log(f"{name}.jsonl", progress, world), StopSignal()
    loader = make_loader(data, progress.steps_done, progress.total_steps, args.num_workers, world.device)
    for epoch in epochs_left(data.steps_per_epoch, progress.steps_done, progress.total_steps):
        train_epoch(epoch, wandb, args.alpha, args.temperature, args=args, world=world, name=name, student=student,
                    tokenizer=tokenizer, modules=modules, optimizer=optimizer, scaler=scaler, data=data,
                    val_data=val_data, loader=loader, progress=progress, log=log, stop=stop, teachers=teachers)
        if stop.stopped:
            break
    end_run(log, wandb, progress, world)


def progressive_distillation(large_model, medium_model, small_model, train_loader, epochs=5, *, distill):
    """large -> medium -> small: each student becomes the teacher assistant of the next. medium_model: one, or a list.
    Mirzadeh et al. 2019, https://arxiv.org/abs/1902.03393."""
    teacher = large_model
    for student in (*(medium_model if isinstance(medium_model, list) else [medium_model]), small_model):
        distill(teacher=teacher, student=student, train_loader=train_loader, epochs=epochs)
        teacher = student
    return small_model


def init_student_model(lm_config, *, weights=None, vocabulary=None):
    """The student and its tokenizer, from SFT weights or a file of any format; 'none': randomly initialised."""
    weights = weights or sft_weights(lm_config)
    return new_model(lm_config, vocabulary) if weights == "none" else load_model(weights)


def init_teacher_model(lm_config, *, weights=None, world=None, shard="none", compiled=False):
    """The teacher: in eval mode, without gradients, outside DDP, in bf16 where the hardware has it."""
    return load_teacher(weights or sft_weights(lm_config), world or World(0, 1, pick_device()), shard, compiled)


def init_teachers(args, world, lm_config) -> list[Teacher]:
    """The models of --teacher and the caches of --teacher_cache."""
    teachers = []
    if not args.teacher and not args.teacher_cache:
        args.teacher = [sft_weights(lm_config, args.out_dir)]
    for path, weight in map(path_and_weight, args.teacher or []):
        model = init_teacher_model(lm_config, weights=path, world=world, shard=args.shard, compiled=args.compile)
        teachers.append(Teacher(model, weight, load_tokenizer(path)))
    for path, weight in map(path_and_weight, args.teacher_cache or []):
        teachers.append(Teacher(TeacherCache(path).to(world.device), weight))
    return as_mixture(teachers)


def fill_in(args) -> tuple[LMConfig, list[tuple[str, LMConfig]]]:
    """Complete the arguments from a row of SIZES; auto: the first whose weights exist. Returns the teacher's sizes, and
    of each student, from large to small, (weights, sizes if new)."""
    roles = ["student"] if args.teacher_cache else ["student", "teacher"]
    found = [name for name, size in SIZES.items()
             if all(Path(sft_weights(size[f"lm_config_{role}"], args.out_dir)).exists() for role in roles)]
    size = SIZES[([*found, "base"][0]) if args.size == "auto" else args.size]
    given = size["lm_config_student"]
    for key in ("epochs", "batch_size", "learning_rate"):
        setattr(args, key, size[key] if vars(args)[key] is None else vars(args)[key])
    last = LMConfig(dim=args.dim or given.dim, n_layers=args.n_layers or given.n_layers,
                    n_heads=args.n_heads or given.n_heads, use_moe=args.use_moe,
                    max_seq_len=args.max_seq_len or given.max_seq_len)
    chain = [chain_link(link, last, args.out_dir) for link in args.chain]
    return size["lm_config_teacher"], [*chain, (args.student or sft_weights(last, args.out_dir), last)]


if __name__ == "__main__":
    main()
